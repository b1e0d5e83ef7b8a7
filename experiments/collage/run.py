"""What weights and moments of 16 bits cost in quality: a character model trained and fine-tuned.

  python experiments/collage/run.py train [--steps=1000] [--seeds=3] [--b2 0.95 0.999]
  python experiments/collage/run.py tune

train: a model of 0.1M parameters on the sources of Python's standard library, from scratch, by
every optimizer; validation loss, and how much of the wanted updates reached the weights. tune: 300
more steps at a learning rate of 1e-5 from the rounded model of 600 steps; how far the weights moved
and in which direction, against a float32 master. Seeds run side by side in one program. Results
are added to `results.json`; what is there already is not run again.
"""

import argparse
import functools
import json
import os
import sysconfig
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_eff import optim
from jaxrl_eff.models import LMConfig, init, token_logprobs

HERE = Path(__file__).parent
ROWS, LENGTH, CHARS = 16, 128, 2_000_000
BF16 = jnp.bfloat16


def corpus() -> tuple[np.ndarray, np.ndarray, int]:
    """Training and validation characters as numbers, and how many there are."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "".join(p.read_text(errors="ignore") for p in files)[:CHARS]
    known = sorted({c for c in text if c.isascii()})
    number = {c: i for i, c in enumerate(known)}
    codes = np.array([number[c] for c in text if c in number], np.int32)
    return codes[:-100_000], codes[-100_000:], len(known)


def rows(codes: np.ndarray, seed: int, count: int) -> np.ndarray:
    """[count, ROWS, LENGTH] random pieces."""
    starts = np.random.default_rng(seed).integers(0, len(codes) - LENGTH, (count, ROWS))
    return codes[starts[..., None] + np.arange(LENGTH)]


def model(vocab: int) -> LMConfig:
    return LMConfig(
        vocab=vocab, width=64, layers=2, heads=4, kv_heads=4, head_dim=16, ffn=192, tie=True,
        max_length=LENGTH,
    )  # fmt: skip


def loss(cfg: LMConfig, params, tokens) -> jax.Array:
    """Mean negative log-likelihood; the arithmetic is float32 on the visible weights."""
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    position = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), tokens.shape)
    segment = jnp.ones_like(tokens)
    logp = token_logprobs(cfg, params, tokens, position, segment, with_entropy=False)[0]
    return -logp[:, 1:].mean()


def _lowp(store: str, mu: str, nu: str):
    def make(lr, b2, wd):
        return optim.lowp_chain(
            optim.scale_by_adam(b2=b2, mu=mu, nu=nu), optax.add_decayed_weights(wd),
            optax.scale_by_learning_rate(lr), store=store, metrics=True,
        )  # fmt: skip

    return make


def _faithful(variant: str):
    return lambda lr, b2, wd: optim.collage_adamw(
        lr, b2=b2, weight_decay=wd, variant=variant, faithful=True
    )


def _plain(wrap=lambda tx: tx):
    return lambda lr, b2, wd: optim.watch_descent(wrap(optax.adamw(lr, b2=b2, weight_decay=wd)))


# name -> bytes a parameter, optimizer. "D" is the reference and handled apart.
VARIANTS = {
    "D: float32 master": (16, None),
    "A: bf16 alone": (8, _plain()),
    "D-MW: float32 moments, no master": (12, _plain(optim.in_float32)),
    "SR weights": (8, _lowp("sr", "bf16", "bf16")),
    "light, faithful": (10, _faithful("light")),
    "plus, faithful": (12, _faithful("plus")),
    "light": (10, _lowp("bf16x2", "bf16", "bf16")),
    "light_sr": (10, _lowp("bf16x2", "bf16", "bf16_sr")),
    "plus": (12, _lowp("bf16x2", "bf16", "bf16x2")),
    "int16, mu bf16, nu float32": (12, _lowp("int16", "bf16", "float32")),
    "exact": (14, _lowp("int16", "float32", "float32")),
    "int16_8bit": (8.1, _lowp("int16", "int8", "int8")),
    "flash8": (7.1, _lowp("int8", "int8", "int8")),
}


def trainer(cfg: LMConfig, name: str, lr, b2: float, wd: float):
    """(start, run): start(float32 weights) -> carry; run(carry, batches) -> (carry, metrics)."""
    _, make = VARIANTS[name]
    gradient = jax.grad(functools.partial(loss, cfg))
    if make is None:
        tx = optax.adamw(lr, b2=b2, weight_decay=wd)

        def start(w):
            return w, tx.init(w)

        def step(carry, tokens):
            w, state = carry
            visible = jax.tree.map(lambda x: x.astype(BF16), w)
            g = jax.tree.map(lambda x: x.astype(jnp.float32), gradient(visible, tokens))
            u, state = tx.update(g, state, w)
            return (optax.apply_updates(w, u), state), {}

        full = lambda carry: carry[0]  # noqa: E731
        visible = lambda carry: jax.tree.map(lambda x: x.astype(BF16), carry[0])  # noqa: E731
    else:
        tx = make(lr, b2, wd)

        def start(w):
            params = jax.tree.map(lambda x: x.astype(BF16), w)
            return params, tx.init(params)

        def step(carry, tokens):
            params, state = carry
            u, state = tx.update(gradient(params, tokens), state, params)
            return (optax.apply_updates(params, u), state), optim.precision_metrics(state)

        def full(carry):
            try:
                return optim.full_precision_params(*carry)
            except ValueError:  # nothing is kept beside the weights
                return jax.tree.map(lambda x: x.astype(jnp.float32), carry[0])

        visible = lambda carry: carry[0]  # noqa: E731
    many = jax.jit(jax.vmap(lambda c, b: jax.lax.scan(step, c, b)), donate_argnums=0)
    return jax.jit(jax.vmap(start)), many, jax.vmap(full), jax.vmap(visible)


def train(args, data, results) -> None:
    training, validation, vocab = data
    cfg = model(vocab)
    seeds = range(args.seeds)
    batches = np.stack([rows(training, s, args.steps) for s in seeds])
    held_out = rows(validation, 10_000, 40)
    value = jax.jit(jax.vmap(lambda p: jax.lax.map(lambda t: loss(cfg, p, t), held_out).mean()))
    start_w = jax.vmap(lambda k: init(cfg, k))(jax.vmap(jax.random.key)(jnp.arange(args.seeds)))
    for b2 in args.b2:
        for name in args.only or VARIANTS:
            key = f"train b2={b2} steps={args.steps} seeds={args.seeds}: {name}"
            if key in results:
                continue
            began = time.time()
            lr = optax.cosine_decay_schedule(1e-3, args.steps)
            start, run, _, visible = trainer(cfg, name, lr, b2, 0.1)
            carry, seen = start(start_w), []
            for at in range(0, args.steps, 100):
                carry, m = run(carry, batches[:, at : at + 100])
                seen.append({k: np.asarray(v) for k, v in m.items()})
            row = {"bytes": VARIANTS[name][0], "loss": np.asarray(value(visible(carry))).tolist()}
            for k in seen[0]:
                each = np.concatenate([s[k] for s in seen], axis=1)
                row[k] = [float(each.mean()), float(each[:, -200:].mean())]
            save(results, key, row, began)


def tune(args, data, results) -> None:
    training, validation, vocab = data
    cfg = model(vocab)
    seeds = range(args.seeds)
    held_out = rows(validation, 10_000, 40)
    value = jax.jit(jax.vmap(lambda p: jax.lax.map(lambda t: loss(cfg, p, t), held_out).mean()))
    start_w = jax.vmap(lambda k: init(cfg, k))(jax.vmap(jax.random.key)(jnp.arange(args.seeds)))
    lr = optax.cosine_decay_schedule(1e-3, 1000)
    start, run, full, visible = trainer(cfg, "D: float32 master", lr, 0.999, 0.1)
    carry, _ = run(start(start_w), np.stack([rows(training, s, 600) for s in seeds]))
    base = jax.tree.map(lambda x: x.astype(jnp.float32), visible(carry))
    more = np.stack([rows(training, 500 + s, 300) for s in seeds])
    before = np.asarray(value(base)).tolist()

    def flat(tree):
        leaves = [np.asarray(x, np.float64).reshape(args.seeds, -1) for x in jax.tree.leaves(tree)]
        return np.concatenate(leaves, axis=1)

    moved = {}
    for name in args.only or VARIANTS:
        key = f"tune seeds={args.seeds}: {name}"
        if key in results and name != "D: float32 master":
            continue
        began = time.time()
        start, run, full, visible = trainer(cfg, name, 1e-5, 0.999, 0.0)
        carry, m = run(start(base), more)
        moved[name] = flat(full(carry)) - flat(base)
        want = moved["D: float32 master"]
        norms = np.linalg.norm(moved[name], axis=1), np.linalg.norm(want, axis=1)
        row = {"bytes": VARIANTS[name][0], "base": before}
        row["loss"] = np.asarray(value(visible(carry))).tolist()
        row["norm"] = (norms[0] / norms[1]).tolist()
        row["cosine"] = ((moved[name] * want).sum(1) / (norms[0] * norms[1] + 1e-300)).tolist()
        row |= {k: [float(np.asarray(v).mean())] for k, v in m.items()}
        save(results, key, row, began)


def save(results, key, row, began) -> None:
    row["seconds"] = round(time.time() - began, 1)
    results[key] = row
    (HERE / "results.json").write_text(json.dumps(results, indent=1))
    print(key, {k: np.round(v, 5).tolist() for k, v in row.items()}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("train", "tune"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--b2", type=float, nargs="*", default=[0.999, 0.95])
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS))
    args = parser.parse_args()
    file = HERE / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    {"train": train, "tune": tune}[args.part](args, corpus(), results)


if __name__ == "__main__":
    main()

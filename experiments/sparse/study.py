r"""Which entries to train: selectors and schedules against LoRA and full fine-tuning.

  python experiments/sparse/study.py [--percent 1 5] [--data much little] [--only NAME ...]
  python experiments/sparse/study.py --model=DIR --label=NAME --source=FILE --target=FILE
  python experiments/sparse/frontier.py

A character model of 0.2M parameters learns the sources of Python's standard library without their
comments and docstrings, and from there, by every method, the English of Python's reference manual
(`pydoc_data.topics`), with all of its 400,000 characters or with 2,000. For every method all
learning rates, seeds and amounts of data run side by side in one program; held-out loss on the new
text and on the old is kept half way and at the end. With --model a checkpoint in Hugging Face's
format is adapted instead; `source` is then text like what it was trained on. Results are added to
`results.json`; what is there already is not run again.
"""

import argparse
import ast
import dataclasses
import functools
import itertools
import json
import os
import sysconfig
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_eff import tree
from jaxrl_eff.checkpoints import load_hf, read_config
from jaxrl_eff.core.specs import Adaptation, Model
from jaxrl_eff.data.tokenizer import load_tokenizer
from jaxrl_eff.models import LMConfig, init, token_logprobs
from jaxrl_eff.peft import ways, weights
from jaxrl_eff.peft.config import AdaptSettings
from jaxrl_eff.train.settings import OptimSettings

HERE = Path(__file__).parent
LENGTH, ROWS, PROBE_ROWS, EVERY = 64, 4, 8, 10
LITTLE = 2_000  # tokens
HELD_OUT = 50_000
EVALUATED = 64  # rows of held-out text
SPARSE = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
HIGHER = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # for entries with small gradients


@dataclasses.dataclass(frozen=True)
class Method:
    """How a model is trained: settings, the optimizer, and learning rates; no settings: whole."""

    rates: tuple[float, ...]
    settings: dict | None = None
    optim: str = "adam"


def methods(percent: int) -> dict[str, Method]:
    """Every method with that share of the projections' entries; LISA and "full" have none."""
    share = {"density": percent / 100, "every": EVERY}

    def sparse(name="static", rates=SPARSE, optim="adam", **more):
        return Method(rates, {"name": name, **share, **more}, optim)

    # Rank 1 of all kernels of the character model would be 2.4 %.
    thin = {"targets": ("layers/attn/[qv]/kernel", "layers/mlp/down/kernel"), "rank": 1}
    low = {"alpha": 2.0, **thin} if percent == 1 else {"alpha": 4.0, "rank": 2}
    grow = {"selector": "gradient", "on_drop": "keep"}
    return {
        "random": sparse(rates=HIGHER, selector="random"),
        "magnitude": sparse(rates=HIGHER, selector="magnitude"),
        "smallest": sparse(rates=HIGHER, selector="smallest"),
        "gradient": sparse(selector="gradient"),
        "fisher": sparse(selector="fisher"),
        "snip": sparse(selector="snip"),
        "gallop": sparse(selector="gallop"),
        "lift": sparse(rates=HIGHER, selector="lift"),
        "periodic": sparse("periodic", **grow),
        "spiel_ag": sparse("spiel_ag", selector="gradient"),
        "spiel_ma": sparse("spiel_ma", (*HIGHER, 1.0), "sm3"),
        "blocks": sparse("periodic", granularity="block", block=(4, 4), **grow),
        "lora": Method(SPARSE, {"name": "lora", **low}),
        "lisa": Method(
            (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), {"name": "lisa", "layers": 1, "every": EVERY}
        ),
        "full": Method((3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
    }


def whole(schedule: optax.Schedule) -> Adaptation:
    """All parameters by Adam."""
    tx = optax.adam(schedule)

    def update(grads, opt, params, finite):
        del finite
        changes, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, changes), opt

    return Adaptation(
        init=tx.init, leaves=lambda params, opt: params, attach=lambda params, opt, leaves: leaves,
        update=update, extended=lambda params: params, axes=lambda name: None,
    )  # fmt: skip


def way(lm: LMConfig, method: Method, steps: int, rate, seed) -> Adaptation:
    """Learning rate and seed may be traced: they differ between runs of one program."""
    schedule = lambda count: rate * (1 - count / steps)  # noqa: E731
    if method.settings is None:
        return whole(schedule)
    s = AdaptSettings(**method.settings)
    object.__setattr__(s, "seed", seed)  # a traced number cannot be checked to be positive
    optim = OptimSettings(name=method.optim, clip_norm=0.0)
    return ways.spec(s, lm, optim, schedule, steps).tx


def loss(lm: LMConfig, params, tokens) -> jax.Array:
    position = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), tokens.shape)
    logp, _ = token_logprobs(
        lm, weights.assembled(lm, params), tokens, position, jnp.ones_like(tokens),
        with_entropy=False,
    )  # fmt: skip
    return -logp[:, 1:].mean()


class Runs:
    """All runs of one method side by side: the first axis of everything."""

    def __init__(self, lm: LMConfig, method: Method, steps: int):
        of = functools.partial(way, lm, method, steps)
        self.due = of(1e-3, 0).due or (lambda step: False)

        def start(base, rate, seed):
            params = of(rate, seed).extended(base)
            return Model(params, of(rate, seed).init(params))

        def choose(model, rate, seed, rows):
            one = of(rate, seed)
            found = None
            if one.probes is not None:
                taps = one.leaves(model.params, model.opt)

                def total(probes):
                    params = one.attach(model.params, model.opt, taps | probes)
                    return loss(lm, params, rows)

                found = jax.grad(total)(one.probes(model.params, model.opt))
            return Model(*one.reselect(model.params, model.opt, found))

        def run(model, rate, seed, rows):
            one = of(rate, seed)

            def step(model, tokens):
                attached = lambda x: one.attach(model.params, model.opt, x)  # noqa: E731
                of_leaves = lambda x: loss(lm, attached(x), tokens)  # noqa: E731
                grads = jax.grad(of_leaves)(one.leaves(model.params, model.opt))
                return Model(*one.update(grads, model.opt, model.params, jnp.bool_(True))), None

            return jax.lax.scan(step, model, rows)[0]

        def measure(model, rows):
            of = functools.partial(loss, lm, model.params)
            return jax.lax.map(of, rows.reshape(-1, 32, LENGTH)).reshape(2, -1).mean(1)

        def changed(model, base):
            new, old = tree.flat(model.params), tree.flat(base)
            if any(k.endswith("lora_b") for k in new):
                return jnp.float32(1.0)
            names = [k for k in old if k.startswith("layers/") and old[k].ndim > 2]
            return sum((new[k] != old[k]).sum() for k in names) / sum(old[k].size for k in names)

        self.start = jax.jit(jax.vmap(start, in_axes=(None, 0, 0)))
        self.choose, self.run = jax.jit(jax.vmap(choose)), jax.jit(jax.vmap(run))
        self.measure = jax.jit(jax.vmap(measure, in_axes=(0, None)))
        self.changed = jax.jit(jax.vmap(changed, in_axes=(0, None)))


def study(data, lm, base, name: str, method: Method, lanes, args) -> list[dict]:
    """One entry a run: what it was and what it reached."""
    pieces = {
        (seed, amount): pieces_of(data, amount, seed, args.steps)
        for seed, amount in {lane[1:] for lane in lanes}
    }
    rows = np.stack([pieces[seed, amount][0] for _, seed, amount in lanes])
    probes = np.stack([pieces[seed, amount][1] for _, seed, amount in lanes])
    held_out = np.stack([rows_of(data[k], 99, EVALUATED) for k in ("target_test", "source_test")])
    rate = jnp.array([lane[0] for lane in lanes], jnp.float32)
    seed = jnp.array([lane[1] for lane in lanes], jnp.int32)
    runs, began = Runs(lm, method, args.steps), time.time()
    model = runs.start(base, rate, seed)
    before = [float(jax.jit(functools.partial(loss, lm))(base, x)) for x in held_out]
    seen, marks = [], {args.steps // 2 // EVERY * EVERY, args.steps}
    for at in range(0, args.steps, EVERY):
        if runs.due(at):
            model = runs.choose(model, rate, seed, probes[:, at // EVERY])
        model = runs.run(model, rate, seed, rows[:, at : at + EVERY])
        if at + EVERY in marks:
            seen.append(np.asarray(runs.measure(model, held_out)))
    share = np.asarray(runs.changed(model, base))
    print(f"{name}: {time.time() - began:.0f} s", flush=True)
    return [
        {
            "rate": lane[0], "seed": lane[1], "data": lane[2], "changed": round(float(share[i]), 4),
            "target": [round(float(x[i, 0]), 4) for x in seen],
            "rise": [round(float(x[i, 1] - before[1]), 4) for x in seen],
            "before": [round(float(x), 4) for x in before],
        }
        for i, lane in enumerate(lanes)
    ]  # fmt: skip


def rows_of(codes: np.ndarray, seed: int, count: int) -> np.ndarray:
    """[count, LENGTH] random pieces."""
    starts = np.random.default_rng(seed).integers(0, len(codes) - LENGTH, count)
    return codes[starts[:, None] + np.arange(LENGTH)]


def pieces_of(data, amount: str, seed: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """[steps, ROWS, LENGTH] to train on, and [choices, PROBE_ROWS, LENGTH] to choose by."""
    codes = data["target"] if amount == "much" else data["target"][seed * LITTLE :][:LITTLE]
    rows = rows_of(codes, 1000 + seed, steps * ROWS).reshape(steps, ROWS, LENGTH)
    choices = -(-steps // EVERY)
    probes = rows_of(codes, 2000 + seed, choices * PROBE_ROWS)
    return rows, probes.reshape(choices, PROBE_ROWS, LENGTH)


def texts(args) -> tuple[str, str]:
    """What the model was, or is, trained on, and what it is to learn."""
    if args.source:
        source = read(args.source)
    else:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        source = "\n".join(bare(p.read_text(errors="ignore")) for p in files)[:2_000_000]
    if args.target:
        return source, read(args.target)
    return source, "\n".join(topics[k] for k in sorted(topics))


def bare(code: str) -> str:
    """A module without comments and docstrings, so that there is little English in it."""
    module = ast.parse(code)
    for node in ast.walk(module):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [x for x in body if not isinstance(getattr(x, "value", None), ast.Constant)
                    or not isinstance(x, ast.Expr)]  # fmt: skip
            node.body = kept or [ast.Pass()]
    return ast.unparse(module)


def read(path: str) -> str:
    """A text; of JSON lines, all values of each."""
    text = Path(path).read_text()
    if not path.endswith(".jsonl"):
        return text
    records = [json.loads(line) for line in text.splitlines()]
    return "\n\n".join("\n".join(map(str, r.values())) for r in records)


def characters(source: str, target: str) -> tuple[dict[str, np.ndarray], int]:
    known = sorted({c for c in source if c.isascii()})
    number = {c: i for i, c in enumerate(known)}
    return split(
        *([number[c] for c in text if c in number] for text in (source, target)), len(known)
    )


def split(source: list[int], target: list[int], vocab: int) -> tuple[dict[str, np.ndarray], int]:
    data = {}
    for name, codes in (("source", source), ("target", target)):
        codes = np.array(codes, np.int32)
        data[name], data[f"{name}_test"] = codes[:-HELD_OUT], codes[-HELD_OUT:]
    return data, vocab


def pretrained(lm: LMConfig, codes: np.ndarray, steps: int):
    """A model of the source, and from then on the same one: kept among temporary files."""
    file = Path(tempfile.gettempdir()) / f"sparse_study_{steps}_{lm.layers}_{lm.width}.npz"
    start = init(lm, jax.random.key(0))
    if not file.exists():
        tx = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 3e-3, 100, steps))

        @jax.jit
        def run(carry, rows):
            def step(carry, tokens):
                params, state = carry
                changes, state = tx.update(jax.grad(lambda p: loss(lm, p, tokens))(params), state)
                return (optax.apply_updates(params, changes), state), None

            return jax.lax.scan(step, carry, rows)[0]

        carry = start, tx.init(start)
        for at in range(0, steps, 100):
            carry = run(carry, rows_of(codes, at, 100 * 32).reshape(100, 32, LENGTH))
        np.savez(file, **tree.flat(carry[0]))
    kept = np.load(file)
    return tree.with_leaves(start, {k: jnp.asarray(kept[k]) for k in kept})


def train(args) -> None:
    if args.model:
        lm = read_config(args.model)
        base = load_hf(args.model, lm)
        encode = load_tokenizer(args.model).encode
        data, _ = split(*(encode(t[:3_000_000]) for t in texts(args)), lm.vocab)
    else:
        data, vocab = characters(*texts(args))
        lm = LMConfig(
            vocab=vocab, width=64, layers=4, heads=4, kv_heads=4, head_dim=16, ffn=192, tie=True,
            max_length=LENGTH,
        )  # fmt: skip
        base = pretrained(lm, data["source"], args.pretrain)
    file = HERE / "results.json"
    kept = lambda: json.loads(file.read_text()) if file.exists() else {}  # noqa: E731
    for percent in args.percent:
        for name, method in methods(percent).items():
            share = {"full": 100, "lisa": 25}.get(name, percent)
            key = f"{args.label} {share} % {name}"
            if args.only and name not in args.only:
                continue
            there = {(r["rate"], r["seed"], r["data"]) for r in kept().get(key, [])}
            every = itertools.product(method.rates, range(args.seeds), args.data)
            lanes = [lane for lane in every if lane not in there]
            if not lanes:
                continue
            runs = study(data, lm, base, key, method, lanes, args)
            results = kept()
            results[key] = results.get(key, []) + runs
            lines = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in results.items()]
            file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", nargs="*", default=["much", "little"])
    parser.add_argument("--pretrain", type=int, default=1500)
    parser.add_argument("--percent", type=int, nargs="*", default=[1, 5])
    parser.add_argument("--label", default="characters", help="what the results call the model")
    parser.add_argument("--model", default="")
    parser.add_argument("--source", default="")
    parser.add_argument("--target", default="")
    parser.add_argument("--only", nargs="*", choices=list(methods(1)))
    train(parser.parse_args())


if __name__ == "__main__":
    main()

r"""What a delta file costs: bits an index, bytes an entry, seconds.

  python experiments/delta_files/run.py --out=results.json
  python experiments/delta_files/run.py --parts masks --model=DIR      # a Hugging Face directory

`codes` compares ways to write random indices, element by element and in blocks. `files` saves a
bfloat16 delta of four matrices and reads, applies and removes it. `masks` codes what training
chooses in a real model (DIR; small, it is trained in float32 on its own samples): the largest 1 %
of gradients, of weights, random entries, and what AdamW at small learning rates changes in
bfloat16. Seconds are the best of five calls, on one thread but for hashing.
"""

import argparse
import json
import tempfile
import time
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax

from jaxrl_eff.checkpoints import deltas, load_hf, read_config
from jaxrl_eff.checkpoints.deltas import coding
from jaxrl_eff.models import token_logprobs
from jaxrl_eff.rollout import Sampling, sample

DENSITIES = (0.001, 0.01, 0.05)


def best(fn, times=5):
    """Seconds of the fastest call, and its result."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        out = fn()
        seconds.append(time.perf_counter() - start)
    return min(seconds), out


def random_indices(density, count, seed=0):
    indices = np.cumsum(np.random.default_rng(seed).geometric(density, count)) - 1
    return indices, int(indices[-1]) + 1


def varint_bits(gaps):
    """Seven bits of the gap in a byte, and one that says whether more follow."""
    return 8 * np.mean([max(1, -(-int(g).bit_length() // 7)) for g in gaps[:100_000]])


def codes(count):
    rows = []
    for density in DENSITIES:
        indices, size = random_indices(density, count)
        gaps = np.diff(indices, prepend=-1) - 1
        encode_s, code = best(lambda i=indices, n=size: coding.encode(i, n))
        decode_s, again = best(lambda c=code, n=size: coding.decode(c, n))
        assert np.array_equal(again, indices)
        rows.append({
            "mask": "random", "density": density,
            "bound": coding.bound(count, size), "rice": 8 * len(code) / count,
            "varint": varint_bits(gaps),
            "deflate": 8 * len(zlib.compress(gaps.astype(np.uint32).tobytes(), 6)) / count,
            "int32": 32.0,
            "encode_million_per_s": count / encode_s / 1e6,
            "decode_million_per_s": count / decode_s / 1e6,
        })  # fmt: skip
    for name, (high, wide) in {"rows": (1, 4096), "128 x 128 blocks": (128, 128)}.items():
        rng = np.random.default_rng(1)
        units = rng.random((4096 // high, 4096 // wide)) < 0.01
        mask = np.repeat(np.repeat(units, high, 0), wide, 1)
        indices = np.flatnonzero(mask)
        code = coding.encode(indices, mask.size)
        density = len(indices) / mask.size
        rows.append({
            "mask": name, "density": density, "bound": coding.bound(len(indices), mask.size),
            "rice": 8 * len(code) / len(indices), "int32": 32.0,
        })  # fmt: skip
    return rows


def files(width):
    """Four matrices [width, width] in bfloat16."""
    rows = []
    rng = np.random.default_rng(0)
    base = {
        f"layers.{i}.weight": rng.standard_normal((width, width), np.float32).astype(
            ml_dtypes.bfloat16
        )
        for i in range(4)
    }
    for density in DENSITIES:
        at = {k: np.flatnonzero(rng.random(x.size) < density) for k, x in base.items()}
        old = {k: x.reshape(-1)[at[k]] for k, x in base.items()}
        new = {k: (x.view(np.uint16) ^ 1).view(x.dtype) for k, x in old.items()}
        delta = deltas.from_entries(
            {k: x.shape for k, x in base.items()}, at, new, old, base=deltas.content_hash(base)
        )
        with tempfile.TemporaryDirectory() as home:
            path = Path(home) / "d.safetensors"
            save_s, whole = best(lambda d=delta, p=path: deltas.save(d, p))
            load_s, loaded = best(lambda p=path: deltas.load(p))
            bare = deltas.save(delta, path, originals=False)
        apply_s, tuned = best(lambda d=loaded: deltas.apply(base, d, content=False))
        remove_s, back = best(lambda d=loaded, t=tuned: deltas.remove(t, d, content=False))
        diff_s, found = best(lambda t=tuned: deltas.diff(base, t), 2)
        hash_s, told = best(lambda b=back: deltas.content_hash(b), 2)
        assert told == delta.base and found.count == delta.count
        rows.append({
            "density": density, "entries": delta.count, "model_bytes": 8 * width * width,
            "bytes_an_entry": bare / delta.count, "with_originals": whole / delta.count,
            "peft_shira": 12.0, "save_s": save_s, "load_s": load_s, "apply_s": apply_s,
            "remove_s": remove_s, "diff_s": diff_s, "hash_s": hash_s,
        })  # fmt: skip
    return rows


def masks(directory):
    """Index bits of masks that a real model's training chooses, against random ones."""
    cfg = read_config(directory).replace(param_dtype="float32", dtype="float32")
    params = load_hf(directory, cfg)
    length = min(cfg.max_length, 200)
    prompt = {
        "prompt": jnp.full((32, 1), cfg.bos, jnp.int32),
        "prompt_length": jnp.ones(32, jnp.int32),
        "prompt_example": jnp.arange(32, dtype=jnp.int32),
    }
    rollout = jax.jit(sample(cfg, Sampling(max_tokens=length - 1)))
    tokens = rollout(params, prompt, jax.random.key(0))["tokens"]
    where = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def loss(p):
        logp, _ = token_logprobs(
            cfg, p, tokens, where, jnp.ones_like(tokens), with_entropy=False
        )  # fmt: skip
        return -logp.mean()

    grads = jax.jit(jax.grad(loss))(params)
    rng = np.random.default_rng(0)
    tables = {
        "largest |gradient|": grads,
        "largest |weight|": params,
        "random": jax.tree.map(lambda x: rng.random(x.shape), params),
    }
    chosen = {name: jax.tree.map(top, tree) for name, tree in tables.items()}
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    for rate in (1e-6, 1e-5):
        tx = optax.adamw(rate)
        step = jax.jit(lambda p, s, tx=tx: _step(tx, loss, p, s))
        tuned, state = params, tx.init(params)
        for _ in range(10):
            tuned, state = step(tuned, state)
        after = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tuned)
        chosen[f"changed in bfloat16, 10 steps at {rate:g}"] = jax.tree.map(
            lambda a, b: np.flatnonzero(np.asarray(a) != np.asarray(b)), half, after
        )
    rows = []
    for name, tree in chosen.items():
        pairs = list(zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True))
        pairs = [(i, x.size) for i, x in pairs if len(i)]
        count = sum(len(i) for i, _ in pairs)
        rows.append({
            "mask": name, "entries": count, "density": count / sum(n for _, n in pairs),
            "bound_if_random": sum(len(i) * coding.bound(len(i), n) for i, n in pairs) / count,
            "rice": 8 * sum(len(coding.encode(i, n)) for i, n in pairs) / count,
        })  # fmt: skip
    return rows


def top(x):
    """Indices of the largest hundredth."""
    flat = np.abs(np.asarray(x)).reshape(-1)
    return np.sort(np.argsort(flat)[-max(1, flat.size // 100) :])


def _step(tx, loss, params, state):
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=("codes", "files", "masks"),
                        default=["codes", "files"])  # fmt: skip
    parser.add_argument("--count", type=int, default=1_000_000, help="indices of each code")
    parser.add_argument("--width", type=int, default=2048, help="of the matrices of `files`")
    parser.add_argument("--model", help="a Hugging Face directory, for `masks`")
    parser.add_argument("--out", help="a JSON file to write")
    args = parser.parse_args()
    if "masks" in args.parts and not args.model:
        parser.error("masks needs --model=DIR.")
    runs = {
        "codes": lambda: codes(args.count),
        "files": lambda: files(args.width),
        "masks": lambda: masks(args.model),
    }
    results = {}
    for part in args.parts:
        results[part] = runs[part]()
        for row in results[part]:
            shown = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
            print(part, *shown, sep="  ", flush=True)
    if args.out:
        Path(args.out).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

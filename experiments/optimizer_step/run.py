"""Seconds of an optimizer's step on the CPU, beside the bytes that it must move.

  OMP_NUM_THREADS=1 taskset -c 1 python experiments/optimizer_step/run.py [--millions=50]

Every optimizer updates the same matrices in turns, compiled and donated; medians. D is
`optax.adamw` with float32 state and a float32 master beside bfloat16 weights. Ideal bytes: the
gradient read once, all else read and written. Printed as ratios to D.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax

from jaxrl_eff import optim, tree

BF16 = jnp.bfloat16
SHAPE = (1024, 1024)


def master():
    """D: float32 weights, moments; the model's bfloat16 copy is made anew."""
    tx = optax.adamw(1e-5, weight_decay=0.1)

    def start(p):
        w = jax.tree.map(lambda x: x.astype(jnp.float32), p)
        return p, (w, tx.init(w))

    def step(p, state, g):
        w, inner = state
        u, inner = tx.update(jax.tree.map(lambda x: x.astype(jnp.float32), g), inner, w)
        w = optax.apply_updates(w, u)
        return jax.tree.map(lambda x: x.astype(BF16), w), (w, inner)

    return start, step


def lowp(tx):
    def step(p, state, g):
        u, state = tx.update(g, state, p)
        return optax.apply_updates(p, u), state

    return lambda p: (p, tx.init(p)), step


def collage(variant, **options):
    return lowp(optim.collage_adamw(1e-5, weight_decay=0.1, variant=variant, **options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cases = {
        "D": master(), "light": collage("light"), "plus": collage("plus"),
        "light_sr": collage("light_sr"), "exact (int16)": collage("exact"),
        "int16_8bit": collage("int16_8bit"), "flash8": collage("flash8"),
        "plus, faithful": collage("plus", faithful=True),
    }  # fmt: skip
    keys = jax.random.split(jax.random.key(0), args.millions)
    make = jax.jit(lambda k: (0.02 * jax.random.normal(k, SHAPE)).astype(BF16))
    size = args.millions * SHAPE[0] * SHAPE[1]
    times, ideal, accessed = {}, {}, {}
    compiled = {}
    for name, (start, step) in cases.items():
        p = [make(k) for k in keys]
        carry = jax.jit(start)(p)
        state = carry[1]
        ideal[name] = (2 * tree.nbytes(p) + 2 * tree.nbytes(state) + tree.nbytes(p)) / size
        program = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, p).compile()
        accessed[name] = program.cost_analysis()["bytes accessed"] / size
        compiled[name] = program
        times[name] = []
        del carry, state, p
    for _ in range(args.rounds):
        for name, (start, _) in cases.items():
            g = [make(k) for k in keys]
            carry = jax.jit(start)([make(k) for k in keys])
            for i in range(3):
                jax.block_until_ready((carry, g))
                began = time.perf_counter()
                carry = compiled[name](*carry, g)
                jax.block_until_ready(carry)
                if i:
                    times[name].append(time.perf_counter() - began)
            del carry, g
    base = statistics.median(times["D"])
    rows = {}
    for name, seen in times.items():
        t = statistics.median(seen)
        rows[name] = {
            "seconds": t, "over D": t / base, "ideal bytes": ideal[name],
            "ideal over D": ideal[name] / ideal["D"], "bytes XLA counts": accessed[name],
            "ratio to limit": t / base / (ideal[name] / ideal["D"]),
        }  # fmt: skip
        print(f"{name:16}", {k: round(v, 3) for k, v in rows[name].items()}, flush=True)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

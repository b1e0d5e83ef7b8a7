"""How far reduced gradients are from their exact sum, on the gradients of a training run.

  python -m experiments.zeropp.errors [--nodes=2] [--steps=200]

Every device has its own rows; AdamW trains on the exact sum, and every way to reduce gets the same
gradients. Prints for each the mean relative error of a step, |sent - exact| / |exact|, and that of
the sums over all steps. Exits with 1 unless rounding on the slow axis alone is better than before
both exchanges, and feedback makes the error of the sums at least ten times smaller.
"""

import argparse
import sys
import time

from experiments.zeropp.lm import BOTH, DEVICES, ROWS, SPLIT, Vector, grid, language_model  # isort: skip

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxrl_eff.parallel.zero.collectives import gather_weights, reduce_gradients
from jaxrl_eff.parallel.zero.levels import ZeroConfig, ZeroLevel

EXACT = ZeroConfig(ZeroLevel("exact", 32, 32))
CLIP = (1.0, 0.9, 0.8, 0.7)
WAYS = {
    "bfloat16, slow axis": ZeroConfig(ZeroLevel("", 32, 16)),
    "int8, slow axis": ZeroConfig(ZeroLevel("", 32, 8)),
    "int4, slow axis": ZeroConfig(ZeroLevel("", 32, 4)),
    "int4, slow axis, clipped": ZeroConfig(ZeroLevel("", 32, 4), shrink=CLIP),
    "int4, slow axis, Hadamard": ZeroConfig(ZeroLevel("", 32, 4, hadamard=True)),
    "int4, slow axis, Hadamard, clipped": ZeroConfig(
        ZeroLevel("", 32, 4, hadamard=True), shrink=CLIP
    ),
    "int4, slow axis, Hadamard, feedback": ZeroConfig(
        ZeroLevel("", 32, 4, hadamard=True, feedback=True)
    ),
    "int4, both axes (qgZ)": ZeroConfig(ZeroLevel("", 32, 4, slow_only=False)),
    "int4, both axes, Hadamard": ZeroConfig(ZeroLevel("", 32, 4, slow_only=False, hadamard=True)),
    "int4, both axes, Hadamard, feedback": ZeroConfig(
        ZeroLevel("", 32, 4, slow_only=False, hadamard=True, feedback=True)
    ),
}


def measured(lm: Vector, nodes: int, steps: int) -> dict[str, tuple[float, float]]:
    """Way -> (mean relative error of a step, relative error of the sums)."""
    tx = optax.adamw(optax.cosine_decay_schedule(1e-3, steps), weight_decay=0.1)

    def norm(x):
        return jnp.sqrt(lax.psum(jnp.sum(x * x), BOTH))

    def step(carry, tokens):
        shard, state, total, ways = carry
        w = gather_weights(shard, None, EXACT)
        g = jax.grad(lm.loss)(w, tokens) / DEVICES
        exact, _ = reduce_gradients(g, None, EXACT)
        total, new, off = total + exact, {}, {}
        for name, plan in WAYS.items():
            feedback, sent = ways[name]
            arrived, feedback = reduce_gradients(g, feedback, plan)
            off[name] = norm(arrived - exact) / norm(exact)
            new[name] = feedback, sent + arrived
        u, state = tx.update(exact, state, shard)
        return (shard + u, state, total, new), off

    def run(vector, batches):
        zero = jnp.zeros_like(vector)
        left = jnp.zeros((nodes, lm.shard))
        ways = {k: (left if p.rung.feedback else None, zero) for k, p in WAYS.items()}
        carry = vector, tx.init(vector), zero, ways
        (_, _, total, ways), off = lax.scan(step, carry, batches)
        sums = {k: norm(sent - total) / norm(total) for k, (_, sent) in ways.items()}
        return {k: jnp.mean(v) for k, v in off.items()}, sums

    program = jax.jit(
        jax.shard_map(run, mesh=grid(nodes), in_specs=(SPLIT, ROWS), out_specs=P(), check_vma=False)
    )
    off, sums = jax.tree.map(np.asarray, program(lm.start(0), lm.batches(0, steps)))
    return {k: (float(off[k]), float(sums[k])) for k in WAYS}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    lm, began = language_model(), time.time()
    found = measured(lm, args.nodes, args.steps)
    print(
        f"{args.nodes} x {DEVICES // args.nodes} devices, {DEVICES * lm.shard:,} parameters, "
        f"{args.steps} steps, blocks of {EXACT.block}, {time.time() - began:.0f} s"
    )
    print("| gradients | error of a step | error of the sums |")
    print("|---|---|---|")
    for name, (step, sums) in found.items():
        print(f"| {name} | {step:.4f} | {sums:.5f} |")
    slow, both = found["int4, slow axis"][0], found["int4, both axes (qgZ)"][0]
    without = found["int4, slow axis, Hadamard"][1]
    fed = found["int4, slow axis, Hadamard, feedback"][1]
    print(f"slow axis / both: {slow / both:.2f}; without / with feedback: {without / fed:.1f}")
    return 0 if slow < both and without >= 10 * fed else 1


if __name__ == "__main__":
    sys.exit(main())

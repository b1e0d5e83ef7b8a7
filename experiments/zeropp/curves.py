"""What rounded weights and gradients cost in quality: a character model trained on every rung.

  python -m experiments.zeropp.curves [--steps=300] [--seeds=3] [--nodes=2] [--ways=NAME ...]

Weights and moments are sharded over all devices and stay float32; what is sent is rounded. The
validation loss is of the float32 weights. Results are added to `results.json`; what is there
already is not run again.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from experiments.zeropp.lm import DEVICES, ROWS, SPLIT, Vector, grid, language_model  # isort: skip

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxrl_eff.parallel.codec import Blocks, encode
from jaxrl_eff.parallel.zero import collectives
from jaxrl_eff.parallel.zero.levels import ZeroConfig, ZeroLevel, zero_level
from tests.parallel.zero import zero_layers

OUT = Path(__file__).parent / "results.json"
DELTAS = Blocks(4)
# name -> plan, whether weights are sent as differences
WAYS = {
    "float32": (ZeroConfig(ZeroLevel("", 32, 32)), False),
    "exact (bfloat16)": (ZeroConfig(zero_level("exact")), False),
    "int8": (ZeroConfig(zero_level("int8")), False),
    "int4 without feedback": (ZeroConfig(ZeroLevel("", 8, 4, hadamard=True)), False),
    "int4": (ZeroConfig(zero_level("int4")), False),
    "qgz": (ZeroConfig(zero_level("qgz")), False),
    "int4, plain": (ZeroConfig(ZeroLevel("", 8, 4)), False),
    "int4, feedback without Hadamard": (ZeroConfig(ZeroLevel("", 8, 4, feedback=True)), False),
    "int4 weights": (ZeroConfig(ZeroLevel("", 4, 32)), False),
    "int4, deltas in int4": (ZeroConfig(ZeroLevel("", 16, 4, hadamard=True, feedback=True)), True),
}


def trainer(lm: Vector, plan: ZeroConfig, deltas: bool, nodes: int, steps: int):
    """(start, run): start(vector) -> carry; run(carry, batches) -> (carry, losses [steps])."""
    tx = optax.adamw(optax.cosine_decay_schedule(1e-3, steps), weight_decay=0.1)

    def start(shard):
        left = jnp.zeros((nodes, lm.shard)) if plan.rung.feedback else None
        held = zero_layers.refresh(shard, plan, "bfloat16") if deltas else None
        return shard, tx.init(shard), left, held

    def gradients(shard, left, held, tokens):
        def value(w, tokens):
            return lm.loss(w, tokens) / DEVICES

        if not deltas:
            fn = jax.value_and_grad(
                lambda s, e: zero_layers.sharded_apply(value, s, tokens, plan, feedback=e), (0, 1)
            )
            value, (g, left) = fn(shard, left)
            return value, g, left, held
        held = collectives.send_deltas(shard, held, plan, DELTAS)
        stage = encode(held, plan.weights)
        slot = jnp.zeros((nodes, lm.shard))
        value, g = jax.value_and_grad(
            lambda slot: zero_layers.held_apply(value, stage, slot, tokens, plan)
        )(slot)
        return value, *collectives.reduce_slow(g, left, plan), held

    def step(carry, tokens):
        shard, state, left, held = carry
        value, g, left, held = gradients(shard, left, held, tokens)
        u, state = tx.update(g, state, shard)
        return (shard + u, state, left, held), lax.psum(value, (plan.slow, plan.fast))

    # Whatever a device has of its own lies along the last axis, as its shard does.
    shapes = jax.eval_shape(lambda: tx.init(jnp.zeros(lm.shard)))
    state = jax.tree.map(lambda x: SPLIT if x.ndim else P(), shapes)
    left = P(None, *SPLIT) if plan.rung.feedback else None
    carry = (SPLIT, state, left, P(None, *SPLIT) if deltas else None)
    options = dict(mesh=grid(nodes), check_vma=False)
    begin = jax.shard_map(start, in_specs=SPLIT, out_specs=carry, **options)
    run = jax.shard_map(
        lambda c, b: lax.scan(step, c, b), in_specs=(carry, ROWS), out_specs=(carry, P()), **options
    )
    return jax.jit(begin), jax.jit(run, donate_argnums=0)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS], metavar="NAME")
    args = parser.parse_args()
    lm = language_model()
    held_out = jnp.asarray(lm.batches(10_000, 40, validation=True))
    validate = jax.jit(lambda w: lax.map(lambda t: lm.loss(w, t), held_out).mean())
    results = json.loads(OUT.read_text()) if OUT.exists() else {}
    for name in args.ways:
        plan, deltas = WAYS[name]
        start, run = trainer(lm, plan, deltas, args.nodes, args.steps)
        for seed in range(args.seeds):
            key = f"nodes={args.nodes} steps={args.steps} seed={seed}: {name}"
            if key in results:
                continue
            began, losses = time.time(), []
            carry, batches = start(lm.start(seed)), lm.batches(seed, args.steps)
            for at in range(0, args.steps, 50):
                carry, seen = run(carry, batches[at : at + 50])
                losses.append(float(np.asarray(seen).mean()))
            final = float(validate(jnp.asarray(np.asarray(carry[0]))))
            results[key] = {"validation": final, "training": losses}
            OUT.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{key}: {final:.4f}, {time.time() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

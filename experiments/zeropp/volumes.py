"""Bytes a training step sends over the slow axis, counted and by closed form.

  python -m experiments.zeropp.volumes

Counts the jaxpr of a step of four layers on two nodes of four simulated devices, for ZeRO-3 and the
parts of ZeRO++, in units of a pass of the whole model in 16 bits. Nothing is run. Exits with 1 if a
program sends 2 % more than the closed form, or blocks' scales add 1 % to what the table promises.
"""

import os
import sys

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxrl_eff.parallel import jaxpr_bytes
from jaxrl_eff.parallel.codec import Blocks, encode
from jaxrl_eff.parallel.zero import collectives
from jaxrl_eff.parallel.zero.levels import ZeroConfig, ZeroLevel
from tests.parallel.zero import zero_layers

NODES, DEVICES, LAYERS, WIDTH, ROWS, BATCHES = 2, 4, 4, 256, 2, 4
SHARD = WIDTH * WIDTH // (NODES * DEVICES)
SIZES = {"dcn": NODES, "ici": DEVICES}
DELTAS = Blocks(4, 512)

# name, what the table promises, rung, micro-batches between slow traffic, deltas
PLANS = (
    ("ZeRO-3", 3.0, ZeroLevel("plain", 16, 16), 1, None),
    ("qwZ", 2.0, ZeroLevel("qwZ", 8, 16), 1, None),
    ("hpZ", 2.0, ZeroLevel("hpZ", 16, 16, secondary=True), 1, None),
    ("qgZ", 2.25, ZeroLevel("qgZ", 16, 4, slow_only=False), 1, None),
    ("all three", 0.75, ZeroLevel("all", 8, 4, slow_only=False, secondary=True), 1, None),
    ("all, slow axis only", 0.75, ZeroLevel("slow", 8, 4, secondary=True), 1, None),
    ("hoisted", 0.75 / BATCHES, ZeroLevel("hoisted", 8, 4), BATCHES, None),
    ("hoisted, deltas", 0.5 / BATCHES, ZeroLevel("deltas", 16, 4), BATCHES, DELTAS),
)


def layer(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w.reshape(WIDTH, WIDTH))


def step(plan: ZeroConfig, shards: jax.Array, xs: jax.Array) -> jax.Array:
    """Gradients of a micro-batch: shards [L, m], xs [1, rows, width] of a device."""

    def loss(shards):
        def body(x, shard):
            return zero_layers.sharded_apply(layer, shard, x, plan), None

        return jnp.sum(lax.scan(body, xs[0], shards)[0])

    return jax.grad(loss)(shards)


def hoisted(plan: ZeroConfig, deltas: Blocks | None, shards, held, xs):
    """Gradients summed over micro-batches xs [k, rows, width]; slow traffic at both ends."""
    if deltas is None:
        stage = collectives.gather_slow(shards, plan)
    else:
        held = collectives.send_deltas(shards, held, plan, deltas)
        stage = encode(held, plan.weights)
    stage = jnp.moveaxis(stage, 0, 1)  # layers first, to scan over
    slot = jnp.zeros((LAYERS, NODES, SHARD), jnp.float32)

    def loss(slot, x):
        def body(x, layers):
            return zero_layers.held_apply(layer, *layers, x, plan), None

        return jnp.sum(lax.scan(body, x, (stage, slot))[0])

    def batch(total, x):
        return total + jax.grad(loss)(slot, x), None

    total = lax.scan(batch, slot, xs)[0]
    return collectives.reduce_slow(total, None, plan)[0], held


def program(rung: ZeroLevel, batches: int, deltas: Blocks | None):
    """(jaxpr, plan) of one step."""
    plan = ZeroConfig(rung, block=512)
    mesh = Mesh(np.array(jax.devices()[: NODES * DEVICES]).reshape(NODES, DEVICES), tuple(SIZES))
    split = P(None, ("dcn", "ici"))
    shards = jnp.zeros((LAYERS, WIDTH * WIDTH), jnp.float32)
    xs = jnp.zeros((NODES * DEVICES * batches, ROWS, WIDTH), jnp.float32)
    if batches == 1:
        fn, args = (lambda *a: step(plan, *a)), (shards, xs)
        specs, out = (split, P(("dcn", "ici"))), split
    else:
        # What a node holds is the same on all nodes, a part for each of its devices.
        held = jnp.zeros((NODES, LAYERS, WIDTH * WIDTH // NODES), jnp.bfloat16)
        fn, args = (lambda *a: hoisted(plan, deltas, *a)), (shards, held, xs)
        specs = (split, P(None, None, "ici"), P(("dcn", "ici")))
        out = (split, P(None, None, "ici"))
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    return jax.make_jaxpr(mapped)(*args), plan


def table() -> list[tuple[str, float, float, float, float]]:
    """(name, promised, closed form, counted, fast axis counted / closed) of each plan.

    In passes of the model a micro-batch.
    """
    rows = []
    unit = 2 * LAYERS * (NODES - 1) * SHARD
    for name, promised, rung, batches, deltas in PLANS:
        jaxpr, plan = program(rung, batches, deltas)
        counted = jaxpr_bytes.count(jaxpr, SIZES)
        closed = zero_layers.expected(
            plan, SHARD, NODES, DEVICES, weights=LAYERS, batches=batches, hoisted=batches > 1,
            deltas=deltas,
        )  # fmt: skip
        each = unit * batches
        fast = counted["ici"] / closed["ici"]
        rows.append((name, promised, closed["dcn"] / each, counted["dcn"] / each, fast))
    return rows


def main() -> int:
    print(f"slow-axis passes a micro-batch, {NODES} x {DEVICES} devices, k = {BATCHES}")
    print("| plan | promised | closed form | counted | ratio | scales | fast axis ratio |")
    print("|---|---|---|---|---|---|---|")
    good = True
    for name, promised, closed, counted, fast in table():
        ratio, scales = counted / closed, counted / promised - 1
        good &= ratio <= 1.02 and fast <= 1.02 and scales <= 0.01
        print(
            f"| {name} | {promised:.4f} | {closed:.4f} | {counted:.4f} | {ratio:.4f} | "
            f"{scales:+.2%} | {fast:.4f} |"
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

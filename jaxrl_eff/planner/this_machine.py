"""Measures this machine's CPU as a cluster of simulated devices that share its cores; about 2 s.

Peaks are of float32, and efficiencies are the share of them that a small model's layers reach.
`corrections` refits the rest call by call.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl_eff.parallel import devices as machine
from jaxrl_eff.planner.clusters import Cluster

ROWS, WIDTH, LAYERS = 512, 256, 16


def best(fn: Callable[..., Any], *args: Any, seconds: float | int = 0.1) -> float:
    """Fewest seconds of a call, without compilation."""
    jax.block_until_ready(fn(*args))
    least, stop = float("inf"), time.perf_counter() + seconds
    while least == float("inf") or time.perf_counter() < stop:
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        least = min(least, time.perf_counter() - start)
    return least


def _block(x: jax.Array, w: jax.Array) -> jax.Array:
    """Two products with a softmax between, a mixture of work as in a layer."""
    return jax.nn.softmax(x @ w, axis=-1) @ w.T


def cpu() -> Cluster:
    """This process's simulated devices as one host, with as many hosts as there are processes.

    Nothing is measured between processes, since they would have to agree on the repetitions.
    """
    devices = jax.local_devices()
    n = len(devices)
    mesh = Mesh(np.array(devices), ("rows",))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*a)) for a in (("rows",), ()))
    x, w = np.ones((ROWS, WIDTH), np.float32), np.ones((WIDTH, 4 * WIDTH), np.float32)

    step = jax.jit(jax.grad(lambda w, x: (_block(x, w) ** 2).sum()))
    alone, spread = float("inf"), float("inf")
    for _ in range(5 if n > 1 else 1):  # alternating, so that other load affects both
        on_one = jax.device_put(w, devices[0]), jax.device_put(x, devices[0])
        alone = min(alone, best(step, *on_one, seconds=0.05))
        if n > 1:
            on_all = jax.device_put(w, whole), jax.device_put(x, rows)
            spread = min(spread, best(step, *on_all, seconds=0.05))

    peak = machine.measure_matmul("float32", seconds=0.2)
    copied = machine.measure_copy(nbytes=1 << 26, seconds=0.2)
    reached = 3 * 2 * 2 * ROWS * WIDTH * 4 * WIDTH / min(alone, spread) / peak

    tiny = jnp.ones((8, 64), jnp.float32)
    small = jnp.ones((64, 64), jnp.float32)
    through = jax.jit(
        lambda x, w: jax.lax.scan(lambda x, _: (_block(x, w), None), x, length=LAYERS)[0]
    )
    layer = best(through, tiny, small, seconds=0.05) / LAYERS
    launch = best(jax.jit(lambda x: x + 1), tiny, seconds=0.05)

    link, latency, move = copied / 2, 0.0, launch
    if n > 1:
        big = jax.device_put(np.ones((n << 15, 8), np.float32), rows)  # small enough for caches
        collect = jax.jit(lambda a: a * 1.0, out_shardings=whole)
        link = big.nbytes * (n - 1) / n / best(collect, big)
        send = lambda a: jax.device_put(a, devices[1])  # noqa: E731
        move = best(send, jax.device_put(tiny, devices[0]), seconds=0.05)
        total = jax.jit(lambda a: a.sum(0), out_shardings=whole)
        ones = jax.device_put(np.ones((n, 8), np.float32), rows)
        latency = max(0.0, best(total, ones, seconds=0.05) - launch) / math.log2(n)
    efficiency = min(1.0, reached)
    memory = machine.memory_bytes(devices[0]) or 8e9
    return Cluster(
        name="local",
        devices=n * jax.process_count(),
        per_host=n,
        flops_per_s=peak / n,
        flops32_per_s=peak / n,
        memory_bytes=memory / n,
        memory_bytes_per_s=copied / n,
        link_bytes_per_s=link,
        nic_bytes_per_s=link,
        host_bytes_per_s=link,
        link_latency=latency,
        nic_latency=latency,
        launch=launch,
        move_seconds=10 * move,
        layer_seconds=layer,
        train_efficiency=efficiency,
        forward_efficiency=efficiency,
        decode_efficiency=efficiency,
        memory_efficiency=1.0,
        link_efficiency=1.0,
        nic_efficiency=1.0,
        host_efficiency=1.0,
        overlap=0.0,
        fused=False,
        shared_compute=min(1.0, spread / alone) if n > 1 else 0.0,
    )

"""Every pair of factorizations of n devices over data, fsdp and tensor.

`pairs.py run 16` compiles and runs a reallocation of a weight matrix and of stacked layers for each
pair and prints what moved as JSON; `pairs.py plan 8 16` only plans, for one host and for two;
`pairs.py jit 8` counts what XLA's jitted identity with other shardings receives instead.
"""

import itertools
import json
import os
import sys

if __name__ == "__main__":
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    N = max(map(int, sys.argv[2:]))
    os.environ["XLA_FLAGS"] = (
        f"--xla_force_host_platform_device_count={N} --xla_backend_optimization_level=0"
    )
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("NPROC", "64")

import hlo_bytes
import jax
import jax.numpy as jnp
import numpy as np
from counted import counted
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_eff.parallel import Placement, Route
from jaxrl_eff.parallel.mesh import mesh
from jaxrl_eff.parallel.reshard import choose, exchange
from jaxrl_eff.parallel.reshard.layout import DeviceLayout, Network, missing

SPECS = {
    "matrix": PartitionSpec("fsdp", "tensor"),
    "layers": PartitionSpec(None, "fsdp", "tensor"),
}


def factorizations(n):
    return [
        Placement(tuple(range(n)), data=a, fsdp=b, tensor=n // a // b)
        for a in range(1, n + 1)
        if n % a == 0
        for b in range(1, n // a + 1)
        if (n // a) % b == 0
    ]


def network(n, hosts=1):
    """One in which bytes are all that counts, as for large arrays, and copies don't."""
    each = n // hosts
    rates = (1e9, 1e9 / 4 if hosts > 1 else 1e9, 1e-12, 1e-12, 1e-12)
    return Network(tuple(i // each for i in range(n)), *rates)


def planned(n, net, nbytes=1e9):
    """Bytes received over the minimum, for every pair and spec."""
    out = []
    for a, b in itertools.product(factorizations(n), repeat=2):
        for spec in SPECS.values():
            s, t = (DeviceLayout.on(p.devices, p.axes, spec, len(spec)) for p in (a, b))
            way = choose.way(s, t, (n,) * len(spec), nbytes, net)
            least = sum(missing(s, t).values())
            out.append(way.total / least if least else 1.0)
    return out


def measure(n, every=1, small=0):
    """(nu planned, nu compiled, largest array, temporaries) of every k-th pair.

    Bytes of the largest array and of all temporaries are over those of the largest shard.

    `small`: bytes below which messages are joined, which makes arrays larger than a shard.
    """
    rng = np.random.default_rng(0)
    values = {
        "matrix": rng.standard_normal((16 * n, 16 * n)).astype(jnp.bfloat16),
        "layers": rng.standard_normal((3, 8 * n, 8 * n)).astype(np.float32),
    }
    out = []
    exchange.SMALL["cpu"] = small
    for a, b in list(itertools.product(factorizations(n), repeat=2))[::every]:
        source, target = (
            {k: NamedSharding(mesh(p), spec) for k, spec in SPECS.items()} for p in (a, b)
        )
        tree = jax.device_put(values, source)
        route = Route(tree, target, network=network(n))
        plan, real = route.report(), counted(route)[0]
        real = real / plan.minimum if plan.minimum else 1 + real
        moved = route(tree)
        for k, value in values.items():
            assert moved[k].sharding == target[k], (a, b)
            assert np.array_equal(np.asarray(moved[k]), value), (a, b, k)
        shards = [x.addressable_shards[0].data.nbytes for x in (*tree.values(), *moved.values())]
        largest = max(map(hlo_bytes.largest, route.programs()), default=0)
        temporary = max((_temporary(p) for p in route.programs()), default=0)
        out.append((plan.nu, real, largest / max(shards), temporary / max(shards)))
    return out


def _temporary(program):
    return program.memory_analysis().temp_size_in_bytes


def jitted(n):
    """Bytes over the minimum that XLA's own reshard receives, for every pair and spec."""
    out = []
    for a, b in itertools.product(factorizations(n), repeat=2):
        for spec in SPECS.values():
            source, target = (NamedSharding(mesh(p), spec) for p in (a, b))
            shape = (16 * n,) * len(spec)
            x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=source)
            program = jax.jit(lambda x: x, out_shardings=target).lower(x).compile()
            got = hlo_bytes.received(program)
            least = Route({"x": x}, {"x": target}).report().minimum
            out.append(got / least if least else 1 + got)
    return out


def plans(sizes):
    """{"devices, hosts, bytes": nus}"""
    return {
        f"{n} devices, {hosts} hosts, {nbytes:.0e} bytes": planned(n, network(n, hosts), nbytes)
        for n in sizes
        for hosts in (1, 2)
        for nbytes in (1e9, 1e4)
    }


if __name__ == "__main__":
    sizes = [int(a) for a in sys.argv[2:]]
    ways = {"plan": plans, "run": lambda sizes: measure(*sizes), "jit": lambda n: jitted(*n)}
    print(json.dumps(ways[sys.argv[1]](sizes)))

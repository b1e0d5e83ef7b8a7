"""Reallocation against `jax.device_put` and XLA's jitted identity, on the same arrays.

    python experiments/realloc/measure.py [--devices=8] [--megabytes=64] [--seconds=3] [--out=FILE]

Prints a table: bytes that all devices receive (of the compiled programs) over the minimum, arrays
that went through the host, seconds to compile and to run (best of interleaved runs). On simulated
devices the "wire" and the "host" are one memory, so seconds there say what the programs cost, not
what a network would make of them; bytes and host copies are the same everywhere.
"""

import argparse
import json
import sys
import time
from pathlib import Path

PARSER = argparse.ArgumentParser(description=__doc__.split("\n")[0])
PARSER.add_argument("--devices", type=int, default=8)
PARSER.add_argument("--megabytes", type=float, default=64)
PARSER.add_argument("--seconds", type=float, default=3, help="for each case")
PARSER.add_argument("--out", default="")

if __name__ == "__main__":
    ARGS = PARSER.parse_args()
    from jaxrl_eff.parallel import host

    host.simulate(ARGS.devices)

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_eff.parallel import Placement, Route, rules

TESTS = Path(__file__).resolve().parents[2] / "tests" / "parallel"
sys.path[:0] = [str(TESTS), str(TESTS / "reshard")]
import hlo_bytes
from counted import counted

AXES = {
    "up": ("layers", "embed", "ffn"),
    "down": ("layers", "ffn", "embed"),
    "qkv": ("layers", "embed", "heads", "head_dim"),
    "norm": ("layers", "embed"),
    "table": ("vocab", "embed"),
}


def cases(n):
    """name -> (source, target)."""
    every, half = tuple(range(n)), n // 2
    first, second = every[:half], every[half:]
    backwards = every[::-1]
    return {
        "fsdp to tensor": (Placement(every, fsdp=n), Placement(every, tensor=n)),
        "fsdp to data 2 x tensor": (
            Placement(every, fsdp=n),
            Placement(every, data=2, tensor=half),
        ),
        "fsdp x tensor to data x tensor, other split": (
            Placement(every, fsdp=half, tensor=2),
            Placement(every, data=2, tensor=half),
        ),
        "fsdp to data (gather)": (Placement(every, fsdp=n), Placement(every)),
        "data to tensor (slice)": (Placement(every), Placement(every, tensor=n)),
        "other order": (Placement(every, fsdp=n), Placement(backwards, fsdp=half, tensor=2)),
        "half to other half": (Placement(first, fsdp=half), Placement(second, tensor=half)),
        "half to other half, gathered": (Placement(first, fsdp=half), Placement(second)),
        "all to half": (Placement(every, fsdp=n), Placement(second, tensor=half)),
        "half to all": (Placement(first, fsdp=half), Placement(every, data=2, tensor=half)),
    }


def values(megabytes):
    """Four layers of a model of about this size in float32, and the axes' sizes."""
    width = max(32, round((megabytes * 1e6 / 4 / (4 * 12 + 8)) ** 0.5) // 32 * 32)
    sizes = {"layers": 4, "embed": width, "ffn": 4 * width, "heads": 32, "head_dim": width // 8}
    sizes["vocab"] = 8 * width
    rng = np.random.default_rng(0)
    tree = {
        k: rng.standard_normal([sizes[a] for a in axes], dtype=np.float32)
        for k, axes in AXES.items()
    }
    return tree, {k: {n} for k, n in sizes.items()}


class Bounces:
    """Counts arrays that go through the host."""

    def __enter__(self):
        self.count, self._type = 0, type(jnp.zeros(1))
        self._old = self._type._value

        def fetch(array):
            self.count += 1
            return self._old.fget(array)

        self._type._value = property(fetch)
        return self

    def __exit__(self, *error):
        self._type._value = self._old


def first(fn, tree):
    """Seconds of the first call, and arrays through the host."""
    with Bounces() as bounces:
        start = time.perf_counter()
        jax.block_until_ready(fn(tree))
        return time.perf_counter() - start, bounces.count


def interleaved(fns, tree, seconds):
    """Seconds of every function's best call."""
    best, stop = {name: [] for name in fns}, time.perf_counter() + seconds
    while time.perf_counter() < stop or not all(best.values()):
        for name, fn in fns.items():
            start = time.perf_counter()
            jax.block_until_ready(fn(tree))
            best[name].append(time.perf_counter() - start)
    return {name: min(all_of) for name, all_of in best.items()}


def row(name, places, tree, sizes, args):
    source, target = (rules(p, sizes).tree(AXES) for p in places)
    arrays = jax.device_put(tree, source)
    route = Route(arrays, target)
    start = time.perf_counter()
    route.compile()
    compile_seconds = time.perf_counter() - start
    report, received = route.report(), counted(route)[0]
    fns = {"route": route, "device_put": lambda t: jax.device_put(t, target)}
    out = {"case": name, "minimum": report.minimum, "nu": {}}
    out["nu"]["route"] = received / report.minimum if report.minimum else 1.0
    if places[0].devices == places[1].devices:
        jitted = jax.jit(lambda t: t, out_shardings=target)
        start = time.perf_counter()
        program = jitted.lower(arrays).compile()
        out["compile"] = {"jit": time.perf_counter() - start}
        out["nu"]["jit"] = hlo_bytes.received(program) / report.minimum if report.minimum else 1.0
        fns["jit"] = program
    out.setdefault("compile", {})["route"] = compile_seconds
    out["host"] = {k: first(fn, arrays)[1] for k, fn in fns.items()}
    for k, moved in route(arrays).items():
        assert np.array_equal(np.asarray(moved), tree[k]), (name, k)
    out["seconds"] = interleaved(fns, arrays, args.seconds)
    return out


def main(args):
    tree, sizes = values(args.megabytes)
    nbytes = sum(v.nbytes for v in tree.values())
    print(
        f"{jax.__version__}, {args.devices} x {jax.devices()[0].device_kind}, {nbytes / 1e6:.0f} MB"
    )
    rows = [row(name, p, tree, sizes, args) for name, p in cases(args.devices).items()]
    print("| case | received / minimum: ours, XLA | through the host: ours, device_put | "
          "compile, s: ours, XLA | run, ms: ours, device_put, XLA |")  # fmt: skip
    print("|---|---|---|---|---|")

    def number(x, scale=1.0, digits=2):
        return "–" if x is None else f"{x * scale:.{digits}f}"

    for r in rows:
        ms = [number(r["seconds"].get(k), 1e3, 1) for k in ("route", "device_put", "jit")]
        print(
            f"| {r['case']} | {number(r['nu']['route'])}, {number(r['nu'].get('jit'))} | "
            f"{r['host']['route']}, {r['host']['device_put']} of {len(tree)} | "
            f"{number(r['compile']['route'])}, {number(r['compile'].get('jit'))} | "
            f"{', '.join(ms)} |"
        )
    if args.out:
        with open(args.out, "w") as f:
            json.dump({"devices": args.devices, "bytes": nbytes, "rows": rows}, f, indent=1)


if __name__ == "__main__":
    main(ARGS)

"""One of several processes that move arrays among meshes: `processes.py port processes process`."""

import os
import sys

PORT, COUNT, ME = (int(a) for a in sys.argv[1:4])
EACH = 8 // COUNT
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count={EACH} --xla_backend_optimization_level=0"
)

import jax

jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{PORT}", COUNT, ME)

import ml_dtypes
import numpy as np

from jaxrl_eff.parallel import Placement, Route, rules
from jaxrl_eff.parallel.codec import Blocks, decode, encode
from jaxrl_eff.parallel.reshard.changes import ChangedElements, SyncConfig
from jaxrl_eff.parallel.reshard.rounded import MOST, Pieces, RoundedRoute

AXES = {"w": ("layers", "embed", "heads"), "b": ("embed",), "count": (), "bf": ("heads", "embed")}
SIZES = {"embed": {12}, "heads": {8}, "layers": {2}}
VALUES = {
    "w": np.arange(2 * 12 * 8, dtype=np.float32).reshape(2, 12, 8),
    "b": np.arange(12, dtype=np.int32),
    "count": np.array(7, np.int32),
    "bf": np.arange(96).reshape(8, 12).astype(ml_dtypes.bfloat16),
}
PAIRS = {
    "same": (Placement(tuple(range(8)), fsdp=4, tensor=2), Placement(tuple(range(8)), tensor=4)),
    "disjoint": (Placement((0, 1, 2, 3), fsdp=2, tensor=2), Placement((4, 5, 6, 7), tensor=4)),
    "disjoint, gathered": (Placement((0, 1, 2, 3), fsdp=4), Placement((4, 5, 6, 7))),
    "split inside hosts": (Placement((0, 1, 4, 5), tensor=4), Placement((2, 3, 6, 7), fsdp=2)),
    "overlap": (Placement((0, 1, 2, 3), fsdp=4), Placement((2, 3, 4, 5), tensor=2)),
    "within the first": (Placement((0, 1), fsdp=2), Placement((1,))),
    "spread": (Placement((1,)), Placement(tuple(range(8)), data=2, tensor=4)),
    "reordered": (
        Placement(tuple(range(8)), tensor=8),
        Placement((7, 3, 5, 1, 6, 2, 4, 0), fsdp=4),
    ),
}


def array(value, sharding):
    return jax.make_array_from_callback(
        value.shape, sharding, lambda i: value[i], dtype=value.dtype
    )


def check(moved, target, values):
    for k, value in values.items():
        assert moved[k].sharding == target[k], k
        assert moved[k].dtype == value.dtype and moved[k].shape == value.shape
        for s in moved[k].addressable_shards:
            np.testing.assert_array_equal(np.asarray(s.data), value[s.index], err_msg=k)


def rounded(x, bits):
    """What one device makes of a tensor."""
    pieces, blocks = Pieces.of(x.shape), Blocks(bits, MOST)
    codes = encode(x.reshape(-1, pieces.length), blocks)
    return np.asarray(decode(codes, pieces.length, blocks, x.dtype)).reshape(x.shape)


def main():
    for name, (a, b) in PAIRS.items():
        if COUNT > 2 and name not in ("disjoint", "overlap", "spread"):
            continue
        source, target = (rules(p, SIZES).tree(AXES) for p in (a, b))
        tree = {k: array(v, source[k]) for k, v in VALUES.items()}
        route = Route(tree, target)
        with jax.transfer_guard("disallow"):
            moved = route(tree)
        check(moved, target, VALUES)
        print(name, "moved")
    for name in ("disjoint", "split inside hosts"):
        source, target = (rules(p, SIZES).tree(AXES) for p in PAIRS[name])
        tree = {k: array(v, source[k]) for k, v in VALUES.items()}
        which = {k: k in ("w", "bf") for k in VALUES}
        route = RoundedRoute(tree, target, rounded=which, precision="int4").compile()
        want = {k: rounded(v, 4) if which[k] else v for k, v in VALUES.items()}
        check(route(tree), target, want)
        print(name, "rounded")
    a, b = PAIRS["split inside hosts"]
    kept = {k: v for k, v in VALUES.items() if k in ("w", "bf")}
    axes = {k: AXES[k] for k in kept}
    source, target = (rules(p, SIZES).tree(axes) for p in (a, b))
    tree = {k: array(v, source[k]) for k, v in kept.items()}
    sync = ChangedElements(tree, target, SyncConfig(0.2, dense_below=0))
    copy, sent = sync.start(tree)
    for step in range(1, 4):
        share = 0.5 if step == 2 else 0.05
        draw = np.random.default_rng(step)
        for k in kept:
            change = draw.random(kept[k].shape) < share
            kept[k] = np.where(change, kept[k] + 1, kept[k]).astype(kept[k].dtype)
        tree = {k: array(v, source[k]) for k, v in kept.items()}
        copy, sent, report = sync(tree, copy, sent, step)
        now = {k: v.astype(ml_dtypes.bfloat16) for k, v in kept.items()}
        check(copy, target, now)
        check(sent, source, now)
        assert (report.dense.addressable_data(0) > 0) == (step == 2)
    print("done")


if __name__ == "__main__":
    main()

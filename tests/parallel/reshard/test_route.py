"""Reallocation: every pair of layouts gives the same values, and none goes through the host."""

import itertools
import json
import os
import statistics
import subprocess
import sys

import hlo_bytes
import jax
import jax.numpy as jnp
import launch
import numpy as np
import pairs
import pytest
from bound import Bound
from counted import counted
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_eff.parallel import Placement, Route, rules
from jaxrl_eff.parallel.mesh import mesh
from jaxrl_eff.parallel.reshard import exchange
from jaxrl_eff.parallel.reshard.layout import DeviceLayout, Network

PLACES = {
    "one": Placement((0,)),
    "fsdp4": Placement((0, 1, 2, 3), fsdp=4),
    "tp4": Placement((0, 1, 2, 3), tensor=4),
    "tp2_other_half": Placement((4, 5), tensor=2),
    "mixed8": Placement(tuple(range(8)), data=2, fsdp=2, tensor=2),
    "reordered": Placement((3, 1, 0, 2), fsdp=2, tensor=2),
    "overlap": Placement((2, 3, 4, 5), fsdp=2, tensor=2),
    "three": Placement((5, 6, 7), data=3),
}
AXES = {"w": ("layers", "embed", "heads", "head_dim"), "b": ("embed",)}


def _tree():
    return {
        "w": jnp.arange(2 * 8 * 4 * 3, dtype=jnp.float32).reshape(2, 8, 4, 3),
        "b": jnp.arange(8, dtype=jnp.float32),
    }


@pytest.mark.parametrize(("a", "b"), itertools.product(PLACES, PLACES))
def test_values_survive_every_pair_of_layouts(a, b, monkeypatch):
    sizes = {"embed": {8}, "heads": {4}, "head_dim": {3}, "layers": {2}}
    source, target = (rules(PLACES[p], sizes).tree(AXES) for p in (a, b))
    tree = jax.device_put(_tree(), source)
    route = Route(source, target)

    bounced = []
    array_type = type(tree["w"])
    fetch = array_type._value.fget
    monkeypatch.setattr(
        array_type, "_value", property(lambda self: bounced.append(self.shape) or fetch(self))
    )
    moved = route(tree)
    monkeypatch.undo()

    assert not bounced, f"{a} to {b} went through the host"
    assert jax.tree.map(lambda x: x.sharding, moved) == target
    jax.tree.map(np.testing.assert_array_equal, moved, _tree())
    assert route.alias == (a == b)


def moved(tree, source, target, **options):
    """The tree after a route, compared with itself, and the route."""
    tree = jax.device_put(tree, source)
    route = Route(tree, target, **options)
    out = route(tree)
    for a, b, s in zip(*map(jax.tree.leaves, (out, tree, target)), strict=True):
        assert a.sharding == s and a.shape == b.shape
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b.astype(a.dtype)))
    return out, route


def trees(a, b, axes, sizes):
    return [rules(PLACES[p], sizes).tree(axes) for p in (a, b)]


def test_pairs_of_factorizations_receive_what_was_planned(monkeypatch):
    monkeypatch.setitem(exchange.SMALL, "cpu", 0)
    check_pairs(pairs.measure(8, every=9))


@pytest.mark.slow
@pytest.mark.parametrize("n", [8, 16])
def test_every_pair_of_factorizations(n):
    rows = alone("run", n)
    assert len(rows) == {8: 100, 16: 225}[n]
    check_pairs(rows)


def alone(*arguments):
    """What `pairs.py` prints, in a process of its own: more devices, and no types checked."""
    run = [
        sys.executable,
        str(launch.ROOT / "tests" / "parallel" / "reshard" / "pairs.py"),
        *map(str, arguments),
    ]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env |= {"PYTHONPATH": str(launch.ROOT)}
    done = subprocess.run(run, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("n", [8, pytest.param(16, marks=pytest.mark.slow)])
def test_every_pair_of_factorizations_as_planned(n):
    found = alone("plan", n)
    assert len(found) == 4
    for case, nus in found.items():
        assert max(nus) <= 1.25 + 1e-9 and min(nus) >= 1 - 1e-9, case
        assert statistics.median(nus) == pytest.approx(1), case


def check_pairs(rows):
    for plan, real, largest, temporary in rows:
        assert real == pytest.approx(plan) and real <= 1.25 + 1e-9
        assert largest <= 1  # no array is larger than the larger of both shards
        assert temporary <= 4  # what both tensors send and receive
    assert statistics.median(row[1] for row in rows) == pytest.approx(1)


STATE = {
    "count": np.array(3, np.int32),
    "key": np.array([1, 2], np.uint32),
    "mu": {"w": np.arange(96).reshape(8, 12).astype(jnp.bfloat16)},
    "nu": {"w": np.arange(96, dtype=np.float32).reshape(8, 12)},
    "flags": np.arange(12) % 2 == 0,
    "half": np.linspace(-1, 1, 24).astype(np.float16),
    "scale": np.array(1.5, jnp.bfloat16),
    "none": np.zeros((0, 4), np.float32),
    "odd": np.arange(21, dtype=np.float32).reshape(7, 3),
}
STATE_AXES = {
    "count": (),
    "key": (None,),
    "mu": {"w": ("embed", "heads")},
    "nu": {"w": ("embed", "heads")},
    "flags": ("heads",),
    "half": ("ffn",),
    "scale": (),
    "none": (None, None),
    "odd": (None, None),
}
STATE_SIZES = {"embed": {8}, "heads": {12}, "ffn": {24}}


@pytest.mark.parametrize(
    ("a", "b"),
    [("mixed8", "tp4"), ("fsdp4", "three"), ("overlap", "mixed8"), ("one", "tp4"), ("tp4", "one")],
)
def test_every_dtype_and_rank_survives(a, b):
    source, target = trees(a, b, STATE_AXES, STATE_SIZES)
    for network in (None, Network((0,) * 8)):  # with and without plain copies
        moved(STATE, source, target, network=network)


def test_an_empty_tree_and_a_single_array():
    route = Route({}, {})
    assert route({}) == {} and route.alias and route.report().nu == 1
    source, target = (rules(PLACES[p], {}).tree((None,)) for p in ("fsdp4", "one"))
    out, route = moved(jnp.arange(5), source, target)
    assert out.shape == (5,) and not route.alias


def test_splits_that_do_not_nest():
    """6 by 2, then by 3: shards of 3 are sent in pieces of 2 and 1."""
    a, b = (
        NamedSharding(mesh(Placement(tuple(range(n)), fsdp=n)), PartitionSpec("fsdp"))
        for n in (2, 3)
    )
    _, route = moved(jnp.arange(6), a, b)
    report = route.report()
    assert counted(route)[0] == report.received == report.minimum == 4 * (1 + 1 + 0 + 2 - 1)


def test_layouts_of_other_names_are_one_layout():
    a, b = (
        NamedSharding(mesh(Placement((0, 1), **axes)), PartitionSpec(name))
        for axes, name in (({"fsdp": 2}, "fsdp"), ({"tensor": 2}, "tensor"))
    )
    x = jax.device_put(jnp.arange(4), a)
    route = Route(a, b)
    assert route.alias and a != b
    out = route(x)
    assert out.sharding == b and route.report().received == 0
    pointers = [[s.data.unsafe_buffer_pointer() for s in v.addressable_shards] for v in (x, out)]
    assert pointers[0] == pointers[1]


@pytest.mark.parametrize(("a", "b"), [("fsdp4", "fsdp4"), ("fsdp4", "tp4"), ("fsdp4", "overlap")])
def test_a_fresh_result_outlives_its_source(a, b):
    source, target = trees(a, b, AXES, {"embed": {8}, "heads": {4}, "layers": {2}})
    tree = jax.device_put(_tree(), source)
    route = Route(tree, target, fresh=True)
    assert not route.alias
    out = route(tree)
    for x in jax.tree.leaves(tree):
        x.delete()
    jax.tree.map(np.testing.assert_array_equal, out, _tree())
    assert route.report().received == Route(tree, target).report().received


@pytest.mark.parametrize(("a", "b"), [("fsdp4", "tp4"), ("fsdp4", "tp2_other_half")])
def test_a_donated_source_is_gone(a, b):
    source, target = trees(a, b, AXES, {"embed": {8}, "heads": {4}, "layers": {2}})
    tree = jax.device_put(_tree(), source)
    out = Route(source, target, donate=True)(tree)
    jax.tree.map(np.testing.assert_array_equal, out, _tree())
    assert all(x.is_deleted() for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("a", "b"),
    [("fsdp4", "tp4"), ("fsdp4", "tp2_other_half"), ("fsdp4", "fsdp4"), ("one", "three")],
)
@pytest.mark.parametrize(("before", "after"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_numbers_travel_in_the_narrower_dtype(a, b, before, after):
    source, target = trees(a, b, AXES, {"embed": {8}, "heads": {4}, "layers": {2}})
    values = jax.tree.map(lambda x: x.astype(before), _tree())
    out, route = moved(values, source, target, dtype=after)
    assert out["w"].dtype == after and not route.alias
    report = route.report()
    assert counted(route)[0] == report.received <= 1.25 * report.minimum
    half = jax.tree.map(lambda x: x.astype("bfloat16"), _tree())
    assert report.minimum == Route(jax.device_put(half, source), target).report().minimum
    for program in route.programs():  # nothing is widened on the wire
        assert {c.dtype for c in hlo_bytes.collectives(program)} <= {"u16"}


@pytest.mark.parametrize(("a", "b"), [("fsdp4", "tp4"), ("fsdp4", "overlap"), ("tp4", "three")])
@pytest.mark.parametrize("network", [None, Network((0,) * 8)])
def test_buckets_and_parts_of_large_arrays(a, b, network):
    axes = {"w": ("layers", "embed", "heads"), "v": ("embed", "heads"), "u": ("embed", "heads")}
    source, target = trees(a, b, axes, {"embed": {8}, "heads": {4}, "layers": {6}})
    tree = {
        "w": jnp.arange(6 * 8 * 4, dtype=jnp.float32).reshape(6, 8, 4),
        "v": jnp.arange(32, dtype=jnp.int32).reshape(8, 4),
        "u": -jnp.arange(32, dtype=jnp.float32).reshape(8, 4),
    }
    out, route = moved(tree, source, target, bucket_bytes=64, network=network)
    whole = Route(out, target).report()
    report = route.report()
    assert report.buckets >= 4 and counted(route)[0] == report.received
    at_once = Route(jax.device_put(tree, source), target, network=network).report()
    assert report.minimum == at_once.minimum and report.peak_bytes < at_once.peak_bytes
    assert whole.nu == 1 and whole.buckets == 0


@pytest.mark.parametrize("b", ["fsdp4", "tp4", "tp2_other_half"])
def test_memory_kinds_are_kept(b, monkeypatch):
    source, target = trees("fsdp4", b, AXES, {"embed": {8}, "heads": {4}, "layers": {2}})
    pinned = [
        jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), t) for t in (source, target)
    ]
    bounced = []
    fetch = type(jnp.zeros(1))._value
    spy = property(lambda self: bounced.append(self.shape) or fetch.fget(self))
    for s, t in ((pinned[0], target), (source, pinned[1]), pinned):
        tree = jax.device_put(_tree(), s)
        with monkeypatch.context() as patched:
            patched.setattr(type(tree["w"]), "_value", spy)
            out = Route(s, t)(tree)
        assert not bounced
        kinds = [
            jax.tree.map(lambda x: x.memory_kind, t),
            {k: v.sharding.memory_kind for k, v in out.items()},
        ]
        assert kinds[0] == kinds[1]
        jax.tree.map(np.testing.assert_array_equal, out, _tree())
        assert Route(s, t).alias == (s == t)


def test_a_route_says_what_it_moves():
    source, target = trees("fsdp4", "tp4", AXES, {"embed": {8}, "heads": {4}, "layers": {2}})
    route = Route(source, target)
    with pytest.raises(ValueError, match="shapes are not known"):
        route.report()
    tree = jax.device_put(_tree(), source)
    report = route.report(tree)
    assert report.nu == 1 and report.steps == {"all-to-all": 1, "all-gather": 1}
    assert counted(route, tree) == (report.received, report.steps)
    assert "1.00 x the minimum, by 1 all-" in str(report)
    bound = Bound(Network.local())
    for k, x in tree.items():
        bound.add(*(DeviceLayout.of(s[k], x.ndim) for s in (source, target)), x.nbytes)
    assert 0 < bound.seconds < report.seconds
    assert bound.minimum == report.minimum
    with pytest.raises(ValueError, match=r"route is for float32\[8\], not float32\[4\]"):
        route({**tree, "b": tree["b"][:4]})
    with pytest.raises(ValueError, match="does not divide"):
        Route(source["b"], target["b"]).report(jax.ShapeDtypeStruct((6,), jnp.float32))


def test_programs_are_shared_by_routes():
    source, target = trees("fsdp4", "tp4", AXES, {"embed": {8}, "heads": {4}, "layers": {2}})
    tree = jax.device_put(_tree(), source)
    first, second = (Route(tree, target).programs() for _ in range(2))
    assert len(first) == 1 and first[0] is second[0]

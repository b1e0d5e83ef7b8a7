"""Reallocation planned without devices: bytes, bounds, paths, rounds."""

import math
import time

import numpy as np
import pairs
import pytest
from bound import Bound
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jaxrl_eff.parallel import Placement
from jaxrl_eff.parallel.reshard import choose
from jaxrl_eff.parallel.reshard.chain import chain
from jaxrl_eff.parallel.reshard.collectives import AllToAll, Copies, Gather, Permute, Slice
from jaxrl_eff.parallel.reshard.layout import DeviceLayout, Network, Units, missing
from jaxrl_eff.parallel.reshard.messages import exchange

EIGHT = tuple(range(8))
NET = pairs.network(8)


def placed(spec, devices=EIGHT, **axes):
    place = Placement(devices, **axes)
    return DeviceLayout.on(place.devices, place.axes, spec, len(spec))


def held(layout, whole):
    """Slow twin of `coords`: for every device the indices of the elements that it holds."""
    shape = tuple(whole)
    grid = np.arange(math.prod(shape)).reshape(shape)
    size = [n // c for n, c in zip(shape, layout.counts, strict=True)]
    return {
        d: set(grid[tuple(slice(c * n, (c + 1) * n) for c, n in zip(at, size, strict=True))].flat)
        for d, at in layout.coords.items()
    }


MESHES = [(1, 2, 3), (3, 2, 1), (2, 2, 2), (1, 1, 5), (2, 1, 4), (1, 4, 1), (1, 1, 1)]
DIMS = [("fsdp", "tensor"), ("tensor", "fsdp"), (("fsdp", "tensor"), None), (None, "data")]
choices = st.tuples(st.permutations(range(12)), st.sampled_from(MESHES), st.sampled_from(DIMS))


def built(choice):
    devices, (data, fsdp, tensor), dims = choice
    devices = tuple(devices[: data * fsdp * tensor])
    return placed(P(*dims), devices, data=data, fsdp=fsdp, tensor=tensor)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(choices, choices)
def test_messages_bring_exactly_what_is_missing(a, b):
    source, target = built(a), built(b)
    units = Units.of(source, target)
    have, want = held(source, units.whole), held(target, units.whole)
    least = missing(source, target)
    for d in target.devices:
        assert least[d] * units.volume == pytest.approx(len(want[d] - have.get(d, set())))
    plan = exchange(source, target, pairs.network(12))
    grid = np.arange(units.volume).reshape(units.whole)
    out = {d: np.full(units.target, -1) for d in target.devices}
    for r in (*plan.kept, *plan.rounds):
        senders, receivers = ([getattr(b, e) for b in r.boxes] for e in ("source", "target"))
        assert len(set(senders)) == len(senders) and len(set(receivers)) == len(receivers)
        for b in r.boxes:
            at = source.coords[b.source]
            low = [c * n + s for c, n, s in zip(at, units.source, b.start, strict=True)]
            cut = tuple(slice(i, i + n) for i, n in zip(low, r.size, strict=True))
            put = tuple(slice(i, i + n) for i, n in zip(b.put, r.size, strict=True))
            assert (out[b.target][put] == -1).all()
            out[b.target][put] = grid[cut]
    for d in target.devices:
        assert set(out[d].flat) == want[d]
    assert plan.total == pytest.approx(sum(least.values()))


def test_as_many_rounds_as_the_busiest_device_has_messages():
    source, target = placed(P("fsdp", None), fsdp=8), placed(P(None, "tensor"), tensor=8)
    plan = exchange(source, target, NET)
    assert len(plan.rounds) == 7 and all(len(r.boxes) == 8 for r in plan.rounds)
    assert len(exchange(placed(P(None), (0,)), placed(P("tensor"), tensor=8), NET).rounds) == 7


def test_load_is_balanced_over_replicas():
    source = placed(P("tensor", None), data=4, tensor=2)
    target = placed(P("tensor", None), tuple(range(8, 16)), data=4, tensor=2)
    plan = exchange(source, target, pairs.network(16))
    (only,) = plan.rounds
    assert sorted(b.source for b in only.boxes) == list(EIGHT)


def kinds(steps):
    return [type(s).__name__ for s in steps]


def test_paths_of_the_textbook():
    """Where XLA would gather everything first: 8 and 10 times the bytes."""
    n, room = 16, (16, 16)
    net, every = pairs.network(n), tuple(range(n))
    source = DeviceLayout(every, (2, 8), ((0, 1), ()))
    steps = chain(source, DeviceLayout(every, (2, 8), ((), (1,))), room, 1e9, net)
    assert kinds(steps) == ["AllToAll", "Gather"]
    total = sum(s.total for s in steps)
    assert total == pytest.approx(
        sum(missing(source, DeviceLayout(every, (2, 8), ((), (1,)))).values())
    )
    # fsdp 4 x tensor 4 to tensor 8, with all axes moved while the shards are smallest.
    source, target = (
        DeviceLayout(every, (4, 4), ((0,), (1,))),
        DeviceLayout(every, (2, 8), ((), (1,))),
    )
    steps = chain(source, target, room, 1e9, net, thrifty=True)
    assert {"Permute", "Gather"} <= set(kinds(steps))
    assert sum(s.total for s in steps) <= 1.25 * sum(missing(source, target).values())


def test_reordered_meshes_have_a_common_refinement_if_their_strides_fit():
    strided = (0, 2, 4, 6, 1, 3, 5, 7)  # the axes of a 4 x 2 mesh swapped
    source = placed(P("tensor"), tensor=8)
    assert chain(source, placed(P("tensor"), strided, tensor=8), (8,), 1e9, NET) is not None
    crooked = (0, 2, 1, 3, 4, 5, 6, 7)
    assert chain(source, placed(P("tensor"), crooked, tensor=8), (8,), 1e9, NET) is None


def test_splits_that_do_not_nest_go_by_messages():
    source, target = placed(P("fsdp"), (0, 1), fsdp=2), placed(P("fsdp"), (0, 1, 2), fsdp=3)
    way = choose.way(source, target, choose.room((6,), source, target), 24, NET)
    assert way.total == pytest.approx(sum(missing(source, target).values()))


def test_what_the_target_repeats_crosses_once_and_is_gathered_there():
    net = Network((0,) * 4 + (1,) * 4, 100e9, 10e9)
    source = placed(P("fsdp", None), EIGHT[:4], fsdp=4)
    target = placed(P("fsdp", None), EIGHT[4:], data=4)
    way = choose.way(source, target, (4, 4), 1e9, net)
    assert [kinds(s.steps) for s in way.stages] == [["Exchange"], ["Gather"]]
    assert way.total == pytest.approx(4)
    bound = Bound(net)
    bound.add(source, target, 1e9)
    # One tensor through four NICs; direct messages would take four times as long.
    assert bound.seconds == pytest.approx(1e9 / 4 / 10e9)
    assert way.seconds < 1.5 * bound.seconds


def test_copies_are_taken_by_one_process_and_alias_by_all():
    net = Network((0,) * 8, copy_latency=1e-6, copies=True)
    source, target = (placed(P("fsdp"), d, fsdp=4) for d in (EIGHT[:4], EIGHT[4:]))
    (stage,) = choose.way(source, target, (4,), 100, net).stages
    assert isinstance(stage.steps[0], Copies)
    assert choose.way(source, placed(P("tensor"), EIGHT[:4], tensor=4), (4,), 100, net).stages == ()


def test_nothing_is_received_where_a_slice_will_do():
    source, target = placed(P(None), data=8), placed(P("fsdp"), fsdp=8)
    steps = chain(source, target, (8,), 1e9, NET)
    assert all(isinstance(s, Slice) for s in steps)
    # A dimension that cannot be split further is left alone.
    assert chain(
        placed(P("fsdp", None), fsdp=8), placed(P(None, "tensor"), tensor=8), (8, 8), 1, NET
    )
    with_less = chain(placed(P("fsdp", None), fsdp=8), placed(P(None, None)), (8, 2), 1e9, NET)
    assert kinds(with_less) == ["Gather"]


def test_lower_bound_counts_hosts_and_links():
    net = Network((0, 0, 1, 1), 10.0, 1.0)
    source, target = placed(P("fsdp"), (0, 1), fsdp=2), placed(P("fsdp"), (2, 3), data=2)
    bound = Bound(net)
    bound.add(source, target, 100)
    assert bound.minimum == 200
    # Each device receives 100 at 10/s; the host imports 100 through two NICs; two NICs export it.
    assert bound.seconds == pytest.approx(50.0)


def test_planning_is_quick():
    net = Network(tuple(i // 8 for i in range(64)), 3e11, 3e10)
    every = tuple(range(64))
    start = time.perf_counter()
    source = placed(P(None, "fsdp", "tensor"), every, fsdp=64)
    target = placed(P(None, "fsdp", "tensor"), every, data=4, tensor=16)
    way = choose.way(source, target, (64, 64, 64), 1e9, net)
    assert time.perf_counter() - start < 5
    assert any(isinstance(s, AllToAll | Gather | Permute) for st in way.stages for s in st.steps)

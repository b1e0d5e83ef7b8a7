"""The paper's plan counts, and what may not be lost by pruning."""

import dataclasses
import itertools
import math

import pytest
from sized import sized

from jaxrl_eff.parallel import Placement
from jaxrl_eff.planner import clusters, space
from jaxrl_eff.planner.clusters import Cluster
from jaxrl_eff.planner.problem import Lengths, Problem, Role, Work
from jaxrl_eff.planner.space import Slice, Strategy


def cluster_of(devices: int, per_host: int = 8) -> Cluster:
    """A cluster of so many devices; how fast they are does not matter here."""
    return clusters.gpus("h100").with_(devices=devices, per_host=per_host, domain=per_host)


# GPUs, fewest of a mesh, meshes, (mesh, strategy) pairs a call, and the decimal logarithm of PPO's
# plans: all of them, and after ReaL's filters.
COUNTS = [
    (8, 1, 15, 42, 9.7, None), (8, 4, 3, 22, None, 8.1),
    (16, 1, 31, 98, 11.9, None), (16, 4, 7, 58, None, 10.5),
    (32, 1, 66, 256, 14.4, None), (32, 4, 18, 176, None, 13.1),
    (64, 1, 148, 780, 17.4, None), (64, 4, 52, 620, None, 16.0),
    (128, 1, 360, 2784, 20.7, None), (128, 4, 168, 2464, None, 19.4),
]  # fmt: skip


@pytest.mark.parametrize(("gpus", "smallest", "legal", "choices", "plans", "filtered"), COUNTS)
def test_the_papers_space_is_counted(gpus, smallest, legal, choices, plans, filtered):
    """Meshes, choices a call and 6-call plans, also after the filters of ReaL's code."""
    found = space.meshes(cluster_of(gpus), smallest)
    assert len(found) == len(set(found)) == legal
    pairs = [(m, s) for m in found for s in space.pipelined(m.count)]
    assert len(pairs) == choices
    if plans is not None:
        assert round(6 * math.log10(choices), 1) == plans
    if filtered is not None:
        deep = [s for _, s in pairs if s.stage <= max(gpus // 8, 8)]
        train = [s for s in deep if s.tensor * s.data <= 8]
        size = 2 * math.log10(len(train)) + 4 * math.log10(len(deep))
        assert round(size, 1) == filtered


@pytest.mark.parametrize(
    ("devices", "per_host"), [(1, 1), (8, 8), (16, 8), (12, 4), (6, 6), (2, 2)]
)
def test_meshes_are_aligned_and_leave_no_holes(devices, per_host):
    found = space.meshes(cluster_of(devices, per_host))
    for m in found:
        assert 0 <= m.start < m.stop <= devices
        inside = m.start // per_host == (m.stop - 1) // per_host
        assert (inside and m.count < per_host and m.start % per_host % m.count == 0) or (
            m.start % per_host == 0 and m.count % per_host == 0
        )
    for a, b in itertools.combinations(found, 2):  # overlapping ones are nested, or whole hosts
        nested = set(a.devices) <= set(b.devices) or set(b.devices) <= set(a.devices)
        assert not a.overlaps(b) or nested or min(a.count, b.count) >= per_host
        assert a.overlaps(b) == bool(set(a.devices) & set(b.devices))
    assert Slice(0, devices) in found


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 24])
def test_executable_strategies_are_placements(count):
    found = space.strategies(count)
    assert len(found) == len(set(found))
    for s in found:
        p = space.placement(Slice(0, count), s)
        assert (p.stage, p.seq, p.data, p.fsdp, p.tensor) == (1, 1, s.data, s.fsdp, s.tensor)
        assert s.tensor <= 8
    assert set(found) <= set(space.strategies(count, executable=False))


def test_strategies_keep_to_what_the_model_divides_by():
    lm = sized(2, 12, 4, 2, 4, 40, 10)
    found = space.strategies(16, lm=lm, executable=False)
    assert {s.tensor for s in found} == {1, 2, 4}
    assert {s.fsdp for s in found} == {1, 2, 4}
    assert {s.stage for s in found} == {1, 2}


def test_microbatches_divide_the_rows_of_an_update():
    train = Work("t", "train", "a", rows=48, length=8, minibatches=2)
    assert space.microbatches(train, Strategy(1, 2, 2, 1)) == (1, 2, 3, 6)
    assert space.microbatches(train, Strategy(1, 8, 2, 1)) == ()
    gen = Work("g", "generate", "a", rows=48, prompts=6, max_new=4)
    assert space.microbatches(gen, Strategy(1, 2, 1, 4)) == (1, 3)
    long = Work("i", "infer", "a", rows=3 * 2**12, length=8)
    found = space.microbatches(long, Strategy(1, 1, 1, 1))
    assert found[-1] == long.rows and all(long.rows % n == 0 for n in found)


@dataclasses.dataclass(frozen=True)
class Paid:
    seconds: float
    static_bytes: float
    active_bytes: float


def price(work: Work, where: Placement) -> Paid:
    """A toy: tensor parallelism and microbatches cost time, fsdp and offload save memory."""
    slow = 1 + 0.1 * (where.tensor - 1) + 0.05 * (where.fsdp > 1) + 0.01 * where.microbatches
    held = 100.0 / (where.fsdp * where.tensor * where.stage)
    if getattr(where, "offload", ""):
        slow, held = slow + 0.3, held / 2
    active = work.rows / (where.data * where.fsdp * max(where.microbatches, 4 / where.data))
    return Paid(8 * slow / len(where.devices), held, active)


def problem() -> Problem:
    lm = sized(2, 16, 4, 2, 4, 32, 10)
    works = (
        Work("gen", "generate", "a", rows=16, prompts=16, prompt=4, max_new=4,
             responses=Lengths.all(4), writes=("tokens",)),
        Work("train", "train", "a", rows=16, length=8, reads=("tokens",)),
    )  # fmt: skip
    return Problem(works, {"a": Role(lm, 8.0, 4.0)})


def test_pruning_keeps_the_best_of_every_memory_limit():
    """For any limit, the fastest candidate that fits is as fast after pruning; and of each layout
    where reallocation could cost anything."""
    work = problem().works[1]
    found = space.candidates(problem(), work, cluster_of(8), price)
    assert set(found) == {1, 2, 4, 8}
    for options in found.values():
        for moved in (0.0, 0.05, math.inf):
            kept = space.pareto(options, moved=moved)
            assert set(kept) <= set(options)
            for limit in sorted({c.bytes for c in options}):
                fits = [c for c in options if c.bytes <= limit]
                left = [c for c in kept if c.bytes <= limit]
                assert min(c.seconds for c in left) == min(c.seconds for c in fits)
                for c in fits:  # a layout is given up only for one that wins by `moved`
                    same = [k.seconds for k in left if k.layout == c.layout]
                    best = min(k.seconds for k in left)
                    assert (same and min(same) <= c.seconds) or best + moved <= c.seconds
        assert len(space.pareto(options)) <= len(space.pareto(options, moved=math.inf))


def test_candidates_say_what_they_hold_and_fit():
    found = space.candidates(problem(), problem().works[0], cluster_of(8), price, smallest=4)
    assert set(found) == {4, 8}
    for count, options in found.items():
        for c in options:
            where = c.at(8)
            assert where.devices == tuple(range(8, 8 + count))
            assert c.seconds == price(problem().works[0], where).seconds
    few = space.fitting(found, 20.0)
    assert all(c.bytes <= 20.0 for cs in few.values() for c in cs)
    assert not space.fitting(found, 1.0)


def test_tokens_of_long_rows_may_be_spread_and_those_of_short_ones_not():
    short, long = (space.strategies(8, length=n) for n in (512, 8192))
    assert {s.seq for s in short} == {1} and {s.seq for s in long} == {1, 2, 4, 8}
    assert set(short) < set(long) and len(set(long)) == len(long)
    for s in long:
        assert s.data * s.fsdp * s.tensor * s.seq == 8
    assert all(s.seq in (1, 3) for s in space.strategies(6, length=3 * 1023))

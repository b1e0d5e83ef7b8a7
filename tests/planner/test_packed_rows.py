"""Packed calls are priced by the schedule of rows that are as long as expected."""

import dataclasses

import numpy as np
import pytest
import steps

from jaxrl_eff.data.balance import skrull
from jaxrl_eff.parallel import Placement
from jaxrl_eff.planner import clusters, packed_rows, space, zero_advice
from jaxrl_eff.planner.cost import call_cost
from jaxrl_eff.planner.problem import ExpectedRows, Lengths
from jaxrl_eff.planner.search import search
from jaxrl_eff.train import balanced
from jaxrl_eff.train.replan import _with_length

H100 = clusters.parse("h100:1x8")
HALF = ExpectedRows(256, Lengths((64, 256, 768), (0.5, 0.25, 0.25)))
FULL = ExpectedRows(256, Lengths.all(768))


def packed(found, size="1b", rows=256):
    """GRPO of rows of 1,024 tokens, its passes packed or (None) padded."""
    problem = steps.grpo(size, rows=rows)
    works = (
        dataclasses.replace(w, packed=found if w.kind in ("infer", "train") else None)
        for w in problem.works
    )
    return dataclasses.replace(problem, works=tuple(works))


def on(count, **axes):
    return Placement(tuple(range(count)), **axes)


def price(problem, name, place):
    return call_cost(problem, problem.work(name), place, H100)


@pytest.mark.parametrize("name", ["ref_inf", "actor_train"])
def test_rows_that_are_all_full_cost_what_padded_ones_do(name):
    for place in (on(1, microbatches=4), on(8, microbatches=4), on(8, fsdp=8, microbatches=2)):
        ours, theirs = price(packed(FULL), name, place), price(packed(None), name, place)
        assert ours.seconds == pytest.approx(theirs.seconds, rel=0.15)
        assert ours.static_bytes == theirs.static_bytes
        assert ours.active_bytes == pytest.approx(theirs.active_bytes, rel=0.3)


@pytest.mark.parametrize("place", [on(8), on(8, data=2, seq=4), on(8, data=2, tensor=4)])
def test_the_price_is_that_of_the_whole_search_for_a_schedule(place):
    problem = packed(HALF, rows=128)
    work, lm = problem.work("actor_train"), problem.roles["actor"].lm
    cost = packed_rows.cost_on(H100, lm, seq=place.seq, tensor=place.tensor)
    lengths = packed_rows.batch(HALF, 64)
    assert sorted({*lengths.tolist()}) == [320, 512, 1024] and (lengths == 320).sum() == 32
    capacity = int(max(1.25 * lengths.sum() / (place.row_shards * place.seq), 1024 / place.seq))
    done = skrull.plan(
        lengths, groups=place.row_shards, parts=place.seq, capacity=capacity, cost=cost
    )
    found = price(problem, "actor_train", place)
    passes = 3 + 1  # remat
    seconds = done.seconds - len(done.shapes) * cost.micro_seconds
    parts = found.parts["compute"] + found.parts.get("seq", 0.0)
    assert parts == pytest.approx(2 * seconds * passes / 3, rel=0.03)
    assert work.minibatches == 2


def test_shorter_responses_and_a_sequence_axis_for_long_ones_cost_less():
    short = ExpectedRows(256, Lengths((32, 768), (0.95, 0.05)))
    costs = [price(packed(x), "actor_train", on(8)).seconds for x in (short, HALF, FULL)]
    assert costs == sorted(costs) and costs[0] < 0.5 * costs[-1]
    # One row of many is long: as one device's it would be waited for.
    rare = ExpectedRows(64, Lengths((64, 60_000), (0.99, 0.01)))
    problem = packed(rare, rows=64)
    works = tuple(
        dataclasses.replace(w, length=60_064, minibatches=1) if w.packed else w
        for w in problem.works
    )
    problem = dataclasses.replace(problem, works=works)
    apart, together = (price(problem, "actor_train", p) for p in (on(8), on(8, data=1, seq=8)))
    assert together.seconds < apart.seconds and together.active_bytes < apart.active_bytes


def test_microbatches_stand_for_the_room():
    costs = [price(packed(HALF), "actor_train", on(1, microbatches=m)) for m in (1, 2, 4)]
    held = [c.active_bytes for c in costs]
    assert held == sorted(held, reverse=True) and costs[0].seconds < costs[-1].seconds
    fixed = dataclasses.replace(HALF, capacity=2048)
    same = [price(packed(fixed), "actor_train", on(1, microbatches=m)) for m in (1, 4)]
    assert same[0].seconds == same[1].seconds
    work = packed(fixed).work("actor_train")
    assert space.microbatches(work, space.Strategy(1, 1, 1, 1)) == (1,)
    narrow = dataclasses.replace(work, packed=dataclasses.replace(HALF, capacity=300))
    assert space.microbatches(narrow, space.Strategy(1, 1, 1, 1)) == ()
    assert space.microbatches(narrow, space.Strategy(1, 1, 1, 1, seq=4)) == (1,)
    odd = dataclasses.replace(work, rows=255)
    assert space.microbatches(odd, space.Strategy(1, 2, 1, 1)) == ()  # two minibatches


def test_many_rows_are_priced_by_a_part_of_them():
    few, many = (packed(HALF, rows=n) for n in (512, 4096))
    a, b = price(few, "ref_inf", on(1)), price(many, "ref_inf", on(8))
    assert b.parts["compute"] == pytest.approx(a.parts["compute"], rel=0.02)


def test_plans_are_searched_and_lengths_corrected():
    problem = packed(HALF)
    two = clusters.parse("h100:1x2")
    found = search(problem, two, evaluations=300, seed=0)
    padded = search(packed(None), two, evaluations=300, seed=0)
    assert found.schedule.seconds < 0.9 * padded.schedule.seconds
    assert found.bound.seconds <= found.schedule.seconds
    new = _with_length(problem, 96.0)
    lengths = new.work("ref_inf").packed
    assert lengths.mean == pytest.approx(256 + 96, abs=3) and lengths.responses.tokens[-1] == 768
    nodes = clusters.parse("h100:2x8")
    ours, theirs = (zero_advice.advice(p, nodes)[0].tokens for p in (problem, packed(None)))
    assert ours == pytest.approx(theirs * HALF.mean / 1024)
    narrow = packed(dataclasses.replace(HALF, capacity=100))
    with pytest.raises(ValueError, match="1024 tokens, more than the room for 100 a device"):
        search(narrow, H100, evaluations=10, seed=0)


def test_what_is_guessed_of_responses_has_few_values_and_their_mean():
    pool = np.concatenate(balanced.guessed([0], 512))
    found = ExpectedRows(0, packed_rows.guessed(pool))
    assert len(found.responses.tokens) <= 32 and found.responses.tokens[-1] == 512
    assert found.mean == pytest.approx(pool.mean(), rel=0.02)

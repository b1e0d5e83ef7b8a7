"""Arrays of schedules and back, and the lattice of their shapes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_eff import edges
from jaxrl_eff.data import skrull
from jaxrl_eff.data.lattice import chosen, lattice
from jaxrl_eff.data.schedules import Shape
from jaxrl_eff.data.skrull_cost import Model, cost_of
from jaxrl_eff.data.skrull_layout import gather_back, lay_out, place

COST = cost_of(Model(2, 64, 4, 2, 16, 128, 256), flops_per_s=1e12, bytes_per_s=1e9)
checked = settings(max_examples=40, deadline=None, derandomize=True)
batches = st.tuples(
    st.lists(st.integers(1, 90), min_size=1, max_size=16),
    st.sampled_from([(1, 1), (1, 4), (2, 3), (3, 2)]),
    st.sampled_from(["plan", "packed", "printed"]),
)


def scheduled(batch):
    lengths, (groups, parts), rule = batch
    same = {"groups": groups, "parts": parts, "room": 96, "cost": COST}
    found = getattr(skrull, rule)(lengths, **same)
    rng = np.random.default_rng(len(lengths))
    examples = [
        (rng.integers(1, 1000, n).astype(np.int32), rng.integers(0, 2, n).astype(np.float32))
        for n in lengths
    ]
    return found, examples


@checked
@given(batches)
def test_gather_back_inverts_the_layout(batch):
    schedule, examples = scheduled(batch)
    arrays = lay_out(schedule, examples)
    for name, values in (
        ("tokens", [ids for ids, _ in examples]),
        ("mask", [mask for _, mask in examples]),
        ("position", [np.arange(len(ids)) for ids, _ in examples]),
        ("example", [np.full(len(ids), k) for k, (ids, _) in enumerate(examples)]),
        ("target", [np.append(ids[1:], 0) for ids, _ in examples]),
        ("weight", [np.append(mask[1:], 0) for _, mask in examples]),
    ):
        back = gather_back(schedule, [a[name] for a in arrays])
        assert all(np.array_equal(a, b) for a, b in zip(back, values, strict=True)), name
    # What a column predicts comes back at the token that it predicts.
    back = gather_back(schedule, [a["target"] for a in arrays], predicted=True)
    for found, (ids, _) in zip(back, examples, strict=True):
        assert found[0] == 0 and np.array_equal(found[1:], ids[1:])
    assert sum(a["weight"].sum() for a in arrays) == sum(m[1:].sum() for _, m in examples)
    assert sum((a["example"] >= 0).sum() for a in arrays) == sum(schedule.lengths)


@checked
@given(batches)
def test_rows_are_as_the_attention_needs_them(batch):
    schedule, examples = scheduled(batch)
    parts = schedule.parts
    for shape, arrays in zip(schedule.shapes, lay_out(schedule, examples), strict=True):
        edges.check("lay_out", {k: v for k, v in arrays.items() if k != "example"})
        empty = arrays["example"] < 0
        for name in ("tokens", "mask", "target", "weight"):
            assert not arrays[name][empty].any()
        for g in range(schedule.groups):
            rows = {k: v[g * parts : (g + 1) * parts] for k, v in arrays.items()}
            segment, position = rows["segment"], rows["position"]
            # Distributed: the same segments on every rank, and stripes of one sequence in order.
            over = slice(shape.local, None)
            assert (segment[:, over] == segment[:1, over]).all()
            across = position[:, over].T.ravel()
            across_segment = segment[:, over].T.ravel()
            for s in np.unique(across_segment[across_segment > 0]):
                here = across[across_segment == s]
                assert np.array_equal(here, np.arange(len(here))) and len(here) % parts == 0
                assert s not in segment[:, : shape.local]
            # Local: contiguous on one rank, and under no other rank's number.
            for s in np.unique(segment[:, : shape.local]):
                if s:
                    r, c = np.nonzero(segment[:, : shape.local] == s)
                    assert len(set(r)) == 1 and np.array_equal(c, np.arange(c[0], c[0] + len(c)))
                    assert np.array_equal(position[r[0], c], np.arange(len(c)))
            one = {
                (s, e)
                for s, e in zip(segment.ravel(), rows["example"].ravel(), strict=True)
                if e >= 0
            }
            assert len({s for s, _ in one}) == len(one) == len({e for _, e in one})


def test_a_small_layout_by_hand():
    ids = [np.array([1, 2], np.int32), np.array([11, 12, 13, 14, 15], np.int32)]
    masks = [np.ones(2, np.float32), np.array([0, 0, 1, 1, 1], np.float32)]
    schedule = skrull.packed([2, 5], groups=1, parts=2, room=8, cost=COST)
    (a,) = lay_out(schedule, list(zip(ids, masks, strict=True)), pad=99)
    assert schedule.shapes == (Shape(0, 4),)
    assert a["tokens"].tolist() == [[1, 11, 13, 15], [2, 12, 14, 99]]
    assert a["segment"].tolist() == [[1, 2, 2, 2], [1, 2, 2, 2]]
    assert a["position"].tolist() == [[0, 0, 2, 4], [1, 1, 3, 5]]
    assert a["target"].tolist() == [[2, 12, 14, 99], [99, 13, 15, 99]]
    assert a["weight"].tolist() == [[1, 0, 1, 0], [0, 1, 1, 0]]
    assert a["example"].tolist() == [[0, 1, 1, 1], [0, 1, 1, -1]]


def test_vectors_a_token_are_placed_and_found_again():
    schedule, examples = scheduled(([5, 80, 17, 3], (2, 2), "plan"))
    values = [
        np.random.default_rng(k).normal(size=(len(ids), 3)) for k, (ids, _) in enumerate(examples)
    ]
    back = gather_back(schedule, place(schedule, values, fill=-1.0))
    assert all(np.array_equal(a, b) for a, b in zip(back, values, strict=True))


def test_examples_of_other_lengths_are_named():
    schedule, examples = scheduled(([5, 8], (1, 2), "plan"))
    with pytest.raises(ValueError, match="example 1 has 5 ids, but 8 tokens"):
        lay_out(schedule, [examples[0], examples[0]])
    with pytest.raises(ValueError, match="example 0 has 4 mask, but 5 tokens"):
        lay_out(schedule, [(examples[0][0], examples[0][1][1:]), examples[1]])
    with pytest.raises(ValueError, match="1 examples, but 2 are scheduled"):
        place(schedule, [np.ones(5)])
    with pytest.raises(ValueError, match=r"arrays are \[\], but scheduled are"):
        gather_back(schedule, [])


# The lattice ----------------------------------------------------------------------------------


def columns(wanted, shapes, room):
    """All columns that the wanted shapes take: each the next of the lowest shelf that it can."""
    total = 0
    for w in wanted:
        shelf = min((s.distributed for s in shapes if s.distributed >= w.distributed), default=room)
        holds = [s.columns for s in shapes if s.distributed == shelf and s.columns >= w.columns]
        total += min(holds, default=room)
    return total


def fewest(wanted, room, count):
    """The least columns of any lattice with so many shapes, by trying all."""
    shared, totals = ({f(w) for w in wanted} for f in (lambda w: w[1], sum))
    every = [Shape(n - d, d) for n in totals | shared for d in shared if d <= n <= room]
    full = Shape(0, room)
    return min(
        columns(wanted, [full, *some], room)
        for n in range(count)
        for some in itertools.combinations(every, n)
    )


def test_the_lattice_takes_as_few_columns_as_any_of_shelves():
    rng = np.random.default_rng(3)
    for most in (1, 3, 6):
        for _ in range(8):
            wanted = [Shape(int(s), int(d)) for s, d in rng.integers(0, (7, most), (7, 2))]
            found = chosen(wanted, room=12, shapes=4, multiple=1)
            assert len(found) <= 4 and Shape(0, 12) in found
            assert columns(wanted, found, 12) == fewest(wanted, 12, 4)


def test_more_shapes_pad_less_and_all_keep_the_room():
    rng = np.random.default_rng(0)
    wanted = [Shape(int(s), int(d)) for s, d in rng.integers(0, (3000, 1000), (300, 2))]
    paid = []
    for n in (1, 2, 4, 8, 12):
        found = chosen(wanted, room=4000, shapes=n)
        assert len(found) <= n and Shape(0, 4000) in found
        assert all(s.columns <= 4000 for s in found)
        assert all(x % 128 == 0 or x == 4000 for s in found for x in s)
        paid.append(columns(wanted, found, 4000))
    assert paid == sorted(paid, reverse=True) and paid[-1] < 0.7 * paid[0]


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_batches_need_at_most_twelve_programs(count):
    rng = np.random.default_rng(5)
    seen = np.exp(rng.uniform(np.log(20), np.log(1500), 4000)).astype(int)
    same = {"groups": 2, "parts": 4, "room": 1024, "cost": COST}
    shapes = lattice(seen, batch=12, multiple=32, batches=40, **same)
    assert 2 <= len(shapes) <= 12
    used, slower = set(), []
    for i in range(count):
        # Half of them longer than what the lattice was made for.
        n = np.minimum(rng.choice(seen, 12) * (1 + i % 2), 4096)
        found = skrull.plan(n, shapes=shapes, more=1, **same)
        used |= set(found.shapes)
        assert set(found.shapes) <= set(shapes)
        for shape, tokens in zip(found.shapes, found.tokens(), strict=True):
            assert (tokens.max((0, 1)) <= shape).all()
        if i < 40:
            slower.append(found.seconds / skrull.packed(n, shapes=shapes, more=1, **same).seconds)
    assert len(used) <= 12 and max(slower) <= 1


def test_a_lattice_repeats_itself_and_takes_a_histogram():
    same = {"groups": 1, "parts": 2, "room": 512, "cost": COST, "batch": 8, "batches": 6}
    values, counts = [10, 100, 700], [6, 3, 1]
    assert lattice(values, counts=counts, **same) == lattice(values, counts=counts, **same)
    assert lattice(values, counts=counts, shapes=1, **same) == (Shape(0, 512),)
    with pytest.raises(ValueError, match="a sequence has 1025 tokens"):
        lattice([1025], **same)
    with pytest.raises(ValueError, match="shapes=0"):
        lattice(values, shapes=0, **same)

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_eff.core import glossary
from jaxrl_eff.data import packing

LENGTH = 12
checked = settings(max_examples=60, deadline=None, derandomize=True)
lengths_of = st.lists(st.integers(1, LENGTH), max_size=30)
pairs_of = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=15)


def segment(n, start):
    ids = np.arange(start, start + n, dtype=np.int32)
    return ids, (ids % 3 == 0).astype(np.float32)


def segments(lengths, start=100):
    return [segment(n, start + 50 * i) for i, n in enumerate(lengths)]


def as_lists(items):
    return sorted([ids.tolist(), mask.tolist()] for ids, mask in items)


def slow_best_fit(lengths, length):
    """Looks through all rows for each sequence: what `fit` does with heaps."""
    rows = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        room = [length - sum(lengths[j] for j in row) for row in rows]
        fitting = [(room[r], r) for r in range(len(rows)) if room[r] >= lengths[i]]
        if fitting:
            rows[min(fitting)[1]].append(i)
        else:
            rows.append([i])
    return [sorted(row) for row in rows]


@checked
@given(lengths_of)
def test_fit_equals_best_fit_decreasing_done_slowly(lengths):
    rows, left = packing.fit(lengths, length=LENGTH)
    assert rows == slow_best_fit(lengths, LENGTH) and left == []


@checked
@given(lengths_of, st.integers(0, 6), st.integers(0, 30))
def test_fit_into_few_rows_overfills_none_and_loses_none(lengths, rows, first):
    plan, left = packing.fit(lengths, length=LENGTH, rows=rows, first=first)
    assert len(plan) == rows
    assert all(sum(lengths[i] for i in row) <= LENGTH for row in plan)
    assert sorted([i for row in plan for i in row] + left) == list(range(len(lengths)))
    # Of those that go first, as many as there are rows get in for certain: the earliest.
    assert not set(left) & set(range(min(first, rows, len(lengths))))


@checked
@given(lengths_of)
def test_unpack_inverts_pack(lengths):
    items = segments(lengths)
    arrays = packing.pack(items, length=LENGTH)
    assert as_lists(packing.unpack(arrays)) == as_lists(items)
    glossary.check("pack", arrays)
    padding = arrays["segment"] == 0
    assert not arrays["mask"][padding].any() and not arrays["position"][padding].any()
    assert not arrays["tokens"][padding].any()


@checked
@given(pairs_of)
def test_pairs_stay_whole_with_chosen_first(sizes):
    pairs = [
        (segment(n, 100 + 50 * i), segment(m, 5000 + 50 * i)) for i, (n, m) in enumerate(sizes)
    ]
    arrays = packing.pack_pairs(pairs, length=LENGTH)

    def flat(ps):
        return sorted(
            [*good[0].tolist(), -1, *bad[0].tolist(), *good[1].tolist()] for good, bad in ps
        )

    assert flat(packing.unpack_pairs(arrays)) == flat(pairs)
    chosen = arrays["segment"] % 2 == 1
    assert (arrays["tokens"][chosen] < 5000).all()
    assert (arrays["tokens"][(arrays["segment"] > 0) & ~chosen] >= 5000).all()


def test_a_packed_row_by_hand():
    items = [segment(2, 10), segment(4, 20), segment(3, 30)]
    arrays = packing.pack(items, length=6, rows=2, pad=9)
    np.testing.assert_array_equal(
        arrays["tokens"], [[10, 11, 20, 21, 22, 23], [30, 31, 32, 9, 9, 9]]
    )
    np.testing.assert_array_equal(arrays["segment"], [[1, 1, 2, 2, 2, 2], [1, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(arrays["position"], [[0, 1, 0, 1, 2, 3], [0, 1, 2, 0, 0, 0]])
    np.testing.assert_array_equal(arrays["mask"], [[0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0]])


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="sequence 1 has 13 tokens, but a row holds 1 to 12"):
        packing.pack(segments([3, 13]), length=12)
    with pytest.raises(ValueError, match="sequence 0 has 0 tokens"):
        packing.pack(segments([0]), length=12)
    with pytest.raises(ValueError, match=r"1 of 3 sequences, 5 tokens, do not fit into 2 rows"):
        packing.pack(segments([9, 9, 5]), length=12, rows=2)
    with pytest.raises(ValueError, match="a sequence has 3 ids, but 2 in its mask"):
        packing.pack([(np.arange(3), np.zeros(2, np.float32))], length=12)
    with pytest.raises(ValueError, match="0 chosen and 2 rejected"):
        packing.pack_pairs([(segment(0, 1), segment(2, 1))], length=12)


@checked
@given(st.integers(0, 30), st.integers(0, 30), st.integers(2, 20))
def test_a_shortened_pair_uses_the_room_and_favours_neither_side(n, m, length):
    (chosen, _), (rejected, _) = packing.shorten((segment(n, 0), segment(m, 100)), length=length)
    assert len(chosen) + len(rejected) == min(n + m, length)
    if n + m > length:
        for kept, before, other in ((chosen, n, rejected), (rejected, m, chosen)):
            assert len(kept) == before or len(kept) >= len(other) - 1


def test_shorten_keeps_the_beginning():
    ((ids, mask),) = packing.shorten([segment(9, 30)], length=4)
    np.testing.assert_array_equal(ids, [30, 31, 32, 33])
    np.testing.assert_array_equal(mask, [1, 0, 0, 1])

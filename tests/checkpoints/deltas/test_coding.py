"""Indices as bits: every set comes back, in no more bits than promised."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_eff.checkpoints.deltas import coding


def returns(indices, size):
    code = coding.encode(np.asarray(indices, np.int64), size)
    again = coding.decode(code, size)
    assert again.dtype == np.int64
    np.testing.assert_array_equal(again, indices)
    return len(code)


def slowly_coded_bits(indices, k):
    """Rice's code written out a gap at a time, as text."""
    out, last = [], -1
    for i in indices:
        gap, last = int(i) - last - 1, int(i)
        low = format(gap % 2**k, f"0{k}b") if k else ""
        out.append("0" * (gap >> k) + "1" + low)
    return "".join(out)


@pytest.mark.parametrize("density", [0.001, 0.01, 0.05])
def test_random_indices_take_almost_no_more_than_their_entropy(density):
    indices = np.cumsum(np.random.default_rng(0).geometric(density, 300_000)) - 1
    size = int(indices[-1]) + 1
    bits = 8 * returns(indices, size) / len(indices)
    least = coding.bound(len(indices), size)
    # A code of so few gaps can fall below the entropy by chance, by less than this.
    assert least - 0.01 < bits < least + 0.1


@pytest.mark.parametrize("density", [1e-5, 3e-4, 0.002, 0.02, 0.1, 0.3, 0.5])
def test_other_densities_cost_little_more(density):
    indices = np.cumsum(np.random.default_rng(1).geometric(density, 100_000)) - 1
    size = int(indices[-1]) + 1
    assert 8 * returns(indices, size) / len(indices) < coding.bound(len(indices), size) + 0.12


def test_the_bits_are_those_of_rices_code():
    rng = np.random.default_rng(2)
    indices = np.flatnonzero(rng.random(200_000) < 0.01)
    code = coding.encode(indices, 200_000)
    wanted = min(len(slowly_coded_bits(indices, k)) for k in range(12))
    # Besides: what is coded, k, two sizes, and bytes that are not filled.
    assert wanted <= 8 * len(code) <= wanted + 8 * (6 + 8)


def test_the_bound_is_the_entropy():
    # H(1/2) = 1 bit for an entry, so 2 for an index; nothing to say if all are there.
    assert coding.bound(50, 100) == pytest.approx(2)
    assert coding.bound(100, 100) == 0
    assert coding.bound(10**6, 10**8) == pytest.approx(8.0793, abs=1e-4)
    for count, size in ((0, 10), (11, 10)):
        with pytest.raises(ValueError, match=f"count={count}"):
            coding.bound(count, size)


@pytest.mark.parametrize(
    ("indices", "size", "most"),
    [
        ([], 0, 0),
        ([], 100, 0),
        ([0], 1, 50),
        ([99], 100, 50),
        ([2**40], 2**40 + 1, 50),
        (np.arange(1_000_000), 1_000_000, 50),
        (np.arange(1_000_000) + 17, 2_000_000, 50),
        (np.arange(0, 3_000_000, 3), 3_000_000, 1_000_000 * 3 / 8 + 50),
    ],
    ids=["nothing", "empty", "only one", "last", "far", "whole", "one run", "every third"],
)
def test_special_sets(indices, size, most):
    assert returns(np.asarray(indices), size) <= most


def test_blocks_and_rows_cost_next_to_nothing():
    rng = np.random.default_rng(3)
    size, width = 4096 * 1024, 1024
    mask = np.zeros((4096, width), bool)
    mask[rng.choice(4096, 40, replace=False)] = True  # rows
    for i, j in rng.integers(0, (32, 8), (20, 2)):  # 128 x 128 blocks
        mask[128 * i : 128 * i + 128, 128 * j : 128 * j + 128] = True
    indices = np.flatnonzero(mask)
    assert 8 * returns(indices, size) / len(indices) < 0.15


def test_a_few_long_gaps_do_not_spoil_the_short_ones():
    """Rows of an embedding that were seen, a third of the entries of each."""
    rng = np.random.default_rng(4)
    mask = np.zeros((32_000, 512), bool)
    mask[rng.choice(32_000, 300, replace=False)] = rng.random((300, 512)) < 0.3
    indices = np.flatnonzero(mask)
    within = coding.bound(3, 10)
    assert 8 * returns(indices, mask.size) / len(indices) < within + 1
    assert coding.bound(len(indices), mask.size) > within + 5  # what one density for all says


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(0, 2**40), max_size=60, unique=True),
    st.integers(0, 2**20),
    st.integers(1, 300),
)
def test_every_set_returns(scattered, start, length):
    indices = sorted({*scattered, *range(start, start + length)})
    returns(indices, indices[-1] + 1)
    returns(sorted(scattered), 2**40 + 1)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=80), st.integers(0, 10_000))
def test_other_bytes_are_refused_or_indices(code, size):
    try:
        indices = coding.decode(np.frombuffer(code, np.uint8), size)
    except ValueError:
        return
    np.testing.assert_array_equal(coding.checked(indices, size), indices)


def test_damaged_bytes_are_refused():
    code = coding.encode(np.arange(0, 3000, 7), 3000)
    runs = coding.encode(np.arange(100, 900), 3000)
    for good in (code, runs):
        for bad in (good[:-1], good[:9], np.append(good, good[-1]), np.append(np.uint8(7), good)):
            with pytest.raises(ValueError):
                coding.decode(bad, 3000)
    with pytest.raises(ValueError, match=r"not below 2000|more than 2000"):
        coding.decode(code, 2000)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([3, 2], "not strictly increasing"),
        ([3, 3], "not strictly increasing"),
        ([-1, 2], "from -1 to 2"),
        ([1, 10], "not all below 10"),
        ([0.5], "float64"),
        ([[1, 2]], r"\[1, 2\]"),
    ],
)
def test_what_is_no_set_of_indices_is_refused(indices, message):
    with pytest.raises(ValueError, match=message):
        coding.encode(np.asarray(indices), 10)

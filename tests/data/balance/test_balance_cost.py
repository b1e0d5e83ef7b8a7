"""What a micro-step costs, and how its constants are fitted to measurements."""

import dataclasses

import numpy as np
import pytest
from sized import sized

from jaxrl_eff.data.balance import baselines, skrull
from jaxrl_eff.data.balance.batch import Batch
from jaxrl_eff.data.balance.cost import CONSTANTS, refit, seen
from jaxrl_eff.planner.packed_rows import cost_of

SMALL = sized(24, 896, 14, 2, 64, 4864, 151936)
LARGE = sized(28, 3584, 28, 4, 128, 18944, 152064)
COST = cost_of(SMALL, flops_per_s=400e12, bytes_per_s=100e9, step_seconds=0.05)


def flops(model, tokens=1):
    """A cost in FLOP, and its FLOP of training on a sequence."""
    cost = cost_of(model, flops_per_s=1, bytes_per_s=1, attention_share=1)
    return cost, cost.perfect(np.array([tokens]), 1)


@pytest.mark.parametrize(
    "model, body, head, attention, equal",
    [(SMALL, 0.72, 0.27, 0.044, 23.0), (LARGE, 13.05, 1.09, 0.206, 70.5)],
)
def test_flops_are_those_worked_out_by_hand(model, body, head, attention, equal):
    """Forward GFLOP a token of Qwen2.5's two sizes; attention a token and 1,024 of context."""
    vocab = 2 * model.width * model.vocab
    assert vocab / 1e9 == pytest.approx(head, abs=0.006)
    cost, whole = flops(model, 1000)
    assert (cost.linear / 3 - vocab) / 1e9 == pytest.approx(body, abs=0.006)
    assert cost.square / 3 * 1024 / 1e9 == pytest.approx(attention, abs=0.001)
    assert cost.linear / cost.square / 1e3 == pytest.approx(equal, rel=0.02)
    assert whole == cost.linear * 1000 + cost.square * 1000**2


def test_a_model_counts_its_matrices_one_by_one():
    m = sized(3, 8, 4, 2, 6, 11, 13)
    matrices = 3 * (8 * 24 + 2 * 8 * 12 + 24 * 8 + 3 * 8 * 11) + 8 * 13
    cost, _ = flops(m)
    assert cost.linear == 3 * 2 * matrices
    assert flops(m.replace(head="value"))[0].linear == 3 * 2 * (matrices - 8 * 12)
    pairs = sum(t + 1 for t in range(1000))  # causal: query t sees t + 1 keys
    exact = 3 * 3 * 2 * (2 * 24) * pairs
    assert cost.square * 1000**2 == pytest.approx(exact, rel=0.002)


def test_seconds_follow_equation_2():
    c, local, shared, parts = dataclasses.replace(COST, hop_seconds=1e-4), 1000, 500, 4
    work = c.linear / c.flops_per_s
    sent = 3 * (c.ring_rounds * c.hop_seconds + shared * c.bytes_per_token / c.bytes_per_s)
    mine = work * (local + c.half)
    for attention, distributed in ((0.0, 0.0), (0.02, 0.001), (0.2, 0.003)):
        expected = max(sent, mine + attention) + work * shared + distributed + c.micro_seconds
        found = c.seconds(local, shared, parts, attention, distributed)
        assert found == pytest.approx(expected, rel=1e-12)
    assert sent > mine  # both sides of the max were met
    hidden = dataclasses.replace(c, overlap=1.0)
    assert hidden.seconds(0, shared, parts, 0.0, 1.0) == pytest.approx(
        c.seconds(0, shared, parts, 0.0, 1.0) - sent
    )
    assert c.seconds(0, 0, parts) == c.micro_seconds
    assert c.exchange(500, 1) == 0


def test_windowed_layers_see_what_a_window_reaches():
    n = np.array([1, 7, 64, 300])
    for window in (1, 5, 64, 1000):
        behind = [np.subtract.outer(np.arange(k), np.arange(k)) for k in n]
        pairs = np.array([((b >= 0) & (b < window)).sum() for b in behind])
        # n^2 / 2 stands for the n (n + 1) / 2 pairs of a whole sequence: half a token each is off.
        off = pairs - seen(n, window, 1) / 2
        assert (off >= 0).all() and (off <= n / 2).all(), window
    mixed = SMALL.replace(window=512, windowed=(True, False) * 12)
    assert flops(mixed, 512)[1] == flops(SMALL, 512)[1]
    assert flops(mixed, 4096)[1] < flops(SMALL, 4096)[1]
    cost = cost_of(mixed, flops_per_s=5e14, bytes_per_s=1e11)
    whole = cost_of(SMALL, flops_per_s=5e14, bytes_per_s=1e11)
    lengths = np.array([100, 30_000])
    short, long = cost.attention(lengths) / whole.attention(lengths)
    assert short == 1 and 0.5 < long < 0.53
    assert cost.perfect(lengths, 4) < whole.perfect(lengths, 4)
    with pytest.raises(ValueError, match=r"windowed is 0\.5 and window 0"):
        dataclasses.replace(cost, window=0)


def test_small_kernels_are_slower_and_cut_ones_more_so():
    lengths = np.array([64, 512, 30_000])
    whole = COST.attention(lengths)
    shared = COST.attention(lengths, 8)
    assert np.all(shared < whole) and np.all(8 * shared > whole)
    wasted = 8 * shared / whole
    assert np.all(np.diff(wasted) < 0) and wasted[0] > 5 and wasted[-1] < 1.1
    cost = dataclasses.replace(COST, attention_half=700)
    at_half = cost.square * 700**2 / cost.attention_per_s
    assert cost.attention(np.array([700]))[0] == pytest.approx(2 * at_half)
    assert cost.products(700) == COST.products(700)


def schedules(n, cost, seed=0):
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        lengths = np.exp(rng.uniform(4, 9.5, size=rng.integers(10, 60))).astype(int)
        out.append(skrull.plan(lengths, groups=2, parts=4, capacity=8192, cost=cost))
    return out


@pytest.mark.parametrize("overlap", [0.0, 0.5, 1.0])
def test_terms_times_constants_are_the_seconds(overlap):
    cost = dataclasses.replace(COST, overlap=overlap)
    prices = np.array([_slope(cost, name) for name in CONSTANTS])
    seen = np.zeros(len(CONSTANTS))
    exposed = baselines.packed(Batch([900] * 40, groups=2, parts=4, capacity=8192, cost=cost))
    for s in (*schedules(12, cost), exposed):
        assert s.terms() @ prices == pytest.approx(s.seconds, rel=1e-9)
        seen += s.terms()
    assert (seen > 0).all()


def _slope(cost, name):
    value = getattr(cost, name)
    return 1 / value if name.endswith("per_s") else value


def test_refit_finds_the_constants_that_made_the_times():
    true = dataclasses.replace(
        COST, flops_per_s=250e12, attention_per_s=120e12, micro_seconds=0.011, step_seconds=0.2
    )
    rows = [
        (s.terms(), float(s.terms() @ [_slope(true, c) for c in CONSTANTS]))
        for s in schedules(60, COST)
    ]
    found = refit(COST, rows, trust=1e-4)
    for name in ("flops_per_s", "attention_per_s", "micro_seconds", "step_seconds"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=0.03), name
    error = [abs(t @ [_slope(found, c) for c in CONSTANTS] / s - 1) for t, s in rows]
    before = [abs(t @ [_slope(COST, c) for c in CONSTANTS] / s - 1) for t, s in rows]
    assert max(error) < 0.01 < 0.3 < max(before)


def test_refit_leaves_alone_what_rows_do_not_tell():
    # Every row is the same: one number cannot say which of six constants was wrong.
    s = schedules(1, COST)[0]
    found = refit(COST, [(s.terms(), s.seconds)] * 3)
    for name in CONSTANTS:
        assert getattr(found, name) == pytest.approx(getattr(COST, name), rel=1e-6)
    slower = refit(COST, [(s.terms(), 2 * s.seconds)] * 3)
    assert s.terms() @ [_slope(slower, c) for c in CONSTANTS] == pytest.approx(
        2 * s.seconds, rel=0.02
    )
    faster = refit(COST, [(s.terms(), 1e-3 * s.seconds)] * 3)
    assert all(getattr(faster, name) > 0 for name in CONSTANTS)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="flops_per_s is 0"):
        cost_of(SMALL, flops_per_s=0, bytes_per_s=1)
    with pytest.raises(ValueError, match="overlap is 2"):
        dataclasses.replace(COST, overlap=2)
    for name in ("half", "attention_half"):
        with pytest.raises(ValueError, match=f"Cost.{name} is -1"):
            dataclasses.replace(COST, **{name: -1})
    with pytest.raises(ValueError, match="at least one measured step"):
        refit(COST, [])
    with pytest.raises(ValueError, match="a step took 0"):
        refit(COST, [(np.ones(6), 0.0)])

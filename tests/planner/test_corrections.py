"""Corrections from measured times."""

import pytest
from workload import ROUND, everywhere, on, ppo

from jaxrl_eff.planner import measured
from jaxrl_eff.planner.corrections import NONE
from jaxrl_eff.planner.simulate import simulate

P = ppo(rows=64)
CLUSTER = ROUND.with_(move_seconds=1e-7)
PLAN = everywhere(P, on(0, 4)) | {"actor_gen": on(0, 4, tensor=2), "ref_inf": on(4, 4)}


def predicted(corrections=NONE, plan=PLAN):
    s = simulate(P, plan, CLUSTER, corrections)
    return {n: c.seconds for n, c in s.costs.items()} | dict(s.edges)


def test_the_first_measurement_is_believed():
    true = {n: t * (i + 1) for i, (n, t) in enumerate(predicted().items())}
    c = measured.refit(P, PLAN, CLUSTER, true)
    assert predicted(c) == pytest.approx(true)
    assert measured.error(measured.compare(P, PLAN, CLUSTER, true, c)) < 1e-9
    assert set(c.counts.values()) == {1}


def test_factors_are_taken_to_other_placements_and_unseen_edges():
    true = {n: 3 * t for n, t in predicted().items()}
    c = measured.refit(P, PLAN, CLUSTER, true)
    other = everywhere(P, on(0, 8, fsdp=8)) | {"critic_inf": on(0, 2)}
    before, after = predicted(plan=other), predicted(c, other)
    assert after == pytest.approx({n: 3 * t for n, t in before.items()})
    assert "critic->critic_inf" not in true


def test_later_measurements_move_a_factor_less():
    one = predicted()["ref_inf"]
    c = measured.refit(P, PLAN, CLUSTER, {"ref_inf": one})
    steps = []
    for _ in range(9):
        c = measured.refit(P, PLAN, CLUSTER, {"ref_inf": 2 * one}, c)
        steps.append(c.seconds["ref_inf"])
    assert steps[0] == pytest.approx(2**0.5)
    assert steps == sorted(steps) and 1.9 < steps[-1] < 2


def test_one_odd_step_does_not_count():
    one = predicted()["ref_inf"]
    c = measured.refit(P, PLAN, CLUSTER, {"ref_inf": [one, 50 * one, one]})
    assert c.seconds["ref_inf"] == pytest.approx(1)
    wild = measured.refit(P, PLAN, CLUSTER, {"ref_inf": 1e9 * one})
    assert wild.seconds["ref_inf"] == measured.MOST_CHANGE
    assert measured.refit(P, PLAN, CLUSTER, {"ref_inf": 0.0}).seconds == {}


def test_the_table_names_every_row():
    true = {"actor_gen": 2 * predicted()["actor_gen"]}
    rows = measured.compare(P, PLAN, CLUSTER, true)
    assert [(r.name, r.kind) for r in rows] == [("actor_gen", "generate")]
    assert rows[0].ratio == pytest.approx(2)
    assert measured.error(rows) == pytest.approx(1)
    assert "actor_gen" in measured.text(rows) and "2.00" in measured.text(rows)
    with pytest.raises(ValueError, match=r"measured \['nothing'\]"):
        measured.compare(P, PLAN, CLUSTER, {"nothing": 1.0})

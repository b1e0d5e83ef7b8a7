"""Searched plans: found for the devices there are, corrected by what was measured."""

import dataclasses

import jax
import launch
import numpy as np
import pytest

from jaxrl_eff.core import plan_rules
from jaxrl_eff.core.timing import Span
from jaxrl_eff.planner import clusters, from_graph
from jaxrl_eff.planner.simulate import simulate
from jaxrl_eff.train import assembly, replan, settings

QUICK = settings.SearchSettings(evaluations=200, calibrate=2)


@pytest.fixture(scope="module")
def stage():
    (stage,) = assembly.assemble(launch.config("algorithm=grpo")).stages
    return stage


@pytest.fixture(scope="module")
def searched(stage):
    step = stage.step
    problem = from_graph.works(
        step.graph, stage.lms, stage.batch, sampling=stage.sampling, specs=step.specs
    )
    return replan.search(problem, QUICK, seed=0)


def spans(searched, factors):
    """What a step would show if calls took these factors of what is predicted."""
    said = simulate(searched.problem, searched.plan, searched.cluster)
    return [Span(k, (0,), 0.0, c.seconds * factors.get(k, 1.0)) for k, c in said.costs.items()]


def test_the_plan_is_for_all_devices_and_the_same_each_time(searched):
    assert searched.cluster.devices == jax.device_count()
    again = replan.search(searched.problem, QUICK, seed=0)
    assert again.plan == searched.plan and again.seconds == searched.seconds
    assert searched.seconds <= min(searched.rules.values()) * (1 + 1e-9)
    assert "s a step predicted" in str(searched)


def test_a_cluster_of_another_size_is_refused(searched):
    other = dataclasses.replace(QUICK, cluster="h100:16x8")
    with pytest.raises(ValueError, match="'h100:16x8' has 128 devices, but there are 8"):
        replan.search(searched.problem, other, seed=0)
    with pytest.raises(ValueError, match="unknown hardware 'z9'"):
        replan.search(searched.problem, dataclasses.replace(QUICK, cluster="z9:8"), seed=0)


def test_what_was_measured_is_predicted_afterwards(searched):
    seen = replan.Calibration(searched, 2)
    factors = {"actor_train": 3.0, "actor_gen": 0.5}
    for _ in range(3):
        seen.see(spans(searched, factors), None)
    assert not seen.due(1) and seen.due(2)
    new = seen.corrected()
    ratios = {r.name: r.ratio for r in seen.rows}
    assert ratios["actor_train"] == pytest.approx(3.0) and ratios["actor_gen"] == pytest.approx(0.5)
    said = simulate(new.problem, searched.plan, new.cluster, corrections=new.corrections)
    for span in spans(searched, factors):
        assert said.costs[span.call].seconds == pytest.approx(span.end, rel=1e-6)


def test_a_plan_is_kept_or_taken_and_the_next_look_is_later(searched):
    seen = replan.Calibration(searched, 2)
    seen.see(spans(searched, {}), None)
    new = seen.corrected()
    assert seen.gain(dataclasses.replace(new, plan=searched.plan)) == 0.0
    faster = dataclasses.replace(new, plan={}, seconds=new.seconds / 2)
    assert seen.gain(faster) >= 0.4
    seen.keep(new)
    assert seen.searched.plan == searched.plan
    assert not seen.due(5) and seen.due(6)


def test_a_plan_that_was_slower_than_predicted_is_left_again(stage, searched):
    """The search knows calls alone, and would stay; whole steps were measured and say otherwise."""
    seen = replan.Calibration(searched, 2)
    seen.see(spans(searched, {}), None, searched.seconds)
    new = seen.corrected()
    assert new.seconds == pytest.approx(searched.seconds)
    other = plan_rules.plan("all", stage.step.graph, 8)
    seen.take(dataclasses.replace(new, plan=other))
    for _ in range(3):
        seen.see(spans(seen.searched, {}), None, 3 * searched.seconds)
    back = seen.corrected()
    assert back.plan == searched.plan
    assert back.seconds == pytest.approx(searched.seconds)
    assert seen.gain(back) == pytest.approx(2 / 3)


def test_measured_lengths_shorten_generation(searched):
    seen = replan.Calibration(searched, 2)
    seen.see(spans(searched, {}), 2.0)
    (gen,) = [w for w in seen.corrected().problem.works if w.kind == "generate"]
    assert gen.responses.tokens[-1] == gen.max_new
    mean = np.dot(gen.responses.tokens, gen.responses.share)
    assert mean == pytest.approx(2.0, abs=0.6)


def test_the_local_cluster_counts_its_devices():
    assert clusters.parse("local").devices == 8


def test_a_run_may_search_its_plan_and_reports_on_it(tmp_path, capsys):
    assert launch.train(launch.config("algorithm=grpo,plan=search,steps=6"), tmp_path)
    rows = launch.document(tmp_path, "calibration")["grpo"]
    assert {"actor_gen", "actor_train"} <= {r["name"] for r in rows}
    assert all(r["measured"] > 0 for r in rows if r["name"].startswith("actor"))

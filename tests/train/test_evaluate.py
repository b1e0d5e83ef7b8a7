"""Held-out problems: the same answers however many are asked at once, wherever training keeps its
state."""

import jax
import launch
import numpy as np
import pytest

from jaxrl_eff.models import params
from jaxrl_eff.train import assembly


def evaluation(algorithm, **changes):
    values = {"temperature": 1.0, "problems": 7} | changes
    plan = values.pop("plan", "{'default': {'devices': [0, 1]}}")
    assembled = assembly.assemble(
        launch.config(
            f"algorithm={algorithm},evaluate=True",
            f"{algorithm}.plan={plan}",
            *(f"{algorithm}.evaluate.{k}={v}" for k, v in values.items()),
        )
    )
    return assembled.stages[0].evaluation, assembled.base


def answers(held_out, lm):
    step = held_out.step
    where = jax.tree.map(lambda x: x.sharding, step.home("actor").params)
    full = params.init(lm, jax.random.key(3))
    score, rows = held_out(jax.device_put(jax.tree.map(np.asarray, full), where))
    assert score == pytest.approx(np.mean([r["reward"] for r in rows]))
    return [(r["example"], r["prompt"], r["completion"]) for r in rows]


@pytest.fixture(scope="module")
def at_once():
    return answers(*evaluation("sft", batch=7))


@pytest.mark.parametrize("batch", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 5))])
def test_answers_do_not_depend_on_how_many_are_asked_at_once(batch, at_once):
    held_out, lm = evaluation("sft", batch=batch)
    assert held_out.calls == {1: 4, 4: 2, 5: 2}[batch]  # of rows that two devices share
    assert answers(held_out, lm) == at_once
    assert sum(held_out.step.traces.values()) == 1  # compiled once
    assert [example for example, *_ in at_once] == list(range(7))
    assert len({completion for *_, completion in at_once}) > 3  # sampled


def test_optimizers_may_be_kept_in_the_host_s_memory(at_once):
    plan = "{'default': {'devices': [0, 1], 'offload': 'opt'}}"
    held_out, lm = evaluation("sft", plan=plan)
    assert held_out.step.plan["actor_gen"].offload == ""
    assert answers(held_out, lm) == at_once


@pytest.mark.parametrize(("algorithm", "calls"), [("sft", 2), ("grpo", 1)])
def test_a_batch_is_as_large_as_a_step_of_the_stage(algorithm, calls):
    """8 examples, or 8 prompts with 4 samples each."""
    assert evaluation(algorithm, problems=12)[0].calls == calls

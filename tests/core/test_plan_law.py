"""The law on whole algorithms: plans on disjoint and overlapping devices, old weights, a change of
plan in mid-run and a plan that was searched give the parameters that one device gives."""

import functools

import jax
import launch
import numpy as np
import pytest

from jaxrl_eff.core import plan_rules
from jaxrl_eff.train import assembly, state

STEPS = 2


def assembled(algorithm, plan, **more):
    arg = ",".join([f"algorithm={algorithm},optim=sgd,plan={plan}", *map("=".join, more.items())])
    return assembly.assemble(launch.config(arg))


def models_after(run, *, steps=STEPS, switch=None):
    """Final parameters; `switch` is a plan to take up after the first step."""
    (stage,) = run.stages
    step = stage.step.build(stage.batch)
    models = state.initial(run, stage, {})
    start = jax.tree.map(np.asarray, {r: m.params for r, m in models.items()})
    for t in range(steps):
        if t == 1 and switch is not None:
            new = stage.placed(switch).build(stage.batch)
            models, step = state.moved(models, step, new), new
        models, _, _ = step(models, next(stage.loader), assembly.words(0, stage.name, t))
    stage.loader.close()
    return start, jax.tree.map(np.asarray, {r: m.params for r, m in models.items()})


def check(got, want):
    """Equal to 1e-6 of each parameter's norm, and the learned part of it to 1e-3."""
    (start, ours), (_, theirs) = got, want
    moved = 0.0
    trees = [jax.tree.leaves(t) for t in (start, ours, theirs)]
    for a, b, c in zip(*trees, strict=True):
        assert np.linalg.norm(b - c) <= 1e-6 * np.linalg.norm(c) + 1e-9
        change = np.linalg.norm(c - a)
        assert np.linalg.norm(b - c) <= 1e-3 * change + 1e-6 * np.linalg.norm(c)
        moved = max(moved, change / max(np.linalg.norm(a), 1e-9))
    assert moved > 1e-3  # or nothing was compared


@functools.cache
def alone(algorithm):
    return models_after(assembled(algorithm, "first", first="1"))


@pytest.mark.parametrize(
    ("algorithm", "plan"),
    [
        pytest.param("remax", "apart", marks=pytest.mark.slow),
        pytest.param("ppo", "overlap", marks=pytest.mark.slow),
        pytest.param("ppo", "apart", marks=pytest.mark.slow),
        pytest.param("grpo", "apart", marks=pytest.mark.slow),
        pytest.param("grpo", "overlap", marks=pytest.mark.slow),
        pytest.param("remax", "overlap", marks=pytest.mark.slow),
    ],
)
def test_calls_on_disjoint_or_overlapping_devices_give_the_same_parameters(algorithm, plan):
    check(models_after(assembled(algorithm, plan)), alone(algorithm))


def test_a_change_of_plan_changes_no_result():
    run = assembled("grpo", "fsdp")
    graph = run.stages[0].step.graph
    got = models_after(run, switch=plan_rules.plan("halves", graph, 8))
    check(got, alone("grpo"))


@pytest.mark.slow
def test_old_weights_do_not_depend_on_the_plan():
    want = models_after(assembled("grpo", "first", first="1", staleness="1"), steps=3)
    check(models_after(assembled("grpo", "apart", staleness="1"), steps=3), want)
    check(want, want)
    fresh = models_after(assembled("grpo", "first", first="1"), steps=3)
    with pytest.raises(AssertionError):
        check(fresh, want)

"""Weights that are sent by what has changed are those that are sent whole, bit for bit."""

import operator

import jax
import jax.numpy as jnp
import launch
import numpy as np
import pytest

from jaxrl_eff.parallel import Placement, Route, SyncConfig, WeightSync, rules
from jaxrl_eff.train import assembly, state

AXES = {"base": ("embed", "heads"), "head": ("embed",), "low": ("embed",)}
SOURCE, TARGET = (
    rules(p, {"embed": {64}, "heads": {32}}).tree(AXES)
    for p in (Placement((0, 1, 2, 3), fsdp=2, tensor=2), Placement((3, 4), tensor=2))
)
STILL = {"base": True, "head": False, "low": False}


def tree(seed, base=None):
    rng = np.random.default_rng(seed)
    new = {"head": rng.standard_normal(64), "low": rng.standard_normal(64).astype(jnp.bfloat16)}
    new = jax.device_put({k: jnp.asarray(v) for k, v in new.items()}, {k: SOURCE[k] for k in new})
    if base is None:
        base = jax.device_put(rng.standard_normal((64, 32)).astype(np.float32), SOURCE["base"])
    return new | {"base": base}


def test_a_copy_is_what_a_route_gives_and_still_arrays_go_once():
    first = tree(0)
    sync = WeightSync(
        first, TARGET, still=STILL, changes=SyncConfig(0.5, every=3, dense_below=1)
    ).compile()
    route, before, now = Route(first, TARGET), None, first
    for t in range(6):
        now = tree(t, first["base"] if t < 4 else tree(9)["base"] if t == 4 else now["base"])
        copy, want = sync(now), route(now)
        for k in want:
            assert copy[k].sharding == want[k].sharding and copy[k].dtype == want[k].dtype
            np.testing.assert_array_equal(np.asarray(copy[k]), np.asarray(want[k]))
        if before is not None:
            assert (copy["base"] is before) == (t != 4)
            assert int(sync.done.drifted) == (0 if t == 3 else -1)
        before = copy["base"]


def started(algorithm, *changes):
    """A stage that samples on four devices and trains on others, compiled, and its models."""
    run = assembly.assemble(launch.config(f"algorithm={algorithm},plan=apart", *changes))
    (stage,) = run.stages
    stage.step.build(stage.batch)
    return stage, state.initial(run, stage, {})


def after(algorithm, *changes, steps=3):
    """Parameters; metrics and arrays by step."""
    stage, models = started(algorithm, *changes)
    step, seen, arrays = stage.step, [], []
    for t in range(steps):
        models, _, m = step(models, next(stage.loader), assembly.words(0, stage.name, t))
        seen.append({k: float(v) for k, v in m.items()})
        arrays.append(jax.tree.leaves(models["actor"].params))
    stage.loader.close()
    assert set(step.traces.values()) <= {0, 1}  # host calls are not traced
    return jax.tree.map(np.asarray, models["actor"].params), seen, arrays


def equal(a, b):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_array_equal(x, y)


LORA = ("ppo.adapt.actor={'name': 'lora', 'rank': 2}", "ppo.loss.minibatches=2")
SPARSE = (
    "grpo.adapt.actor={'name': 'static', 'density': 0.1, 'granularity': 'row'}",
    "model.param_dtype=bfloat16", "grpo.optim.actor.lr=0.1",
)  # fmt: skip


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        pytest.param("ppo", LORA, id="lora", marks=pytest.mark.slow),
        pytest.param("grpo", SPARSE, id="sparse", marks=pytest.mark.slow),
    ],
)
def test_a_run_is_the_same_however_weights_are_sent(algorithm, changes):
    whole, first, _ = after(algorithm, *changes)
    name = f"{algorithm}.sync={{'name': 'changes', 'every': 2}}"
    ours, seen, arrays = after(algorithm, *changes, name)
    equal(ours, whole)
    for a, b in zip(seen, first, strict=True):
        sync = {k for k in a if "/sync_" in k}
        assert {k: v for k, v in a.items() if k not in sync} == b
    assert not any("/sync_" in k for k in seen[0])
    changed = [m["actor_gen/sync_changed"] for m in seen[1:]]
    assert [m["actor_gen/sync_drifted"] for m in seen[1:]] == [-1, 0]
    if algorithm == "ppo":  # the base is the same arrays; what is beside it, all changed
        assert sum(map(operator.is_, arrays[0], arrays[-1])) >= len(arrays[0]) // 3
        assert min(changed) > 0.5
    else:
        assert 0 < max(changed) < 0.11


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("grpo.sync.name=half", "config.grpo.sync: unknown sync 'half'; expected one of"),
        ("grpo.sync={'name': 'whole', 'capacity': 0.1}", "capacity=0.1 is of 'changes'"),
        (
            "grpo.sync.capacity=2.0",
            "config.grpo.sync.capacity is 2.0, but must be at least 0 and at most 1",
        ),
        ("grpo.sync.every=0", "config.grpo.sync.every is 0, but must be at least 1"),
    ],
)
def test_a_bad_setting_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        launch.config("algorithm=grpo", change)

"""Packed rows of calls that send weights between nodes: no schedule changes what is sent."""

import functools

import jax
import launch
import numpy as np
import pytest
from test_plan_law import check, models_after
from test_zero import check_copies

from jaxrl_eff import tree
from jaxrl_eff.train import assembly, state

SPLIT = {"dcn": 2, "fsdp": 2, "seq": 2}


def assembled(algorithm, plan, *changes, room=24, zero="exact"):
    schedule = {"name": "skrull", "room": room, "shapes": 2}
    more = [f"{algorithm}.batch=16", f"{algorithm}.schedule={schedule!r}", *changes]
    if zero:
        more.append(f"{algorithm}.zero.name={zero}")
    plan = f"{algorithm}.plan={plan!r}"
    return assembly.assemble(launch.config(f"algorithm={algorithm},optim=sgd", plan, *more))


@functools.cache
def alone(algorithm, *changes):
    """One device, with a schedule of its own and nothing sent."""
    return models_after(assembled(algorithm, {"default": {"devices": [0]}}, *changes, zero=""))


@pytest.mark.parametrize(
    ("algorithm", "place"),
    [
        ("sft", SPLIT),
        *(
            pytest.param(algorithm, place, marks=pytest.mark.slow)
            for algorithm, place in (
                ("sft", {"dcn": 2, "data": 2, "fsdp": 2}),
                ("sft", {"dcn": 2, "fsdp": 2, "tensor": 2}),
                ("dpo", {"dcn": 2, "seq": 2, "tensor": 2}),
                ("reward_model", {"dcn": 4, "fsdp": 2}),
            )
        ),
    ],
    ids=str,
)
def test_without_rounding_packed_rows_train_as_on_one_device(algorithm, place):
    run = assembled(algorithm, {"default": place})
    check(models_after(run), alone(algorithm))
    for traffic in run.stages[0].step.traffic.values():
        assert traffic.counted == traffic.promised


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_sampled_rows_do_too(algorithm):
    names = {"ppo": ["actor_train", "critic_train"]}.get(algorithm, ["actor_train"])
    plan = {"default": {"fsdp": 8}} | dict.fromkeys(names, SPLIT)
    steps = 1 if algorithm == "ppo" else 2
    one = assembled(algorithm, {"default": {"devices": [0]}}, zero="")
    check(models_after(assembled(algorithm, plan), steps=steps), models_after(one, steps=steps))


@pytest.mark.slow
@pytest.mark.parametrize(
    "adapt",
    [
        dict(name="lora", rank=4, base="int8"),
        dict(name="lisa", layers=1, every=1),
        dict(name="spiel_ag", density=0.05, every=1, selector="gradient"),
    ],
    ids=lambda adapt: adapt["name"],
)
def test_parts_of_a_model_learn_from_packed_rows_what_they_do_on_one_device(adapt):
    change = f"sft.adapt={ {'actor': adapt}!r}"
    got, want = models_after(assembled("sft", {"default": SPLIT}, change)), alone("sft", change)
    for a, b in zip(*map(jax.tree.leaves, (got[1], want[1])), strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b) + 1e-9


def stepped(room, zero):
    """The step, and its models after one step."""
    run = assembled("sft", {"default": SPLIT}, room=room, zero=zero)
    (stage,) = run.stages
    step, models = stage.step.build(stage.batch), state.initial(run, stage, {})
    models, _, _ = step(models, next(stage.loader), assembly.words(0, stage.name, 0))
    stage.loader.close()
    return step, models["actor"]


@pytest.mark.parametrize("zero", ["int4_delta", pytest.param("int8", marks=pytest.mark.slow)])
def test_the_number_of_microbatches_changes_neither_rounding_nor_bytes(zero):
    (many, got), (few, want) = (stepped(room, zero) for room in (16, 64))
    for name, x in tree.flat(want.params).items():  # a number between two codes may fall either way
        apart = np.abs(np.asarray(tree.flat(got.params)[name]) - np.asarray(x))
        assert np.mean(apart > 1e-5) < 0.01, name
    one, other = (step.traffic["actor_train"].counted for step in (many, few))
    assert one["dcn"] == other["dcn"]
    for name, x in (got.node_copy or {}).items():
        check_copies(name, x, copies=4)
    assert set(got.node_copy or ()) == set(want.node_copy or ()) and bool(got.node_copy) == (
        zero == "int4_delta"
    )

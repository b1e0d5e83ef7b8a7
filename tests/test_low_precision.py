"""Optimizers for weights of 16 bits, chosen in a config and run by the training loop."""

import jax
import launch
import numpy as np
import pytest

from jaxrl_eff import metrics, optim, stages, state, tree
from jaxrl_eff.dataflow import compile

BF16 = "model.param_dtype='bfloat16'"


def collage(algorithm, variant, *more):
    role = f"{algorithm}.optim.actor"
    options = f"{role}.options={{'variant': '{variant}'}}"
    return launch.config(
        f"algorithm={algorithm},steps=4,every=1", BF16, f"{role}.name='collage_adamw'", options,
        f"{role}.lr=1e-3", *more,
    )  # fmt: skip


@pytest.mark.parametrize(("algorithm", "variant"), [("sft", "plus"), ("grpo", "flash8")])
def test_a_run_stopped_and_started_again_ends_bitwise_the_same(
    algorithm, variant, tmp_path, monkeypatch
):
    run = collage(algorithm, variant)
    assert launch.train(run, tmp_path / "whole")

    step = metrics.Writer.step

    def fail(self, number, *args, **kwargs):
        if number == 3:
            raise RuntimeError("stopped")
        return step(self, number, *args, **kwargs)

    monkeypatch.setattr(metrics.Writer, "step", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        launch.train(run, tmp_path / "parts")
    monkeypatch.undo()
    assert launch.train(run, tmp_path / "parts")
    assert launch.export(tmp_path / "parts") == launch.export(tmp_path / "whole")
    assert launch.numbers(tmp_path / "parts") == launch.numbers(tmp_path / "whole")


def after(plan, steps=3):
    """float32 weights after some steps of SFT under a plan."""
    run = collage("sft", "exact", f"sft.plan={plan!r}", "model.dtype='float32'")
    assembled = stages.assemble(run)
    stage = assembled.stages[0]
    step = compile(stage.step.graph, stage.step.plan, stage.step.specs)
    step.build(stage.batch)
    models = state.initial(assembled, stage, {})
    for t in range(steps):
        models, _, _ = step(models, next(stage.loader), stages.words(0, "sft", t))
    model = models["actor"]
    full = optim.full_precision_params(model.params, model.opt)
    return (
        {k: np.asarray(v) for k, v in zip(tree.names(full), jax.tree.leaves(full), strict=True)},
        step,
        model,
    )


def test_a_plan_changes_nothing_and_state_lies_beside_its_parameters():
    """But for the gradients' rounding to bfloat16, which reordered sums may turn the other way."""
    one, _, _ = after({"default": {"devices": [0]}})
    still, _, _ = after({"default": {"devices": [0]}}, steps=0)
    many, step, model = after({"default": {"fsdp": 4, "tensor": 2}})
    flat = [np.concatenate([x.ravel() for x in w.values()]) for w in (one, many, still)]
    moved = np.linalg.norm(flat[0] - flat[2])
    assert moved > 0.1 and np.linalg.norm(flat[0] - flat[1]) < 0.02 * moved
    kernel = model.params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) != kernel.shape
    low = [x for x in jax.tree.leaves(model.opt) if x.shape == kernel.shape]
    assert len(low) >= 3 and all(x.sharding == kernel.sharding for x in low)
    assert step.traces["actor_train"] == 1


def test_what_would_do_nothing_is_refused():
    with pytest.raises(ValueError, match=r"16 bits, but config.model.param_dtype is 'float32'"):
        stages.assemble(launch.config("algorithm=sft", "sft.optim.actor.name='collage_adamw'"))
    with pytest.raises(ValueError, match=r"store='int16' is for parameters of 16 bits"):
        stages.assemble(launch.config("algorithm=sft", "sft.optim.actor.store='int16'"))
    with pytest.raises(ValueError, match=r"config.sft.optim.actor.*store is 'int4'"):
        stages.assemble(launch.config("algorithm=sft", BF16, "sft.optim.actor.store='int4'"))

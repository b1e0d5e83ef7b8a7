"""Optimizers for weights of 16 bits, chosen in a config and run by the training loop."""

import jax
import jax.numpy as jnp
import launch
import numpy as np
import pytest
from test_resume import failed

from jaxrl_eff import optim, tree
from jaxrl_eff.core import Graph, Placement, Spec, compile, train
from jaxrl_eff.train import assembly, state

BF16 = "model.param_dtype='bfloat16'"


def collage(algorithm, variant, *more):
    role = f"{algorithm}.optim.actor"
    options = f"{role}.options={{'variant': '{variant}'}}"
    return launch.config(
        f"algorithm={algorithm},steps=4,every=1", BF16, f"{role}.name='collage_adamw'", options,
        f"{role}.lr=1e-3", *more,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "variant"),
    [("sft", "flash8"), ("grpo", "plus")],
)
def test_a_run_stopped_and_started_again_ends_bitwise_the_same(
    algorithm, variant, tmp_path, monkeypatch
):
    run = collage(algorithm, variant)
    assert launch.train(run, tmp_path / "whole")
    failed(monkeypatch, run, tmp_path / "parts", at=3)
    assert launch.train(run, tmp_path / "parts")
    assert launch.export(tmp_path / "parts") == launch.export(tmp_path / "whole")
    assert launch.numbers(tmp_path / "parts") == launch.numbers(tmp_path / "whole")


def after(plan, steps=3):
    """float32 weights after some steps of SFT under a plan."""
    run = collage("sft", "exact", f"sft.plan={plan!r}", "model.dtype='float32'")
    assembled = assembly.assemble(run)
    stage = assembled.stages[0]
    step = compile(stage.step.graph, stage.step.plan, stage.step.specs)
    step.build(stage.batch)
    models = state.initial(assembled, stage, {})
    for t in range(steps):
        models, _, _ = step(models, next(stage.loader), assembly.words(0, "sft", t))
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


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_a_gradient_of_16_bits_is_rounded_once_however_rows_are_split(microbatches):
    """One over the weight is not a number of 16 bits: the quotient is rounded, nothing before."""

    def loss(p, batch, key):
        x = batch["mask"]
        return (p["w"][None, :].astype(jnp.float32) * x).sum(), jnp.float32(3 / 8) * x.shape[0], {}

    graph = Graph("mask", (train("critic_train", of="critic", loss=loss, reads="mask"),))
    like = {"w": jax.ShapeDtypeStruct((16,), jnp.bfloat16)}
    spec = Spec(like, {"w": ("embed",)}, optim.optimizer("sgd", 1.0))
    place = Placement((0,), microbatches=microbatches)
    step = compile(graph, {"critic_train": place}, {"critic": spec})
    where = step.home("critic").params["w"].sharding
    models = {
        "critic": step.init("critic", {"w": jax.device_put(jnp.zeros(16, jnp.bfloat16), where)})
    }
    rows = np.random.default_rng(0).integers(0, 8, (8, 16)).astype(np.float32)
    models, _, _ = step(models, {"mask": rows}, np.zeros(2, np.uint32))
    want = -(rows.sum(0) / np.float32(3)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(models["critic"].params["w"]), want)


@pytest.mark.parametrize(
    ("changes", "keeps"),
    [
        (("sft.optim.actor.lr=1e-5",), False),
        (("sft.optim.actor.name='collage_adamw'", "sft.optim.actor.lr=1e-5"), True),
    ],
    ids=["plain", "collage"],
)
def test_metrics_say_what_became_of_the_updates(changes, keeps, tmp_path):
    run = launch.config(
        "algorithm=sft,steps=2", BF16, "sft.optim.actor.descent=True", "export=False", *changes
    )
    assert launch.train(run, tmp_path)
    for _, _, values in launch.numbers(tmp_path):
        seen = {k: values[f"actor_train/descent_{k}"] for k in ("visible", "stored", "lost")}
        assert (seen["lost"] < 0.01) == keeps
        assert (abs(seen["stored"] - 1) < 0.01) == keeps and np.isfinite(seen["visible"])


def test_what_would_do_nothing_is_refused():
    with pytest.raises(ValueError, match=r"16 bits, but config.model.param_dtype is 'float32'"):
        assembly.assemble(launch.config("algorithm=sft", "sft.optim.actor.name='collage_adamw'"))
    with pytest.raises(ValueError, match=r"store='int16' is for parameters of 16 bits"):
        assembly.assemble(launch.config("algorithm=sft", "sft.optim.actor.store='int16'"))
    with pytest.raises(ValueError, match=r"config.sft.optim.actor.*unknown store 'int4'"):
        assembly.assemble(launch.config("algorithm=sft", BF16, "sft.optim.actor.store='int4'"))
    lora = "sft.adapt.actor={'name': 'lora', 'rank': 2}"
    with pytest.raises(ValueError, match=r"adapt.actor: .*adapters are float32"):
        assembly.assemble(launch.config("algorithm=sft", lora, BF16, "sft.optim.actor.store='sr'"))

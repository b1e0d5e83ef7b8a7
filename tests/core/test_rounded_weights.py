"""The law for rounded weights: a call says the precision that it reads, and no plan changes it."""

import dataclasses

import jax
import jax.numpy as jnp
import launch
import numpy as np
import pytest
from test_plan_law import check, models_after
from test_step import APART, ONE, PLANS, _everywhere, _place, _run, ppo

from jaxrl_eff import core
from jaxrl_eff.core import Graph, Spec
from jaxrl_eff.parallel.codec import Blocks, decode, encode
from jaxrl_eff.train import assembly

SOME = {"actor_gen": "int8", "ref_inf": "int4", "critic_inf": "int8"}


def rounding(graph, weights):
    calls = (dataclasses.replace(c, weights=weights.get(c.name, "")) for c in graph.calls)
    return Graph(graph.inputs, tuple(calls))


@pytest.fixture(scope="module")
def alone():
    graph = rounding(ppo(), SOME)
    return graph, _run(graph, _everywhere(graph, ONE), steps=1)


@pytest.mark.parametrize("plan", PLANS)
def test_plan_changes_where_never_what(plan, alone):
    graph, (_, want_models, want_data, want_metrics) = alone
    step, models, data, metrics = _run(graph, PLANS[plan](graph), steps=1)
    np.testing.assert_array_equal(data["tokens"], want_data["tokens"])
    for name in ("actor", "critic"):
        for a, b in zip(*map(jax.tree.leaves, (models[name], want_models[name])), strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5)
    for k, v in want_metrics.items():
        np.testing.assert_allclose(metrics[k], v, rtol=1e-4, atol=1e-6, err_msg=k)
    assert set(step.traces.values()) == {1}


def test_precision_changes_what_is_computed(alone):
    _, (_, models, *_) = alone
    _, exact, *_ = _run(ppo(), _everywhere(ppo(), ONE), steps=1)
    assert np.abs(np.asarray(models["actor"].params["out"] - exact["actor"].params["out"])).max()


def test_a_call_reads_rounded_kernels_and_all_else_as_it_is():
    """`[8, 12]` is one block of 96 numbers; a bias, and a head of one number, are not rounded."""
    rng = np.random.default_rng(0)
    shapes = {"w": (8, 12), "bias": (12,), "head": (8, 1)}
    params = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    axes = {"w": ("embed", "ffn"), "bias": ("ffn",), "head": ("embed", None)}

    def fn(p, batch, key):
        return {"y": batch["x"] @ p["w"], "z": batch["x"] @ p["head"], "b": p["bias"] + 0}

    calls = tuple(
        core.infer(
            f"label{p}",
            of="rule",
            fn=lambda *a, p=p: {k + p: v for k, v in fn(*a).items()},
            reads="x",
            writes=f"y{p} z{p} b{p}",
            weights=p,
        )
        for p in ("", "int8", "int4")
    )
    spec = Spec(jax.eval_shape(lambda: params), axes)
    places = [_place([0]), _place([1, 2], tensor=2), _place([3])]
    plan = dict(zip([c.name for c in calls], places, strict=True))
    keep = "y yint8 yint4 z zint8 zint4 b bint8 bint4"
    step = core.compile(Graph("x", calls), plan, {"rule": spec}, keep=keep)
    where = jax.tree.map(lambda x: x.sharding, step.home("rule").params)
    x = rng.standard_normal((4, 8)).astype(np.float32)
    models = {"rule": step.init("rule", jax.device_put(params, where))}
    _, data, _ = step(models, {"x": x}, np.zeros(2, np.uint32))
    for name, bits in (("int8", 8), ("int4", 4)):
        blocks = Blocks(bits, 128)
        w = decode(encode(jnp.asarray(params["w"].reshape(-1)), blocks), 96, blocks, jnp.float32)
        np.testing.assert_allclose(
            data[f"y{name}"], x @ np.reshape(w, (8, 12)), rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(data[f"z{name}"], data["z"], rtol=1e-6)
        np.testing.assert_array_equal(data[f"b{name}"], data["b"])
        assert np.abs(np.asarray(data[f"y{name}"]) - np.asarray(data["y"])).max() > 1e-3
    np.testing.assert_array_equal(models["rule"].params["w"], params["w"])


def test_fewer_bytes_are_sent():
    plan = {**APART, "actor_gen": _place([0, 1])}
    whole, eight, four = (
        _run(rounding(ppo(), {"actor_gen": p}), plan, steps=0)[0].reallocated()["actor_gen"]
        for p in ("", "int8", "int4")
    )
    assert (eight / whole, four / whole) == pytest.approx((66 / 256, 34 / 256))


def test_old_weights_are_rounded_too():
    graph = rounding(ppo(staleness=1), SOME)
    _, want, want_data, _ = _run(graph, _everywhere(graph, ONE), steps=2)
    _, models, data, _ = _run(graph, {**APART, "actor_gen": _place([0, 1])}, steps=2)
    np.testing.assert_array_equal(data["tokens"], want_data["tokens"])
    old = models["actor"].stale["actor_gen"][0]
    for k, x in want["actor"].stale["actor_gen"][0].items():
        np.testing.assert_allclose(np.asarray(old[k]), np.asarray(x), rtol=1e-4, atol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (models["actor"], want["actor"])), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5)


def test_a_step_keeps_nothing_from_the_one_before():
    """So a resumed run needs the models alone."""
    graph = rounding(ppo(), SOME)
    plan = {**APART, "actor_gen": _place([0, 1])}
    step, models, *_ = _run(graph, plan, steps=1)
    kept, batch = jax.tree.map(np.asarray, models), {"prompt": np.ones((16, 2), np.int32)}
    where = jax.tree.map(lambda x: x.sharding, models)
    key = np.array([7, 1], np.uint32)
    first, data, _ = step(models, batch, key)
    fresh, *_ = _run(graph, plan, steps=0)
    again, same, _ = fresh(jax.device_put(kept, where), batch, key)
    np.testing.assert_array_equal(data["tokens"], same["tokens"])
    for a, b in zip(*map(jax.tree.leaves, (first, again)), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_who_may_read_rounded_weights_is_said():
    gen, *_, train, _ = ppo().calls
    with pytest.raises(ValueError, match=r"actor_gen: unknown weights 'int2'; expected one of \['"):
        dataclasses.replace(gen, weights="int2")
    with pytest.raises(ValueError, match="actor_train is a train call with int8 weights"):
        dataclasses.replace(train, weights="int8")


def test_the_figure_says_so():
    graph = rounding(ppo(), {"actor_gen": "int8"})
    assert "actor_train -. actor, int8 .-> actor_gen" in core.draw(graph)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "grpo.weights={'gen': 'int8'}",
            r"^config.grpo.weights: unknown call 'gen'; expected one of \['actor_gen', 'ref_inf'\]",
        ),
        (
            "grpo.weights={'actor_gen': 'int9'}",
            "^config.grpo.weights: actor_gen: unknown weights 'int9'; expected one of",
        ),
        (
            "grpo.weights={'actor_train': 'int8'}",
            "^config.grpo.weights: actor_train is a train call with int8 weights",
        ),
        (
            "grpo.sync.name=int8",
            "^config.grpo.sync.name: 'int8' is now a property of the call: set "
            r"config.grpo.weights=\{'actor_gen': 'int8'\}",
        ),
    ],
)
def test_a_bad_setting_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        assembly.assemble(launch.config("algorithm=grpo", change))


def assembled(plan, *changes):
    arg = f"algorithm=grpo,optim=sgd,plan={plan},first=1"
    return assembly.assemble(launch.config(arg, "grpo.weights={'actor_gen': 'int8'}", *changes))


@pytest.mark.parametrize(
    ("plan", "changes"),
    [
        ("overlap", ()),
        pytest.param("apart", ("grpo.sync.name=changes",), marks=pytest.mark.slow),
        pytest.param(
            "small", ("grpo.adapt={'actor': {'name': 'lora', 'rank': 2}}",), marks=pytest.mark.slow
        ),
        pytest.param("fsdp", (), marks=pytest.mark.slow),
    ],
)
def test_an_algorithm_learns_the_same_on_any_devices(plan, changes):
    """One step: a code may turn with the last bit of a weight, which a plan may change."""
    same = tuple(c for c in changes if "sync" not in c)
    want = models_after(assembled("first", *same), steps=1)
    check(models_after(assembled(plan, *changes), steps=1), want)

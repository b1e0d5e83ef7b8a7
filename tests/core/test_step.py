"""The law: a plan changes where and how fast, never what. On a toy model with all six calls."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_eff import core
from jaxrl_eff.core import Graph, Placement, Spec, meters

V, D, T, B = 16, 8, 6, 16
AXES = {"emb": ("vocab", "embed"), "out": ("embed", "vocab")}
HEAD_AXES = {"emb": ("vocab", "embed"), "out": ("embed", None)}


def _init(seed, out):
    a, b = jax.random.split(jax.random.key(seed))
    return {"emb": jax.random.normal(a, (V, D)), "out": 0.3 * jax.random.normal(b, (D, out))}


def _forward(p, t):
    counts = jnp.arange(1, t.shape[1] + 1, dtype=jnp.float32)[None, :, None]
    return (jnp.cumsum(p["emb"][t], 1) / counts) @ p["out"]


def _logp(p, t):
    logits = jax.nn.log_softmax(_forward(p, t))[:, :-1]
    picked = jnp.take_along_axis(logits, t[:, 1:, None], -1)[..., 0]
    return jnp.pad(picked, ((0, 0), (1, 0)))


def _generate(p, b, key):
    n = b["prompt"].shape[0]
    row = b.get("prompt_row", jnp.arange(n, dtype=jnp.int32))
    t = b["prompt"]
    for i in range(T - 2):
        keys = jax.vmap(lambda r, i=i: jax.random.fold_in(jax.random.fold_in(key, r), i))(row)
        new = jax.vmap(jax.random.categorical)(keys, _forward(p, t)[:, -1])
        t = jnp.concatenate([t, new[:, None].astype(jnp.int32)], 1)
    steps = jnp.arange(T, dtype=jnp.int32)[None, :]
    mask = ((steps >= 2) & (steps < 3 + t[:, :1] % 4)).astype(jnp.float32)
    return {"tokens": t, "mask": mask, "logp": _logp(p, t)}


def _advantage(b, key):
    r = (-0.1 * (b["logp"] - b["ref_logp"])).at[:, -1].add(b["score"])
    ret = jnp.cumsum(r[:, ::-1], 1)[:, ::-1]
    return {"ret": ret, "adv": ret - b["value"], "metrics": {"reward": r.mean()}}


def _policy_loss(p, b, key):
    ratio = jnp.exp(_logp(p, b["tokens"]) - b["logp"])
    loss = -jnp.minimum(ratio * b["adv"], jnp.clip(ratio, 0.8, 1.2) * b["adv"])
    n = b["mask"].sum()
    gap = meters.Max(jnp.abs((ratio - 1) * b["mask"]).max())
    seen = {"ratio": meters.Mean((ratio * b["mask"]).sum(), n), "gap": gap}
    return (loss * b["mask"]).sum(), n, seen


def _value_loss(p, b, key):
    e = _forward(p, b["tokens"])[..., 0] - b["ret"]
    return (e * e * b["mask"]).sum(), b["mask"].sum(), {}


def _ref(p, b, key):
    return {"ref_logp": _logp(p, b["tokens"])}


def _value(p, b, key):
    return {"value": _forward(p, b["tokens"])[..., 0]}


def ppo(epochs=1, minibatches=1, host=False, staleness=0):
    def score(p, b, key):
        return {"score": _forward(p, b["tokens"])[:, -1, 0]}

    reward = core.infer("rew_inf", of="reward", fn=score, reads="tokens", writes="score")
    if host:
        reward = core.local(
            "rew",
            fn=lambda b, key: {"score": (b["tokens"] == 3).mean(1, dtype=np.float32)},
            reads="tokens",
            writes="score",
            host=True,
        )
    updates = {"epochs": epochs, "minibatches": minibatches}
    return Graph(
        inputs="prompt",
        calls=(
            core.generate(
                "actor_gen",
                of="actor",
                fn=_generate,
                reads="prompt",
                writes="tokens mask logp",
                staleness=staleness,
            ),
            reward,
            core.infer("ref_inf", of="ref", fn=_ref, reads="tokens", writes="ref_logp"),
            core.infer("critic_inf", of="critic", fn=_value, reads="tokens", writes="value"),
            core.local(
                "advantage", fn=_advantage, reads="logp ref_logp score value", writes="adv ret"
            ),
            core.train(
                "actor_train",
                of="actor",
                loss=_policy_loss,
                reads="tokens mask logp adv",
                **updates,
            ),
            core.train(
                "critic_train", of="critic", loss=_value_loss, reads="tokens mask ret", **updates
            ),
        ),
    )


def _place(devices, **axes):
    return Placement(tuple(devices), **axes)


def _everywhere(graph, place):
    return {c.name: place for c in graph.calls}


ONE = _place([0])
MIXED = {
    "actor_gen": _place(range(4)),
    "rew_inf": _place([2, 3], tensor=2),
    "ref_inf": _place([4, 5]),
    "critic_inf": _place(range(8), fsdp=2, tensor=4),
    "actor_train": _place([0, 1], tensor=2),
    "critic_train": _place([2, 3, 6, 7], fsdp=2, tensor=2),
}
APART = {
    "actor_gen": _place([0, 1, 2]),
    "rew_inf": _place([3]),
    "ref_inf": _place([3]),
    "critic_inf": _place([3]),
    "actor_train": _place([4, 5], fsdp=2),
    "critic_train": _place([6, 7]),
}
HOSTED = {
    **_everywhere(ppo(), _place(range(4), data=2, fsdp=2)),
    "ref_inf": _place(range(4), fsdp=4, offload="params"),
    "actor_train": _place(range(4), data=2, fsdp=2, offload="opt"),
}
PLANS = {
    "colocated": lambda g: _everywhere(g, _place(range(4), data=2, tensor=2)),
    "fsdp": lambda g: _everywhere(g, _place(range(8), fsdp=8)),
    "nodes": lambda g: _everywhere(g, _place(range(8), dcn=2, data=2, fsdp=2)),
    "seq": lambda g: _everywhere(g, _place(range(6), data=2, seq=3)),
    "mixed": lambda g: MIXED,
    "microbatches": lambda g: _everywhere(g, dataclasses.replace(ONE, microbatches=4)),
    "apart": lambda g: {**APART, "actor_gen": _place([0, 1])},
    "hosted": lambda g: HOSTED,
    "reversed": lambda g: _everywhere(g, _place([3, 2, 1, 0], data=2, tensor=2)),
}


def _prompts():
    return {"prompt": (np.arange(2 * B).reshape(B, 2) % V).astype(np.int32)}


def _run(graph, plan, steps=2, batch=None, nan_at=None):
    specs, params = {}, {}
    heads = {"actor": V, "critic": 1, "ref": V, "reward": 1}
    for i, name in enumerate(graph.models):
        params[name] = _init(i, heads[name])
        axes = AXES if heads[name] == V else HEAD_AXES
        tx = optax.adam(0.01) if name in ("actor", "critic") else None
        specs[name] = Spec(jax.eval_shape(lambda p=params[name]: p), axes, tx)
    step = core.compile(graph, plan, specs, keep="tokens score")
    models = {}
    for name, p in params.items():
        where = jax.tree.map(lambda x: x.sharding, step.home(name).params)
        models[name] = step.init(name, jax.device_put(p, where))
    batch, data, metrics = batch or _prompts(), {}, {}
    for i in range(steps):
        models, data, metrics = step(models, batch, np.array([7, i], np.uint32))
    return step, models, data, metrics


@pytest.fixture(scope="module", params=[(1, 1), (2, 2)], ids=["once", "epochs"])
def reference(request):
    graph = ppo(*request.param)
    return graph, _run(graph, _everywhere(graph, ONE))


@pytest.mark.parametrize("plan", PLANS)
def test_plan_changes_where_never_what(plan, reference):
    graph, (_, want_models, want_data, want_metrics) = reference
    step, models, data, metrics = _run(graph, PLANS[plan](graph))
    np.testing.assert_array_equal(data["tokens"], want_data["tokens"])
    for name in ("actor", "critic"):
        for a, b in zip(
            jax.tree.leaves(models[name]), jax.tree.leaves(want_models[name]), strict=True
        ):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5)
    for k, v in want_metrics.items():
        np.testing.assert_allclose(metrics[k], v, rtol=1e-4, atol=1e-6, err_msg=k)
    assert set(step.traces.values()) == {1}


def test_a_host_call_may_compute_the_reward():
    graph = ppo(host=True)
    plan = {k: v for k, v in MIXED.items() if k != "rew_inf"}
    _, _, data, _ = _run(graph, plan)
    _, _, want, _ = _run(graph, dict.fromkeys(plan, ONE))
    np.testing.assert_array_equal(data["score"], want["score"])


def test_optimizer_state_lies_where_its_parameter_lies():
    graph = ppo()
    step, models, _, _ = _run(graph, MIXED, steps=1)
    mu = models["critic"].opt[0].mu
    assert mu["emb"].sharding == models["critic"].params["emb"].sharding
    assert len(models["critic"].params["emb"].sharding.device_set) == 4
    assert step.reallocated()["critic_inf"] > 0 and step.reallocated()["critic_train"] == 0


def test_the_timeline_has_every_call_in_order():
    graph = ppo()
    step, *_ = _run(graph, MIXED)
    spans = {s.call: s for s in step.timeline.last()}
    moved = {"actor->actor_gen", "critic->critic_inf"}
    assert set(spans) == {c.name for c in graph.calls} | moved
    assert all(s.end >= s.start >= 0 for s in spans.values())
    assert spans["advantage"].start >= spans["ref_inf"].end


def _by_hand(staleness, steps):
    """PPO with old samples, written out: sample with version t - s, then train version t."""
    calls = ppo().calls
    sampler = Graph("prompt", calls[:1])
    trainer = Graph("tokens mask logp", calls[1:])
    _, models, *_ = _run(ppo(), _everywhere(ppo(), ONE), steps=0)
    specs = {
        name: Spec(
            jax.eval_shape(lambda p=m.params: p),
            HEAD_AXES if name in ("critic", "reward") else AXES,
            optax.adam(0.01) if name in ("actor", "critic") else None,
        )
        for name, m in models.items()
    }
    place = _everywhere(ppo(), ONE)
    sample = core.compile(
        sampler, {"actor_gen": ONE}, {"actor": specs["actor"]}, keep="tokens mask logp"
    )
    train = core.compile(trainer, {k: v for k, v in place.items() if k != "actor_gen"}, specs)
    versions = []
    for t in range(steps):
        versions.append(jax.tree.map(np.asarray, models["actor"].params))
        old = core.Model(versions[max(0, t - staleness)])
        key = np.array([7, t], np.uint32)
        _, rollout, _ = sample({"actor": old}, _prompts(), key)
        models, *_ = train(models, {k: np.asarray(v) for k, v in rollout.items()}, key)
    return models


@pytest.mark.parametrize("staleness", [1, 2])
def test_old_weights_sample_as_many_steps_late_as_said(staleness):
    graph = ppo(staleness=staleness)
    want = _by_hand(staleness, 4)
    for plan in (_everywhere(graph, ONE), {**APART, "actor_gen": _place([0, 1])}):
        _, models, *_ = _run(graph, plan, steps=4)
        assert set(models["actor"].stale) == {"actor_gen"}
        assert len(models["actor"].stale["actor_gen"]) == staleness
        for name in ("actor", "critic"):
            trees = models[name].params, want[name].params
            for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
                np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5)


def test_only_sampling_may_be_stale_and_only_of_trained_models():
    with pytest.raises(ValueError, match="ref_inf is a infer call with staleness 1"):
        dataclasses.replace(ppo().calls[2], staleness=1)
    alone = Graph("prompt", ppo().calls[:1])
    with pytest.raises(ValueError, match="staleness 1, but nothing trains actor"):
        dataclasses.replace(alone, calls=(_twin(staleness=1),))


def test_what_waits_in_host_memory_is_there():
    _, models, *_ = _run(ppo(), HOSTED, steps=1)
    kinds = lambda t: {x.sharding.memory_kind for x in jax.tree.leaves(t)}  # noqa: E731
    assert kinds(models["ref"].params) == {"pinned_host"}
    assert kinds(models["actor"].opt) == {"pinned_host"}
    assert "pinned_host" not in kinds(models["actor"].params) | kinds(models["critic"])


def test_operations_are_in_one_order_for_all():
    step, *_ = _run(ppo(staleness=1), {**APART, "actor_gen": _place([0, 1])}, steps=1)
    names = [op.name for op in step.operations]
    assert names.index("actor_gen") < names.index("actor->actor_gen") < names.index("actor_train")
    assert len(names) == len(set(names))
    assert {op.kind for op in step.operations} == {"call", "move", "realloc", "keep"}


def test_an_update_that_is_not_finite_is_withheld():
    def bad(p, b, key):
        rows = {**b, "ret": jnp.zeros((B, T)), "mask": jnp.ones((B, T))}
        loss, weight, m = _value_loss(p, rows, key)
        return jnp.where(b["tokens"].sum() > 0, jnp.nan, 1.0) * loss, weight, m

    graph = Graph("tokens", (core.train("critic_train", of="critic", loss=bad, reads="tokens"),))
    batch = {"tokens": np.ones((B, T), np.int32)}
    spec = Spec(jax.eval_shape(lambda: _init(0, 1)), HEAD_AXES, optax.adam(0.1))
    step = core.compile(graph, {"critic_train": ONE}, {"critic": spec})
    where = jax.tree.map(lambda x: x.sharding, step.home("critic").params)
    models = {"critic": step.init("critic", jax.device_put(_init(0, 1), where))}
    models, _, metrics = step(models, batch, np.zeros(2, np.uint32))
    assert metrics["critic_train/finite"] == 0 and not np.isfinite(metrics["critic_train/loss"])
    np.testing.assert_array_equal(models["critic"].params["emb"], _init(0, 1)["emb"])
    assert models["critic"].opt[0].count == 0


def test_weights_are_read_before_they_are_trained():
    calls = ppo().calls
    names = [c.name for c in core.order(Graph("prompt", calls[::-1]))]
    assert names.index("critic_inf") < names.index("critic_train")
    assert names.index("actor_gen") < names.index("actor_train")


def test_host_calls_wait_for_nothing_on_the_device():
    names = [c.name for c in core.order(ppo(host=True))]
    assert names.index("rew") > names.index("ref_inf")


def test_the_figure_shows_data_and_weights():
    text = core.draw(ppo())
    assert "actor_gen -- tokens, mask, logp --> actor_train" in text
    assert "actor_train -. actor .-> actor_gen" in text


def _twin(**change):
    return dataclasses.replace(ppo().calls[0], **change)


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        (lambda: ppo().calls[1:2], "rew_inf reads the unknown array 'tokens'"),
        (lambda: (*ppo().calls, _twin(name="twin")), "written by actor_gen and again by twin"),
        (lambda: (*ppo().calls, _twin(writes=())), "two calls are named 'actor_gen'"),
        (
            lambda: (
                core.local("a", fn=dict, reads="y", writes="x"),
                core.local("b", fn=dict, reads="x", writes="y"),
            ),
            "wait for each other: ",
        ),
    ],
)
def test_a_bad_graph_is_refused_by_name(calls, message):
    with pytest.raises(ValueError, match=message):
        Graph("prompt", calls())


def test_a_local_call_lies_where_training_does_and_takes_nothing_else_from_its_plan():
    graph = ppo()
    rest = {c.name: ONE for c in graph.calls if c.of is not None}
    away = _place(range(2), fsdp=2, offload="opt")
    full = core.check_plan(graph, {**rest, "actor_train": away})
    local = next(c.name for c in graph.calls if c.kind == "local")
    assert full["actor_train"] == away and full[local] == _place(range(2), fsdp=2)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"actor_gen": ONE}, "no placement for"),
        ({**MIXED, "actr": ONE}, "the plan: unknown call 'actr'"),
        ({**MIXED, "actor_gen": _place([9])}, "names device 9, but there are 8"),
        ({**MIXED, "actor_gen": _place([0, 1], stage=2)}, "pipelining can be priced"),
        ({**MIXED, "actor_gen": _place([0], offload="opt")}, "cannot offload 'opt'"),
        ({**MIXED, "actor_gen": _place([0], offload="params")}, "actor, which is trained"),
    ],
)
def test_a_bad_plan_is_refused_by_name(plan, message):
    graph = ppo()
    with pytest.raises(ValueError, match=message):
        core.check_plan(graph, plan)


def test_rows_that_do_not_divide_are_refused_before_anything_runs():
    graph = ppo()
    with pytest.raises(ValueError, match="reads 'prompt' with 6 rows, which do not divide by 4"):
        _run(graph, MIXED, batch={"prompt": np.zeros((6, 2), np.int32)})

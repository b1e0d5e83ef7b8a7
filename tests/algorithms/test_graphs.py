"""The tables: which calls, in which order, of which models; what they refuse; one step of each."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_eff import core
from jaxrl_eff.algorithms import (
    Rollout,
    dpo,
    grpo,
    policy,
    ppo,
    raft,
    remax,
    reward_model,
    rloo,
    sft,
)
from jaxrl_eff.core import Placement, Spec
from jaxrl_eff.models import LMConfig, abstract, init, logical_axes
from jaxrl_eff.rollout import Sampling

EOS = 3
LM = LMConfig(
    vocab=11, layers=1, width=16, heads=2, kv_heads=1, head_dim=8, ffn=24, eos=(EOS,), tie=True
)
HEAD = LM.replace(head="value")
ONE = Sampling(max_tokens=5)
FOUR = dataclasses.replace(ONE, samples=4)


def share_of_evens(batch, key):
    """A reward on the host."""
    del key
    even = (batch["tokens"] % 2 == 0) * batch["mask"]
    return {"score": (even.sum(1) / np.maximum(batch["mask"].sum(1), 1)).astype(np.float32)}


HOST, MODEL = (share_of_evens, None)
MODELS = {"actor": LM, "critic": HEAD, "reward": HEAD}
ADAPTIVE = ppo.PPOConfig(kl_target=2.0, kl_in="loss", entropy=0.01, epochs=2, minibatches=2)
GRAPHS = {
    "sft": (
        sft.graph(sft.SFTConfig(), {"actor": LM}),
        "actor_train",
    ),
    "reward model": (
        reward_model.graph(reward_model.RewardModelConfig(center=0.01), {"reward": HEAD}),
        "reward_train",
    ),
    "dpo": (
        dpo.graph(dpo.DPOConfig(), {"actor": LM}),
        "ref_inf actor_train",
    ),
    "ppo": (
        ppo.graph(ppo.PPOConfig(), MODELS, Rollout(ONE, MODEL)),
        "actor_gen rew_inf ref_inf critic_inf advantage actor_train critic_train",
    ),
    "ppo, adaptive, host reward": (
        ppo.graph(ADAPTIVE, MODELS, Rollout(ONE, HOST)),
        "actor_gen ref_inf critic_inf rew kl_inf advantage actor_train critic_train kl_train",
    ),
    "grpo": (
        grpo.graph(grpo.GRPOConfig(minibatches=2), MODELS, Rollout(FOUR, MODEL)),
        "actor_gen rew_inf ref_inf advantage actor_train",
    ),
    "dapo": (
        grpo.graph(
            grpo.GRPOConfig(beta=0.0, loss_agg="token_mean", clip_high=0.28, mask_truncated=True),
            MODELS,
            Rollout(FOUR, HOST),
        ),
        "actor_gen rew advantage actor_train",
    ),
    "rloo": (
        rloo.graph(rloo.RLOOConfig(whiten_advantages=True), MODELS, Rollout(FOUR, HOST)),
        "actor_gen ref_inf rew advantage actor_train",
    ),
    "remax": (
        remax.graph(remax.ReMaxConfig(), MODELS, Rollout(ONE, HOST)),
        "actor_gen greedy_gen ref_inf rew greedy_rew advantage actor_train",
    ),
    "remax, reward model": (
        remax.graph(remax.ReMaxConfig(kl_coef=0.0), MODELS, Rollout(ONE, MODEL)),
        "actor_gen greedy_gen rew_inf greedy_rew_inf advantage actor_train",
    ),
    "raft": (
        raft.graph(raft.RAFTConfig(drop_ties=False), MODELS, Rollout(FOUR, HOST)),
        "actor_gen rew best_of actor_train",
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_calls_are_the_papers_and_run_in_an_order_that_works(name):
    graph, calls = GRAPHS[name]
    order = [c.name for c in core.order(graph)]
    assert sorted(order) == sorted(calls.split())
    at = order.index
    for late in ("actor_train", "critic_train", "kl_train"):
        if late in order:
            model = late.removesuffix("_train")
            assert all(at(c.name) < at(late) for c in graph.of(model) if c.kind != "train")
            assert "advantage" not in order or at("advantage") < at(late)


def test_the_ppo_table_is_in_the_order_of_the_paper():
    graph, calls = GRAPHS["ppo"]
    assert [c.name for c in core.order(graph)] == calls.split()
    assert graph.models == ("actor", "reward", "ref", "critic")


def models_of(graph, seed=0):
    trained = {c.of for c in graph.calls if c.kind == "train"}
    specs, params = {}, {}
    for name in graph.models:
        if name == "kl":
            specs[name], params[name] = ppo.kl_spec(), ppo.kl_params(ADAPTIVE)
            continue
        cfg = HEAD if name in ("critic", "reward") else LM
        tx = optax.sgd(0.5) if name in trained else None
        specs[name] = Spec(abstract(cfg), logical_axes(cfg), tx)
        # The reference starts as the actor; the others as models of their own.
        at = seed if name in ("actor", "ref") else seed + 1
        params[name] = init(cfg, jax.random.key(at))
    return specs, params


def a_batch(graph, rows=4, length=8):
    rng = np.random.default_rng(0)
    if "prompt" in graph.inputs:
        size = rng.integers(1, 4, rows).astype(np.int32)
        prompt = rng.integers(4, 11, (rows, 3)) * (np.arange(3) < size[:, None])
        example = np.arange(rows, dtype=np.int32)
        return {
            "prompt": prompt.astype(np.int32), "prompt_length": size, "prompt_example": example
        }  # fmt: skip
    at = np.arange(length)
    row = {
        "tokens": rng.integers(4, 11, (rows, length)),
        "segment": np.broadcast_to(1 + at // 4, (rows, length)),
        "position": np.broadcast_to(at % 4, (rows, length)),
    }
    mask = np.broadcast_to((at % 4 > 1).astype(np.float32), (rows, length))
    return {k: np.ascontiguousarray(v, np.int32) for k, v in row.items()} | {"mask": mask.copy()}


# Every loss and every kind of call once; compilation is what takes the time.
STEPPED = (
    "reward model",
    "dpo",
    "ppo, adaptive, host reward",
    "grpo",
    "remax, reward model",
    "raft",
)


@pytest.mark.parametrize("name", STEPPED)
def test_one_step_is_finite_and_changes_what_it_trains(name):
    graph, _ = GRAPHS[name]
    specs, params = models_of(graph)
    plan = {c.name: Placement(devices=(0,)) for c in graph.calls}
    step = core.compile(graph, plan, specs).build(a_batch(graph))
    models = {}
    for m in graph.models:
        where = jax.tree.map(lambda x: x.sharding, step.home(m).params)
        models[m] = step.init(m, jax.device_put(params[m], where))
    before = {m: jax.tree.map(np.asarray, x.params) for m, x in models.items()}
    models, _, seen = step(models, a_batch(graph), np.array([0, 7], np.uint32))
    seen = {k: float(v) for k, v in seen.items()}
    assert all(np.isfinite(v) for v in seen.values()), seen
    for c in graph.calls:
        if c.kind != "train":
            continue
        assert seen[f"{c.name}/finite"] == 1
        after = jax.tree.map(np.asarray, models[c.of].params)
        same = jax.tree.map(np.array_equal, before[c.of], after)
        assert not all(jax.tree.leaves(same)), f"{c.name} changed nothing: {seen}"
    if "actor_train/logp_gap_max" in seen:
        assert seen["actor_train/logp_gap"] <= seen["actor_train/logp_gap_max"] <= 1e-4
        assert 0 < seen["advantage/length"] <= 5
    if "advantage/ref_kl" in seen:
        assert abs(seen["advantage/ref_kl"]) < 1e-4
    if "kl" in graph.models:
        # The KL is 0, so e = clip(0 / target - 1) = -0.2 and beta shrinks by 1 - 0.1 * 0.2.
        np.testing.assert_allclose(models["kl"].params["beta"], 0.05 * 0.98, rtol=1e-6)


# The adaptive coefficient


@pytest.mark.parametrize("kl,factor", [(0.0, 0.98), (2.1, 1.005), (2.0, 1.0), (100.0, 1.02)])
def test_adaptive_coefficient_follows_ziegler(kl, factor):
    cfg = ppo.PPOConfig(kl_target=2.0, kl_gain=0.1, kl_coef=0.5)
    rows, length = 4, 3
    mask = jnp.ones((rows, length), jnp.float32)
    batch = {
        "tokens": jnp.zeros((rows, length), jnp.int32),
        "segment": jnp.ones((rows, length), jnp.int32),
        "mask": mask,
        "logp": mask * kl / length,
        "ref_logp": 0 * mask,
        "score": jnp.zeros(rows),
        "value": 0 * mask,
        "kl_coef": jnp.full(rows, 0.5),
    }
    params = ppo.kl_params(cfg)
    out = ppo.advantage(cfg, (), batch, jax.random.key(0))

    def loss(params, rows):
        error = {"kl_error": out["kl_error"][rows]}
        total, weight, _ = ppo.coefficient_loss(cfg, params, error, jax.random.key(0))
        return total, weight

    # In two microbatches, as dataflow adds them up.
    parts = [jax.grad(loss, has_aux=True)(params, slice(i, i + 2)) for i in (0, 2)]
    grad = sum(g["beta"] for g, _ in parts) / sum(w for _, w in parts)
    tx = ppo.kl_spec().tx
    change, _ = tx.update({"beta": grad}, tx.init(params), params)
    np.testing.assert_allclose(params["beta"] + change["beta"], 0.5 * factor, rtol=1e-6)


# What the local calls compute


def rollout(scores, masks, tokens=None, **more):
    mask = jnp.asarray(masks, jnp.float32)
    segment = jnp.ones(mask.shape, jnp.int32)
    tokens = jnp.full(mask.shape, EOS, jnp.int32) if tokens is None else jnp.asarray(tokens)
    zero = jnp.zeros_like(mask)
    base = {"tokens": tokens, "segment": segment, "mask": mask, "logp": zero, "value": zero}
    score = {"score": jnp.asarray(scores, jnp.float32)}
    return base | score | {k: jnp.asarray(v) for k, v in more.items()}


KEY = jax.random.key(0)


def test_ppo_reward_is_kl_and_score_less_the_penalty_for_not_ending():
    cfg = ppo.PPOConfig(
        kl_coef=0.5, missing_eos_penalty=3.0, whiten_advantages=False, lam=1.0, discount=1.0
    )
    batch = rollout(
        [10.0, 10.0],
        [[0, 1, 1], [0, 1, 1]],
        tokens=np.array([[1, 4, EOS], [1, 4, 5]], np.int32),
        logp=np.array([[0, 1, 2], [0, 0, 0]], np.float32),
        ref_logp=np.zeros((2, 3), np.float32),
    )
    out = ppo.advantage(cfg, (EOS,), batch, KEY)
    np.testing.assert_allclose(out["ret"], [[0, 8.5, 9], [0, 7, 7]])
    seen = {k: float(m.read()) for k, m in out["metrics"].items()}
    assert seen == {"score": 10, "length": 2, "ref_kl": 1.5, "ended": 0.5, "beta": 0.5}


def test_ppo_whitens_over_the_chosen_tokens():
    batch = rollout([1.0, -2.0], [[0, 1, 1], [0, 1, 0]])
    out = ppo.advantage(ppo.PPOConfig(kl_coef=0.0), (), batch, KEY)
    adv, chosen = np.asarray(out["adv"]), np.asarray(batch["mask"]) > 0
    np.testing.assert_allclose([adv[chosen].mean(), adv[chosen].std()], [0, 1], atol=1e-5)
    assert (adv[~chosen] == 0).all()


def test_remax_advantage_is_the_reward_to_go_less_the_greedy_score():
    batch = rollout(
        [10.0, 4.0],
        [[0, 1, 1], [1, 1, 0]],
        logp=np.array([[0, 1, 2], [3, 0, 0]], np.float32),
        ref_logp=np.zeros((2, 3), np.float32),
        group=np.array([1, 0], np.int32),
        greedy_score=np.array([1.0, 2.0], np.float32),
        greedy_group=np.array([0, 1], np.int32),
    )
    out = remax.advantage(remax.ReMaxConfig(kl_coef=0.5), batch, KEY)
    np.testing.assert_allclose(out["adv"], [[0, 6.5, 7], [1.5, 3, 0]])
    assert float(out["metrics"]["greedy_score"].read()) == 1.5


def test_raft_keeps_the_best_answer_that_ended():
    ended, cut = [7, 4, EOS], [7, 4, 5]
    tokens = np.array([ended, ended, cut, ended, ended, cut, cut, ended, ended], np.int32)
    batch = rollout(
        [1.0, 5.0, 9.0, 2.0, 2.0, 3.0, 1.0, 2.0, 3.0],
        [[0, 1, 1]] * 9,
        tokens=tokens,
        group=np.array([0, 0, 0, 1, 1, 1, 2, 2, 2], np.int32),
        position=np.tile(np.arange(3, dtype=np.int32), (9, 1)),
    )
    order = np.array([3, 8, 0, 5, 2, 6, 1, 4, 7])
    batch = {k: v[order] for k, v in batch.items()}
    marked = batch | {"tokens": batch["tokens"].at[:, 0].set(jnp.asarray(order, jnp.int32) + 20)}
    for drop, kept in ((True, [1, 0, 1]), (False, [1, 1, 1])):
        out = raft.best_of(raft.RAFTConfig(drop_ties=drop), (EOS,), 3, marked, KEY)
        np.testing.assert_array_equal(out["best_mask"].max(axis=1), kept)
        first = np.asarray(out["best_tokens"][:, 0]) - 20
        assert first[0] == 1 and first[2] == 8 and (drop or first[1] == 3)
        assert float(out["metrics"]["kept"].read()) == pytest.approx(np.mean(kept))
    assert float(out["metrics"]["best_score"].read()) == pytest.approx((5 + 2 + 3) / 3)


def test_raft_without_a_finished_answer_keeps_none():
    batch = rollout([1.0, 2.0], [[0, 1, 1]] * 2, tokens=np.array([[7, 4, 5]] * 2, np.int32))
    batch |= {"group": jnp.zeros(2, jnp.int32), "position": batch["segment"]}
    out = raft.best_of(raft.RAFTConfig(), (EOS,), 2, batch, KEY)
    assert out["best_mask"].sum() == 0 and float(out["metrics"]["best_score"].read()) == 0


def test_group_meters_count_rows_without_a_signal():
    batch = rollout([1.0, 1.0, 0.0, 1.0], [[0, 1]] * 4, group=np.array([0, 0, 1, 1], np.int32))
    assert float(policy.group_meters(batch)["degenerate"].read()) == 0.5


# Refusals


@pytest.mark.parametrize(
    "config,fields,message",
    [
        (
            sft.SFTConfig,
            {"loss_agg": "mean"},
            "SFTConfig: unknown loss_agg 'mean'; .*'token_mean', 's",
        ),
        (reward_model.RewardModelConfig, {"center": -1.0}, "center is -1.0; it must be at least 0"),
        (dpo.DPOConfig, {"beta": 0.0}, "DPOConfig.beta is 0.0; it must be above 0"),
        (dpo.DPOConfig, {"loss": "kto"}, r"unknown loss 'kto'; .*'sigmoid', 'ipo', 'hinge'"),
        (dpo.DPOConfig, {"loss": "ipo", "label_smoothing": 0.1}, "0.1; it must be 0 with loss='i"),
        (ppo.PPOConfig, {"clip": 1.5}, "PPOConfig.clip is 1.5; it must be between 0 and 1"),
        (ppo.PPOConfig, {"kl_in": "both"}, r"unknown kl_in 'both'; .*'reward', 'loss'"),
        (ppo.PPOConfig, {"kl_estimator": "k0"}, r"'k0'; expected one of \['k1', 'k2', 'k3'\]"),
        (ppo.PPOConfig, {"kl_target": 6.0, "kl_coef": 0.0}, "kl_coef is 0.0; .* with kl_target"),
        (ppo.PPOConfig, {"dual_clip": 0.5}, "dual_clip is 0.5; it must be None or above 1"),
        (ppo.PPOConfig, {"minibatches": 0}, "minibatches is 0; it must be at least 1"),
        (grpo.GRPOConfig, {"ratio": "word"}, r"unknown ratio 'word'; .*'token', 'sequence'"),
        (grpo.GRPOConfig, {"loss_agg": "sum"}, "GRPOConfig: unknown loss_agg 'sum'; .*constant"),
        (rloo.RLOOConfig, {"clip": 2.0}, "RLOOConfig.clip is 2.0; it must be None or between"),
        (remax.ReMaxConfig, {"kl_coef": -0.1}, "ReMaxConfig.kl_coef is -0.1; it must be at least"),
        (raft.RAFTConfig, {"epochs": 0}, "RAFTConfig.epochs is 0; it must be at least 1"),
    ],
)
def test_configs_name_the_value_and_what_is_allowed(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


@pytest.mark.parametrize("file", [grpo, rloo, raft])
def test_group_algorithms_want_several_samples(file):
    config = {grpo: grpo.GRPOConfig, rloo: rloo.RLOOConfig, raft: raft.RAFTConfig}[file]
    with pytest.raises(ValueError, match=r"samples is 1; it must be at least 2"):
        file.graph(config(), MODELS, Rollout(ONE, HOST))


def test_graphs_refuse_models_and_ends_that_cannot_work():
    endless = LM.replace(eos=())
    with pytest.raises(ValueError, match="critic's head is 'lm'"):
        ppo.graph(ppo.PPOConfig(), MODELS | {"critic": LM}, Rollout(ONE, HOST))
    with pytest.raises(ValueError, match="reward model's head is 'lm'"):
        ppo.graph(ppo.PPOConfig(), MODELS | {"reward": LM}, Rollout(ONE))
    with pytest.raises(ValueError, match="reward model's head is 'lm'"):
        reward_model.graph(reward_model.RewardModelConfig(), {"reward": LM})
    with pytest.raises(ValueError, match=r"missing_eos_penalty is 1.0, but neither"):
        cfg = ppo.PPOConfig(missing_eos_penalty=1.0)
        ppo.graph(cfg, MODELS | {"actor": endless}, Rollout(ONE, HOST))
    with pytest.raises(ValueError, match="mask_truncated is True, but neither"):
        cfg = grpo.GRPOConfig(mask_truncated=True)
        grpo.graph(cfg, MODELS | {"actor": endless}, Rollout(FOUR, HOST))
    with pytest.raises(ValueError, match="RAFT keeps responses that ended"):
        raft.graph(raft.RAFTConfig(), MODELS | {"actor": endless}, Rollout(FOUR, HOST))

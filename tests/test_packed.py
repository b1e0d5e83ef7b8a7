"""Sampled sequences computed packed: no schedule changes a parameter, a metric or an output."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from launch import compiled_once  # noqa: F401 (fixture)

from jaxrl_eff import dataflow, packed
from jaxrl_eff.algorithms import grpo, policy, ppo, raft, remax
from jaxrl_eff.data import scheduled, skrull
from jaxrl_eff.data.schedules import Schedule, Shape
from jaxrl_eff.data.skrull_cost import Model, cost_of
from jaxrl_eff.dataflow import Graph, Placement, Spec, infer, train
from jaxrl_eff.edges import Rowwise
from jaxrl_eff.models import LMConfig, attention, params
from jaxrl_eff.rollout import Sampling

pytestmark = pytest.mark.usefixtures("compiled_once")

COST = cost_of(Model(2, 16, 4, 2, 8, 32, 24), flops_per_s=1e9, bytes_per_s=1e9)
FOUR = Placement((3, 0, 2, 1), data=2, seq=2)
ONE = Placement((0,))
SHAPES = {FOUR: (Shape(12, 4), Shape(0, 16), Shape(16, 0)), ONE: (Shape(24, 0), Shape(0, 32))}
ROOM = {FOUR: 16, ONE: 32}
OWN = skrull.plan


def at_random(lengths, *, groups, parts, room, cost, shapes, seed):
    """Any legal schedule: every sequence where there is room, in one of the shapes."""
    rng = np.random.default_rng(seed)
    taken, places, free = [], [], []
    for n in lengths:
        options = [
            (s, g, r) for s, there in enumerate(free) for (g, r), left in there.items() if left >= n
        ]
        if not options or rng.random() < 0.3:
            fit = [s for s in shapes if n <= max(s.local, parts * s.distributed)]
            shape = fit[rng.integers(len(fit))]
            taken.append(shape)
            free.append({
                (g, r): parts * shape.distributed if r < 0 else shape.local
                for g in range(groups) for r in range(-1, parts)
            })  # fmt: skip
            s = len(free) - 1
            options = [(s, *gr) for gr, left in free[s].items() if left >= n]
        s, g, r = options[rng.integers(len(options))]
        free[s][g, r] -= n
        places.append((s, g, r))
    step, group, rank = np.array(places, np.int32).T
    return Schedule(
        np.asarray(lengths), groups, parts, room, cost, tuple(taken), step, group, rank, 1.0, "", {}
    )


def only(kind):
    """The scheduler's own plan, or one in which all is distributed, or all local if it fits."""

    def plan(lengths, *, shapes, **how):
        if kind == "own":
            return OWN(lengths, shapes=shapes, **how)
        if isinstance(kind, int):
            return at_random(lengths, shapes=shapes, seed=kind, **how)
        few = [s for s in shapes if bool(s.distributed) == (kind == "shared")]
        return at_random(lengths, shapes=few, seed=0, **how)

    return plan


# In double precision, with a table for a model


V, B, T = 7, 8, 12
INPUTS = "tokens segment position mask logp ref_logp adv value ret kl_coef"


def table_lm(params, tokens, position, segment):
    """log-probabilities and entropies of a bigram table, 0 where a segment begins."""
    before = attention.spread(tokens.shape[1]).previous(tokens)
    logits = jax.nn.log_softmax(params["w"][before], axis=-1)
    there = (position > 0) & (segment > 0)
    logp = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return jnp.where(there, logp, 0.0), jnp.where(there, -(jnp.exp(logits) * logits).sum(-1), 0.0)


def table_values(params, tokens, position, segment):
    before = attention.spread(tokens.shape[1]).previous(tokens)
    return jnp.where((position > 0) & (segment > 0), params["w"][before, 0], 0.0)


def table_score(params, batch, key):
    return {"after": jnp.where(batch["segment"] > 0, params["w"][batch["tokens"], 1], 0.0)}


def table_last(batch, key):
    end = batch["segment"].sum(1, keepdims=True, dtype=jnp.int32) - 1
    return {"last": jnp.take_along_axis(batch["after"], end, axis=1)[:, 0]}


def tables():
    """Every loss of the policy-gradient family, each on a model of its own."""
    row = "tokens segment position mask "
    kl = ppo.PPOConfig(kl_in="loss", dual_clip=1.5, entropy=0.1)
    gspo = grpo.GRPOConfig(ratio="sequence", clip_low=0.1, clip_high=0.1, beta=0.0)
    dapo = grpo.GRPOConfig(loss_agg="token_mean", clip_high=0.28, mask_truncated=True)
    tail = (table_lm, (V - 1,), 5)
    twice = {"epochs": 2, "minibatches": 2}

    def one(name, fn, reads, **how):
        return train(f"{name}_train", of=name, fn=fn, reads=row + reads, **how)

    calls = (
        one("ppo", functools.partial(ppo.policy_loss, kl, table_lm), "logp adv ref_logp kl_coef"),
        one("value", functools.partial(ppo.value_loss, ppo.PPOConfig(), table_values), "value ret",
            **twice),
        one("grpo", functools.partial(grpo.policy_loss, grpo.GRPOConfig(), *tail),
            "logp adv ref_logp", **twice),
        one("gspo", functools.partial(grpo.policy_loss, gspo, *tail), "logp adv"),
        one("dapo", functools.partial(grpo.policy_loss, dapo, *tail), "logp adv ref_logp"),
        one("rloo", functools.partial(policy.reinforce_loss, 0.2, "sequence_sum", 5, table_lm),
            "logp adv"),
        infer("score_inf", of="reward", fn=Rowwise(table_score, table_last), reads=row.strip(),
              writes="last"),
        infer("logp_inf", of="reward", reads="tokens segment position", writes="fresh",
              fn=lambda p, b, key: {"fresh": table_lm(
                  p, b["tokens"], b["position"], b["segment"])[0]}),
    )  # fmt: skip
    return Graph(inputs=INPUTS, calls=calls)


def sampled():
    """Padded rows of prompt and response, and what calls before would have written."""
    rng = np.random.default_rng(3)
    length = np.array([12, 3, 5, 2, 9, 4, 7, 3])
    at = np.arange(T)[None]
    inside = at < length[:, None]
    mask = (inside & (at > 0)).astype(np.float32)
    normal = lambda s=0.4: (rng.normal(size=(B, T)) * s * mask).astype(np.float32)  # noqa: E731
    logp = normal() - 2 * mask
    tokens = np.where(inside, rng.integers(0, V - 1, (B, T)), 0)
    tokens[::2][at == length[::2, None] - 1] = V - 1
    return {
        "tokens": tokens.astype(np.int32), "segment": inside.astype(np.int32), "mask": mask,
        "position": np.where(inside, at, 0).astype(np.int32), "logp": logp,
        "ref_logp": logp + normal(), "adv": normal(2.0), "value": normal(), "ret": normal(),
        "kl_coef": rng.uniform(0.01, 0.1, B).astype(np.float32),
    }  # fmt: skip


def table_specs(graph):
    like = {"w": jax.ShapeDtypeStruct((V, V), jnp.float64)}
    trained = {c.of for c in graph.calls if c.kind == "train"}
    return {
        m: Spec(like, {"w": (None, None)}, optax.sgd(0.5) if m in trained else None)
        for m in graph.models
    }


def outcome(step, batch):
    """Models, kept arrays and metrics after one step, as numpy."""
    models = {}
    for i, name in enumerate(step.graph.models):
        there = jax.tree.map(lambda x: x.sharding, step.home(name).params)
        full = {"w": np.random.default_rng(i).normal(size=(V, V))}
        models[name] = step.init(name, jax.device_put(full, there))
    models, data, seen = step(models, batch, np.array([0, 1], np.uint32))
    own = {k: float(v) for k, v in seen.items() if not k.startswith("schedule/")}
    return jax.tree.map(np.asarray, ({m: x.params for m, x in models.items()}, data)), own


def same_tables(place, kinds, monkeypatch):
    graph, batch = tables(), sampled()
    keep = "last fresh"
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        plan = dict.fromkeys((c.name for c in graph.calls), ONE)
        specs = table_specs(graph)
        want, told = outcome(dataflow.compile(graph, plan, specs, keep=keep).build(batch), batch)
        step = packed.compile(graph, dict.fromkeys(plan, place), specs, keep=keep).check(batch)
        step.scheduled(packed.Packing(SHAPES[place], ROOM[place], COST)).build(batch)
        traces = dict(step.traces)
        for kind in kinds:
            monkeypatch.setattr(packed.skrull, "plan", only(kind))
            got, seen = outcome(step, batch)
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                assert a.dtype == b.dtype
                np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10, err_msg=str(kind))
            assert seen.keys() == told.keys()
            for k in told:
                np.testing.assert_allclose(seen[k], told[k], rtol=2e-6, atol=1e-7, err_msg=k)
        assert step.traces == traces


def test_no_schedule_changes_a_parameter_in_double_precision(monkeypatch):
    same_tables(FOUR, ("own", "local", "shared", 1, 2, 3), monkeypatch)


def test_neither_does_packing_on_one_device(monkeypatch):
    same_tables(ONE, ("own", "local", "shared", 1), monkeypatch)

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_eff import models
from jaxrl_eff.core import glossary
from jaxrl_eff.models import LMConfig, Rope
from jaxrl_eff.rollout import Sampling, sample

CFG = LMConfig(
    vocab=12, layers=2, width=16, heads=4, kv_heads=2, head_dim=8, ffn=20, init_std=0.4,
    window=4, windowed=(True, False), rope_local=Rope(theta=50.0), eos=(1,),
)  # fmt: skip
NEW = 6


@pytest.fixture(scope="module")
def params():
    return models.init(CFG, jax.random.key(0))


@pytest.fixture(scope="module")
def batch():
    prompt = jax.random.randint(jax.random.key(1), (4, 5), 2, CFG.vocab)
    length = jnp.asarray([5, 2, 3, 1])
    prompt = jnp.where(jnp.arange(5)[None, :] < length[:, None], prompt, 0)
    return dict(prompt=prompt, prompt_length=length, prompt_example=jnp.asarray([9, 8, 7, 6]))


@functools.cache
def compiled(**choices):
    return jax.jit(sample(CFG, Sampling(**dict(max_tokens=NEW) | choices)))


def run(params, batch, **choices):
    return compiled(**choices)(params, batch, jax.random.key(5))


@jax.jit
def likeliest(params, tokens):
    """For one row the likeliest token after each position, everything read again."""
    at = jnp.arange(tokens.shape[1])[None]
    hidden, _ = models.apply(CFG, params, tokens, at, jnp.ones_like(tokens))
    return models.unembed(CFG, params, hidden)[0].argmax(axis=-1)


def test_greedy_equals_reading_everything_again_for_every_token(params, batch):
    out = jax.tree.map(np.asarray, run(params, batch, temperature=0.0))
    for b in range(4):
        tokens = list(np.asarray(batch["prompt"][b, : batch["prompt_length"][b]]))
        while len(tokens) < int(batch["prompt_length"][b]) + NEW:
            row = jnp.asarray([tokens + [0] * (5 + NEW - len(tokens))])
            tokens.append(int(likeliest(params, row)[len(tokens) - 1]))
            if tokens[-1] in CFG.eos:
                break
        assert list(out["tokens"][b, : len(tokens)]) == tokens
        assert (out["segment"][b] == (np.arange(5 + NEW) < len(tokens))).all()


WARPS = [
    dict(), dict(temperature=0.6), dict(top_k=3), dict(top_p=0.8), dict(min_p=0.1),
    dict(temperature=1.3, top_k=6, top_p=0.9, min_p=0.02), dict(temperature=0.0),
]  # fmt: skip


@pytest.mark.parametrize("choices", WARPS, ids=str)
def test_the_trainer_agrees_with_the_sampler(params, batch, choices):
    out = run(params, batch, samples=2, **choices)
    warp = Sampling(max_tokens=NEW, **choices).warp
    where = out["tokens"], out["position"], out["segment"]
    logp, _ = models.token_logprobs(CFG, params, *where, warp=warp)
    np.testing.assert_allclose(logp * out["mask"], out["logp"], atol=1e-4)


def test_what_is_written_follows_the_glossary(params, batch):
    out = run(params, batch, samples=2)
    glossary.check("gen", out)
    out = jax.tree.map(np.asarray, out)
    length = np.repeat(np.asarray(batch["prompt_length"]), 2)
    np.testing.assert_array_equal(out["group"], [0, 0, 1, 1, 2, 2, 3, 3])
    np.testing.assert_array_equal(out["example"], [9, 9, 8, 8, 7, 7, 6, 6])
    for b in range(8):
        total = int(out["segment"][b].sum())
        expected = np.zeros(5 + NEW)
        expected[length[b] : total] = 1
        np.testing.assert_array_equal(out["mask"][b], expected)
        np.testing.assert_array_equal(out["position"][b, :total], np.arange(total))
        prompt = batch["prompt"][b // 2, : length[b]]
        np.testing.assert_array_equal(out["tokens"][b, : length[b]], prompt)
        answer = list(out["tokens"][b, length[b] : total])
        assert 1 not in answer[:-1] and (len(answer) == NEW or answer[-1] == 1)
        assert (out["tokens"][b, total:] == 0).all() and (out["logp"][b, total:] == 0).all()
    assert "example" not in run(params, {k: batch[k] for k in ("prompt", "prompt_length")})


def test_the_samples_of_a_prompt_differ_and_stops_stop(params, batch):
    out = run(params, batch, samples=2)
    assert (out["tokens"][0::2] != out["tokens"][1::2]).any()
    stopped = run(params, batch, stop=tuple(range(CFG.vocab)))
    assert (stopped["mask"].sum(axis=1) == 1).all()


WAYS = [
    dict(unstack=False), dict(compactions=2, growths=2),
    dict(unstack=False, compactions=1, growths=4),
]  # fmt: skip


@pytest.mark.parametrize("choices", WAYS, ids=str)
def test_how_it_is_computed_changes_no_token(params, batch, choices):
    common = dict(samples=2, stop=(2, 3, 4))
    expected, got = run(params, batch, **common), run(params, batch, **common, **choices)
    assert len(np.unique(expected["mask"].sum(axis=1))) > 2, "rows should end at different times"
    for name in ("tokens", "segment", "position", "mask"):
        np.testing.assert_array_equal(expected[name], got[name])
    np.testing.assert_allclose(expected["logp"], got["logp"], atol=1e-5)


def test_a_row_does_not_depend_on_the_other_rows(params, batch):
    all_ = run(params, batch)
    first = run(params, {name: x[:2] for name, x in batch.items()})
    for name in ("tokens", "mask", "position"):
        np.testing.assert_array_equal(all_[name][:2], first[name])


def test_sharding_changes_no_token(params, batch):
    expected = run(params, batch, samples=2)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rules = [
        ("batch", "data"), ("heads", "tensor"), ("kv_heads", "tensor"), ("ffn", "tensor"),
        ("vocab", "tensor"), ("act_heads", "tensor"), ("act_kv_heads", "tensor"),
        ("act_ffn", "tensor"), ("length", None), ("embed", None), ("act_embed", None),
        ("layers", None), ("head_dim", None),
    ]  # fmt: skip
    places = jax.tree.map(
        lambda names: NamedSharding(mesh, nn.logical_to_mesh_axes(names, rules)),
        models.logical_axes(CFG), is_leaf=lambda x: isinstance(x, tuple),
    )  # fmt: skip
    for unstack in (True, False):
        fn = sample(CFG, Sampling(max_tokens=NEW, samples=2, unstack=unstack))
        with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
            rows = jax.device_put(batch, NamedSharding(mesh, P("data")))
            got = jax.jit(fn)(jax.device_put(params, places), rows, jax.random.key(5))
        for name in ("tokens", "segment", "position", "mask", "group", "example"):
            np.testing.assert_array_equal(expected[name], got[name])
        np.testing.assert_allclose(expected["logp"], got["logp"], atol=1e-4)

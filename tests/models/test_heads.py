import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_eff import models
from jaxrl_eff.models import LMConfig, Warp

CFG = LMConfig(vocab=12, layers=1, width=8, heads=2, kv_heads=1, head_dim=4, ffn=12, init_std=0.5)


def packed():
    tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, CFG.vocab)
    segment = jnp.asarray([[1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 0, 0]])
    position = jnp.asarray([[0, 1, 2, 0, 1, 2, 0], [0, 1, 2, 3, 4, 0, 0]])
    return tokens, position, segment


@pytest.fixture(scope="module")
def params():
    return models.init(CFG, jax.random.key(0))


def test_index_t_is_the_choice_of_token_t(params):
    data = packed()
    hidden, _ = jax.jit(lambda p: models.apply(CFG, p, *data))(params)
    every = np.asarray(jax.nn.log_softmax(models.unembed(CFG, params, hidden), axis=-1))
    logp, spread = jax.jit(lambda p: models.token_logprobs(CFG, p, *data))(params)
    for b, t in np.ndindex(2, 7):
        chosen = data[2][b, t] > 0 and data[1][b, t] > 0
        expected = every[b, t - 1, data[0][b, t]] if chosen else 0.0
        uncertain = -(np.exp(every[b, t - 1]) * every[b, t - 1]).sum() if chosen else 0.0
        np.testing.assert_allclose(logp[b, t], expected, atol=1e-5)
        np.testing.assert_allclose(spread[b, t], uncertain, atol=1e-5)


@pytest.mark.parametrize("w", [Warp(), Warp(temperature=0.7, top_k=4)], ids=str)
@pytest.mark.parametrize("chunk", [4, 6])
def test_chunks_change_neither_values_nor_gradients(params, chunk, w):
    def loss(params, chunk):
        logp, spread = models.token_logprobs(CFG, params, *packed(), warp=w, chunk=chunk)
        weight = jnp.arange(7.0)[None, :]
        return (logp * weight).sum() + (spread * weight).sum()

    whole = jax.value_and_grad(loss)(params, 0)
    pieces = jax.value_and_grad(loss)(params, chunk)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), whole, pieces)


def test_the_call_writes_what_it_was_asked_for(params):
    batch = dict(zip(("tokens", "position", "segment"), packed(), strict=True))
    key = jax.random.key(0)
    out = models.logprobs(CFG, name="ref_logp", entropy=True)(params, batch, key)
    logp, spread = models.token_logprobs(CFG, params, *packed())
    np.testing.assert_array_equal(out["ref_logp"], logp)
    np.testing.assert_array_equal(out["entropy"], spread)
    assert set(models.logprobs(CFG)(params, batch, key)) == {"logp"}


def test_values_are_shifted_and_scores_are_not():
    cfg = CFG.replace(head="value")
    params = jax.jit(models.init, static_argnums=0)(cfg, jax.random.key(0))
    tokens, position, segment = packed()
    segment = (segment > 0).astype(jnp.int32)
    position = jnp.arange(7)[None, :] * segment
    after = jax.jit(lambda p: models.scalar_head(cfg, p, tokens, position, segment))(params)
    batch = dict(tokens=tokens, position=position, segment=segment)
    value = jax.jit(models.values(cfg))(params, batch, jax.random.key(0))["value"]
    numbers = jax.jit(models.token_scores(cfg))(params, batch, jax.random.key(0))
    score = models.last_score(batch | numbers, jax.random.key(0))["score"]
    np.testing.assert_allclose(value[0, 1:6], after[0, :5], atol=1e-6)
    np.testing.assert_allclose(value[1], [0, *after[1, :4], 0, 0], atol=1e-6)
    np.testing.assert_allclose(score, [after[0, 5], after[1, 4]], atol=1e-6)
    assert (after[segment == 0] == 0).all()

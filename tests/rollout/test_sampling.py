import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_eff.models import Warp
from jaxrl_eff.models.logits import log_softmax_at, warp
from jaxrl_eff.rollout import Sampling
from jaxrl_eff.rollout.sampling import draw, ends, uniforms


@pytest.mark.parametrize("vocab", [5, 16, 33])
@pytest.mark.parametrize("w", [Warp(), Warp(top_k=3), Warp(temperature=0.5, top_p=0.8)], ids=str)
def test_a_draw_is_the_inverse_distribution_function(key, vocab, w):
    logits = jnp.broadcast_to(2 * jax.random.normal(key, (1, vocab)), (500, vocab))
    uniform = jnp.asarray((np.arange(500) + 0.5) / 500, jnp.float32)
    token, logp = draw(logits, w, uniform)
    p = np.asarray(jax.nn.softmax(warp(logits[0], w)), np.float64)
    # Over an even grid every token comes as often as its probability says.
    np.testing.assert_allclose(np.bincount(token, minlength=vocab) / 500, p, atol=0.0041)
    assert (np.diff(token) >= 0).all() and (p[np.asarray(token)] > 0).all()
    np.testing.assert_allclose(logp, log_softmax_at(warp(logits, w), token), atol=1e-6)


def test_the_ends_of_the_unit_interval_draw_possible_tokens():
    logits = jnp.asarray([[-jnp.inf, 0.0, -jnp.inf, 1.0, -jnp.inf]] * 2)
    token, _ = draw(logits, Warp(), jnp.asarray([0.0, 1.0 - 2.0**-24]))
    np.testing.assert_array_equal(token, [1, 3])


def test_greedy_is_the_likeliest_token_at_temperature_one(key):
    logits = jax.random.normal(key, (4, 9))
    token, logp = draw(logits, Warp(temperature=0.0), jnp.full(4, 0.999))
    np.testing.assert_array_equal(token, logits.argmax(axis=1))
    np.testing.assert_allclose(logp, jax.nn.log_softmax(logits).max(axis=1), atol=1e-6)


def test_random_numbers_depend_on_row_and_step_alone(key):
    few = uniforms(key, jnp.asarray([7]), 3)
    many = uniforms(key, jnp.arange(9), 5)
    np.testing.assert_array_equal(few[0], many[7, :3])
    assert len(np.unique(many)) == many.size


def test_ends_knows_every_stop():
    np.testing.assert_array_equal(ends(jnp.asarray([1, 2, 3]), (1, 3)), [True, False, True])
    assert not ends(jnp.asarray([1]), ()).any()


def test_impossible_sampling_is_refused():
    for wrong in (dict(max_tokens=0), dict(max_tokens=1, samples=0)):
        with pytest.raises(ValueError, match="needs"):
            Sampling(**wrong)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_eff.models import Warp
from jaxrl_eff.models.logits import entropy, log_softmax_at, warp


def slow(logits, w):
    """One row, one rule after the other, on sorted probabilities."""
    logits = np.asarray(logits, np.float64) / (w.temperature or 1.0)
    order = np.argsort(-logits)
    kept = list(order[: w.top_k or len(order)])
    p = np.exp(logits[kept]) / np.exp(logits[kept]).sum()
    if w.top_p < 1:
        kept = kept[: int(np.searchsorted(np.cumsum(p), w.top_p) + 1)]
    p = np.exp(logits[kept])
    kept = [i for i, x in zip(kept, p, strict=True) if x >= w.min_p * p.max()]
    out = np.full(len(logits), -np.inf)
    out[kept] = logits[kept]
    return out


WARPS = [
    Warp(), Warp(temperature=0.5), Warp(top_k=3), Warp(top_p=0.7), Warp(min_p=0.3),
    Warp(temperature=2.0, top_k=5, top_p=0.8, min_p=0.1), Warp(temperature=0.0, top_k=2),
]  # fmt: skip


@pytest.mark.parametrize("w", WARPS, ids=str)
def test_warp_equals_one_rule_after_the_other(key, w):
    logits = 2 * jax.random.normal(key, (6, 9))
    got = warp(logits, w)
    for row, expected in zip(got, [slow(x, w) for x in logits], strict=True):
        np.testing.assert_allclose(row, expected, rtol=1e-6)


def test_the_sampled_token_is_kept_whatever_its_rank():
    logits = jnp.asarray([[3.0, 2.0, 1.0]])
    kept = warp(logits, Warp(top_k=1), keep=jnp.asarray([2]))
    np.testing.assert_array_equal(kept, [[3.0, -np.inf, 1.0]])


def test_equal_logits_are_kept_together():
    kept = warp(jnp.asarray([1.0, 1.0, 0.0]), Warp(top_k=1))
    np.testing.assert_array_equal(kept, [1.0, 1.0, -np.inf])


def test_log_softmax_and_entropy_live_on_the_kept_set():
    logits = jnp.log(jnp.asarray([[0.5, 0.25, 0.25], [0.9, 0.05, 0.05]]))
    logits = warp(logits, Warp(top_p=0.6))
    got = log_softmax_at(logits, jnp.asarray([1, 0]))
    np.testing.assert_allclose(got, np.log([0.25, 1.0]), atol=1e-6)
    expected = [0.5 * np.log(2) + 0.5 * np.log(4), 0.0]
    np.testing.assert_allclose(entropy(logits), expected, atol=1e-6)


def test_gradients_through_truncation_are_finite(key):
    def loss(logits):
        cut = warp(logits, Warp(top_k=2), keep=jnp.asarray([4]))
        return log_softmax_at(cut, jnp.asarray([4])).sum() + entropy(cut).sum()

    grad = jax.grad(loss)(jax.random.normal(key, (1, 6)))
    assert np.isfinite(grad).all() and (np.asarray(grad) != 0).sum() == 3


def test_impossible_warps_are_refused():
    for wrong in (dict(temperature=-1.0), dict(top_p=0.0), dict(min_p=2.0), dict(top_k=-1)):
        with pytest.raises(ValueError, match="needs"):
            Warp(**wrong)

"""The loss equations against hand-computed numbers, loops, and each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_eff.algorithms import losses


def array(*rows):
    return jnp.asarray(rows, jnp.float32)


ONE = jnp.ones((1, 3), jnp.int32)
FULL = jnp.ones((1, 3), jnp.float32)


def draw(seed, shape=(3, 10)):
    rng = np.random.default_rng(seed)
    normal = lambda: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    segment = jnp.asarray(np.sort(rng.integers(1, 4, shape), axis=1) * (np.arange(shape[1]) < 8))
    mask = jnp.asarray(rng.integers(0, 2, shape) * (np.arange(shape[1]) < 8), jnp.float32)
    return normal, segment.astype(jnp.int32), mask


# How tokens are averaged


def test_aggregations_of_two_packed_sequences():
    x = array([1, 2, 3, 10, 20, 99])
    mask = array([0, 1, 1, 1, 0, 0])
    segment = jnp.asarray([[1, 1, 1, 2, 2, 0]], jnp.int32)
    sums = {h: losses.aggregate(x, mask, segment, h, max_tokens=5) for h in losses.AGGREGATIONS}
    assert {k: (float(a), float(b)) for k, (a, b) in sums.items()} == {
        "token_mean": (15.0, 3.0),
        "sequence_mean": (12.5, 2.0),
        "sequence_sum": (15.0, 2.0),
        "constant": (3.0, 2.0),
    }


def test_aggregation_ignores_sequences_without_a_token_and_nan_outside_the_mask():
    x = array([1, 2, jnp.nan])
    segment = jnp.asarray([[1, 1, 2]], jnp.int32)
    total, weight = losses.aggregate(x, array([1, 1, 0]), segment, "sequence_mean")
    assert (float(total), float(weight)) == (1.5, 1.0)


def test_aggregation_errors_name_the_value():
    with pytest.raises(
        ValueError, match=r"unknown aggregation 'mean'; expected one of \['token_mean'"
    ):
        losses.aggregate(FULL, FULL, ONE, "mean")
    with pytest.raises(ValueError, match="max_tokens, which is None"):
        losses.aggregate(FULL, FULL, ONE, "constant")


# Ratios and the surrogate


def test_clipped_surrogate_by_hand():
    ratio, adv = array([1.5, 1.5, 0.5, 0.5]), array([1, -1, 1, -1])
    loss = losses.clipped_surrogate(ratio, adv, clip_low=0.2, clip_high=0.28)
    np.testing.assert_allclose(loss, [[-1.28, 1.5, -0.5, 0.8]], rtol=1e-6)
    active = losses.clipped(ratio, adv, clip_low=0.2, clip_high=0.28)
    np.testing.assert_array_equal(active, [[1, 0, 0, 1]])


def test_dual_clip_bounds_only_bad_tokens():
    ratio, adv = array([10, 10, 2]), array([1, -1, -1])
    loss = losses.clipped_surrogate(ratio, adv, clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    np.testing.assert_allclose(loss, [[-1.2, 3.0, 2.0]], rtol=1e-6)


def test_open_sides_never_clip():
    ratio, adv = array([9.0, 0.1, 1.0]), array([1, -1, 1])
    loss = losses.clipped_surrogate(ratio, adv, clip_low=None, clip_high=None)
    np.testing.assert_allclose(loss, -ratio * adv)
    assert losses.clipped(ratio, adv, clip_low=None, clip_high=None).sum() == 0


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
    normal, _, mask = draw(0)
    old, adv = normal(), normal()

    def loss(logp):
        ratio = losses.token_ratio(logp, old, mask)
        each = losses.clipped_surrogate(ratio, adv, clip_low=0.2, clip_high=0.2)
        return (each * mask).sum()

    np.testing.assert_allclose(jax.grad(loss)(old), -adv * mask, rtol=1e-6)


def test_clipping_takes_the_gradient_away_where_it_says_so():
    normal, _, mask = draw(1)
    old, adv, new = normal(), normal(), normal()
    ratio = losses.token_ratio(new, old, mask)

    def loss(logp):
        ratio = losses.token_ratio(logp, old, mask)
        each = losses.clipped_surrogate(ratio, adv, clip_low=0.2, clip_high=0.3)
        return (each * mask).sum()

    gone = losses.clipped(ratio, adv, clip_low=0.2, clip_high=0.3)
    assert 0 < (gone * mask).sum() < mask.sum()
    expected = -adv * ratio * mask * (1 - gone)
    np.testing.assert_allclose(jax.grad(loss)(new), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("far", [1e4, -1e4])
def test_a_policy_that_ran_away_has_finite_gradients(far):
    def loss(logp):
        ratio = losses.token_ratio(logp, jnp.zeros_like(logp), FULL)
        each = losses.clipped_surrogate(ratio, array([1.0, -1.0, 0.5]), clip_low=0.2, clip_high=0.2)
        kl = losses.kl_penalty(logp, jnp.zeros_like(logp), FULL, "k3")
        return (each + kl).sum()

    assert jnp.isfinite(jax.grad(loss)(jnp.full((1, 3), far, jnp.float32))).all()


def test_sequence_ratio_is_the_geometric_mean_over_each_segment():
    normal, segment, mask = draw(2)
    new, old = normal(), normal()
    expected = np.ones(mask.shape)
    for b in range(mask.shape[0]):
        for s in range(1, 4):
            here = np.asarray((segment[b] == s) & (mask[b] > 0))
            if here.any():
                gap = np.asarray(new[b] - old[b], np.float64)[here].mean()
                expected[b, np.asarray(segment[b] == s)] = np.exp(gap)
    ratio = losses.sequence_ratio(new, old, mask, segment)
    np.testing.assert_allclose(ratio, expected, rtol=1e-5)


def test_sequence_ratio_of_single_tokens_is_the_token_ratio():
    normal, _, _ = draw(3)
    new, old = normal(), normal()
    segment = jnp.broadcast_to(jnp.arange(1, 11, dtype=jnp.int32), new.shape)
    mask = jnp.ones_like(new)
    np.testing.assert_allclose(
        losses.sequence_ratio(new, old, mask, segment),
        losses.token_ratio(new, old, mask),
        rtol=1e-6,
    )


# KL


def test_kl_estimators_by_hand():
    logp, ref = array([0.0, -1.0, -2.0]), array([-1.0, 0.0, -2.0])
    e = np.e
    np.testing.assert_allclose(losses.kl(logp, ref, FULL, "k1"), [[1, -1, 0]], rtol=1e-6)
    np.testing.assert_allclose(losses.kl(logp, ref, FULL, "k2"), [[0.5, 0.5, 0]], rtol=1e-6)
    np.testing.assert_allclose(losses.kl(logp, ref, FULL, "k3"), [[1 / e, e - 2, 0]], rtol=1e-5)


def test_k3_is_never_negative_and_unbiased():
    p = jax.nn.log_softmax(jnp.asarray([0.3, -1.0, 2.0, 0.1]))
    q = jax.nn.log_softmax(jnp.asarray([1.3, 0.2, -0.5, 0.4]))
    exact = (jnp.exp(p) * (p - q)).sum()
    ones = jnp.ones((1, 4), jnp.float32)
    for estimator in ("k1", "k3"):
        mean = (jnp.exp(p) * losses.kl(p[None], q[None], ones, estimator)[0]).sum()
        np.testing.assert_allclose(mean, exact, rtol=1e-5)
    normal, _, mask = draw(4)
    assert (losses.kl(normal(), normal(), mask, "k3") >= 0).all()
    assert (losses.kl(normal(), normal(), mask, "k3") * (1 - mask) == 0).all()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_penalty_has_the_gradient_of_a_kl(estimator):
    """Over the policy's own tokens: of KL(pi || ref) for k1 and k2, of KL(ref || pi) for k3."""
    logits = jnp.asarray([0.3, -1.0, 2.0, 0.1])
    q = jax.nn.log_softmax(jnp.asarray([1.3, 0.2, -0.5, 0.4]))
    ones = jnp.ones((1, 4), jnp.float32)
    weights = jax.nn.softmax(logits)

    def sampled(logits):  # the expectation over tokens that are drawn, not differentiated
        p = jax.nn.log_softmax(logits)[None]
        return (weights * losses.kl_penalty(p, q[None], ones, estimator)[0]).sum()

    def reverse(logits):
        p = jax.nn.log_softmax(logits)
        return (jnp.exp(p) * (p - q)).sum()

    def forward(logits):
        return (jnp.exp(q) * (q - jax.nn.log_softmax(logits))).sum()

    exact = forward if estimator == "k3" else reverse
    np.testing.assert_allclose(
        jax.grad(sampled)(logits), jax.grad(exact)(logits), rtol=1e-5, atol=1e-6
    )
    value = losses.kl(jax.nn.log_softmax(logits)[None], q[None], ones, estimator)
    np.testing.assert_allclose(sampled(logits), (weights * value[0]).sum(), rtol=1e-5)


def test_unknown_estimator_is_named():
    with pytest.raises(ValueError, match=r"'k4'; expected one of \['k1', 'k2', 'k3'\]"):
        losses.kl(FULL, FULL, FULL, "k4")


# Values and pairs


def test_value_loss_by_hand():
    value, old, ret = array([1.0, 2.0, 0.0]), array([0.0, 1.9, 0.0]), array([2.0, 2.0, 1.0])
    np.testing.assert_allclose(
        losses.value_loss(value, old, ret, clip=None), [[0.5, 0, 0.5]], atol=1e-6
    )
    np.testing.assert_allclose(
        losses.value_loss(value, old, ret, clip=0.2), [[0.5 * 1.8**2, 0, 0.5]], rtol=1e-6, atol=1e-6
    )


def test_bradley_terry_by_hand():
    loss = losses.bradley_terry(jnp.asarray([2.0, 0.0]), jnp.asarray([1.0, 0.0]))
    np.testing.assert_allclose(loss, [np.log1p(np.exp(-1)), np.log(2)], rtol=1e-6)
    margin = losses.bradley_terry(jnp.asarray([2.0]), jnp.asarray([1.0]), margin=1.0)
    np.testing.assert_allclose(margin, [np.log(2)], rtol=1e-6)


def test_preference_losses_by_hand():
    gap = jnp.asarray([2.0, -1.0])
    by = lambda loss, **k: losses.preference(gap, beta=0.5, loss=loss, **k)  # noqa: E731
    soft = lambda x: np.log1p(np.exp(-x))  # noqa: E731
    np.testing.assert_allclose(by("sigmoid"), [soft(1), soft(-0.5)], rtol=1e-6)
    smooth = [0.9 * soft(1) + 0.1 * soft(-1), 0.9 * soft(-0.5) + 0.1 * soft(0.5)]
    np.testing.assert_allclose(by("sigmoid", label_smoothing=0.1), smooth, rtol=1e-6)
    np.testing.assert_allclose(by("ipo"), [1, 4], rtol=1e-6)
    np.testing.assert_allclose(by("hinge"), [0, 1.5], rtol=1e-6)
    with pytest.raises(ValueError, match=r"'dpo'; expected one of \['sigmoid', 'ipo', 'hinge'\]"):
        by("dpo")


def test_dpo_is_bradley_terry_of_the_implicit_reward():
    chosen, rejected = jnp.asarray([0.3, -2.0]), jnp.asarray([1.0, 0.5])
    np.testing.assert_allclose(
        losses.preference(chosen - rejected, beta=0.3, loss="sigmoid"),
        losses.bradley_terry(0.3 * chosen, 0.3 * rejected),
        rtol=1e-6,
    )


@pytest.mark.parametrize("width", [4, 5, 6, 7])
def test_pairs_are_neighbouring_segments(width):
    chosen, rejected = losses.pairs(jnp.arange(width, dtype=jnp.float32)[None])
    assert chosen[0].tolist() == list(range(1, width - 1, 2))
    assert rejected[0].tolist() == [s + 1 for s in range(1, width - 1, 2)]

"""Advantages against loops in float64, and against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_eff.algorithms import advantages


def gae_by_loop(reward, value, mask, segment, discount, lam):
    """One sequence at a time, over its chosen tokens only."""
    adv, ret = np.zeros(mask.shape), np.zeros(mask.shape)
    for b in range(mask.shape[0]):
        for s in set(segment[b]) - {0}:
            steps = [t for t in range(mask.shape[1]) if segment[b, t] == s and mask[b, t]]
            after, value_after = 0.0, 0.0
            for t in reversed(steps):
                delta = reward[b, t] + discount * value_after - value[b, t]
                after, value_after = delta + discount * lam * after, value[b, t]
                adv[b, t], ret[b, t] = after, after + value[b, t]
    return adv, ret


def packed(seed=0, rows=4, length=12):
    rng = np.random.default_rng(seed)
    segment = np.sort(rng.integers(1, 4, (rows, length)), axis=1)
    segment[:, -2:] = 0
    mask = (rng.integers(0, 3, (rows, length)) > 0) * (segment > 0)
    reward, value = rng.normal(size=(2, rows, length))
    return reward, value, mask.astype(np.float64), segment


def device(*xs):
    return [jnp.asarray(x, jnp.int32 if x.dtype.kind == "i" else jnp.float32) for x in xs]


@pytest.mark.parametrize("discount,lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_equals_the_loop_on_packed_rows_with_holes(discount, lam):
    arrays = packed()
    adv, ret = jax.jit(lambda *xs: advantages.gae(*xs, discount=discount, lam=lam))(
        *device(*arrays)
    )
    expected = gae_by_loop(*arrays, discount, lam)
    np.testing.assert_allclose(adv, expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ret, expected[1], rtol=1e-5, atol=1e-5)


def test_gae_by_hand():
    reward, value = np.array([[0.0, 0.0, 1.0]]), np.array([[0.5, 0.4, 0.6]])
    ones, segment = np.ones((1, 3)), np.ones((1, 3), int)
    adv, ret = advantages.gae(*device(reward, value, ones, segment), discount=0.9, lam=0.5)
    # d = (0.9 0.4 - 0.5, 0.9 0.6 - 0.4, 1 - 0.6) = (-0.14, 0.14, 0.4)
    np.testing.assert_allclose(adv, [[0.004, 0.32, 0.4]], rtol=1e-5)
    np.testing.assert_allclose(ret, [[0.504, 0.72, 1.0]], rtol=1e-5)


def test_gae_with_lambda_one_is_the_return_minus_the_value():
    reward, value, mask, segment = device(*packed(1))
    adv, ret = advantages.gae(reward, value, mask, segment, discount=1.0, lam=1.0)
    returns = advantages.reward_to_go(reward, mask, segment)
    np.testing.assert_allclose(adv, (returns - value) * mask, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ret, returns, rtol=1e-5, atol=1e-5)


def test_what_is_not_chosen_neither_counts_nor_discounts():
    reward, value, mask, segment = packed(2)
    noise = np.random.default_rng(9).normal(size=mask.shape) * (1 - mask)
    run = lambda *xs: advantages.gae(*device(*xs), discount=0.9, lam=0.8)  # noqa: E731
    for a, b in zip(
        run(reward, value, mask, segment),
        run(reward + noise, value - noise, mask, segment),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
        assert (np.asarray(a)[mask == 0] == 0).all()


def test_last_chosen_marks_one_token_of_each_segment():
    mask = jnp.asarray([[0, 1, 1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]], jnp.float32)
    segment = jnp.asarray([[1, 1, 1, 1, 2, 2, 3, 0], [1, 1, 1, 0, 0, 0, 0, 0]], jnp.int32)
    expected = [[0, 0, 1, 0, 1, 0, 0, 0], [0] * 8]
    np.testing.assert_array_equal(advantages.last_chosen(mask, segment), expected)


def test_ended_looks_at_the_last_chosen_token_only():
    tokens = jnp.asarray([[7, 9, 5, 9, 5, 8, 0, 9]], jnp.int32)
    mask = jnp.asarray([[0, 1, 1, 0, 1, 1, 0, 0]], jnp.float32)
    segment = jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 0]], jnp.int32)
    done = advantages.ended(tokens, mask, segment, ends=(8, 9))
    np.testing.assert_array_equal(done, [[0, 0, 0, 0, 1, 1, 1, 0]])
    assert advantages.ended(tokens, mask, segment, ends=()).sum() == 0


def test_shaped_reward_by_hand():
    mask = jnp.asarray([[0, 1, 1, 0], [0, 1, 0, 0]], jnp.float32)
    segment = jnp.asarray([[1, 1, 1, 0], [1, 1, 1, 1]], jnp.int32)
    kl = jnp.asarray([[9, 1, 2, 9], [9, 3, 9, 9]], jnp.float32)
    score = jnp.asarray([10.0, 20.0])
    out = advantages.shaped_reward(score, kl, mask, segment, kl_coef=0.5)
    np.testing.assert_allclose(out, [[0, -0.5, 9, 0], [0, 18.5, 0, 0]])
    beta = jnp.asarray([0.5, 1.0])
    each = advantages.shaped_reward(score, kl, mask, segment, kl_coef=beta)
    np.testing.assert_allclose(each, [[0, -0.5, 9, 0], [0, 17, 0, 0]])


def groups(seed=0, prompts=4, samples=3):
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat(np.arange(prompts), samples))
    return device(rng.normal(size=group.shape), group)


def test_group_normalized_equals_the_loop_in_any_row_order():
    score, group = groups()
    for scale in (True, False):
        out = advantages.group_normalized(score, group, scale_by_std=scale, eps=1e-4)
        for i in range(score.shape[0]):
            same = np.asarray(score, np.float64)[np.asarray(group == group[i])]
            expected = float(score[i]) - same.mean()
            expected /= same.std(ddof=1) + 1e-4 if scale else 1.0
            np.testing.assert_allclose(out[i], expected, rtol=1e-5, atol=1e-6)


def test_a_group_of_equal_scores_or_of_one_row_has_no_advantage():
    score = jnp.asarray([0.1, 0.1, 0.1, 5.0], jnp.float32)
    group = jnp.asarray([0, 0, 0, 1], jnp.int32)
    for scale in (True, False):
        assert not advantages.group_normalized(score, group, scale_by_std=scale).any()
    np.testing.assert_array_equal(advantages.group_spread(score, group), [0, 0, 0, 0])


def test_leave_one_out_equals_the_loop():
    score, group = groups(1)
    out = advantages.leave_one_out(score, group)
    for i in range(score.shape[0]):
        others = [float(score[j]) for j in range(len(score)) if j != i and group[j] == group[i]]
        np.testing.assert_allclose(out[i], float(score[i]) - np.mean(others), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("samples", [2, 3, 8])
def test_leave_one_out_is_the_centred_score_times_r_over_r_minus_one(samples):
    score, group = groups(2, samples=samples)
    centred = advantages.group_normalized(score, group, scale_by_std=False)
    np.testing.assert_allclose(
        advantages.leave_one_out(score, group),
        centred * samples / (samples - 1),
        rtol=1e-5,
        atol=1e-6,
    )


def test_greedy_baseline_follows_the_group_not_the_row():
    greedy_score = jnp.asarray([30.0, 10.0, 20.0])
    greedy_group = jnp.asarray([2, 0, 1], jnp.int32)
    group = jnp.asarray([0, 0, 2, 1, 2], jnp.int32)
    out = advantages.greedy_baseline(greedy_score, greedy_group, group)
    assert out.tolist() == [10, 10, 30, 20, 30]

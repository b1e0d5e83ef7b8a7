"""Advantages from rewards, on arrays alone.

Per token with a critic (`gae`), or per response against the other answers to the same prompt
(`group_normalized`, `leave_one_out`) or against the greedy answer (`greedy_baseline`). The rows of
a group are identified by group id, never by position, so the order of rows does not matter.
"""

import jax
import jax.numpy as jnp

from jaxrl_eff import masked
from jaxrl_eff.types import Array, Float, Int


def gae(
    reward: Float[Array, "B T"],
    value: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    segment: Int[Array, "B T"],
    *,
    discount: float,
    lam: float,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Computes generalized advantage estimates and value targets.

    d_t = r_t + g v_{t+1} - v_t        A_t = d_t + g l A_{t+1}        R_t = A_t + v_t

    Schulman et al. 2016, arXiv:1506.02438, Eq. 16. The value after a segment's last masked token
    is 0: a truncated response is treated as finished.

    Args:
        reward: for choosing token t; the KL penalty on each, plus the score on the last.
        value: critic's estimate before token t, in units of reward.
        mask: 1 where the policy chose the token. Other positions are skipped, not treated as
            steps, so tool output does not discount.
        segment: the recursion never crosses between packed sequences.
        discount, lam: g and l.

    Returns:
        A_t and R_t, 0 outside the mask. No gradient is stopped here; callers must do so.
    """

    def step(after, here):
        adv_after, value_after, segment_after = after
        r, v, chosen, ids = here
        same = ids == segment_after
        delta = r + discount * jnp.where(same, value_after, 0.0) - v
        adv = delta + discount * lam * jnp.where(same, adv_after, 0.0)
        kept = (
            jnp.where(chosen, adv, adv_after),
            jnp.where(chosen, v, value_after),
            jnp.where(chosen, ids, segment_after),
        )
        return kept, jnp.where(chosen, adv, 0.0)

    # Segment 0 is padding, which is never chosen, so nothing continues into it.
    zero = jnp.zeros_like(value[:, 0])
    start = (zero, zero, jnp.zeros_like(segment[:, 0]))
    steps = jax.tree.map(lambda x: x.T, (reward, value, mask > 0, segment))
    adv = jax.lax.scan(step, start, steps, reverse=True)[1].T
    return adv, jnp.where(mask > 0, adv + value, 0.0)


def reward_to_go(
    reward: Float[Array, "B T"], mask: Float[Array, "B T"], segment: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Computes the undiscounted sum of a segment's rewards from token t; 0 outside the mask."""
    zero = jnp.zeros_like(reward)
    return gae(reward, zero, mask, segment, discount=1.0, lam=1.0)[0]


def last_chosen(mask: Float[Array, "B T"], segment: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Returns 1 at the last masked token of each segment, 0 elsewhere."""
    at = jnp.broadcast_to(jnp.arange(1, mask.shape[1] + 1, dtype=jnp.int32), mask.shape)
    index = jnp.where(mask > 0, at, 0)
    last = jax.vmap(lambda i, ids: jax.ops.segment_max(i, ids, num_segments=i.shape[0] + 1))(
        index, segment
    )
    return jnp.where((mask > 0) & (index == jnp.take_along_axis(last, segment, axis=1)), 1.0, 0.0)


def ended(
    tokens: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    segment: Int[Array, "B T"],
    *,
    ends: tuple[int, ...],
) -> Float[Array, "B T"]:
    """Returns 1 on every token of a segment whose last chosen token is one of `ends`.

    The others were truncated at the length limit. Without `ends`, no segment counts as ended.
    """
    is_end = jnp.isin(tokens, jnp.asarray(ends, jnp.int32)).astype(jnp.float32)
    return masked.spread(masked.segment_sum(is_end * last_chosen(mask, segment), segment), segment)


def shaped_reward(
    score: Float[Array, "B"],
    kl: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    segment: Int[Array, "B T"],
    *,
    kl_coef: float | Float[Array, "B"],
) -> Float[Array, "B T"]:
    """Computes r_t = -beta KL_t, plus the score at the row's last chosen token.

    0 outside the mask. Ziegler et al. 2019, arXiv:1909.08593, Eq. 2, spread over the tokens. Each
    row must be one sequence, since a score belongs to a row.

    Args:
        kl: from `losses.kl`, nats.
        kl_coef: beta, reward per nat; one number, or one per row.
    """
    beta = jnp.broadcast_to(jnp.asarray(kl_coef, jnp.float32), score.shape)
    return score[:, None] * last_chosen(mask, segment) - beta[:, None] * kl * mask


def group_normalized(
    score: Float[Array, "B"],
    group: Int[Array, "B"],
    *,
    scale_by_std: bool = True,
    eps: float = 1e-4,
) -> Float[Array, "B"]:
    """Computes (r_i - mean of the group) / (std of the group + eps).

    GRPO, Shao et al. 2024, arXiv:2402.03300, Sec. 4.1.2; `scale_by_std=False` is Dr. GRPO,
    arXiv:2503.20783, which only centers. The paper does not specify the std: this is the sample std
    (divided by n - 1), as in common implementations. A group of equal scores, or of one row, gets
    exactly 0: rounding in its mean must not be scaled up to an advantage.
    """
    mean = _group_sum(score, group) / _group_sum(jnp.ones_like(score), group)
    centred = jnp.where(group_spread(score, group) > 0, score - mean, 0.0)
    if not scale_by_std:
        return centred
    count = _group_sum(jnp.ones_like(score), group)
    variance = _group_sum(jnp.square(centred), group) / jnp.maximum(count - 1, 1.0)
    return centred / (jnp.sqrt(variance) + eps)


def leave_one_out(score: Float[Array, "B"], group: Int[Array, "B"]) -> Float[Array, "B"]:
    """Computes r_i - mean of the *other* rows of the group.

    RLOO, Ahmadian et al. 2024, arXiv:2402.14740, Sec. 2.3; Kool et al. 2019. A row that is alone in
    its group has no baseline and keeps its score.
    """
    others = _group_sum(jnp.ones_like(score), group) - 1
    return score - (_group_sum(score, group) - score) / jnp.maximum(others, 1.0)


def greedy_baseline(
    greedy_score: Float[Array, "P"], greedy_group: Int[Array, "P"], group: Int[Array, "B"]
) -> Float[Array, "B"]:
    """Returns b_i, the greedy score for row i's prompt (ReMax, arXiv:2310.10505, Eq. 4)."""
    by_group = jnp.zeros_like(greedy_score).at[greedy_group].set(greedy_score)
    return by_group[group]


def group_spread(score: Float[Array, "B"], group: Int[Array, "B"]) -> Float[Array, "B"]:
    """Returns largest minus smallest score of each row's group; 0 gives no learning signal."""
    rows = score.shape[0]
    high = jax.ops.segment_max(score, group, num_segments=rows)
    low = jax.ops.segment_min(score, group, num_segments=rows)
    return high[group] - low[group]


def _group_sum(x, group):
    # A batch of B rows has at most B groups, with ids below B.
    return jax.ops.segment_sum(x, group, num_segments=x.shape[0])[group]

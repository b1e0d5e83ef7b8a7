"""Loss functions of fine-tuning, on arrays alone: no model, no graph.

Policy losses are returned per token, `[B, T]`, so that only `aggregate` defines how tokens are
averaged, which is where GRPO, DAPO and Dr. GRPO differ. Everything that depends on a whole sequence
uses `masked.segment_sum`, so packed rows and one row per sequence give the same numbers.

Not supported: losses that need the whole distribution of both models (full KL, distillation), and
off-policy importance weights for the KL term (see `kl_penalty`).
"""

import jax
import jax.numpy as jnp

from jaxrl_eff import masked
from jaxrl_eff.types import Array, Float, Int

ESTIMATORS = ("k1", "k2", "k3")
AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum", "constant")
PREFERENCES = ("sigmoid", "ipo", "hinge")

# exp(20) is far outside any clip range, and stays finite if a policy diverges: the gradient of
# `minimum` multiplies the branch not taken by 0, and 0 * inf would be NaN.
_LOG_LIMIT = 20.0


def aggregate(
    x: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    segment: Int[Array, "B T"],
    how: str,
    *,
    max_tokens: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns sum and weight of a per-token loss; sum / weight over the whole batch is its mean.

    - `token_mean`: every token counts the same (DAPO, arXiv:2503.14476, Eq. 8).
    - `sequence_mean`: the mean over a sequence's tokens, then over sequences (GRPO,
      arXiv:2402.03300, Eq. 3).
    - `sequence_sum`: the sum over a sequence's tokens, then the mean over sequences: the gradient
      of log pi(whole response) (REINFORCE).
    - `constant`: `sequence_sum` divided by `max_tokens`, so that length does not affect the scale
      (Dr. GRPO, arXiv:2503.20783, Sec. 3.2).

    A sequence counts if it has a masked token. Outside the mask x can have any value, even NaN.

    Raises:
        ValueError: `how` is none of these, or is `constant` without `max_tokens`.
    """
    x = jnp.where(mask > 0, x, 0.0) * mask
    if how == "token_mean":
        return x.sum(), mask.sum()
    length = masked.segment_sum(mask, segment)
    sequences = (length > 0).astype(jnp.float32).sum()
    if how == "sequence_mean":
        return (masked.segment_sum(x, segment) / jnp.maximum(length, 1.0)).sum(), sequences
    if how == "sequence_sum":
        return x.sum(), sequences
    if how != "constant":
        raise ValueError(f"unknown aggregation {how!r}; expected one of {[*AGGREGATIONS]}.")
    if not max_tokens:
        raise ValueError(f"'constant' divides by max_tokens, which is {max_tokens}; give >= 1.")
    return x.sum() / max_tokens, sequences


def token_ratio(
    logp: Float[Array, "B T"], old: Float[Array, "B T"], mask: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """Computes r_t = pi(t) / pi_old(t) for each token; 1 outside the mask.

    Schulman et al. 2017, arXiv:1707.06347, Eq. 6.
    """
    return jnp.exp(_log_ratio(logp, old, mask))


def sequence_ratio(
    logp: Float[Array, "B T"],
    old: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    segment: Int[Array, "B T"],
) -> Float[Array, "B T"]:
    """Computes s = (pi(y) / pi_old(y))^(1/|y|), the geometric mean of a sequence's token ratios.

    GSPO, Zheng et al. 2025, arXiv:2507.18071, Eq. 7. Every token has its sequence's s, so that
    `sequence_mean` of the clipped surrogate is the paper's Eq. 5. 1 outside sequences.
    """
    total = masked.segment_sum(_log_ratio(logp, old, mask), segment)
    length = jnp.maximum(masked.segment_sum(mask, segment), 1.0)
    return jnp.exp(masked.spread(total / length, segment))


def _log_ratio(logp, old, mask):
    return jnp.clip(jnp.where(mask > 0, logp - old, 0.0), -_LOG_LIMIT, _LOG_LIMIT)


def clipped_surrogate(
    ratio: Float[Array, "B T"],
    adv: Float[Array, "B T"],
    *,
    clip_low: float | None,
    clip_high: float | None,
    dual_clip: float | None = None,
) -> Float[Array, "B T"]:
    """Computes the loss of each token: -min(r A, clip(r, 1 - low, 1 + high) A).

    PPO, arXiv:1707.06347, Eq. 7; `clip_high > clip_low` is DAPO's asymmetric clip,
    arXiv:2503.14476, Eq. 10. At r = 1 the gradient is the policy gradient, -A grad log pi.

    Args:
        ratio: from `token_ratio` or `sequence_ratio`.
        adv: advantage; no gradient flows through it.
        clip_low, clip_high: None leaves that side open.
        dual_clip: c > 1 bounds the loss where A < 0 by -c A (Ye et al. 2020, arXiv:1912.09729,
            Eq. 5), since min() leaves r unbounded there.
    """
    adv = jax.lax.stop_gradient(adv)
    low = None if clip_low is None else 1 - clip_low
    high = None if clip_high is None else 1 + clip_high
    gain = jnp.minimum(ratio * adv, jnp.clip(ratio, low, high) * adv)
    if dual_clip is not None:
        gain = jnp.where(adv < 0, jnp.maximum(gain, dual_clip * adv), gain)
    return -gain


def clipped(
    ratio: Float[Array, "B T"],
    adv: Float[Array, "B T"],
    *,
    clip_low: float | None,
    clip_high: float | None,
) -> Float[Array, "B T"]:
    """Returns 1 for tokens whose gradient is removed by clipping."""
    over = (adv > 0) & (ratio > (jnp.inf if clip_high is None else 1 + clip_high))
    under = (adv < 0) & (ratio < (-jnp.inf if clip_low is None else 1 - clip_low))
    return (over | under).astype(jnp.float32)


def kl(
    logp: Float[Array, "B T"],
    ref_logp: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    estimator: str,
) -> Float[Array, "B T"]:
    """Estimates KL(pi || ref) in nats from tokens drawn from pi; 0 outside the mask.

    With d = log pi - log ref:  k1 = d,  k2 = d^2 / 2,  k3 = exp(-d) - 1 + d.
    (Schulman 2020, joschu.net/blog/kl-approx.html.) k1 and k3 are unbiased, k2 and k3 never
    negative. A log-ratio beyond 20 nats counts as 20. These are values: see `kl_penalty` before
    differentiating one.

    Raises:
        ValueError: the estimator is not one of k1, k2, k3.
    """
    d = _log_ratio(logp, ref_logp, mask)
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * jnp.square(d)
    if estimator == "k3":
        return jnp.expm1(-d) + d
    raise ValueError(f"unknown KL estimator {estimator!r}; expected one of {[*ESTIMATORS]}.")


def kl_penalty(
    logp: Float[Array, "B T"],
    ref_logp: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    estimator: str,
) -> Float[Array, "B T"]:
    """Computes `kl` as a loss term: the same values, with a meaningful gradient.

    On tokens sampled from the policy, the mean of d grad log pi is grad KL(pi || ref). This is the
    gradient of k2. The gradient of k1 is grad log pi, whose mean is 0, so k1 uses k2's gradient
    here. k3 keeps its own, (1 - ref/pi) grad log pi, as published for GRPO (arXiv:2402.03300,
    Eq. 4): its mean is the gradient of KL(ref || pi), which agrees to first order around pi = ref.
    After several updates the tokens are off-policy, and no importance weight corrects for it.
    """
    value = kl(logp, ref_logp, mask, estimator)
    if estimator != "k1":
        return value
    slope = kl(logp, ref_logp, mask, "k2")
    return slope + jax.lax.stop_gradient(value - slope)


def value_loss(
    value: Float[Array, "B T"],
    old: Float[Array, "B T"],
    ret: Float[Array, "B T"],
    *,
    clip: float | None,
) -> Float[Array, "B T"]:
    """Computes the loss of each value: max((v - R)^2, (clip(v, old - c, old + c) - R)^2) / 2.

    This is the clipping in OpenAI's PPO code, described by Engstrom et al. 2020, arXiv:2005.12729,
    Sec. 3; `clip=None` is (v - R)^2 / 2. R and old get no gradient.
    """
    old, ret = jax.lax.stop_gradient((old, ret))
    error = jnp.square(value - ret)
    if clip is not None:
        error = jnp.maximum(error, jnp.square(old + jnp.clip(value - old, -clip, clip) - ret))
    return 0.5 * error


def bradley_terry(
    chosen: Float[Array, "..."], rejected: Float[Array, "..."], *, margin: float = 0.0
) -> Float[Array, "..."]:
    """Computes -log sigmoid(r_chosen - r_rejected - m), the loss of each pair.

    Ouyang et al. 2022, arXiv:2203.02155, Eq. 1; the margin m is Llama 2's, arXiv:2307.09288, Eq. 2.
    """
    return -jax.nn.log_sigmoid(chosen - rejected - margin)


def preference(
    gap: Float[Array, "..."], *, beta: float, loss: str, label_smoothing: float = 0.0
) -> Float[Array, "..."]:
    """Computes a DPO-family loss per pair from h = log-ratio(chosen) - log-ratio(rejected).

    A log-ratio is log pi(y) - log ref(y) of a whole response, in nats.

    - `sigmoid`: -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h); e = `label_smoothing` is the
      probability that a label is wrong. Rafailov et al. 2023, arXiv:2305.18290, Eq. 7; cDPO,
      Mitchell 2023.
    - `ipo`: (h - 1 / (2 beta))^2. Azar et al. 2023, arXiv:2310.12036, Eq. 17.
    - `hinge`: max(0, 1 - beta h). SLiC-HF, arXiv:2305.10425, with DPO's reward (RSO,
      arXiv:2309.06657, Eq. 10).

    Raises:
        ValueError: the loss is none of these.
    """
    if loss == "sigmoid":
        right, wrong = jax.nn.log_sigmoid(beta * gap), jax.nn.log_sigmoid(-beta * gap)
        return -(1 - label_smoothing) * right - label_smoothing * wrong
    if loss == "ipo":
        return jnp.square(gap - 1 / (2 * beta))
    if loss == "hinge":
        return jax.nn.relu(1 - beta * gap)
    raise ValueError(f"unknown preference loss {loss!r}; expected one of {[*PREFERENCES]}.")


def pairs(per_segment: Float[Array, "B T1"]) -> tuple[Float[Array, "B K"], Float[Array, "B K"]]:
    """Returns numbers of the chosen and rejected responses of every possible pair of a row.

    Segments 2k + 1 and 2k + 2 of a row are pair k. A row of T tokens has at most T // 2 pairs;
    absent pairs are 0, as filled in by `masked.segment_sum`.
    """
    last = (per_segment.shape[1] - 1) // 2 * 2
    return per_segment[:, 1 : last + 1 : 2], per_segment[:, 2 : last + 1 : 2]

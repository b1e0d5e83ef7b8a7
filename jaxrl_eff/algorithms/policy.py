"""Parts shared by policy-gradient algorithms: rollout and reward calls, and the actor's meters.

A reward is either a model, which scores the whole row, or a function of the text, which runs on the
host. Every algorithm supports both, through `reward_call`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import jax.numpy as jnp

from jaxrl_eff.algorithms import advantages, losses
from jaxrl_eff.algorithms.base import HostReward, Rollout
from jaxrl_eff.core import Call, generate, infer, local, meters
from jaxrl_eff.models.config import LMConfig
from jaxrl_eff.models.heads import last_score, logprobs, token_scores
from jaxrl_eff.rollout import Sampling, sample
from jaxrl_eff.types import Array, Float

PROMPTS = "prompt prompt_length prompt_example"
ROLLOUT = "tokens segment position mask logp group example"


def rollout_call(lm: LMConfig, sampling: Sampling) -> Call:
    """Returns the call in which the actor answers the prompts, `sampling.samples` times each."""
    fn = sample(lm, sampling)
    return generate("actor_gen", of="actor", fn=fn, reads=PROMPTS, writes=ROLLOUT)


def greedy_calls(
    lm: LMConfig, sampling: Sampling, reward: LMConfig | HostReward
) -> tuple[Call, Call]:
    """Returns the calls for greedy answers and their reward: `greedy_tokens`, `greedy_score`, ...

    Truncation is disabled too: it never removes the likeliest token.
    """
    greedy = replace(sampling, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, samples=1)
    fn = _prefixed(sample(lm, greedy), reads="", writes="greedy_")
    writes = " ".join(f"greedy_{name}" for name in ROLLOUT.split())
    return (
        generate("greedy_gen", of="actor", fn=fn, reads=PROMPTS, writes=writes),
        reward_call(reward, prefix="greedy_"),
    )


def reference_call(lm: LMConfig, sampling: Sampling) -> Call:
    """Returns the call for the reference's log-probabilities, warped as by the sampler."""
    fn = logprobs(lm, warp=sampling.warp, name="ref_logp")
    return infer("ref_inf", of="ref", fn=fn, reads="tokens segment position", writes="ref_logp")


def reward_of(models: Mapping[str, LMConfig], rollout: Rollout) -> LMConfig | HostReward:
    """Returns the reward: a function of the text, or the config of the scoring model."""
    return models["reward"] if rollout.reward is None else rollout.reward


def reward_call(reward: LMConfig | HostReward, *, prefix: str = "") -> Call:
    """Returns the call that scores responses: `rew_inf` of a model, or `rew` on the host.

    Args:
        reward: a model with `head="value"`, or a `HostReward`.
        prefix: prefix of the call's name and of every array it reads and writes.

    Raises:
        ValueError: the reward model has no value head.
    """
    if isinstance(reward, LMConfig):
        if reward.head != "value":
            raise ValueError(f"the reward model's head is {reward.head!r}; it must be 'value'.")
        names = "tokens segment position"
        fn = _prefixed(token_scores(reward), reads=prefix, writes=prefix)
        finish = _prefixed(last_score, reads=prefix, writes=prefix)
        call = partial(infer, f"{prefix}rew_inf", of="reward", finish=finish)
    else:
        names = "tokens mask example"
        fn = _prefixed(reward, reads=prefix, writes=prefix)
        call = partial(local, f"{prefix}rew", host=True)
    reads = " ".join(prefix + name for name in names.split())
    return call(fn=fn, reads=reads, writes=f"{prefix}score")


def _prefixed(fn: Callable, *, reads: str, writes: str) -> Callable:
    """Wraps fn for a batch with prefixed names. The batch is the second-to-last argument."""
    if not reads and not writes:
        return fn

    def call(*args):
        *before, batch, key = args
        out = fn(*before, {k.removeprefix(reads): v for k, v in batch.items()}, key)
        return {k if k == "metrics" else writes + k: v for k, v in out.items()}

    return call


def ends(lm: LMConfig, sampling: Sampling) -> tuple[int, ...]:
    """Returns the tokens that end a response."""
    return (*lm.eos, *sampling.stop)


def rollout_meters(batch: dict[str, Array]) -> dict[str, meters.Meter]:
    """Returns score, length in tokens, and KL to the reference in nats, each per response.

    KL(pi || ref) is the mean of the summed k1, the sampled log-ratio of the whole response. The
    batch needs `score` and `mask`, and the KL needs `logp` and `ref_logp`.
    """
    score, mask = batch["score"], batch["mask"]
    rows = jnp.float32(score.shape[0])
    out = {
        "score": meters.Mean(score.sum(), rows),
        "length": meters.Mean(mask.sum(), rows),
    }
    if "ref_logp" in batch:
        kl = losses.kl(batch["logp"], batch["ref_logp"], mask, "k1")
        out["ref_kl"] = meters.Mean(kl.sum(), rows)
    return out


def group_meters(batch: dict[str, Array]) -> dict[str, meters.Meter]:
    """Returns `rollout_meters`, and `degenerate`, the fraction of rows with equal group scores."""
    flat = advantages.group_spread(batch["score"], batch["group"]) == 0
    rows = jnp.float32(flat.shape[0])
    return rollout_meters(batch) | {"degenerate": meters.Mean(flat.astype(jnp.float32).sum(), rows)}


def policy_meters(
    *,
    logp: Float[Array, "B T"],
    old: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    ratio: Float[Array, "B T"],
    clipped: Float[Array, "B T"],
    entropy: Float[Array, "B T"] | None = None,
) -> dict[str, meters.Meter]:
    """Measures the policy's distance from the sampler's, over the masked tokens.

    - `kl`: KL(sampler || policy) in nats per token, by k3.
    - `clip_fraction`: fraction of tokens whose gradient is removed by clipping.
    - `ratio_max`: the largest probability ratio.
    - `logp_gap`, `logp_gap_p95`, `logp_gap_max`: |policy - sampler| in nats on a call's first
      update, when both have the same weights: the numerical difference of the two programs.
    - `entropy`: nats per token, if it was computed.
    """
    gap = jnp.where(mask > 0, jnp.abs(logp - old), 0.0)
    tokens = mask.sum()
    out = {
        "kl": meters.Mean(losses.kl(old, logp, mask, "k3").sum(), tokens),
        "clip_fraction": meters.Mean((clipped * mask).sum(), tokens),
        "ratio_max": meters.Max(jnp.where(mask > 0, ratio, 0.0).max()),
        "logp_gap": meters.first(meters.Mean(gap.sum(), tokens)),
        "logp_gap_p95": meters.first(meters.Quantile.of(gap, mask, 0.95)),
        "logp_gap_max": meters.first(meters.Max(gap.max())),
    }
    if entropy is not None:
        out["entropy"] = meters.Mean((entropy * mask).sum(), tokens)
    return out


def reinforce_loss(
    clip: float | None,
    loss_agg: str,
    max_tokens: int,
    numbers: tuple[Array, Array],
    batch: dict[str, Array],
    key: Array,
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, meters.Meter]]:
    """Computes the loss of RLOO and ReMax: -A r with r = pi / pi_sampler, clipped to 1 +- `clip`.

    On a rollout's first update r is 1 and the gradient is REINFORCE's, -A grad log pi.

    Args:
        clip: r is clipped to 1 +- clip where that bounds the gain; None never clips.
        loss_agg, max_tokens: see `losses.aggregate`.
        numbers: log-probabilities `[B, T]`, and entropies, which are not used.

    Returns:
        Sum, weight and `policy_meters`.
    """
    del key
    old, mask, adv = batch["logp"], batch["mask"], batch["adv"]
    logp, _ = numbers
    ratio = losses.token_ratio(logp, old, mask)
    sides = {"clip_low": clip, "clip_high": clip}
    loss = losses.clipped_surrogate(ratio, adv, **sides)
    total, weight = losses.aggregate(loss, mask, batch["segment"], loss_agg, max_tokens=max_tokens)
    clipped = losses.clipped(ratio, adv, **sides)
    return total, weight, policy_meters(logp=logp, old=old, mask=mask, ratio=ratio, clipped=clipped)


def require_samples(algorithm: str, sampling: Sampling) -> None:
    """Raises ValueError unless every prompt gets at least two samples, which are compared."""
    if sampling.samples < 2:
        raise ValueError(
            f"{algorithm} compares the answers to one prompt, but sampling.samples is "
            f"{sampling.samples}; it must be at least 2."
        )

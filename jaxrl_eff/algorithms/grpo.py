"""GRPO and its variants: PPO whose baseline is the other answers to the same prompt.

    A_i = (score_i - mean of the group) / std of the group        advantages.group_normalized
    L   = -min(rho A, clip(rho, 1 - low, 1 + high) A) + beta KL(pi || ref)

Shao et al. 2024, arXiv:2402.03300, Eq. 3: no critic. Each change of later papers is a field:

    Dr. GRPO   arXiv:2503.20783   scale_by_std=False, loss_agg="constant"
    DAPO       arXiv:2503.14476   clip_high=0.28, loss_agg="token_mean", beta=0, mask_truncated=True
    GSPO       arXiv:2507.18071   ratio="sequence", clip_low=3e-4, clip_high=4e-4, beta=0

Not supported: DAPO's resampling of groups without a gradient and its soft length penalty (which is
a reward), and GSPO's token variant.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxrl_eff.algorithms import advantages, losses
from jaxrl_eff.algorithms.base import Algorithm, Rollout, require, require_one_of
from jaxrl_eff.algorithms.policy import (
    PROMPTS,
    ends,
    group_meters,
    policy_meters,
    reference_call,
    require_samples,
    reward_call,
    reward_of,
    rollout_call,
)
from jaxrl_eff.core import Graph, local, meters, train
from jaxrl_eff.models.config import LMConfig
from jaxrl_eff.models.heads import token_logprobs
from jaxrl_eff.types import Array, Float


@dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """Settings that select a variant of GRPO.

    Attributes:
        beta: weight of the KL penalty in the loss; 0 drops the reference.
        kl_estimator: "k1", "k2" or "k3".
        scale_by_std: divide the centered score by the group's standard deviation.
        ratio: "token", or "sequence" for the geometric mean over a response (GSPO).
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        dual_clip: c > 1 bounds the loss of tokens with A < 0 (arXiv:1912.09729); None: no bound.
        loss_agg: "sequence_mean" (GRPO), "token_mean" (DAPO), "constant" (Dr. GRPO) or
            "sequence_sum".
        mask_truncated: excludes responses truncated at the length limit from the loss. They still
            count in their group's mean and deviation.
        entropy: coefficient of the entropy bonus; 0 skips its computation.
        epochs, minibatches: passes over a rollout, updates per pass.
    """

    beta: float = 0.04
    kl_estimator: str = "k3"
    scale_by_std: bool = True
    ratio: str = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    loss_agg: str = "sequence_mean"
    mask_truncated: bool = False
    entropy: float = 0.0
    epochs: int = 1
    minibatches: int = 1

    def __post_init__(self):
        require(self, "beta", self.beta >= 0, "at least 0")
        require_one_of(self, "kl_estimator", losses.ESTIMATORS)
        require_one_of(self, "ratio", ("token", "sequence"))
        require(self, "clip_low", 0 < self.clip_low <= 1, "in (0, 1]")
        require(self, "clip_high", self.clip_high > 0, "above 0")
        require(self, "dual_clip", self.dual_clip is None or self.dual_clip > 1, "None or above 1")
        require_one_of(self, "loss_agg", losses.AGGREGATIONS)
        require(self, "entropy", self.entropy >= 0, "at least 0")
        require(self, "epochs", self.epochs >= 1, "at least 1")
        require(self, "minibatches", self.minibatches >= 1, "at least 1")


def graph(cfg: GRPOConfig, models: Mapping[str, LMConfig], rollout: Rollout) -> Graph:
    """Returns GRPO's calls. Models: actor, ref (unless beta is 0), reward (if it is a model).

    Raises:
        ValueError: fewer than two samples per prompt; `mask_truncated` where no token ends a
            response.
    """
    sampling, actor = rollout.sampling, models["actor"]
    require_samples("GRPO", sampling)
    stop = ends(actor, sampling)
    if cfg.mask_truncated and not stop:
        raise ValueError(
            "mask_truncated is True, but neither the model's eos nor sampling.stop names a token "
            "that ends a response, so every response would be masked."
        )
    forward = partial(token_logprobs, actor, warp=sampling.warp, with_entropy=cfg.entropy > 0)
    loss = partial(policy_loss, cfg, stop, sampling.max_tokens)
    ref_logp = " ref_logp" * (cfg.beta > 0)
    calls = (
        rollout_call(actor, sampling),
        reward_call(reward_of(models, rollout)),
        ref_logp and reference_call(actor, sampling),
        local("advantage",               fn=partial(advantage, cfg),
                                         reads="score group mask logp" + ref_logp, writes="adv"),
        train("actor_train", of="actor", forward=forward, loss=loss,
                                         reads="tokens segment position mask logp adv" + ref_logp,
                                         epochs=cfg.epochs, minibatches=cfg.minibatches),
    )  # fmt: skip
    return Graph(inputs=PROMPTS, calls=tuple(c for c in calls if c))


def advantage(cfg: GRPOConfig, batch: dict[str, Array], key: Array) -> dict[str, Any]:
    """Puts the group-normalized score on every response token; meters: `policy.group_meters`."""
    del key
    adv = advantages.group_normalized(batch["score"], batch["group"], scale_by_std=cfg.scale_by_std)
    return {"adv": adv[:, None] * batch["mask"], "metrics": group_meters(batch)}


def policy_loss(
    cfg: GRPOConfig,
    stop: tuple[int, ...],
    max_tokens: int,
    numbers: tuple[Array, Array],
    batch: dict[str, Array],
    key: Array,
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, meters.Meter]]:
    """Computes clipped surrogate plus KL penalty: sum, weight, `policy.policy_meters`.

    The weight is the number of sequences, or of tokens with "token_mean".

    Args:
        numbers: log-probabilities and entropies, `[B, T]` each.
    """
    del key
    tokens, segment = batch["tokens"], batch["segment"]
    old, mask, adv = batch["logp"], batch["mask"], batch["adv"]
    if cfg.mask_truncated:
        mask = mask * advantages.ended(tokens, mask, segment, ends=stop)
    logp, entropy = numbers
    ratio = losses.token_ratio(logp, old, mask)
    if cfg.ratio == "sequence":
        ratio = losses.sequence_ratio(logp, old, mask, segment)
    clip = {"clip_low": cfg.clip_low, "clip_high": cfg.clip_high}
    loss = losses.clipped_surrogate(ratio, adv, **clip, dual_clip=cfg.dual_clip)
    if "ref_logp" in batch:
        loss = loss + cfg.beta * losses.kl_penalty(logp, batch["ref_logp"], mask, cfg.kl_estimator)
    if cfg.entropy:
        loss = loss - cfg.entropy * entropy
    total, weight = losses.aggregate(loss, mask, segment, cfg.loss_agg, max_tokens=max_tokens)
    return (
        total,
        weight,
        policy_meters(
            logp=logp,
            old=old,
            mask=mask,
            ratio=ratio,
            clipped=losses.clipped(ratio, adv, **clip),
            entropy=entropy if cfg.entropy else None,
        ),
    )


ALGORITHM = Algorithm(
    config=GRPOConfig,
    graph=graph,
    batch="prompts",
    roles={"actor": "lm", "ref": "lm", "reward": "value"},
)

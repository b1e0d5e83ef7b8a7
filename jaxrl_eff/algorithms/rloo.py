"""RLOO: REINFORCE with the mean of the other answers as baseline. A response is one action.

    R_i = score_i - beta sum_t KL_t        A_i = R_i - mean of R_j over the group's other rows j
    L   = -A_i log pi(y_i)                  summed over the response's tokens

Ahmadian et al. 2024, arXiv:2402.14740, Sec. 2.3. Equals GRPO without the division by the deviation
and with the KL in the reward. Updates after a rollout's first are off policy; their token ratios
are clipped as in PPO, which the paper, with one update per rollout, does not need.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp

from jaxrl_eff import masked
from jaxrl_eff.algorithms import advantages, losses
from jaxrl_eff.algorithms.base import Algorithm, Rollout, require, require_one_of
from jaxrl_eff.algorithms.policy import (
    PROMPTS,
    group_meters,
    reference_call,
    reinforce_loss,
    require_samples,
    reward_call,
    reward_of,
    rollout_call,
)
from jaxrl_eff.core import Graph, local, train
from jaxrl_eff.models.config import LMConfig
from jaxrl_eff.models.heads import token_logprobs
from jaxrl_eff.types import Array


@dataclass(frozen=True, kw_only=True)
class RLOOConfig:
    """Settings of RLOO.

    Attributes:
        kl_coef: beta, reward per nat; 0 drops the reference.
        kl_estimator: "k1", "k2" or "k3".
        whiten_advantages: shift and scale a batch's advantages to mean 0, variance 1.
        clip: token ratios are clipped to 1 +- clip; None never clips.
        loss_agg: "sequence_sum" is the paper's; see `losses.aggregate`.
        epochs, minibatches: passes over a rollout, updates per pass.
    """

    kl_coef: float = 0.05
    kl_estimator: str = "k1"
    whiten_advantages: bool = False
    clip: float | None = 0.2
    loss_agg: str = "sequence_sum"
    epochs: int = 1
    minibatches: int = 1

    def __post_init__(self):
        require(self, "kl_coef", self.kl_coef >= 0, "at least 0")
        require_one_of(self, "kl_estimator", losses.ESTIMATORS)
        require(self, "clip", self.clip is None or 0 < self.clip < 1, "None or between 0 and 1")
        require_one_of(self, "loss_agg", losses.AGGREGATIONS)
        require(self, "epochs", self.epochs >= 1, "at least 1")
        require(self, "minibatches", self.minibatches >= 1, "at least 1")


def graph(cfg: RLOOConfig, models: Mapping[str, LMConfig], rollout: Rollout) -> Graph:
    """Returns RLOO's calls. Models: actor, ref (unless kl_coef is 0), reward (if it is a model).

    Raises:
        ValueError: fewer than two samples per prompt.
    """
    sampling, actor = rollout.sampling, models["actor"]
    require_samples("RLOO", sampling)
    forward = partial(token_logprobs, actor, warp=sampling.warp, with_entropy=False)
    loss = partial(reinforce_loss, cfg.clip, cfg.loss_agg, sampling.max_tokens)
    ref_logp = " ref_logp" * (cfg.kl_coef > 0)
    calls = (
        rollout_call(actor, sampling),
        reward_call(reward_of(models, rollout)),
        ref_logp and reference_call(actor, sampling),
        local("advantage",               fn=partial(advantage, cfg),
                                         reads="score group mask logp" + ref_logp, writes="adv"),
        train("actor_train", of="actor", forward=forward, loss=loss,
                                         reads="tokens segment position mask logp adv",
                                         epochs=cfg.epochs, minibatches=cfg.minibatches),
    )  # fmt: skip
    return Graph(inputs=PROMPTS, calls=tuple(c for c in calls if c))


def advantage(cfg: RLOOConfig, batch: dict[str, Array], key: Array) -> dict[str, Any]:
    """Puts R_i - mean of its group's others on every token; meters: `policy.group_meters`."""
    del key
    total, mask = batch["score"], batch["mask"]
    if "ref_logp" in batch:
        kl = losses.kl(batch["logp"], batch["ref_logp"], mask, cfg.kl_estimator)
        total = total - cfg.kl_coef * kl.sum(axis=1)
    adv = advantages.leave_one_out(total, batch["group"])
    if cfg.whiten_advantages:
        adv = masked.whiten(adv, jnp.ones_like(adv))
    return {"adv": adv[:, None] * mask, "metrics": group_meters(batch)}


ALGORITHM = Algorithm(
    config=RLOOConfig,
    graph=graph,
    batch="prompts",
    roles={"actor": "lm", "ref": "lm", "reward": "value"},
)

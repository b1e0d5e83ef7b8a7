"""ReMax: REINFORCE with the reward of the greedy answer as baseline, and no critic.

    A_t = sum_{s >= t} r_s - score(greedy answer)        r_t = -beta KL_t + [t last] score
    L   = -sum_t A_t log pi(y_t)

Li et al. 2023, arXiv:2310.10505, Eq. 4 and 5. RLOO with another baseline: a second generation of
one greedy answer per prompt, which needs only the weights, so a plan can run it in parallel with
the first.
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
    greedy_calls,
    reference_call,
    reinforce_loss,
    reward_call,
    reward_of,
    rollout_call,
    rollout_meters,
)
from jaxrl_eff.core import Graph, local, meters, train
from jaxrl_eff.models.config import LMConfig
from jaxrl_eff.models.heads import token_logprobs
from jaxrl_eff.types import Array


@dataclass(frozen=True, kw_only=True)
class ReMaxConfig:
    """Settings of ReMax.

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


def graph(cfg: ReMaxConfig, models: Mapping[str, LMConfig], rollout: Rollout) -> Graph:
    """Returns ReMax's calls. Models: actor, ref (unless kl_coef is 0), reward (if a model)."""
    sampling, actor = rollout.sampling, models["actor"]
    forward = partial(token_logprobs, actor, warp=sampling.warp, with_entropy=False)
    loss = partial(reinforce_loss, cfg.clip, cfg.loss_agg, sampling.max_tokens)
    ref_logp = " ref_logp" * (cfg.kl_coef > 0)
    greedy = " greedy_score greedy_group"
    calls = (
        rollout_call(actor, sampling),
        *greedy_calls(actor, sampling, reward_of(models, rollout)),
        reward_call(reward_of(models, rollout)),
        ref_logp and reference_call(actor, sampling),
        local("advantage",               fn=partial(advantage, cfg),
                                         reads="score group segment mask logp" + greedy + ref_logp,
                                         writes="adv"),
        train("actor_train", of="actor", forward=forward, loss=loss,
                                         reads="tokens segment position mask logp adv",
                                         epochs=cfg.epochs, minibatches=cfg.minibatches),
    )  # fmt: skip
    return Graph(inputs=PROMPTS, calls=tuple(c for c in calls if c))


def advantage(cfg: ReMaxConfig, batch: dict[str, Array], key: Array) -> dict[str, Any]:
    """Computes reward to go minus the greedy score; meters of the rollout and `greedy_score`."""
    del key
    mask, segment, greedy = batch["mask"], batch["segment"], batch["greedy_score"]
    penalty = jnp.zeros_like(mask)
    if "ref_logp" in batch:
        penalty = losses.kl(batch["logp"], batch["ref_logp"], mask, cfg.kl_estimator)
    reward = advantages.shaped_reward(batch["score"], penalty, mask, segment, kl_coef=cfg.kl_coef)
    baseline = advantages.greedy_baseline(greedy, batch["greedy_group"], batch["group"])
    adv = (advantages.reward_to_go(reward, mask, segment) - baseline[:, None]) * mask
    if cfg.whiten_advantages:
        adv = masked.whiten(adv, mask)
    seen = rollout_meters(batch)
    seen["greedy_score"] = meters.Mean(greedy.sum(), jnp.float32(greedy.shape[0]))
    return {"adv": adv, "metrics": seen}


ALGORITHM = Algorithm(
    config=ReMaxConfig,
    graph=graph,
    batch="prompts",
    roles={"actor": "lm", "ref": "lm", "reward": "value"},
)

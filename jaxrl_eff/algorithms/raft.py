"""RAFT: fine-tuning on the best of several answers. Generate, score, select, SFT.

    y* = argmax_i score(x, y_i)        L = -sum_t log pi(y*_t | x, y*_<t) / tokens

Dong et al. 2023, arXiv:2304.06767, Algorithm 1 (best of each prompt's answers). A truncated
response never wins: its score does not cover the missing rest, and imitating it teaches not to
stop. Not supported: the KL-penalized score and the global top share of the paper's appendix.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_eff.algorithms import advantages, sft
from jaxrl_eff.algorithms.base import Algorithm, Rollout, require, require_one_of
from jaxrl_eff.algorithms.policy import (
    PROMPTS,
    ends,
    group_meters,
    require_samples,
    reward_call,
    reward_of,
    rollout_call,
)
from jaxrl_eff.core import Graph, local, meters, train
from jaxrl_eff.models.config import LMConfig
from jaxrl_eff.models.heads import token_logprobs
from jaxrl_eff.types import Array, Float, Int

ROW = "tokens segment position mask"
WINNERS = " ".join(f"best_{name}" for name in ROW.split())


@dataclass(frozen=True, kw_only=True)
class RAFTConfig:
    """Settings for selecting and imitating winners.

    Attributes:
        drop_ties: True to skip prompts whose candidates have equal scores; False keeps the first.
        loss_agg: "token_mean" or "sequence_mean", as in SFT.
        epochs, minibatches: passes over the winners, updates per pass.
    """

    drop_ties: bool = True
    loss_agg: str = "token_mean"
    epochs: int = 1
    minibatches: int = 1

    def __post_init__(self):
        require_one_of(self, "loss_agg", ("token_mean", "sequence_mean"))
        require(self, "epochs", self.epochs >= 1, "at least 1")
        require(self, "minibatches", self.minibatches >= 1, "at least 1")


def graph(cfg: RAFTConfig, models: Mapping[str, LMConfig], rollout: Rollout) -> Graph:
    """Returns RAFT's calls. Models: actor and reward (if it is a model).

    Raises:
        ValueError: fewer than two samples per prompt, or no token ends a response.
    """
    sampling, actor = rollout.sampling, models["actor"]
    require_samples("RAFT", sampling)
    stop = ends(actor, sampling)
    if not stop:
        raise ValueError(
            "RAFT keeps responses that ended by themselves, but neither the model's eos nor "
            "sampling.stop names a token that ends one."
        )
    select = partial(best_of, cfg, stop, sampling.samples)
    # Without the sampler's warp: the loss is on the full distribution, not the truncated one.
    forward = partial(token_logprobs, actor, with_entropy=False)
    loss = partial(winner_loss, sft.SFTConfig(loss_agg=cfg.loss_agg))
    return Graph(inputs=PROMPTS, calls=(
        rollout_call(actor, sampling),
        reward_call(reward_of(models, rollout)),
        local("best_of",                 fn=select, reads=f"{ROW} score group", writes=WINNERS),
        train("actor_train", of="actor", forward=forward, loss=loss, reads=WINNERS,
                                         epochs=cfg.epochs, minibatches=cfg.minibatches),
    ))  # fmt: skip


def best_of(
    cfg: RAFTConfig, stop: tuple[int, ...], samples: int, batch: dict[str, Array], key: Array
) -> dict[str, Any]:
    """Returns the winning row of each group, `[P, T]`; with an empty mask if there is no winner.

    Meters: those of `policy.group_meters`, `kept` (fraction of prompts with a winner) and
    `best_score` (mean score of the winners).
    """
    del key
    score, group, mask = batch["score"], batch["group"], batch["mask"]
    may = advantages.ended(batch["tokens"], mask, batch["segment"], ends=stop).max(axis=1) > 0
    row, won = winners(score, group, may, prompts=score.shape[0] // samples, ties=not cfg.drop_ties)
    out = {f"best_{name}": batch[name][row] for name in ROW.split()}
    won = won.astype(jnp.float32)
    out["best_mask"] = out["best_mask"] * won[:, None]
    out["metrics"] = group_meters(batch) | {
        "kept": meters.Mean(won.sum(), jnp.float32(won.shape[0])),
        "best_score": meters.Mean((score[row] * won).sum(), won.sum()),
    }
    return out


def winners(
    score: Float[Array, "B"],
    group: Int[Array, "B"],
    may: Array,
    *,
    prompts: int,
    ties: bool,
) -> tuple[Int[Array, "P"], Array]:
    """Selects the best eligible row of each group, the first among equals.

    Args:
        may: eligible rows, bool `[B]`.
        prompts: number of groups; ids are below it.
        ties: True if a group can win although all its candidates have equal scores.

    Returns:
        The winner's index in the batch (0 without a winner), and True for groups with a winner.
    """
    rows = score.shape[0]
    best = jax.ops.segment_max(jnp.where(may, score, -jnp.inf), group, num_segments=prompts)
    worst = jax.ops.segment_min(jnp.where(may, score, jnp.inf), group, num_segments=prompts)
    index = jnp.where(may & (score == best[group]), jnp.arange(rows), rows)
    first = jax.ops.segment_min(index, group, num_segments=prompts)
    won = (first < rows) & (ties | (best > worst))
    return jnp.where(won, first, 0).astype(jnp.int32), won


def winner_loss(
    cfg: sft.SFTConfig, numbers: tuple[Array, Array], batch: dict[str, Array], key: Array
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, meters.Meter]]:
    """Computes SFT's loss on the winners."""
    row = {name.removeprefix("best_"): x for name, x in batch.items()}
    return sft.likelihood_loss(cfg, numbers, row, key)


ALGORITHM = Algorithm(
    config=RAFTConfig,
    graph=graph,
    batch="prompts",
    roles={"actor": "lm", "reward": "value"},
)

"""Reward modeling from pairs (Bradley-Terry). One call.

    L = -log sigmoid(r(x, y_chosen) - r(x, y_rejected) - m)  +  c (r_chosen + r_rejected)^2

Ouyang et al. 2022, arXiv:2203.02155, Eq. 1. The second term (Eisenstein et al. 2023,
arXiv:2312.09244) centers the scores, which the first determines only up to a constant per prompt. r
is read at the response's last token, after the whole response. Both responses of a pair are in one
row as segments 2k + 1 and 2k + 2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp

from jaxrl_eff import masked
from jaxrl_eff.algorithms import advantages, losses
from jaxrl_eff.algorithms.base import Algorithm, Rollout, require
from jaxrl_eff.core import Graph, meters, train
from jaxrl_eff.models.config import LMConfig
from jaxrl_eff.models.heads import scalar_head
from jaxrl_eff.types import Array, Float


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """Settings of a reward model's loss.

    Attributes:
        margin: m, the margin by which the chosen response should win.
        center: c, 0 for none; 0.01 is typical.
    """

    margin: float = 0.0
    center: float = 0.0

    def __post_init__(self):
        require(self, "margin", self.margin >= 0, "at least 0")
        require(self, "center", self.center >= 0, "at least 0")


def graph(
    cfg: RewardModelConfig, models: Mapping[str, LMConfig], rollout: Rollout | None = None
) -> Graph:
    """Returns one train call over packed pairs, of the model `reward`.

    Raises:
        ValueError: the model has no value head.
    """
    del rollout
    lm = models["reward"]
    if lm.head != "value":
        raise ValueError(f"the reward model's head is {lm.head!r}; it must be 'value'.")
    forward, loss = partial(scalar_head, lm), partial(pair_loss, cfg)
    row = "tokens segment position mask"
    call = train("reward_train", of="reward", forward=forward, loss=loss, reads=row)
    return Graph(inputs=row, calls=(call,))


def pair_loss(
    cfg: RewardModelConfig, each: Float[Array, "B T"], batch: dict[str, Array], key: Array
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, meters.Meter]]:
    """Computes the Bradley-Terry loss of the pairs: sum, number of pairs, meters.

    Meters: `accuracy` (ties count half), `margin` = r_chosen - r_rejected, and `score`, the mean
    of both, which centering keeps at 0.

    Args:
        each: the value head's number after every token.
    """
    del key
    segment, mask = batch["segment"], batch["mask"]
    last = advantages.last_chosen(mask, segment)
    chosen, rejected = losses.pairs(masked.segment_sum(each * last, segment))
    there = pairs_there(mask, segment)
    loss = losses.bradley_terry(chosen, rejected, margin=cfg.margin)
    loss = loss + cfg.center * jnp.square(chosen + rejected)
    count = there.sum()
    return (
        (loss * there).sum(),
        count,
        {
            "accuracy": meters.Mean((wins(chosen, rejected) * there).sum(), count),
            "margin": meters.Mean(((chosen - rejected) * there).sum(), count),
            "score": meters.Mean((0.5 * (chosen + rejected) * there).sum(), count),
        },
    )


def pairs_there(mask: Float[Array, "B T"], segment: Array) -> Float[Array, "B K"]:
    """Returns 1 for the pairs that a row has: both responses have a masked token."""
    chosen, rejected = losses.pairs(masked.segment_sum(mask, segment))
    return ((chosen > 0) & (rejected > 0)).astype(jnp.float32)


def wins(chosen: Float[Array, "B K"], rejected: Float[Array, "B K"]) -> Float[Array, "B K"]:
    """Returns 1 where the chosen response scores higher, 1/2 for a tie."""
    return 0.5 * (jnp.sign(chosen - rejected) + 1)


ALGORITHM = Algorithm(
    config=RewardModelConfig, graph=graph, batch="preference", roles={"reward": "value"}
)

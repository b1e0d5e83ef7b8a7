"""Supervised fine-tuning: maximum likelihood of the masked tokens. One call.

    L = -sum_t m_t log pi(y_t | y_<t) / sum_t m_t

Masked tokens are the assistant's (or all, for continued pretraining). The weight is their number
over the whole batch, so rows, packing and microbatches do not change a token's weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp

from jaxrl_eff.algorithms import losses
from jaxrl_eff.algorithms.base import Algorithm, Rollout, require_one_of
from jaxrl_eff.core import Graph, meters, train
from jaxrl_eff.models.config import LMConfig
from jaxrl_eff.models.heads import token_logprobs
from jaxrl_eff.types import Array, Float


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Settings of supervised fine-tuning.

    Attributes:
        loss_agg: "token_mean", or "sequence_mean" so that short answers count as much as long ones.
    """

    loss_agg: str = "token_mean"

    def __post_init__(self):
        require_one_of(self, "loss_agg", ("token_mean", "sequence_mean"))


def graph(cfg: SFTConfig, models: Mapping[str, LMConfig], rollout: Rollout | None = None) -> Graph:
    """Returns one train call over packed rows, of the model `actor`."""
    del rollout
    forward = partial(token_logprobs, models["actor"], with_entropy=False)
    loss, row = partial(likelihood_loss, cfg), "tokens segment position mask"
    call = train("actor_train", of="actor", forward=forward, loss=loss, reads=row)
    return Graph(inputs=row, calls=(call,))


def likelihood_loss(
    cfg: SFTConfig, numbers: tuple[Array, Array], batch: dict[str, Array], key: Array
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, meters.Meter]]:
    """Computes the negative log-likelihood: sum, weight and meters.

    A segment's first token is never learned, whatever its mask, since it has no context.

    Meters: `nll` (nats per token, the log of the perplexity) and `token_prob`, the mean probability
    of the correct token.

    Args:
        numbers: log-probabilities `[B, T]`, and entropies, which are not used.
    """
    del key
    (logp, _), position, segment = numbers, batch["position"], batch["segment"]
    mask = batch["mask"] * (position > 0).astype(jnp.float32)
    total, weight = losses.aggregate(-logp, mask, segment, cfg.loss_agg)
    count = mask.sum()
    return (
        total,
        weight,
        {
            "nll": meters.Mean(-(logp * mask).sum(), count),
            "token_prob": meters.Mean((jnp.exp(logp) * mask).sum(), count),
        },
    )


ALGORITHM = Algorithm(config=SFTConfig, graph=graph, batch="sft", roles={"actor": "lm"})

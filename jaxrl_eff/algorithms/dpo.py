"""Direct preference optimization: the policy is its own reward model. Two calls.

    h = [log pi(y_c) - log ref(y_c)] - [log pi(y_r) - log ref(y_r)]        L = -log sigmoid(beta h)

Rafailov et al. 2023, arXiv:2305.18290, Eq. 7, with IPO, hinge and smoothed labels as options of
`losses.preference`. `length_normalised` takes means over a response's tokens instead of sums (as in
SimPO, arXiv:2405.14734, but keeping the reference), against the bias toward long answers. Both
responses of a pair are in one row as segments 2k + 1 and 2k + 2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp

from jaxrl_eff import masked
from jaxrl_eff.algorithms import losses
from jaxrl_eff.algorithms.base import Algorithm, Rollout, require, require_one_of
from jaxrl_eff.algorithms.reward_model import pairs_there, wins
from jaxrl_eff.core import Graph, infer, meters, train
from jaxrl_eff.models.config import LMConfig
from jaxrl_eff.models.heads import logprobs, token_logprobs
from jaxrl_eff.types import Array, Float


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """Settings of the preference loss.

    Attributes:
        beta: strength of the pull to the reference; for "ipo" its tau.
        loss: "sigmoid", "ipo" or "hinge".
        label_smoothing: probability that a label is wrong (cDPO); "sigmoid" only.
        length_normalised: means over tokens instead of sums. Needs a beta larger by about the
            length of a response.
    """

    beta: float = 0.1
    loss: str = "sigmoid"
    label_smoothing: float = 0.0
    length_normalised: bool = False

    def __post_init__(self):
        require(self, "beta", self.beta > 0, "above 0")
        require_one_of(self, "loss", losses.PREFERENCES)
        require(self, "label_smoothing", 0 <= self.label_smoothing < 0.5, "in [0, 0.5)")
        smooth = self.label_smoothing == 0 or self.loss == "sigmoid"
        require(self, "label_smoothing", smooth, f"0 with loss={self.loss!r}")


def graph(cfg: DPOConfig, models: Mapping[str, LMConfig], rollout: Rollout | None = None) -> Graph:
    """Returns DPO's calls: the reference reads the pairs, then the actor trains on them."""
    del rollout
    lm, row = models["actor"], "tokens segment position"
    return Graph(inputs=f"{row} mask", calls=(
        infer("ref_inf",     of="ref",   fn=logprobs(lm, name="ref_logp"),
                             reads=row,  writes="ref_logp"),
        train("actor_train", of="actor", forward=partial(token_logprobs, lm, with_entropy=False),
                             loss=partial(preference_loss, cfg), reads=f"{row} mask ref_logp"),
    ))  # fmt: skip


def preference_loss(
    cfg: DPOConfig, numbers: tuple[Array, Array], batch: dict[str, Array], key: Array
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, meters.Meter]]:
    """Computes the loss of the pairs: sum, number of pairs, meters.

    Meters, with the implicit reward beta (log pi - log ref) of a response: `accuracy` (ties count
    half), `margin`, `chosen_reward`, `rejected_reward`.

    Args:
        numbers: log-probabilities `[B, T]`, and entropies, which are not used.
    """
    del key
    (logp, _), segment, position = numbers, batch["segment"], batch["position"]
    mask = batch["mask"] * (position > 0).astype(jnp.float32)
    ratio = masked.segment_sum((logp - batch["ref_logp"]) * mask, segment)
    if cfg.length_normalised:
        ratio = ratio / jnp.maximum(masked.segment_sum(mask, segment), 1.0)
    chosen, rejected = losses.pairs(ratio)
    there = pairs_there(mask, segment)
    loss = losses.preference(
        chosen - rejected, beta=cfg.beta, loss=cfg.loss, label_smoothing=cfg.label_smoothing
    )
    count = there.sum()
    return (
        (loss * there).sum(),
        count,
        {
            "accuracy": meters.Mean((wins(chosen, rejected) * there).sum(), count),
            "margin": meters.Mean(cfg.beta * ((chosen - rejected) * there).sum(), count),
            "chosen_reward": meters.Mean(cfg.beta * (chosen * there).sum(), count),
            "rejected_reward": meters.Mean(cfg.beta * (rejected * there).sum(), count),
        },
    )


ALGORITHM = Algorithm(
    config=DPOConfig, graph=graph, batch="preference", roles={"actor": "lm", "ref": "lm"}
)

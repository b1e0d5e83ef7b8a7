"""Transformation of raw logits into the distribution that is sampled from.

The sampler and the trainer call the same `warp`, so that probability ratios are exact: with
truncation the trainer renormalizes over the support that the sampler drew from.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxrl_eff.types import Array, Float, Int

_COLDEST = 1e-6  # logits divided by less are infinite in float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Warp:
    """Temperature, then top-k, then top-p, then min-p.

    Attributes:
        temperature: divisor of the logits; 0 means greedy choice, with log-probabilities at
            temperature 1.
        top_k: keep the k largest logits; 0 keeps all.
        top_p: keep the smallest set of the largest probabilities that sums to at least top_p.
        min_p: keep probabilities of at least min_p times the largest.

    Equal logits are kept or dropped together.

    Example:
        >>> from jaxrl_eff.models import Warp
        >>> Warp(temperature=0.7).truncates, Warp(top_k=50).truncates
        (False, True)
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"{self}: needs top_k >= 0 and 0 < top_p <= 1.")
        if self.temperature != 0 and not _COLDEST <= self.temperature < math.inf:
            raise ValueError(f"{self}: needs a temperature of 0 or from {_COLDEST}, finite.")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"{self}: needs 0 <= min_p <= 1.")

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def warp(
    logits: Float[Array, "*batch V"], warp: Warp, keep: Int[Array, "*batch"] | None = None
) -> Float[Array, "*batch V"]:
    """Returns tempered logits, -inf outside the kept set; their softmax is the distribution.

    Args:
        logits: float32.
        keep: the sampled token, which is kept whatever its rank, since rounding could otherwise
            put it just outside.

    Example:
        >>> from jaxrl_eff.models import Warp, warp
        >>> warp(jnp.array([0.0, 1.0, 2.0]), Warp(temperature=0.5, top_k=2)).tolist()
        [-inf, 2.0, 4.0]
    """
    if warp.temperature not in (0.0, 1.0):
        logits = logits / warp.temperature
    if not warp.truncates:
        return logits
    kept = logits >= _threshold(jax.lax.stop_gradient(logits), warp)
    if keep is not None:
        kept |= jnp.arange(logits.shape[-1]).reshape((1,) * keep.ndim + (-1,)) == keep[..., None]
    return jnp.where(kept, logits, -jnp.inf)


def _threshold(logits: Float[Array, "*batch V"], warp: Warp) -> Float[Array, "*batch 1"]:
    """Returns the smallest logit that is kept."""
    vocab = logits.shape[-1]
    top = logits.max(axis=-1, keepdims=True)
    low = jnp.full_like(top, -jnp.inf)
    k = min(warp.top_k or vocab, vocab)
    if warp.top_p < 1:
        # Probabilities relative to the top-k set, largest first.
        ranked = jax.lax.top_k(logits, k)[0]
        mass = jnp.cumsum(jnp.exp(ranked - top), axis=-1)
        before = mass - jnp.exp(ranked - top)
        inside = before < warp.top_p * mass[..., -1:]
        low = jnp.where(inside, ranked, jnp.inf).min(axis=-1, keepdims=True)
    elif k < vocab:
        low = jax.lax.top_k(logits, k)[0][..., -1:]
    if warp.min_p > 0:
        low = jnp.maximum(low, top + jnp.log(warp.min_p))
    return low


def log_softmax_at(
    logits: Float[Array, "*batch V"], token: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """Computes log softmax(logits)[token].

    Selects by comparison: a gather would all-gather a sharded vocabulary, and its transpose is a
    scatter.
    """
    hit = jnp.arange(logits.shape[-1]).reshape((1,) * token.ndim + (-1,)) == token[..., None]
    return jnp.where(hit, logits, 0.0).sum(axis=-1) - jax.nn.logsumexp(logits, axis=-1)


def entropy(logits: Float[Array, "*batch V"]) -> Float[Array, "*batch"]:
    """Computes -sum p ln p in nats, over the tokens whose logit is finite."""
    logp = jax.nn.log_softmax(logits, axis=-1)
    logp = jnp.where(jnp.isfinite(logits), logp, 0.0)
    return -jnp.where(jnp.isfinite(logits), jnp.exp(logp) * logp, 0.0).sum(axis=-1)

"""Sums and means over masked positions, and over the segments of packed rows.

Example:
    >>> from jaxrl_eff import masked
    >>> float(masked.mean(jnp.array([1.0, 2.0, 100.0]), jnp.array([1.0, 1.0, 0.0])))
    1.5
"""

import jax
import jax.numpy as jnp

from jaxrl_eff.types import Array, Float, Int


def mean(x: Float[Array, "..."], mask: Float[Array, "..."]) -> Float[Array, ""]:
    """Computes the mean of x where mask is 1; 0 if the mask is empty."""
    return (x * mask).sum() / jnp.maximum(mask.sum(), 1e-8)


def variance(x: Float[Array, "..."], mask: Float[Array, "..."]) -> Float[Array, ""]:
    """Computes the population variance of x where mask is 1; 0 if the mask is empty."""
    return mean(jnp.square(x - mean(x, mask)), mask)


def whiten(
    x: Float[Array, "..."], mask: Float[Array, "..."], *, shift_mean: bool = True, eps: float = 1e-8
) -> Float[Array, "..."]:
    """Computes (x - mean) / std over the mask, 0 outside. `shift_mean=False` keeps the mean."""
    middle, spread_ = mean(x, mask), jax.lax.rsqrt(variance(x, mask) + eps)
    white = (x - middle) * spread_
    return jnp.where(mask > 0, white if shift_mean else white + middle, 0.0)


def segment_sum(x: Float[Array, "B T"], segment: Int[Array, "B T"]) -> Float[Array, "B T1"]:
    """Sums x over each packed sequence of a row.

    Args:
        x: one number per token.
        segment: 0 for padding, 1.. for the row's sequences. A row of T tokens has at most T.

    Returns:
        `[B, T + 1]`: entry s is the sum over segment s; entry 0 sums the padding.
    """
    width = x.shape[1] + 1
    return jax.vmap(lambda row, ids: jax.ops.segment_sum(row, ids, num_segments=width))(x, segment)


def spread(per_segment: Float[Array, "B T1"], segment: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Gathers for every token the number of its segment: the transpose of `segment_sum`."""
    return jnp.take_along_axis(per_segment, segment, axis=1)

"""Metrics that can be added over microbatches, updates and devices before they are read.

A loss returns meters instead of numbers, since a mean of means is wrong when rows differ in length.
Meters are pytrees: programs add them over microbatches with `add`, keep one per optimizer update of
a call, merge these with `combine`, and `read` the number at the end.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxrl_eff.types import Array, Float


@flax.struct.dataclass
class Mean:
    """sum / weight, where both are sums over the counted items."""

    sum: Any  # float32
    weight: Any  # float32, same shape

    def read(self) -> Float[Array, "..."]:
        return self.sum / jnp.maximum(self.weight, 1e-8)


@flax.struct.dataclass
class Max:
    """The largest value seen."""

    value: Any  # float32

    def read(self) -> Float[Array, "..."]:
        return self.value


@flax.struct.dataclass
class Quantile:
    """The q-quantile of non-negative values, from counts in logarithmic bins.

    Sixteen bins per decade from 1e-9 to 1e3: the value read is the upper edge of the bin that
    holds the quantile, so it is never below the true quantile and at most 16 % above it. A value
    below 1e-9 counts as 0.
    """

    counts: Any  # [..., bins] int32
    q: float = flax.struct.field(pytree_node=False)

    _LOW, _PER_DECADE, _BINS = -9, 16, 12 * 16 + 1

    @classmethod
    def of(cls, values: Float[Array, "..."], mask: Float[Array, "..."], q: float) -> "Quantile":
        """Counts `values` where `mask` is positive. Negative values count as 0."""
        steps = (jnp.log10(jnp.maximum(values, 1e-30)) - cls._LOW) * cls._PER_DECADE
        index = jnp.clip(jnp.floor(steps).astype(jnp.int32) + 1, 0, cls._BINS - 1)
        counts = jnp.zeros(cls._BINS, jnp.int32).at[index].add((mask > 0).astype(jnp.int32))
        return cls(counts, q)

    def read(self) -> Float[Array, "..."]:
        below = jnp.cumsum(self.counts, axis=-1).astype(jnp.float32)
        total = below[..., -1:]
        index = jnp.argmax((below >= self.q * total) & (below > 0), axis=-1)
        edge = 10.0 ** (index.astype(jnp.float32) / self._PER_DECADE + self._LOW)
        return jnp.where(index > 0, edge, 0.0)


@flax.struct.dataclass
class First:
    """A meter that counts only a call's first update (made by `first`)."""

    inner: Mean | Max | Quantile


Meter = Mean | Max | Quantile | First


def first(meter: Mean | Max | Quantile) -> First:
    """Counts only a call's first optimizer update, when the policy still equals the sampler's."""
    return First(meter)


def add(a: Meter, b: Meter) -> Meter:
    """Adds two meters: over microbatches of one update, or over rows of several devices."""
    if isinstance(a, First):
        return First(add(a.inner, b.inner))
    if isinstance(a, Max):
        return Max(jnp.maximum(a.value, b.value))
    return jax.tree.map(jnp.add, a, b)


def summed(meter: Meter, axes: tuple[str, ...]) -> Meter:
    """Adds a meter over the devices of mesh axes, for use inside `jax.shard_map`."""
    if isinstance(meter, First):
        return First(summed(meter.inner, axes))
    if isinstance(meter, Max):
        return Max(jax.lax.pmax(meter.value, axes))
    return jax.tree.map(lambda x: jax.lax.psum(x, axes), meter)


def combine(stacked: Meter) -> Meter:
    """Merges meters of several updates, stacked on a leading axis, into one."""
    if isinstance(stacked, First):
        return jax.tree.map(lambda x: x[0], stacked.inner)
    if isinstance(stacked, Max):
        return Max(stacked.value.max(axis=0))
    return jax.tree.map(lambda x: x.sum(axis=0), stacked)


def read(meter: Meter | Array | float) -> Array | float:
    """Returns the number of a meter; a plain number passes through."""
    if isinstance(meter, First):
        return meter.inner.read()
    return meter.read() if isinstance(meter, Mean | Max | Quantile) else meter

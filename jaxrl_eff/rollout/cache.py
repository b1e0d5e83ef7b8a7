"""Construction, growth and indexing of key/value caches with a fixed number of slots.

The cache and how layers write it are defined in `models.transformer`.
"""

import jax
import jax.numpy as jnp

from jaxrl_eff.models.config import LMConfig
from jaxrl_eff.models.transformer import Cache
from jaxrl_eff.types import Array, Int


def empty(cfg: LMConfig, rows: int, slots: int, *, stacked: bool = True) -> Cache:
    """Returns an empty cache.

    Args:
        stacked: True for one array for all layers, as stacked parameters need; else one per layer.
    """
    shape, dtype = (rows, cfg.kv_heads, slots, cfg.head_dim), jnp.dtype(cfg.dtype)

    def zeros():
        if stacked:
            return jnp.zeros((cfg.layers, *shape), dtype)
        return tuple(jnp.zeros(shape, dtype) for _ in range(cfg.layers))

    none = jnp.zeros((rows, slots), jnp.int32)
    return Cache(k=zeros(), v=zeros(), position=none, segment=none, slot=0)


def unstack(cache: Cache) -> Cache:
    """Splits stacked arrays into one array per layer."""
    return cache.replace(k=tuple(cache.k), v=tuple(cache.v))


def grow(cache: Cache, slots: int) -> Cache:
    """Returns the cache with `slots` more empty slots."""

    def pad(x: Array, axis: int) -> Array:
        return jnp.pad(x, [(0, slots if i == axis % x.ndim else 0) for i in range(x.ndim)])

    return cache.replace(
        k=jax.tree.map(lambda x: pad(x, -2), cache.k),
        v=jax.tree.map(lambda x: pad(x, -2), cache.v),
        position=pad(cache.position, -1),
        segment=pad(cache.segment, -1),
    )


def repeat(cache: Cache, samples: int) -> Cache:
    """Repeats every row `samples` times, with copies adjacent."""
    return _rows(cache, lambda x, axis: jnp.repeat(x, samples, axis=axis))


def take(cache: Cache, rows: Int[Array, "B"]) -> Cache:
    """Selects rows."""
    return _rows(cache, lambda x, axis: jnp.take(x, rows, axis=axis))


def _rows(cache: Cache, fn) -> Cache:
    kv = lambda x: fn(x, x.ndim - 4)  # noqa: E731  (rows precede heads, slots, dimensions)
    return cache.replace(
        k=jax.tree.map(kv, cache.k),
        v=jax.tree.map(kv, cache.v),
        position=fn(cache.position, 0),
        segment=fn(cache.segment, 0),
    )

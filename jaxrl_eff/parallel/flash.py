"""What kernels of a device's share of attention have in common: see `hops`, which they equal.

FlashAttention (Dao, 2023, arXiv:2307.08691), with a mask of positions and segments, in the chunks
of `hops`: scores stay on the chip, and a chunk of queries meets only the chunks of keys from the
first to the last that it may see. What it met before comes in as (out, lse) and is updated in
place, so hops of a ring need no merging.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrl_eff.parallel.hops import FLOOR, NEG, Window
from jaxrl_eff.shapes import Array, Bool, Float, Int

FAR = 2**30  # a window that hides nothing, a position after all others


class Bounds(NamedTuple):
    """Chunks from `low` to before `high` are to be met; [2, chunks, B] int32 in one array."""

    of_queries: Int[Array, "2 n B"]
    of_keys: Int[Array, "2 m B"]


def bounds(
    q_where: Int[Array, "n 2 B c"], k_where: Int[Array, "m 2 B d"], window: Window
) -> Bounds:
    """Which chunks each chunk must meet: all that it sees, and few more.

    A chunk is known by the least and greatest position and segment of its tokens: another document
    or a later token is left out when the whole chunk is.
    """
    (q_first, q_last), (q_least, q_most) = _ranges(q_where)[..., :, None, :]
    (k_first, k_last), (k_least, k_most) = _ranges(k_where)[..., None, :, :]
    meet = (q_least <= k_most) & (k_least <= q_most) & (q_last >= k_first)
    if window is not None:
        meet &= q_first - k_last < window
    return Bounds(_span(meet, 1), _span(meet, 0))


def _ranges(where: Int[Array, "n 2 B c"]) -> Int[Array, "2 2 n B"]:
    """(position, segment), (least, most) of the tokens of a chunk; of no tokens, most < least."""
    real = where[:, 1:] > 0
    least = jnp.where(real, where, FAR).min(axis=-1)
    most = jnp.where(real, where, -1).max(axis=-1)
    return jnp.moveaxis(jnp.stack([least, most]), 2, 0)


def _span(meet: Bool[Array, "n m B"], axis: int) -> Int[Array, "2 rest B"]:
    """Along `axis` the first that holds, and one past the last; (0, 0) if none does."""
    low = jnp.argmax(meet, axis=axis)
    high = meet.shape[axis] - jnp.argmax(jnp.flip(meet, axis), axis=axis)
    return jnp.stack([low, jnp.where(meet.any(axis=axis), high, 0)]).astype(jnp.int32)


# Of one chunk of queries, of one head, and one of keys, inside a kernel. Letters as in `hops`.


class Met(NamedTuple):
    """A softmax under way: the sum of e^(score - top) value, the greatest score, the sum of e^."""

    out: Float[Array, "c H"]
    top: Float[Array, "c 1"]
    total: Float[Array, "c 1"]


def begin(out: Float[Array, "c H"], lse: Float[Array, "c 1"]) -> Met:
    """A softmax that goes on from `out` and `lse`."""
    return Met(out, lse, jnp.where(lse > FLOOR, 1.0, 0.0).astype(lse.dtype))


def meet(met: Met, q: Array, k: Array, v: Array, seen: Array, softcap: float | None) -> Met:
    """With these keys and values, too."""
    score = _score(q, k, seen, softcap)[0]
    top = jnp.maximum(met.top, score.max(axis=-1, keepdims=True))
    # The floor makes every weight of a query that sees nothing vanish, instead of all being equal.
    weight = jnp.exp(score - jnp.maximum(top, FLOOR))
    shrink = jnp.exp(met.top - top)
    out = met.out * shrink + _product(weight.astype(v.dtype), v, 1, 0)
    return Met(out, top, met.total * shrink + weight.sum(axis=-1, keepdims=True))


def output(met: Met) -> Float[Array, "c H"]:
    """The attention over all keys met; 0 where there are none."""
    return met.out / jnp.where(met.total > 0, met.total, 1.0)


def logsum(top: Float[Array, "c *l"], total: Float[Array, "c *l"]) -> Float[Array, "c *l"]:
    """The lse of all keys met."""
    some = total > 0
    return jnp.where(some, top + jnp.log(jnp.where(some, total, 1.0)), NEG)


def weights(
    q: Float[Array, "c H"],
    k: Float[Array, "d H"],
    v: Float[Array, "d H"],
    dout: Float[Array, "c H"],
    lse: Float[Array, "c 1"],
    delta: Float[Array, "c 1"],
    seen: Bool[Array, "c d"],
    softcap: float | None,
) -> tuple[Float[Array, "c d"], Float[Array, "c d"]]:
    """The attention weights, and the gradient with respect to the scores q.k, in `k`'s dtype."""
    score, slope = _score(q, k, seen, softcap)
    weight = jnp.exp(score - jnp.maximum(lse, FLOOR))
    dscore = weight * (_product(dout, v, 1, 1) - delta)
    if slope is not None:
        dscore *= slope
    return weight.astype(k.dtype), dscore.astype(k.dtype)


def _score(q, k, seen, softcap):
    score, slope = _product(q, k, 1, 1), None
    if softcap is not None:
        bend = jnp.tanh(score / softcap)
        score, slope = softcap * bend, 1 - bend * bend
    return jnp.where(seen, score, NEG), slope


def _product(x: Array, y: Array, over_x: int, over_y: int) -> Array:
    """Of two matrices, summed over these axes in float32."""
    dimensions = (((over_x,), (over_y,)), ((), ()))
    return lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def spread_keys(dscore: Array, weight: Array, q: Array, dout: Array) -> tuple[Array, Array]:
    """(dk, dv) of one chunk of queries."""
    return _product(dscore, q, 0, 0), _product(weight, dout, 0, 0)


def spread_queries(dscore: Array, k: Array) -> Array:
    """dq of one chunk of keys."""
    return _product(dscore, k, 1, 0)


def sees(
    q_position: Int[Array, "c 1"],
    q_segment: Int[Array, "c 1"],
    k_position: Int[Array, "1 d"],
    k_segment: Int[Array, "1 d"],
    window: Int[Array, ""],
) -> Bool[Array, "c d"]:
    """`models.attention.allowed` of one row; a window of `FAR` hides nothing."""
    behind = q_position - k_position
    return (q_segment == k_segment) & (k_segment > 0) & (behind >= 0) & (behind < window)


def window_of(window: Window) -> Int[Array, "1"]:
    """As an array, which every kernel takes."""
    return jnp.asarray(FAR if window is None else window, jnp.int32).reshape(1)


def by_head(x: Float[Array, "n B K R *h"], chunk: int) -> Float[Array, "n B N c *h"]:
    """The rows of `hops.fold`, G heads' c queries each, with heads apart."""
    chunks, rows, heads, many = x.shape[:4]
    return x.reshape(chunks, rows, heads * many // chunk, chunk, *x.shape[4:])


def by_group(x: Float[Array, "n B N c *h"], keys: int) -> Float[Array, "n B K R *h"]:
    """The converse of `by_head`."""
    chunks, rows, heads, chunk = x.shape[:4]
    return x.reshape(chunks, rows, keys, heads // keys * chunk, *x.shape[4:])


def like(x: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """Of an output that varies over the devices as `x` does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)

"""Common parts of the GPU and TPU attention kernels, which implement `blockwise`.

FlashAttention (Dao, 2023, arXiv:2307.08691) with masks from positions and segments, in the chunks
of `blockwise`: scores stay on the chip, and a chunk of queries visits only the chunks of keys from
the first to the last that it can see. The partial result (out, lse) of earlier keys is an input and
is updated in place, so hops of a ring need no merging.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrl_eff.parallel.attention.blockwise import FLOOR, NEG, Window
from jaxrl_eff.types import Array, Bool, Float, Int

FAR = 2**30  # as a window: masks nothing; as a position: after all others
LOG2E = math.log2(math.e)


class Bounds(NamedTuple):
    """Ranges of chunks that each chunk visits: int32 (low, high, first, end) in one array.

    A chunk visits the chunks in [low, high). In the subrange [first, end) every query sees every
    key, so no mask is needed; low <= first <= end <= high.
    """

    of_queries: Int[Array, "4 n B"]
    of_keys: Int[Array, "4 m B"]


def bounds(
    q_where: Int[Array, "n 2 B c"], k_where: Int[Array, "m 2 B d"], window: Window
) -> Bounds:
    """Chunks that each chunk visits: all that it sees, and few others.

    A chunk is summarized by its lowest and highest document, and by the first and last position in
    each of these and overall. If two chunks share a single document, only positions in that
    document are compared, since other documents in a chunk are irrelevant to it. Only the first run
    of chunks without a mask is used.
    """
    q, k = _known(q_where), _known(k_where)
    ends = q.most[:, None] == k.least[None]  # the only document in both
    begins = q.least[:, None] == k.most[None]

    def shared(q: Array, k: Array) -> tuple[Array, Array]:
        """Positions in the shared document, from those in (all, least, most) [3, chunks, B]."""
        q, k = q[:, :, None], k[:, None]
        return (
            jnp.where(ends, q[2], jnp.where(begins, q[1], q[0])),
            jnp.where(ends, k[1], jnp.where(begins, k[2], k[0])),
        )

    q_last, k_first = shared(q.last, k.first)
    meet = (q.least[:, None] <= k.most[None]) & (k.least[None] <= q.most[:, None])
    meet &= q_last >= k_first
    one = (q.least == q.most)[:, None] & (k.least == k.most)[None] & ends
    full = q.real[:, None] & k.real[None] & one & (q.first[0][:, None] >= k.last[0][None])
    if window is not None:
        q_first, k_last = shared(q.first, k.last)
        meet &= q_first - k_last < window
        full &= q.last[0][:, None] - k.first[0][None] < window
    return Bounds(_span(meet, full, 1), _span(meet, full, 0))


class _Known(NamedTuple):
    """Summary of every chunk.

    Attributes:
        least, most: lowest and highest document; most < least if all tokens are padding.
        first, last: first and last positions in (all, least, most) documents.
        real: True if no token is padding.
    """

    least: Int[Array, "n B"]
    most: Int[Array, "n B"]
    first: Int[Array, "3 n B"]
    last: Int[Array, "3 n B"]
    real: Bool[Array, "n B"]


def _known(where: Int[Array, "n 2 B c"]) -> _Known:
    position, segment = where[:, 0], where[:, 1]
    real = segment > 0
    least = jnp.where(real, segment, FAR).min(axis=-1)
    most = jnp.where(real, segment, -1).max(axis=-1)
    inside = jnp.stack([real, segment == least[..., None], segment == most[..., None]])
    first = jnp.where(inside, position, FAR).min(axis=-1)
    last = jnp.where(inside, position, -1).max(axis=-1)
    return _Known(least, most, first, last, real.all(axis=-1))


def _span(
    meet: Bool[Array, "n m B"], full: Bool[Array, "n m B"], axis: int
) -> Int[Array, "4 rest B"]:
    """Range of chunks to visit along `axis`, and the first run of full ones in it.

    (0, 0, 0, 0) if there are none to visit; without full chunks, the run is empty and at the end.
    """
    size = meet.shape[axis]
    low = jnp.argmax(meet, axis=axis)
    high = jnp.where(meet.any(axis), size - jnp.argmax(jnp.flip(meet, axis), axis=axis), 0)
    first = jnp.where(full.any(axis), jnp.argmax(full, axis=axis), high)
    at = jnp.arange(size).reshape([-1 if i == axis else 1 for i in range(3)])
    over = ~full & (at >= jnp.expand_dims(first, axis))
    end = jnp.where(over.any(axis), jnp.argmax(over, axis=axis), size)
    return jnp.stack([low, high, first, jnp.clip(end, first, high)]).astype(jnp.int32)


# Inside a kernel: one chunk of queries of one head, one chunk of keys. Letters as in `blockwise`.


class Met(NamedTuple):
    """Online softmax state.

    Attributes:
        out: sum of e^(score - top) value.
        top: running maximum of the scores.
        total: sum of e^(score - top).
    """

    out: Float[Array, "c H"]
    top: Float[Array, "c 1"]
    total: Float[Array, "c 1"]


def begin(out: Float[Array, "c H"], lse: Float[Array, "c 1"]) -> Met:
    """Softmax state that continues from `out` and `lse`."""
    return Met(out, lse, jnp.where(lse > FLOOR, 1.0, 0.0).astype(lse.dtype))


def meet(met: Met, q: Array, k: Array, v: Array, seen: Array | None, softcap: float | None) -> Met:
    """Adds these keys and values to the softmax; `seen` is the mask, None: all are seen."""
    score = _score(q, k, seen, softcap)[0]
    top = jnp.maximum(met.top, score.max(axis=-1, keepdims=True))
    # The floor gives a query that sees no key zero weights instead of uniform ones.
    weight = _exp(score, jnp.maximum(top, FLOOR))
    shrink = jnp.exp(met.top - top)
    out = met.out * shrink + _product(weight.astype(v.dtype), v, 1, 0)
    return Met(out, top, met.total * shrink + weight.sum(axis=-1, keepdims=True))


def output(met: Met) -> Float[Array, "c H"]:
    """Attention output over the keys so far; 0 for queries that saw none."""
    return met.out / jnp.where(met.total > 0, met.total, 1.0)


def logsum(top: Float[Array, "c *l"], total: Float[Array, "c *l"]) -> Float[Array, "c *l"]:
    """The lse over the keys so far."""
    some = total > 0
    return jnp.where(some, top + jnp.log(jnp.where(some, total, 1.0)), NEG)


def weights(
    q: Float[Array, "c H"],
    k: Float[Array, "d H"],
    v: Float[Array, "d H"],
    dout: Float[Array, "c H"],
    lse: Float[Array, "#c #d"],
    delta: Float[Array, "#c #d"],
    seen: Bool[Array, "c d"] | None,
    softcap: float | None,
) -> tuple[Float[Array, "c d"], Float[Array, "c d"]]:
    """Attention weights, and the gradient with respect to the scores q.k, in `k`'s dtype.

    Transposed, `[d, c]`, if q is swapped with k and v with dout, and lse and delta are rows.
    """
    score, slope = _score(q, k, seen, softcap)
    weight = _exp(score, jnp.maximum(lse, FLOOR))
    dscore = weight * (_product(dout, v, 1, 1) - delta)
    if slope is not None:
        dscore *= slope
    return weight.astype(k.dtype), dscore.astype(k.dtype)


def _score(q, k, seen, softcap):
    score, slope = _product(q, k, 1, 1), None
    if softcap is not None:
        bend = jnp.tanh(score / softcap)
        score, slope = softcap * bend, 1 - bend * bend
    return (score if seen is None else jnp.where(seen, score, NEG)), slope


def _exp(x: Array, minus: Array) -> Array:
    """e^(x - minus) as one multiply-add and exp2, which is a hardware instruction."""
    return jnp.exp2(x * LOG2E - minus * LOG2E)


def _product(x: Array, y: Array, over_x: int, over_y: int) -> Array:
    """Matrix product contracted over these axes, with float32 accumulation."""
    dimensions = (((over_x,), (over_y,)), ((), ()))
    return lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def spread_keys(dscore: Array, weight: Array, q: Array, dout: Array) -> tuple[Array, Array]:
    """Contribution of one chunk of queries to (dk, dv)."""
    return _product(dscore, q, 0, 0), _product(weight, dout, 0, 0)


def spread_queries(dscore: Array, k: Array) -> Array:
    """Contribution of one chunk of keys to dq."""
    return _product(dscore, k, 1, 0)


def sees(
    q_position: Int[Array, "#c #d"],
    q_segment: Int[Array, "#c #d"],
    k_position: Int[Array, "#c #d"],
    k_segment: Int[Array, "#c #d"],
    window: Int[Array, ""],
) -> Bool[Array, "c d"]:
    """Mask of one row, as `models.attention.allowed`; a window of `FAR` masks nothing.

    Transposed if queries are a row and keys are a column.
    """
    behind = q_position - k_position
    return (q_segment == k_segment) & (k_segment > 0) & (behind >= 0) & (behind < window)


def window_of(window: Window) -> Int[Array, "1"]:
    """The window as an operand of the kernels; `FAR` for None."""
    return jnp.asarray(FAR if window is None else window, jnp.int32).reshape(1)


def by_head(x: Float[Array, "n B K R *h"], chunk: int) -> Float[Array, "n B N c *h"]:
    """Splits the rows of `blockwise.fold`, c queries of G heads each, by head."""
    chunks, rows, heads, many = x.shape[:4]
    return x.reshape(chunks, rows, heads * many // chunk, chunk, *x.shape[4:])


def by_group(x: Float[Array, "n B N c *h"], keys: int) -> Float[Array, "n B K R *h"]:
    """Inverse of `by_head`."""
    chunks, rows, heads, chunk = x.shape[:4]
    return x.reshape(chunks, rows, keys, heads // keys * chunk, *x.shape[4:])


def like(x: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an output that varies over the same mesh axes as `x`."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)

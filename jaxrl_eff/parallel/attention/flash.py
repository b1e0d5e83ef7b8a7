"""Common parts of the GPU and TPU attention kernels, which implement `blockwise`.

`forward` and `backward` call three kernels of a `Device`: one updates the partial result, one adds
to the gradient of the queries, and one computes that of the keys and values.

FlashAttention (Dao, 2023, arXiv:2307.08691) with masks from positions and segments, in the chunks
of `blockwise`: scores stay on the chip, and a chunk of queries visits only the chunks of keys from
the first to the last that it can see. The partial result (out, lse) of earlier keys is an input and
is updated in place, so hops of a ring need no merging.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxrl_eff.parallel.attention.blockwise import FLOOR, NEG, Queries, Where
from jaxrl_eff.types import Array, Bool, Float, Int

FAR = 2**30  # as a window: masks nothing; as a position: after all others
LOG2E = math.log2(math.e)


class Walk(NamedTuple):
    """A kernel, its grid of programs, and the blocks of its operands.

    Attributes:
        kernel: its code, without `softcap`.
        where: first operands: `Bounds`, window, positions and segments of queries and of keys.
        at: blocks of those operands (of the last two if the others are prefetched).
        q, number, kv: blocks of arrays of queries, of their lse and delta, and of keys and values.
        specs: (input blocks, output blocks) -> arguments of `pallas_call`.
    """

    kernel: Callable[..., None]
    where: tuple[Array, ...]
    at: tuple[Any, ...]
    q: Any
    number: Any
    kv: Any
    specs: Callable[[list[Any], Any], dict[str, Any]]

    def run(
        self,
        name: str,
        softcap: float | None,
        interpret: bool,
        inputs: Sequence[tuple[Array, Any]],
        outputs: Sequence[tuple[tuple[int, ...], Any]],
        aliases: dict[int, int],
    ) -> Sequence[Array]:
        """Calls the kernel.

        Args:
            name: of the kernel, for profiles.
            inputs: operands after `where`, with their blocks.
            outputs: shapes of the float32 outputs, with their blocks.
            aliases: operand (with those of `where`) -> the output that replaces it in place.
        """
        operands, blocks = zip(*inputs, strict=True)
        shapes, out_blocks = zip(*outputs, strict=True)
        axes = jax.typeof(operands[0]).manual_axis_type  # over which outputs vary
        return pl.pallas_call(
            functools.partial(self.kernel, softcap=softcap),
            out_shape=[
                jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=axes) for shape in shapes
            ],
            input_output_aliases=aliases,
            name=name,
            interpret=interpret,
            **self.specs([*self.at, *blocks], list(out_blocks)),
        )(*self.where, *operands)


class Device(NamedTuple):
    """A device's kernels, each as a function of (q by head, kv, where) to its `Walk`.

    Attributes:
        numbers: `[n B N c]` of lse or delta -> the array that the kernels take.
    """

    forward: Callable[..., Walk]
    to_queries: Callable[..., Walk]
    to_keys: Callable[..., Walk]
    numbers: Callable[[Array], Array] = lambda x: x


def forward(
    device: Device,
    met: tuple[Float[Array, "n B K R H"], Float[Array, "n B K R"]],
    q: Float[Array, "n B K R H"],
    kv: Float[Array, "m 2 B K d H"],
    where: Where,
    softcap: float | None,
    interpret: bool = False,
) -> tuple[Float[Array, "n B K R H"], Float[Array, "n B K R"]]:
    """Computes `blockwise.forward`."""
    out, lse, q = (_by_head(x, where) for x in (*met, q))
    walk, lse = device.forward(q, kv, where), device.numbers(lse)
    inputs = [(q, walk.q), (kv, walk.kv), (out, walk.q), (lse, walk.number)]
    outputs = [(out.shape, walk.q), (lse.shape, walk.number)]
    done = walk.run("ring_forward", softcap, interpret, inputs, outputs, {6: 0, 7: 1})
    return tuple(x.reshape(old.shape) for x, old in zip(done, met, strict=True))


def backward(
    device: Device,
    dq: Float[Array, "n B K R H"],
    queries: Queries,
    kv: Float[Array, "m 2 B K d H"],
    where: Where,
    softcap: float | None,
    interpret: bool = False,
) -> tuple[Float[Array, "n B K R H"], Float[Array, "m 2 B K d H"]]:
    """Computes `blockwise.backward`."""
    shape, queries = dq.shape, queries._replace(dout=queries.dout.astype(kv.dtype))
    dq, q, dout, lse, delta = (_by_head(x, where) for x in (dq, *queries))
    lse, delta = map(device.numbers, (lse, delta))

    def read(walk: Walk) -> list[tuple[Array, Any]]:
        pairs = (q, walk.q), (kv, walk.kv), (dout, walk.q)
        return [*pairs, (lse, walk.number), (delta, walk.number)]

    walk = device.to_queries(q, kv, where)
    inputs, outputs = [*read(walk), (dq, walk.q)], [(dq.shape, walk.q)]
    (dq,) = walk.run("ring_backward_q", softcap, interpret, inputs, outputs, {9: 0})
    walk = device.to_keys(q, kv, where)
    outputs = [(kv.shape, walk.kv)]
    (dkv,) = walk.run("ring_backward_kv", softcap, interpret, read(walk), outputs, {})
    return dq.reshape(shape), dkv


def _by_head(x: Float[Array, "n B K R *h"], where: Where) -> Float[Array, "n B N c *h"]:
    """Splits the rows of `blockwise.fold`, c queries of G heads each, by head."""
    (chunks, rows, heads, many), chunk = x.shape[:4], where.q.shape[-1]
    return x.reshape(chunks, rows, heads * many // chunk, chunk, *x.shape[4:])


class Bounds(NamedTuple):
    """Ranges of chunks that each chunk visits: int32 (low, high, first, end) in one array.

    A chunk visits the chunks in [low, high). In the subrange [first, end) every query sees every
    key, so no mask is needed; low <= first <= end <= high.
    """

    of_queries: Int[Array, "4 n B"]
    of_keys: Int[Array, "4 m B"]


def bounds(where: Where) -> Bounds:
    """Chunks that each chunk visits: all that it sees, and few others.

    A chunk is summarized by its lowest and highest document, and by the first and last position in
    each of these and overall. If two chunks share a single document, only positions in that
    document are compared, since other documents in a chunk are irrelevant to it. Only the first run
    of chunks without a mask is used.
    """
    q, k, window = _known(where.q), _known(where.k), where.window
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


def window_of(where: Where) -> Int[Array, "1"]:
    """The window as an operand of the kernels; `FAR`, which masks nothing, for None."""
    return jnp.asarray(FAR if where.window is None else where.window, jnp.int32).reshape(1)

"""TPU kernels for a device's share of attention, in Pallas (Mosaic); equivalent to `blockwise`.

The innermost grid axis runs over all chunks to be visited and accumulates in scratch memory. Chunks
outside the bounds are not computed, and not fetched either: their index maps to the nearest chunk
inside, which the pipeline already holds.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from jaxrl_eff.parallel.attention import flash
from jaxrl_eff.parallel.attention.blockwise import Where
from jaxrl_eff.parallel.attention.context import sees
from jaxrl_eff.types import Array

CHUNK = 512  # tokens, a multiple of the 128 lanes
LANES = 128


def fits(head_dim: int, dtype: Any) -> bool:
    """True if the kernels support this head dim and dtype."""
    return head_dim % 64 == 0 and head_dim <= 256 and jnp.dtype(dtype).itemsize <= 4


_PARALLEL = tpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
)


def _specs(grid: tuple[int, ...], scratch: list[Any], blocks: list[Any], out: Any):
    spec = tpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2, grid=grid, in_specs=blocks, out_specs=out, scratch_shapes=scratch
    )
    return {"grid_spec": spec, "compiler_params": _PARALLEL}


def _where(where: Where, spans: Array) -> tuple[Array, ...]:
    """First operands of a kernel, with places of queries as columns and of keys as rows."""
    places = jnp.moveaxis(where.q, 1, 3), jnp.moveaxis(where.k, 1, 2)
    return spans[:2], flash.window_of(where), *places


def _nearest(at: Any, i: Any, b: Any, spans: Any) -> Array:
    """The chunk to be visited that is nearest to `at`."""
    return jnp.clip(at, spans[0, i, b], jnp.maximum(spans[1, i, b] - 1, 0))


def _over_queries(kernel: Callable[..., None], scratch: int, q, kv, where: Where) -> flash.Walk:
    """Grid (B, N, n, m), the last axis over the chunks of keys for a chunk of queries.

    A block's last two axes are full axes of its array or multiples of a register's tile.

    Args:
        scratch: number of accumulators that hold a number per query.
    """
    n, rows, heads, c, dim = q.shape
    m, _, _, keys, d, _ = kv.shape
    group = heads // keys

    def own(*shape):
        return pl.BlockSpec((None, None, None, *shape), lambda b, h, i, j, *_: (i, b, h, 0, 0))

    def keys_at(b, h, i, j, spans, _):
        return _nearest(j, i, b, spans), 0, b, lax.div(h, group), 0, 0

    one = tpu.VMEM((c, LANES), jnp.float32)
    return flash.Walk(
        kernel,
        _where(where, flash.bounds(where).of_queries),
        at=(
            pl.BlockSpec((None, None, c, 2), lambda b, h, i, j, *_: (i, b, 0, 0)),
            pl.BlockSpec(
                (None, None, 2, d), lambda b, h, i, j, s, _: (_nearest(j, i, b, s), b, 0, 0)
            ),
        ),
        q=own(c, dim),
        number=own(1, c),
        kv=pl.BlockSpec((None, 2, None, None, d, dim), keys_at),
        specs=functools.partial(
            _specs, (rows, heads, n, m), [tpu.VMEM((c, dim), jnp.float32), *[one] * scratch]
        ),
    )


def _over_keys(kernel: Callable[..., None], q, kv, where: Where) -> flash.Walk:
    """Grid (B, K, m, G n), the last axis over the chunks of queries of all heads of a group."""
    n, rows, heads, c, dim = q.shape
    m, _, _, keys, d, _ = kv.shape
    group = heads // keys

    def met(*shape):
        def index(b, k, j, t, spans, _):
            chunk = _nearest(lax.rem(t, n), j, b, spans)
            return chunk, b, k * group + lax.div(t, n), 0, 0

        return pl.BlockSpec((None, None, None, *shape), index)

    return flash.Walk(
        functools.partial(kernel, chunks=n),
        _where(where, flash.bounds(where).of_keys),
        at=(
            pl.BlockSpec(
                (None, None, c, 2),
                lambda b, k, j, t, s, _: (_nearest(lax.rem(t, n), j, b, s), b, 0, 0),
            ),
            pl.BlockSpec((None, None, 2, d), lambda b, k, j, t, *_: (j, b, 0, 0)),
        ),
        q=met(c, dim),
        number=met(1, c),
        kv=pl.BlockSpec((None, 2, None, None, d, dim), lambda b, k, j, t, *_: (j, 0, b, k, 0, 0)),
        specs=functools.partial(
            _specs, (rows, keys, m, group * n), [tpu.VMEM((d, dim), jnp.float32)] * 2
        ),
    )


def _inside(spans: Any, chunk: Any, row: Any, at: Any) -> Any:
    return (at >= spans[0, chunk, row]) & (at < spans[1, chunk, row])


def _column(row: Any) -> Array:
    """Transposes [1, c] to [c, 1]."""
    return jnp.expand_dims(row[0], -1)


def _seen(q_where: Any, k_where: Any, window: Any) -> Array:
    return sees(q_where[:, 0:1], q_where[:, 1:2], k_where[0:1], k_where[1:2], window[0])


def _forward(
    spans, window, q_where, k_where, q, kv, out, lse, new_out, new_lse, sums, tops, totals,
    *, softcap,
):  # fmt: skip
    row, chunk, at = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    def keep(met):
        sums[...] = met.out
        tops[...] = jnp.broadcast_to(met.top, tops.shape)
        totals[...] = jnp.broadcast_to(met.total, totals.shape)

    @pl.when(at == 0)
    def _():
        keep(flash.begin(out[...], _column(lse)))

    @pl.when(_inside(spans, chunk, row, at))
    def _():
        met = flash.Met(sums[...], tops[:, :1], totals[:, :1])
        seen = _seen(q_where, k_where, window)
        keep(flash.meet(met, q[...], kv[0], kv[1], seen, softcap))

    @pl.when(at == pl.num_programs(3) - 1)
    def _():
        new_out[...] = flash.output(flash.Met(sums[...], tops[:, :1], totals[:, :1]))
        new_lse[...] = flash.logsum(tops[...], totals[...]).T[:1]


def _to_queries(
    spans, window, q_where, k_where, q, kv, dout, lse, delta, dq, new_dq, sums, *, softcap
):  # fmt: skip
    row, chunk, at = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(at == 0)
    def _():
        sums[...] = dq[...]

    @pl.when(_inside(spans, chunk, row, at))
    def _():
        seen, keys = _seen(q_where, k_where, window), kv[0]
        mine = dout[...], _column(lse), _column(delta)
        dscore = flash.weights(q[...], keys, kv[1], *mine, seen, softcap)[1]
        sums[...] += flash.spread_queries(dscore, keys)

    @pl.when(at == pl.num_programs(3) - 1)
    def _():
        new_dq[...] = sums[...]


def _to_keys(
    spans, window, q_where, k_where, q, kv, dout, lse, delta, dkv, dk, dv, *, softcap, chunks
):  # fmt: skip
    row, chunk, at = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(at == 0)
    def _():
        dk[...] = jnp.zeros_like(dk)
        dv[...] = jnp.zeros_like(dv)

    @pl.when(_inside(spans, chunk, row, lax.rem(at, chunks)))
    def _():
        seen, queries, pull = _seen(q_where, k_where, window), q[...], dout[...]
        mine = pull, _column(lse), _column(delta)
        weight, dscore = flash.weights(queries, kv[0], kv[1], *mine, seen, softcap)
        more = flash.spread_keys(dscore, weight, queries, pull)
        dk[...] += more[0]
        dv[...] += more[1]

    @pl.when(at == pl.num_programs(3) - 1)
    def _():
        dkv[0], dkv[1] = dk[...], dv[...]


DEVICE = flash.Device(
    functools.partial(_over_queries, _forward, 2),
    functools.partial(_over_queries, _to_queries, 0),
    functools.partial(_over_keys, _to_keys),
    numbers=lambda x: x[..., None, :],
)

"""TPU kernels for a device's share of attention, in Pallas (Mosaic); equivalent to `blockwise`.

The innermost grid axis runs over all chunks to be visited and accumulates in scratch memory. Chunks
outside the bounds are not computed, and not fetched either: their index maps to the nearest chunk
inside, which the pipeline already holds.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from jaxrl_eff.parallel.attention import flash
from jaxrl_eff.parallel.attention.blockwise import Window
from jaxrl_eff.types import Array, Float, Int

CHUNK = 512  # tokens, a multiple of the 128 lanes
LANES = 128


def fits(head_dim: int, dtype: Any) -> bool:
    """True if the kernels support this head dim and dtype."""
    return head_dim % 64 == 0 and head_dim <= 256 and jnp.dtype(dtype).itemsize <= 4


def forward(
    out: Float[Array, "n B K R H"],
    lse: Float[Array, "n B K R"],
    q: Float[Array, "n B K R H"],
    kv: Float[Array, "m 2 B K d H"],
    q_where: Int[Array, "n 2 B c"],
    k_where: Int[Array, "m 2 B d"],
    window: Window,
    softcap: float | None,
    interpret: bool = False,
) -> tuple[Float[Array, "n B K R H"], Float[Array, "n B K R"]]:
    """Computes `blockwise.forward`."""
    spans = flash.bounds(q_where, k_where, window).of_queries[:2]
    grid = _Grid(q, kv, q_where, k_where)
    out, lse, q = grid.heads(out), grid.rows(lse), grid.heads(q)
    out, lse = pl.pallas_call(
        functools.partial(_forward, softcap=softcap),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid.over_queries,
            in_specs=[*grid.at_query, grid.query, grid.keys, grid.query, grid.number],
            out_specs=[grid.query, grid.number],
            scratch_shapes=[grid.scratch_q, grid.scratch_one, grid.scratch_one],
        ),
        out_shape=[flash.like(q, out.shape), flash.like(q, lse.shape)],
        input_output_aliases={6: 0, 7: 1},
        name="ring_forward",
        interpret=interpret,
        compiler_params=_PARALLEL,
    )(spans, flash.window_of(window), *grid.where, q, kv, out, lse)
    return grid.folded(out), grid.folded(lse[..., 0, :])


def backward(
    dq: Float[Array, "n B K R H"],
    q: Float[Array, "n B K R H"],
    dout: Float[Array, "n B K R H"],
    lse: Float[Array, "n B K R"],
    delta: Float[Array, "n B K R"],
    kv: Float[Array, "m 2 B K d H"],
    q_where: Int[Array, "n 2 B c"],
    k_where: Int[Array, "m 2 B d"],
    window: Window,
    softcap: float | None,
    interpret: bool = False,
) -> tuple[Float[Array, "n B K R H"], Float[Array, "m 2 B K d H"]]:
    """Computes `blockwise.backward`."""
    spans = flash.bounds(q_where, k_where, window)
    grid = _Grid(q, kv, q_where, k_where)
    dq, q, dout = (grid.heads(x) for x in (dq, q, dout.astype(kv.dtype)))
    lse, delta = grid.rows(lse), grid.rows(delta)
    how = {"interpret": interpret, "compiler_params": _PARALLEL}
    window = flash.window_of(window)
    dq = pl.pallas_call(
        functools.partial(_to_queries, softcap=softcap),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid.over_queries,
            in_specs=[
                *grid.at_query, grid.query, grid.keys, grid.query, grid.number, grid.number,
                grid.query,
            ],
            out_specs=grid.query,
            scratch_shapes=[grid.scratch_q],
        ),
        out_shape=flash.like(q, dq.shape),
        input_output_aliases={9: 0},
        name="ring_backward_q",
        **how,
    )(spans.of_queries[:2], window, *grid.where, q, kv, dout, lse, delta, dq)  # fmt: skip
    dkv = pl.pallas_call(
        functools.partial(_to_keys, softcap=softcap, chunks=len(q)),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid.over_keys,
            in_specs=[
                *grid.at_key, grid.met_query, grid.key, grid.met_query, grid.met_number,
                grid.met_number,
            ],
            out_specs=grid.key,
            scratch_shapes=[grid.scratch_k, grid.scratch_k],
        ),
        out_shape=flash.like(q, kv.shape),
        name="ring_backward_kv",
        **how,
    )(spans.of_keys[:2], window, *grid.where, q, kv, dout, lse, delta)  # fmt: skip
    return grid.folded(dq), dkv


_PARALLEL = tpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
)


class _Grid:
    """The kernels' two grids and the block specs of their operands.

    Over queries: (B, N, n, m), the last axis over the chunks of keys for a chunk of queries. Over
    keys: (B, K, m, G n), the last axis over the chunks of queries of all heads of a group. A
    block's last two axes are full axes of its array or multiples of a register's tile.
    """

    def __init__(self, q: Array, kv: Array, q_where: Array, k_where: Array):
        n, rows, keys, many, dim = q.shape
        m, _, _, _, d, _ = kv.shape
        self._chunk = c = q_where.shape[-1]
        self._keys, group = keys, many // c
        self.over_queries = rows, keys * group, n, m
        self.over_keys = rows, keys, m, group * n
        # Positions and segments: of queries as columns, of keys as rows.
        self.where = jnp.moveaxis(q_where, 1, 3), jnp.moveaxis(k_where, 1, 2)

        def met(at, i, b, spans):
            return jnp.clip(at, spans[0, i, b], jnp.maximum(spans[1, i, b] - 1, 0))

        def query(*shape):
            def index(b, h, i, j, *_):
                return i, b, h, 0, 0

            return pl.BlockSpec((None, None, None, *shape), index)

        def met_query(*shape):
            def index(b, k, j, t, spans, _):
                return met(lax.rem(t, n), j, b, spans), b, k * group + lax.div(t, n), 0, 0

            return pl.BlockSpec((None, None, None, *shape), index)

        def keys_of(b, h, i, j, spans, _):
            return met(j, i, b, spans), 0, b, lax.div(h, group), 0, 0

        one_key = (None, 2, None, None, d, dim)
        self.query, self.number = query(c, dim), query(1, c)
        self.met_query, self.met_number = met_query(c, dim), met_query(1, c)
        self.keys = pl.BlockSpec(one_key, keys_of)
        self.key = pl.BlockSpec(one_key, lambda b, k, j, t, *_: (j, 0, b, k, 0, 0))
        here = (None, None, c, 2), (None, None, 2, d)
        self.at_query = (
            pl.BlockSpec(here[0], lambda b, h, i, j, *_: (i, b, 0, 0)),
            pl.BlockSpec(here[1], lambda b, h, i, j, s, _: (met(j, i, b, s), b, 0, 0)),
        )
        self.at_key = (
            pl.BlockSpec(here[0], lambda b, k, j, t, s, _: (met(lax.rem(t, n), j, b, s), b, 0, 0)),
            pl.BlockSpec(here[1], lambda b, k, j, t, *_: (j, b, 0, 0)),
        )
        self.scratch_q = tpu.VMEM((c, dim), jnp.float32)
        self.scratch_one = tpu.VMEM((c, LANES), jnp.float32)
        self.scratch_k = tpu.VMEM((d, dim), jnp.float32)

    def heads(self, x: Float[Array, "n B K R *h"]) -> Float[Array, "n B N c *h"]:
        return flash.by_head(x, self._chunk)

    def rows(self, x: Float[Array, "n B K R"]) -> Float[Array, "n B N 1 c"]:
        return self.heads(x)[..., None, :]

    def folded(self, x: Float[Array, "n B N c *h"]) -> Float[Array, "n B K R *h"]:
        return flash.by_group(x, self._keys)


def _inside(spans: Any, chunk: Any, row: Any, at: Any) -> Any:
    return (at >= spans[0, chunk, row]) & (at < spans[1, chunk, row])


def _column(row: Any) -> Array:
    """Transposes [1, c] to [c, 1]."""
    return jnp.expand_dims(row[0], -1)


def _seen(q_where: Any, k_where: Any, window: Any) -> Array:
    return flash.sees(q_where[:, 0:1], q_where[:, 1:2], k_where[0:1], k_where[1:2], window[0])


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

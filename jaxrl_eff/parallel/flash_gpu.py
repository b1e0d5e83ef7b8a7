"""Kernels for GPUs of a device's share of attention, in Pallas by Triton. Twins of `hops`.

A program has one chunk of queries (or, for dk and dv, of keys) in registers and loops over the
chunks that it must meet.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxrl_eff.parallel import flash
from jaxrl_eff.parallel.hops import Window
from jaxrl_eff.shapes import Array, Float, Int

CHUNK = 64  # tokens, a power of two: Triton's blocks are


def fits(head_dim: int, dtype: Any) -> bool:
    """Whether the kernels take heads of this size and numbers of this dtype."""
    power = head_dim & (head_dim - 1) == 0
    return power and 16 <= head_dim <= 256 and jnp.dtype(dtype).itemsize <= 4


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
    """`hops.forward`."""
    chunk = q_where.shape[-1]
    spans = flash.bounds(q_where, k_where, window).of_queries
    out, lse, q = (flash.by_head(x, chunk) for x in (out, lse, q))
    shapes = out.shape, lse.shape
    specs = _Specs(q, kv, q_where, k_where)
    operands = (spans, flash.window_of(window), q_where, k_where, q, kv, out, lse)
    out, lse = pl.pallas_call(
        functools.partial(_forward, softcap=softcap),
        grid=specs.queries_grid,
        in_specs=[*specs.of_queries, specs.query, specs.keys, specs.query, specs.number],
        out_specs=[specs.query, specs.number],
        out_shape=[flash.like(q, shape) for shape in shapes],
        input_output_aliases={6: 0, 7: 1},
        name="ring_forward",
        **_how(q.shape[-1], kv.dtype, interpret),
    )(*operands)
    return flash.by_group(out, kv.shape[3]), flash.by_group(lse, kv.shape[3])


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
    """`hops.backward`."""
    chunk = q_where.shape[-1]
    spans = flash.bounds(q_where, k_where, window)
    dout = dout.astype(kv.dtype)
    dq, q, dout, lse, delta = (flash.by_head(x, chunk) for x in (dq, q, dout, lse, delta))
    specs, how = _Specs(q, kv, q_where, k_where), _how(q.shape[-1], kv.dtype, interpret)
    where = (flash.window_of(window), q_where, k_where)
    dq = pl.pallas_call(
        functools.partial(_to_queries, softcap=softcap),
        grid=specs.queries_grid,
        in_specs=[
            *specs.of_queries, specs.query, specs.keys, specs.query, specs.number, specs.number,
            specs.query,
        ],
        out_specs=specs.query,
        out_shape=flash.like(q, dq.shape),
        input_output_aliases={9: 0},
        name="ring_backward_q",
        **how,
    )(spans.of_queries, *where, q, kv, dout, lse, delta, dq)  # fmt: skip
    dkv = pl.pallas_call(
        functools.partial(_to_keys, softcap=softcap, groups=q.shape[2] // kv.shape[3]),
        grid=specs.keys_grid,
        in_specs=[
            *specs.of_keys, specs.group, specs.key, specs.group, specs.numbers, specs.numbers,
        ],
        out_specs=specs.key,
        out_shape=flash.like(q, kv.shape),
        name="ring_backward_kv",
        **how,
    )(spans.of_keys, *where, q, kv, dout, lse, delta)  # fmt: skip
    return flash.by_group(dq, kv.shape[3]), dkv


def _how(head_dim: int, dtype: Any, interpret: bool) -> dict[str, Any]:
    # JAX means to drop this backend: then `kernels.best` finds it missing, and nothing else does.
    from jax.experimental.pallas import triton

    # Of 4 warps a program's registers hold a chunk of heads of 64 numbers in half precision.
    wide = head_dim * jnp.dtype(dtype).itemsize > 128
    params = triton.CompilerParams(num_warps=8 if wide else 4, num_stages=2)
    return {"compiler_params": params, "interpret": interpret}


class _Specs:
    """Blocks of a program's operands: (i, b, h) of a chunk of queries, (j, b, k) of one of keys.

    Of what is looped over a program has all chunks: Triton loads what is read.
    """

    def __init__(self, q: Array, kv: Array, q_where: Array, k_where: Array):
        n, rows, heads, c, dim = q.shape
        m, _, _, keys, d, _ = kv.shape
        group = heads // keys
        self.queries_grid, self.keys_grid = (n, rows, heads), (m, rows, keys)
        whole = pl.BlockSpec((1,), lambda *_: (0,))
        each_q = pl.BlockSpec((None, 2, None, c), lambda i, b, h: (i, 0, b, 0))
        every_q = pl.BlockSpec((n, 2, None, c), lambda j, b, k: (0, 0, b, 0))
        each_k = pl.BlockSpec((None, 2, None, d), lambda j, b, k: (j, 0, b, 0))
        every_k = pl.BlockSpec((m, 2, None, d), lambda i, b, h: (0, 0, b, 0))
        span = pl.BlockSpec((2, None, None), lambda i, b, _: (0, i, b))
        self.of_queries = (span, whole, each_q, every_k)
        self.of_keys = (span, whole, every_q, each_k)
        self.query = pl.BlockSpec((None, None, None, c, dim), lambda i, b, h: (i, b, h, 0, 0))
        self.number = pl.BlockSpec((None, None, None, c), lambda i, b, h: (i, b, h, 0))
        self.keys = pl.BlockSpec(
            (m, 2, None, None, d, dim), lambda i, b, h: (0, 0, b, h // group, 0, 0)
        )
        self.key = pl.BlockSpec((None, 2, None, None, d, dim), lambda j, b, k: (j, 0, b, k, 0, 0))
        self.group = pl.BlockSpec((n, None, group, c, dim), lambda j, b, k: (0, b, k, 0, 0))
        self.numbers = pl.BlockSpec((n, None, group, c), lambda j, b, k: (0, b, k, 0))


def _column(x: Array) -> Array:
    return x[:, None]


def _forward(span, window, q_where, k_where, q, kv, out, lse, new_out, new_lse, *, softcap):
    queries, at = q[...], (_column(q_where[0]), _column(q_where[1]))
    met = flash.begin(out[...], _column(lse[...]))

    def step(j, met):
        seen = flash.sees(*at, k_where[j, 0][None], k_where[j, 1][None], window[0])
        return flash.meet(met, queries, kv[j, 0], kv[j, 1], seen, softcap)

    met = lax.fori_loop(span[0], span[1], step, met)
    new_out[...], new_lse[...] = flash.output(met), flash.logsum(met.top, met.total)[:, 0]


def _to_queries(
    span, window, q_where, k_where, q, kv, dout, lse, delta, dq, new_dq, *, softcap
):  # fmt: skip
    at = _column(q_where[0]), _column(q_where[1])
    mine = dout[...], _column(lse[...]), _column(delta[...])
    queries = q[...]

    def step(j, dq):
        seen = flash.sees(*at, k_where[j, 0][None], k_where[j, 1][None], window[0])
        keys = kv[j, 0]
        dscore = flash.weights(queries, keys, kv[j, 1], *mine, seen, softcap)[1]
        return dq + flash.spread_queries(dscore, keys)

    new_dq[...] = lax.fori_loop(span[0], span[1], step, dq[...])


def _to_keys(span, window, q_where, k_where, q, kv, dout, lse, delta, dkv, *, softcap, groups):
    keys, values = kv[0], kv[1]
    at = k_where[0][None], k_where[1][None]

    def step(i, both):
        seen = flash.sees(_column(q_where[i, 0]), _column(q_where[i, 1]), *at, window[0])

        def head(g, both):
            queries, pull = q[i, g], dout[i, g]
            mine = pull, _column(lse[i, g]), _column(delta[i, g])
            weight, dscore = flash.weights(queries, keys, values, *mine, seen, softcap)
            more = flash.spread_keys(dscore, weight, queries, pull)
            return both[0] + more[0], both[1] + more[1]

        return lax.fori_loop(0, groups, head, both)

    zero = jnp.zeros(keys.shape, jnp.float32)
    dkv[0], dkv[1] = lax.fori_loop(span[0], span[1], step, (zero, zero))

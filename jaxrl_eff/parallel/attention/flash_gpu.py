"""GPU kernels for a device's share of attention, in Pallas (Triton); equivalent to `blockwise`.

A program holds a tile of queries (or, for dk and dv, of keys) and loops over the tiles to visit:
first those that need a mask, then those that do not, which are the majority in a long document.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxrl_eff.parallel.attention import flash
from jaxrl_eff.parallel.attention.blockwise import Window
from jaxrl_eff.types import Array, Float, Int

CHUNK = 128  # tokens; Triton requires block sizes that are powers of two
# Compute capabilities with at least 160 kB of shared memory per program; others have at most 100.
LARGE = ("8.0", "8.7", "9.0", "10.0", "10.3")


class Tile(NamedTuple):
    """Tile sizes and launch parameters of a kernel.

    Attributes:
        own: maximum tokens that a program holds.
        met: maximum tokens that it processes per loop iteration.
        warps: per program.
        stages: of Triton's software pipeline (loads in flight).
    """

    own: int
    met: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Tiles of the three kernels."""

    forward: Tile
    to_queries: Tile
    to_keys: Tile


def tiles(head_dim: int, dtype: Any) -> Tiles:
    """Fastest tiles measured on an H100 by bytes per head; small ones for sizes not measured."""
    wide = head_dim * jnp.dtype(dtype).itemsize
    if wide <= 128:
        return Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 2))
    if wide <= 256:
        small = Tile(64, 64, 4, 2)
        return Tiles(Tile(128, 128, 8, 3) if _large() else small, small, small)
    return Tiles(*[Tile(64, 32, 8, 2)] * 2, Tile(32, 32, 8, 2))


def fits(head_dim: int, dtype: Any) -> bool:
    """True if the kernels support this head dim and dtype.

    The head dim must be a power of two, at least 16, and a head at most 512 bytes, or 256 on GPUs
    with little shared memory.
    """
    power, itemsize = head_dim & (head_dim - 1) == 0, jnp.dtype(dtype).itemsize
    most = 512 if _large() else 256
    return power and head_dim >= 16 and itemsize <= 4 and head_dim * itemsize <= most


def _large() -> bool:
    """True if the GPU has large shared memory; assumed when compiling without a GPU."""
    return getattr(jax.devices()[0], "compute_capability", LARGE[-1]) in LARGE


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
    chunk = q_where.shape[-1]
    out, lse, q = (flash.by_head(x, chunk) for x in (out, lse, q))
    shapes = out.shape, lse.shape
    tile = tiles(q.shape[-1], kv.dtype).forward
    work = _Queries(q, kv, q_where, k_where, window, tile)
    out, lse = pl.pallas_call(
        functools.partial(_forward, softcap=softcap, met=work.met),
        grid=work.grid,
        in_specs=[*work.at, work.tile, work.keys, work.tile, work.number],
        out_specs=[work.tile, work.number],
        out_shape=[flash.like(q, shape) for shape in shapes],
        input_output_aliases={6: 0, 7: 1},
        name="ring_forward",
        **_how(tile, interpret),
    )(*work.where, q, kv, out, lse)
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
    """Computes `blockwise.backward`."""
    chunk = q_where.shape[-1]
    dout = dout.astype(kv.dtype)
    dq, q, dout, lse, delta = (flash.by_head(x, chunk) for x in (dq, q, dout, lse, delta))
    _, to_queries, to_keys = tiles(q.shape[-1], kv.dtype)
    work = _Queries(q, kv, q_where, k_where, window, to_queries)
    dq = pl.pallas_call(
        functools.partial(_to_queries, softcap=softcap, met=work.met),
        grid=work.grid,
        in_specs=[
            *work.at, work.tile, work.keys, work.tile, work.number, work.number, work.tile,
        ],
        out_specs=work.tile,
        out_shape=flash.like(q, dq.shape),
        input_output_aliases={9: 0},
        name="ring_backward_q",
        **_how(to_queries, interpret),
    )(*work.where, q, kv, dout, lse, delta, dq)  # fmt: skip
    work = _Keys(q, kv, q_where, k_where, window, to_keys)
    dkv = pl.pallas_call(
        functools.partial(_to_keys, softcap=softcap, met=work.met),
        grid=work.grid,
        in_specs=[*work.at, work.group, work.tile, work.group, work.numbers, work.numbers],
        out_specs=work.tile,
        out_shape=flash.like(q, kv.shape),
        name="ring_backward_kv",
        **_how(to_keys, interpret),
    )(*work.where, q, kv, dout, lse, delta)
    return flash.by_group(dq, kv.shape[3]), dkv


def _how(tile: Tile, interpret: bool) -> dict[str, Any]:
    # JAX plans to drop this backend. With the import here only `kernels.best` is affected, which
    # then falls back to XLA.
    from jax.experimental.pallas import triton

    params = triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)
    return {"compiler_params": params, "interpret": interpret}


class _Queries:
    """Grid with a program per tile of queries: (tile, row, head), last tiles first.

    Later queries see more keys, so the longest programs start first. The block of an array that a
    program loops over spans all its tiles: Triton loads only what is read.
    """

    def __init__(self, q, kv, q_where, k_where, window: Window, tile: Tile):
        n, rows, heads, c, dim = q.shape
        m, _, _, keys, d, _ = kv.shape
        own, self.met = min(tile.own, c), min(tile.met, d)
        parts, group = c // own, heads // keys
        mine, theirs = _cut(q_where, own), _cut(k_where, self.met)
        spans = flash.bounds(mine, theirs, window).of_queries
        self.where = spans, flash.window_of(window), mine, theirs
        self.grid = n * parts, rows, heads
        last = n * parts - 1

        def tile_at(i, b, h):
            return lax.div(last - i, parts), b, h, lax.rem(last - i, parts), 0

        self.at = (
            pl.BlockSpec((4, None, None), lambda i, b, h: (0, last - i, b)),
            pl.BlockSpec((1,), lambda *_: (0,)),
            pl.BlockSpec((None, 2, None, own), lambda i, b, h: (last - i, 0, b, 0)),
            pl.BlockSpec((m * d // self.met, 2, None, self.met), lambda i, b, h: (0, 0, b, 0)),
        )
        self.tile = pl.BlockSpec((None, None, None, own, dim), tile_at)
        self.number = pl.BlockSpec((None, None, None, own), lambda *i: tile_at(*i)[:4])
        self.keys = pl.BlockSpec(
            (m, 2, None, None, d, dim), lambda i, b, h: (0, 0, b, lax.div(h, group), 0, 0)
        )


class _Keys:
    """Grid with a program per tile of keys: (tile, row, key head)."""

    def __init__(self, q, kv, q_where, k_where, window: Window, tile: Tile):
        n, rows, heads, c, dim = q.shape
        m, _, _, keys, d, _ = kv.shape
        own, self.met = min(tile.own, d), min(tile.met, c)
        parts, group = d // own, heads // keys
        mine, theirs = _cut(k_where, own), _cut(q_where, self.met)
        spans = flash.bounds(theirs, mine, window).of_keys
        self.where = spans, flash.window_of(window), theirs, mine
        self.grid = m * parts, rows, keys
        self.at = (
            pl.BlockSpec((4, None, None), lambda j, b, k: (0, j, b)),
            pl.BlockSpec((1,), lambda *_: (0,)),
            pl.BlockSpec((n * c // self.met, 2, None, self.met), lambda j, b, k: (0, 0, b, 0)),
            pl.BlockSpec((None, 2, None, own), lambda j, b, k: (j, 0, b, 0)),
        )
        self.tile = pl.BlockSpec(
            (None, 2, None, None, own, dim),
            lambda j, b, k: (lax.div(j, parts), 0, b, k, lax.rem(j, parts), 0),
        )
        self.group = pl.BlockSpec((n, None, group, c, dim), lambda j, b, k: (0, b, k, 0, 0))
        self.numbers = pl.BlockSpec((n, None, group, c), lambda j, b, k: (0, b, k, 0))


def _cut(where: Int[Array, "n 2 B c"], size: int) -> Int[Array, "m 2 B d"]:
    """Splits chunks into chunks of `size`, which divides c."""
    chunks, two, rows, chunk = where.shape
    parts = where.reshape(chunks, two, rows, chunk // size, size)
    return jnp.moveaxis(parts, 3, 1).reshape(-1, two, rows, size)


def _over(span: Any, step: Callable[[bool, Any, Any], Any], carry: Any) -> Any:
    """Loops `step(masked, tile, carry)` over a span of `flash.Bounds`, masked tiles first."""
    low, high, first, end = (span[i] for i in range(4))

    def edge(t, carry):
        return step(True, jnp.where(t < first, t, t + end - first), carry)

    carry = lax.fori_loop(low, high - (end - first), edge, carry)
    return lax.fori_loop(first, end, functools.partial(step, False), carry)


def _place(t: Any, size: int, chunk: int) -> tuple[Any, Any]:
    """(chunk index, slice within the chunk) of tile t of `size` tokens in chunks of `chunk`."""
    parts = chunk // size
    if parts == 1:
        return t, slice(None)
    return lax.div(t, parts), pl.ds(lax.rem(t, parts) * size, size)


def _column(x: Array) -> Array:
    return x[:, None]


def _row(where: Any, t: Any) -> tuple[Array, Array]:
    """Positions and segments of a tile, as rows."""
    return where[t, 0][None], where[t, 1][None]


def _forward(span, window, q_where, k_where, q, kv, out, lse, new_out, new_lse, *, softcap, met):
    queries, at = q[...], (_column(q_where[0]), _column(q_where[1]))

    def step(masked, t, found):
        seen = flash.sees(*at, *_row(k_where, t), window[0]) if masked else None
        j, part = _place(t, met, kv.shape[-2])
        return flash.meet(found, queries, kv[j, 0, part], kv[j, 1, part], seen, softcap)

    found = _over(span, step, flash.begin(out[...], _column(lse[...])))
    new_out[...], new_lse[...] = flash.output(found), flash.logsum(found.top, found.total)[:, 0]


def _to_queries(
    span, window, q_where, k_where, q, kv, dout, lse, delta, dq, new_dq, *, softcap, met
):  # fmt: skip
    at = _column(q_where[0]), _column(q_where[1])
    mine = dout[...], _column(lse[...]), _column(delta[...])
    queries = q[...]

    def step(masked, t, dq):
        seen = flash.sees(*at, *_row(k_where, t), window[0]) if masked else None
        j, part = _place(t, met, kv.shape[-2])
        keys = kv[j, 0, part]
        dscore = flash.weights(queries, keys, kv[j, 1, part], *mine, seen, softcap)[1]
        return dq + flash.spread_queries(dscore, keys)

    new_dq[...] = _over(span, step, dq[...])


def _to_keys(span, window, q_where, k_where, q, kv, dout, lse, delta, dkv, *, softcap, met):
    keys, values = kv[0], kv[1]
    at = _column(k_where[0]), _column(k_where[1])

    def head(g, both):
        def step(masked, t, both):
            # Transposed, so that the weights are the left operand below without a transpose.
            seen = flash.sees(*_row(q_where, t), *at, window[0]) if masked else None
            i, part = _place(t, met, q.shape[-2])
            queries, pull = q[i, g, part], dout[i, g, part]
            numbers = lse[i, g, part][None], delta[i, g, part][None]
            weight, dscore = flash.weights(keys, queries, pull, values, *numbers, seen, softcap)
            dk = flash.spread_queries(dscore, queries)
            return both[0] + dk, both[1] + flash.spread_queries(weight, pull)

        return _over(span, step, both)

    zero = jnp.zeros(keys.shape, jnp.float32)
    dkv[0], dkv[1] = lax.fori_loop(0, q.shape[1], head, (zero, zero))

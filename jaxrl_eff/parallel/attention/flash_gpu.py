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
from jaxrl_eff.parallel.attention.blockwise import Where
from jaxrl_eff.parallel.attention.context import sees
from jaxrl_eff.types import Array, Int

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


def _specs(grid: tuple[int, ...], tile: Tile, blocks: list[Any], out: Any) -> dict[str, Any]:
    # JAX plans to drop this backend. With the import here only `kernels.best` is affected, which
    # then falls back to XLA.
    from jax.experimental.pallas import triton

    params = triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)
    return {"grid": grid, "in_specs": blocks, "out_specs": out, "compiler_params": params}


def _over_queries(kernel: Callable[..., None], tile: Tile, q, kv, where: Where) -> flash.Walk:
    """Grid with a program per tile of queries: (tile, row, head), last tiles first.

    Later queries see more keys, so the longest programs start first. The block of an array that a
    program loops over spans all its tiles: Triton loads only what is read.
    """
    n, rows, heads, c, dim = q.shape
    m, _, _, keys, d, _ = kv.shape
    own, met = min(tile.own, c), min(tile.met, d)
    parts, group = c // own, heads // keys
    cut = Where(_cut(where.q, own), _cut(where.k, met), where.window)
    last = n * parts - 1

    def tile_at(i, b, h):
        return lax.div(last - i, parts), b, h, lax.rem(last - i, parts), 0

    return flash.Walk(
        functools.partial(kernel, met=met),
        (flash.bounds(cut).of_queries, flash.window_of(where), cut.q, cut.k),
        at=(
            pl.BlockSpec((4, None, None), lambda i, b, h: (0, last - i, b)),
            pl.BlockSpec((1,), lambda *_: (0,)),
            pl.BlockSpec((None, 2, None, own), lambda i, b, h: (last - i, 0, b, 0)),
            pl.BlockSpec((m * d // met, 2, None, met), lambda i, b, h: (0, 0, b, 0)),
        ),
        q=pl.BlockSpec((None, None, None, own, dim), tile_at),
        number=pl.BlockSpec((None, None, None, own), lambda *i: tile_at(*i)[:4]),
        kv=pl.BlockSpec(
            (m, 2, None, None, d, dim), lambda i, b, h: (0, 0, b, lax.div(h, group), 0, 0)
        ),
        specs=functools.partial(_specs, (n * parts, rows, heads), tile),
    )


def _over_keys(kernel: Callable[..., None], tile: Tile, q, kv, where: Where) -> flash.Walk:
    """Grid with a program per tile of keys: (tile, row, key head)."""
    n, rows, heads, c, dim = q.shape
    m, _, _, keys, d, _ = kv.shape
    own, met = min(tile.own, d), min(tile.met, c)
    parts, group = d // own, heads // keys
    cut = Where(_cut(where.q, met), _cut(where.k, own), where.window)
    return flash.Walk(
        functools.partial(kernel, met=met),
        (flash.bounds(cut).of_keys, flash.window_of(where), cut.q, cut.k),
        at=(
            pl.BlockSpec((4, None, None), lambda j, b, k: (0, j, b)),
            pl.BlockSpec((1,), lambda *_: (0,)),
            pl.BlockSpec((n * c // met, 2, None, met), lambda j, b, k: (0, 0, b, 0)),
            pl.BlockSpec((None, 2, None, own), lambda j, b, k: (j, 0, b, 0)),
        ),
        q=pl.BlockSpec((n, None, group, c, dim), lambda j, b, k: (0, b, k, 0, 0)),
        number=pl.BlockSpec((n, None, group, c), lambda j, b, k: (0, b, k, 0)),
        kv=pl.BlockSpec(
            (None, 2, None, None, own, dim),
            lambda j, b, k: (lax.div(j, parts), 0, b, k, lax.rem(j, parts), 0),
        ),
        specs=functools.partial(_specs, (m * parts, rows, keys), tile),
    )


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
        seen = sees(*at, *_row(k_where, t), window[0]) if masked else None
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
        seen = sees(*at, *_row(k_where, t), window[0]) if masked else None
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
            seen = sees(*_row(q_where, t), *at, window[0]) if masked else None
            i, part = _place(t, met, q.shape[-2])
            queries, pull = q[i, g, part], dout[i, g, part]
            numbers = lse[i, g, part][None], delta[i, g, part][None]
            weight, dscore = flash.weights(keys, queries, pull, values, *numbers, seen, softcap)
            dk = flash.spread_queries(dscore, queries)
            return both[0] + dk, both[1] + flash.spread_queries(weight, pull)

        return _over(span, step, both)

    zero = jnp.zeros(keys.shape, jnp.float32)
    dkv[0], dkv[1] = lax.fori_loop(0, q.shape[1], head, (zero, zero))


def _walk(over: Callable[..., flash.Walk], kernel: Callable[..., None], which: str):
    """The walk of a kernel, whose tiles are chosen by the operands."""
    return lambda q, kv, where: over(
        kernel, getattr(tiles(q.shape[-1], kv.dtype), which), q, kv, where
    )


DEVICE = flash.Device(
    _walk(_over_queries, _forward, "forward"),
    _walk(_over_queries, _to_queries, "to_queries"),
    _walk(_over_keys, _to_keys, "to_keys"),
)

"""Active entries of a matrix: units, tiles, and gather and scatter of k of them.

A parameter of any rank is treated as a stack of matrices, `[*stack, rows, columns]`. A matrix is
divided into a grid of equal *tiles*, and every tile has the same number of active *units*; a unit
is one entry, or a block of them. Indices count the units of a tile row by row:

    index int32[*stack, R, C, k]        values [*stack, R, C, k] or [*stack, R, C, k, r, c]

R x C is the grid and r x c the block. No operation crosses the edge of a tile, so a device that
holds whole tiles selects, gathers and scatters without any collective (`per_shard` runs functions
this way). Since the grid is part of the configuration, the mesh cannot change which entries are
active.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The division of one parameter into tiles and units. Hashable.

    Attributes:
        stack: number of leading axes; every index of these is a separate matrix.
        inputs: number of axes after these that together are the rows; the rest are the columns.
        tile: rows and columns of a tile.
        count: k, active units per tile.
        block: rows and columns of a unit.
        spec: how the parameter is sharded, if every shard holds whole tiles; None: replicated, or
            sharded in a way that needs collectives.
    """

    stack: int
    inputs: int
    tile: tuple[int, int]
    count: int
    block: tuple[int, int] = (1, 1)
    spec: PartitionSpec | None = None

    @property
    def units(self) -> tuple[int, int]:
        """Rows and columns of units in a tile."""
        return self.tile[0] // self.block[0], self.tile[1] // self.block[1]

    @property
    def unit(self) -> tuple[int, ...]:
        """Trailing shape of values: () for entries, the block's shape for blocks."""
        return () if self.block == (1, 1) else self.block

    def matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of a parameter of this shape, global or a shard."""
        rows = math.prod(shape[self.stack : self.stack + self.inputs])
        return rows, math.prod(shape[self.stack + self.inputs :])

    def index_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the index of a parameter of this shape."""
        rows, columns = self.matrix_shape(shape)
        grid = rows // self.tile[0], columns // self.tile[1]
        return *shape[: self.stack], *grid, self.count

    def value_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of an array with one number per active entry."""
        return *self.index_shape(shape), *self.unit

    def index_spec(self, rank: int) -> PartitionSpec:
        """Sharding of indices, values and scores of this rank: as the tiles are sharded."""
        if self.spec is None:
            return PartitionSpec()
        axes = (*self.spec, *[None] * (self.stack + self.inputs + 1 - len(self.spec)))
        tiled = (*axes[: self.stack], axes[self.stack], axes[self.stack + self.inputs])
        return PartitionSpec(*tiled, *[None] * (rank - len(tiled)))


def tiling(
    shape: tuple[int, ...],
    density: float,
    *,
    stack: int = 0,
    inputs: int = 1,
    grid: tuple[int, int] = (1, 1),
    block: tuple[int, int] = (1, 1),
) -> Tiling:
    """Makes a `Tiling` of a parameter of this shape with a share of its units active.

    Args:
        density: share of the units of every tile, rounded to at least one unit.
        grid: tiles down and across.
        block: rows and columns of a unit; 0 means the whole side of a tile, so (1, 0) is a row of
            it and (0, 1) a column.

    Raises:
        ValueError: the density is not in (0, 1], or grid or block does not divide the matrix.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}, but must be above 0 and at most 1.")
    whole = Tiling(stack, inputs, (1, 1), 0).matrix_shape(shape)
    if any(g < 1 or n % g for n, g in zip(whole, grid, strict=True)):
        raise ValueError(f"{grid} tiles do not divide a matrix of {whole}.")
    tile = whole[0] // grid[0], whole[1] // grid[1]
    block = block[0] or tile[0], block[1] or tile[1]
    if any(b < 1 or n % b for n, b in zip(tile, block, strict=True)):
        raise ValueError(f"blocks of {block} do not divide tiles of {tile}.")
    units = (tile[0] // block[0]) * (tile[1] // block[1])
    return Tiling(stack, inputs, tile, max(1, round(density * units)), block)


def as_matrix(x: jax.Array, t: Tiling) -> jax.Array:
    """Reshapes a parameter to `[*stack, rows, columns]`."""
    return x.reshape(*x.shape[: t.stack], *t.matrix_shape(x.shape))


def positions(index: jax.Array, t: Tiling) -> tuple[jax.Array, jax.Array]:
    """Row and column of every active unit, in units, within the matrix (or the local shard)."""
    rows, columns = t.units
    ones = (1,) * (index.ndim - 3)
    down = jnp.arange(index.shape[-3], dtype=index.dtype).reshape(*ones, -1, 1, 1)
    across = jnp.arange(index.shape[-2], dtype=index.dtype).reshape(*ones, 1, -1, 1)
    return index // columns + down * rows, index % columns + across * columns


def gather(x: jax.Array, index: jax.Array, t: Tiling) -> jax.Array:
    """Gathers the active entries of a parameter, as values."""

    def one(matrix: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
        at, flags = _at(matrix, row, column, t), {"mode": "promise_in_bounds"}
        return at.get(unique_indices=True, **flags).reshape(*row.shape, *t.unit)

    return _stacked(one, t.stack)(as_matrix(x, t), *positions(index, t))


def scatter(x: jax.Array, index: jax.Array, values: jax.Array, t: Tiling) -> jax.Array:
    """Sets the active entries of a parameter. In place where the parameter is donated."""

    def one(matrix: jax.Array, row: jax.Array, column: jax.Array, new: jax.Array) -> jax.Array:
        at, new = _at(matrix, row, column, t), new.reshape(-1, *t.unit).astype(matrix.dtype)
        # Sets rather than adds: with unique indices it needs no atomic additions.
        out = at.set(new, unique_indices=True, mode="promise_in_bounds")
        return out.reshape(matrix.shape)

    return _stacked(one, t.stack)(as_matrix(x, t), *positions(index, t), values).reshape(x.shape)


def _at(matrix: jax.Array, row: jax.Array, column: jax.Array, t: Tiling) -> Any:
    row, column = row.reshape(-1), column.reshape(-1)
    if not t.unit:
        return matrix.at[row, column]
    (r, c), (rows, columns) = t.block, matrix.shape
    return matrix.reshape(rows // r, r, columns // c, c).at[row, :, column, :]


def _stacked(fn: Callable, axes: int) -> Callable:
    for _ in range(axes):
        fn = jax.vmap(fn)
    return fn


def by_unit(scores: jax.Array, t: Tiling) -> jax.Array:
    """Scores of entries `[*stack, rows, columns]` summed to units, `[*stack, R, C, units]`."""
    *stack, rows, columns = scores.shape
    grid, (r, c) = (rows // t.tile[0], columns // t.tile[1]), t.block
    down, across = t.units
    x = scores.reshape(*stack, grid[0], down, r, grid[1], across, c).sum((-4, -1))
    return jnp.moveaxis(x, -2, -3).reshape(*stack, *grid, down * across)


def top(scores: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The largest scores of every tile, descending, and their units."""
    values, index = jax.lax.top_k(scores, count)
    return values, index.astype(jnp.int32)


def per_shard(fn: Callable, t: Tiling, kinds: str, out: str) -> Callable:
    """Runs `fn` on every shard separately, where the parameter is sharded by whole tiles.

    Args:
        fn: a function of arrays.
        kinds: one letter per argument: "p" has the parameter's axes, "t" those of its tiles, "-" is
            replicated.
        out: the same for the results.
    """
    if t.spec is None or not _several(jax.sharding.get_abstract_mesh()):
        return fn

    def run(*args: Any) -> Any:
        def specs(kinds: str, arrays: Any) -> tuple[PartitionSpec, ...]:
            return tuple(_spec(k, x.ndim, t) for k, x in zip(kinds, arrays, strict=True))

        results = jax.eval_shape(fn, *args)
        several = isinstance(results, tuple)
        where = specs(out, results if several else (results,))
        return jax.shard_map(
            fn, in_specs=specs(kinds, args), out_specs=where if several else where[0]
        )(*args)

    return functools.wraps(fn)(run)


def _spec(kind: str, rank: int, t: Tiling) -> PartitionSpec:
    if kind == "t":
        return t.index_spec(rank)
    return t.spec if kind == "p" else PartitionSpec()


def _several(mesh: Any) -> bool:
    return any(n > 1 for n in dict(mesh.shape).values())

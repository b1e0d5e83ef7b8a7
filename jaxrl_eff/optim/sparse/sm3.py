"""SM3 over the active entries of a matrix, and growth by its accumulators: the parts of SpIEL-MA.

A matrix keeps one number per row and one per column instead of one per entry. For every active
entry

    v_ij = min(row_i, column_j) + g_ij^2        w_ij <- w_ij - lr g_ij / sqrt(v_ij)
    row_i <- max over its active j of v_ij      column_j <- max over its active i of v_ij

(SM3-II, arXiv:1901.11150, with rows and columns as its cover; no momentum). The score of an
inactive entry is row_i column_j, so growth needs no gradients except those of active entries
(SpIEL-MA, arXiv:2401.16405). Accumulators never shrink. They belong to rows and columns, whichever
of their entries are active, and one whose entries were never active is 0, so nothing grows there:
the price of using the gradients of active entries only.

In a grid of tiles every tile has separate accumulators.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_eff.optim import mcf
from jaxrl_eff.optim.sparse.selectors import candidates
from jaxrl_eff.optim.sparse.tiling import Tiling, per_shard


class SM3State(NamedTuple):
    """Accumulators of one parameter: 4 (r + c) bytes per tile of r x c entries."""

    row: jax.Array  # float32[*stack, R, C, r]
    column: jax.Array  # float32[*stack, R, C, c]


@dataclasses.dataclass(frozen=True)
class SM3:
    """The one inner optimizer of `sparse_adapt` that is not elementwise. Its learning rate is 1."""

    def init(self, index: jax.Array, t: Tiling) -> SM3State:
        """Returns accumulators of 0.

        Raises:
            ValueError: units are not single entries.
        """
        if t.unit:
            raise ValueError(f"SM3 adds up single entries, but units are blocks of {t.block}.")
        lead = index.shape[:-1]
        return SM3State(*(jnp.zeros((*lead, side), jnp.float32) for side in t.units))

    def update(
        self, gradient: jax.Array, state: SM3State, index: jax.Array, t: Tiling
    ) -> tuple[jax.Array, SM3State]:
        """(changes to add, state) from the active entries' float32 gradients, shaped as `index`."""
        u, *after = per_shard(partial(_updated, t), t, "tttt", "ttt")(gradient, *state, index)
        return u, SM3State(*after)

    def grown(self, state: SM3State, index: jax.Array, t: Tiling) -> jax.Array:
        """The inactive candidates of every tile, as `selectors.candidates` returns them."""
        return per_shard(partial(_grown, t), t, "ttt", "t")(*state, index)


def _updated(t: Tiling, gradient, row, column, index):
    def one(g, row, column, index):
        i, j = index // t.units[1], index % t.units[1]
        g = mcf.gradients(g)
        v = jnp.minimum(jnp.minimum(row[i], column[j]) + jnp.square(g), jnp.finfo(g.dtype).max)
        u = jnp.where(v > 0, -g * jax.lax.rsqrt(jnp.where(v > 0, v, 1.0)), 0.0)
        return u, row.at[i].max(v), column.at[j].max(v)

    for _ in range(index.ndim - 1):
        one = jax.vmap(one)
    return one(gradient, row, column, index)


def _grown(t: Tiling, row, column, index):
    alone = Tiling(0, 1, t.tile, t.count)

    def one(tile):
        row, column, index = tile
        # The square root is monotonic, and products of accumulators could overflow.
        scores = (jnp.sqrt(row)[:, None] * jnp.sqrt(column)[None]).reshape(-1)
        scores = scores.at[index].set(0.0, unique_indices=True, mode="promise_in_bounds")
        return candidates(scores.reshape(t.units), alone)[0, 0]

    # One tile at a time: the scores of a tile are as large as the tile.
    tiles = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), (row, column, index))
    found = jax.lax.map(one, tiles)
    return found.reshape(*index.shape[:-1], *found.shape[-2:])

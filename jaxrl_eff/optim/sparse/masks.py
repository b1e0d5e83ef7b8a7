"""Layouts: which parameters are trained sparsely, in which tiles, and with which given entries."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_eff.optim.sparse.tiling import Tiling, tiling

Layout = Callable[[str, Any], Tiling | None]


def matrices(density: float, block: tuple[int, int], name: str, leaf: Any) -> Tiling | None:
    del name
    if leaf.ndim < 2:
        return None
    return tiling(leaf.shape, density, stack=leaf.ndim - 2, block=block)


def masked_tiling(masks: Any, plain: Layout, name: str, leaf: Any) -> Tiling | None:
    if name not in masks:
        return None
    mask, t = np.asarray(masks[name]), plain(name, leaf)
    if t is None or t.unit or mask.shape != leaf.shape or mask.dtype != bool:
        raise ValueError(
            f"the mask of {name!r} is {mask.dtype}{list(mask.shape)}; it must be a bool for every "
            f"entry of a parameter of {list(leaf.shape)} that is adapted by single entries."
        )
    counts = np.unique(_tile_masks(mask, t).sum(-1))
    if len(counts) > 1 or counts[0] == 0:
        raise ValueError(
            f"the mask of {name!r} has between {counts[0]} and {counts[-1]} entries a tile; every "
            "tile of every layer needs as many, and at least one."
        )
    return Tiling(t.stack, t.inputs, t.tile, int(counts[0]), t.block, t.spec)


def _tile_masks(mask: np.ndarray, t: Tiling) -> np.ndarray:
    rows, columns = t.matrix_shape(mask.shape)
    stack, grid = mask.shape[: t.stack], (rows // t.tile[0], columns // t.tile[1])
    x = mask.reshape(*stack, grid[0], t.tile[0], grid[1], t.tile[1])
    return np.moveaxis(x, -2, -3).reshape(*stack, *grid, -1)


def mask_index(mask: Any, t: Tiling) -> jax.Array:
    tiles = _tile_masks(np.asarray(mask), t)
    index = np.nonzero(tiles)[-1].reshape(*tiles.shape[:-1], t.count)
    return jnp.asarray(index, jnp.int32)

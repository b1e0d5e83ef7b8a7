"""Selectors of the units to train: at random, by the weights, or by the gradient.

Selectors of weights choose from a parameter alone, in one program at the start:

    random      one unit in each of k equal runs of a tile, without computing scores
    magnitude   the largest |W| (Super-Tuning, arXiv:2607.09287)
    smallest    the smallest |W|
    lift        the largest |W_r|, W_r the best approximation of rank r (LIFT, ICML 2025)

Selectors of gradients score the gradient G of a matrix in the backward pass, where it exists:

    gradient    |G| (SIFT; RigL's and SpIEL's growth)
    fisher      the sum over a batch's rows of the squares of their gradients
    snip        |G W|, how much the loss would change without the weight
    gallop      |G| / |W|, large gradients at small weights (GaLLoP, arXiv:2510.19778)

A block's score is the sum of its entries' scores. For reinforcement learning, random or small
weights are the safe choice: RL mostly changes weights off the principal directions
(arXiv:2511.08567), and a random 1 % mask is as good as all parameters (arXiv:2602.01599).
"""

import functools
import zlib

import jax
import jax.numpy as jnp

from jaxrl_eff.optim.sparse.tiling import Tiling, as_matrix, by_unit, per_shard, top

WEIGHTS = ("random", "magnitude", "smallest", "lift")
GRADIENTS = ("gradient", "fisher", "snip", "gallop")
LIFT_RANK = 32  # of the approximation whose largest entries are principal
_FLOOR = 1e-8  # keeps scores finite at weights of 0


def select(name: str, selector: str, x: jax.Array, t: Tiling, seed: int) -> jax.Array:
    """The units that a selector of weights chooses, int32 `[*stack, R, C, k]`, ascending.

    Args:
        name: of the parameter; random choices depend on it and on the seed.
    """
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    if selector == "random":
        return _strata(key, t, t.index_shape(x.shape))
    return per_shard(functools.partial(_by_weight, selector, t), t, "p-", "t")(
        x, jax.random.key_data(key)
    )


def _strata(key: jax.Array, t: Tiling, shape: tuple[int, ...]) -> jax.Array:
    size, rest = divmod(t.units[0] * t.units[1], t.count)
    i = jnp.arange(t.count, dtype=jnp.int32)
    start, length = i * size + jnp.minimum(i, rest), size + (i < rest).astype(jnp.int32)
    bits = jax.random.bits(key, shape, jnp.uint32)
    ones = (1,) * (len(shape) - 1)
    offset = bits % length.astype(jnp.uint32).reshape(*ones, -1)
    return start.reshape(*ones, -1) + offset.astype(jnp.int32)


def _by_weight(selector: str, t: Tiling, x: jax.Array, words: jax.Array) -> jax.Array:
    def one(matrix: jax.Array) -> jax.Array:
        w = matrix.astype(jnp.float32)
        scores = {
            "magnitude": jnp.abs,
            "smallest": lambda w: -jnp.abs(w),
            "lift": functools.partial(_principal, t, jax.random.wrap_key_data(words)),
        }[selector](w)
        return jnp.sort(top(by_unit(scores, t), t.count)[1], axis=-1)

    # One matrix at a time: its scores are as large as the matrix.
    matrices = as_matrix(x, t).reshape(-1, *t.matrix_shape(x.shape))
    return jax.lax.map(one, matrices).reshape(t.index_shape(x.shape))


def _principal(t: Tiling, key: jax.Array, w: jax.Array) -> jax.Array:
    """|W_r| of every tile, by a randomized range finder with two power iterations.

    Halko, Martinsson and Tropp 2011, Algorithms 4.4 and 5.1: a basis of r + 8 columns, then the
    best approximation of rank r within it. Only matrix products, except for an SVD of r + 8 rows.
    """
    (rows, columns), (r, c) = w.shape, t.tile
    tiles = jnp.moveaxis(w.reshape(rows // r, r, columns // c, c), 2, 1)
    rank = min(LIFT_RANK, r, c)
    test = jax.random.normal(key, (c, min(rank + 8, r, c)))
    basis = jnp.linalg.qr(tiles @ test)[0]
    for _ in range(2):
        basis = jnp.linalg.qr(jnp.swapaxes(tiles, -1, -2) @ basis)[0]
        basis = jnp.linalg.qr(tiles @ basis)[0]
    u, s, v = jnp.linalg.svd(jnp.swapaxes(basis, -1, -2) @ tiles, full_matrices=False)
    near = basis @ ((u * s[..., None, :])[..., :rank] @ v[..., :rank, :])
    return jnp.abs(jnp.moveaxis(near, 1, 2).reshape(rows, columns))


def score(kind: str, gradient: jax.Array, weight: jax.Array) -> jax.Array:
    """Scores of entries by a selector of gradients, float32; for "fisher" the gradient is squared.

    Args:
        gradient: of a matrix, float32; for "fisher" already the sum of squares over rows.
        weight: the matrix.
    """
    size, w = jnp.abs(gradient), jnp.abs(weight.astype(jnp.float32))
    if kind == "snip":
        return size * w
    return size / (w + _FLOOR) if kind == "gallop" else size


def candidates(scores: jax.Array, t: Tiling) -> jax.Array:
    """The k best units of every tile: float32 `[*stack, R, C, 3, k]` of row, column and score.

    Rows and columns count units within the tile. As floats they are exact below 2^24 each, which
    a single number for both would not be.
    """
    scores = jnp.where(jnp.isfinite(scores), scores, 0.0)  # an update with these is skipped anyway
    best, index = top(by_unit(scores, t), t.count)
    row, column = index // t.units[1], index % t.units[1]
    return jnp.stack([row.astype(jnp.float32), column.astype(jnp.float32), best], axis=-2)


def units_of(found: jax.Array, t: Tiling) -> jax.Array:
    """The units, int32 `[*stack, R, C, k]`, of the output of `candidates`, best first."""
    row, column = found[..., 0, :].astype(jnp.int32), found[..., 1, :].astype(jnp.int32)
    return row * t.units[1] + column

"""Which rank of a mesh axis holds which token of a row.

Distributed attention is right under any order, since positions and segments travel with tokens;
orders differ in how evenly they share out the causal triangle. A row laid out by an `Order` is
split into equal contiguous pieces, one a rank.
"""

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from jaxrl_eff.types import Array, Shaped


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
    """A permutation of a row and of the padding behind it.

    Attributes:
        name: of the function that made it.
        length: tokens in the row, without padding.
        order: [padded length], the token at each place; padding is `length` and above.
        inverse: [padded length], the place of each token.
    """

    name: str
    length: int
    order: np.ndarray
    inverse: np.ndarray

    def place(self, x: Shaped[Array | np.ndarray, "..."], axis: int = 1) -> Array | np.ndarray:
        """The row's tokens along `axis` in this order; padding is 0, and so of segment 0."""
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, len(self.order) - self.length)
        numpy = np if isinstance(x, np.ndarray) else jnp
        return numpy.take(numpy.pad(x, widths), self.order, axis=axis)

    def restore(self, x: Shaped[Array | np.ndarray, "..."], axis: int = 1) -> Array | np.ndarray:
        """What `place` made, back in the order of the row and without padding."""
        numpy = np if isinstance(x, np.ndarray) else jnp
        return numpy.take(x, self.inverse[: self.length], axis=axis)


def padded(length: int, multiple: int) -> int:
    """The least multiple that holds this many tokens, at least one."""
    return max(1, -(-length // multiple)) * multiple


def striped(length: int, parts: int) -> Order:
    """Token i on rank i mod P: equal work for any mixture of documents; fits every use.

    Striped attention (Brandon et al., 2023, arXiv:2311.09431).
    """
    return _order("striped", length, parts, lambda n: np.arange(n).reshape(-1, parts).T)


def zigzag(length: int, parts: int) -> Order:
    """Of 2P chunks, i and 2P-1-i on rank i: equal work for one document, in whole blocks."""

    def tokens(n: int) -> np.ndarray:
        pieces = np.arange(n).reshape(2 * parts, -1)
        return np.stack([pieces[:parts], pieces[: parts - 1 : -1]], axis=1)

    return _order("zigzag", length, 2 * parts, tokens)


def contiguous(length: int, parts: int) -> Order:
    """The row as it is: the last rank of one document has the most work, the first the least."""
    return _order("contiguous", length, parts, np.arange)


def reach(piece: float | int, sight: int | None) -> int | float:
    """Of a row as it is, how many pieces before its own a rank's queries see into.

    Args:
        piece: tokens a rank.
        sight: positions that a query sees, its own included; None: all.
    """
    return math.inf if sight is None else math.ceil((sight - 1) / piece)


def _order(name: str, length: int, multiple: int, tokens: Callable[[int], np.ndarray]) -> Order:
    order = tokens(padded(length, multiple)).reshape(-1)
    return Order(name, length, order, np.argsort(order))

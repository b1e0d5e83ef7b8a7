"""Assignment of a row's tokens to the ranks of a mesh axis.

Distributed attention is correct under any order, since positions and segments travel with tokens;
orders differ in how evenly they balance the causal triangle. A row permuted by an `Order` is split
into equal contiguous pieces, one per rank.
"""

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from jaxrl_eff.types import Array, Shaped


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
    """Permutation of a row and its trailing padding.

    Attributes:
        name: of the function that made it.
        length: tokens in the row, without padding.
        order: [padded length], the token at each position; padding is `length` and above.
        inverse: [padded length], the position of each token.
    """

    name: str
    length: int
    order: np.ndarray
    inverse: np.ndarray

    def place(self, x: Shaped[Array | np.ndarray, "..."], axis: int = 1) -> Array | np.ndarray:
        """Permutes the row's tokens along `axis`; padding is 0, and so of segment 0."""
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, len(self.order) - self.length)
        numpy = np if isinstance(x, np.ndarray) else jnp
        return numpy.take(numpy.pad(x, widths), self.order, axis=axis)

    def restore(self, x: Shaped[Array | np.ndarray, "..."], axis: int = 1) -> Array | np.ndarray:
        """Inverse of `place`: row order, without padding."""
        numpy = np if isinstance(x, np.ndarray) else jnp
        return numpy.take(x, self.inverse[: self.length], axis=axis)


def padded(length: int, multiple: int) -> int:
    """Rounds `length` up to a multiple, at least one multiple."""
    return max(1, -(-length // multiple)) * multiple


def striped(length: int, parts: int) -> Order:
    """Order with token i on rank i mod P: balanced for any mix of documents; the general choice.

    Striped attention (Brandon et al., 2023, arXiv:2311.09431).
    """
    return _order("striped", length, parts, lambda n: np.arange(n).reshape(-1, parts).T)


def zigzag(length: int, parts: int) -> Order:
    """Order with contiguous chunks i and 2P-1-i of 2P on rank i: balanced for one document."""

    def tokens(n: int) -> np.ndarray:
        pieces = np.arange(n).reshape(2 * parts, -1)
        return np.stack([pieces[:parts], pieces[: parts - 1 : -1]], axis=1)

    return _order("zigzag", length, 2 * parts, tokens)


def contiguous(length: int, parts: int) -> Order:
    """Identity order: for one document, the last rank has the most work and the first the least."""
    return _order("contiguous", length, parts, np.arange)


def reach(piece: float | int, sight: int | None) -> int | float:
    """Number of preceding pieces that a rank's queries see, in the contiguous order.

    Args:
        piece: tokens per rank.
        sight: positions that a query sees, including its own; None: all.
    """
    return math.inf if sight is None else math.ceil((sight - 1) / piece)


def _order(name: str, length: int, multiple: int, tokens: Callable[[int], np.ndarray]) -> Order:
    order = tokens(padded(length, multiple)).reshape(-1)
    return Order(name, length, order, np.argsort(order))

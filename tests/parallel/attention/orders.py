"""Orders of a row's tokens over the ranks of a mesh axis; attention is correct under any."""

import dataclasses

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
    """Permutation of a row and its trailing padding.

    Attributes:
        length: tokens in the row, without padding.
        order: [padded length], the token at each position; padding is `length` and above.
        inverse: [padded length], the position of each token.
    """

    length: int
    order: np.ndarray
    inverse: np.ndarray

    def place(self, x, axis=1):
        """Permutes the row's tokens along `axis`; padding is 0, and so of segment 0."""
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, len(self.order) - self.length)
        numpy = np if isinstance(x, np.ndarray) else jnp
        return numpy.take(numpy.pad(x, widths), self.order, axis=axis)

    def restore(self, x, axis=1):
        """Inverse of `place`: row order, without padding."""
        numpy = np if isinstance(x, np.ndarray) else jnp
        return numpy.take(x, self.inverse[: self.length], axis=axis)


def striped(length, parts):
    """Order with token i on rank i mod P: balanced for any mix of documents; the general choice.

    Striped attention (Brandon et al., 2023, arXiv:2311.09431).
    """
    return _order(length, parts, lambda n: np.arange(n).reshape(-1, parts).T)


def zigzag(length, parts):
    """Order with contiguous chunks i and 2P-1-i of 2P on rank i: balanced for one document."""

    def tokens(n):
        pieces = np.arange(n).reshape(2 * parts, -1)
        return np.stack([pieces[:parts], pieces[: parts - 1 : -1]], axis=1)

    return _order(length, 2 * parts, tokens)


def contiguous(length, parts):
    """Identity order: for one document, the last rank has the most work and the first the least."""
    return _order(length, parts, np.arange)


def _order(length, multiple, tokens):
    order = tokens(max(1, -(-length // multiple)) * multiple).reshape(-1)
    return Order(length, order, np.argsort(order))

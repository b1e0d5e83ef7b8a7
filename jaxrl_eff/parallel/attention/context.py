"""Context for the sequence layout in force: how tokens of a row are sharded over devices.

A step sets it while tracing a call; a model requests it by row length. The model code is the same
for every layout.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_eff.types import Array, Bool, Int

Attend = Callable[..., jax.Array]  # with the signature of `models.attention.plain`


class Mask(NamedTuple):
    """Attention mask, given by positions and packed sequences of queries and keys.

    A query sees a key iff both belong to the same packed sequence, the key is not later, and it is
    within the window.

    Attributes:
        q_position, k_position: index of each token in its packed sequence.
        q_segment, k_segment: packed sequence of each token; 0: padding, which neither sees nor is
            seen.
        window: keys at least this many positions back are not seen; None: no limit.
    """

    q_position: Int[Array, "B T"]
    q_segment: Int[Array, "B T"]
    k_position: Int[Array, "B S"]
    k_segment: Int[Array, "B S"]
    window: int | Int[Array, ""] | None = None

    def seen(self) -> Bool[Array, "B T S"]:
        """Boolean mask of the keys that each query sees."""
        q, k = (x[:, :, None] for x in self[:2]), (x[:, None, :] for x in self[2:4])
        return sees(*q, *k, self.window)

    def each(
        self,
        of_queries: Callable[[Array], Array],
        of_keys: Callable[[Array], Array] | None = None,
    ) -> "Mask":
        """Applies functions to the arrays of queries and of keys; None: the same function."""
        of_keys = of_keys or of_queries
        return Mask(*map(of_queries, self[:2]), *map(of_keys, self[2:4]), self.window)


def sees(
    q_position: Array,
    q_segment: Array,
    k_position: Array,
    k_segment: Array,
    window: int | Array | None,
) -> Array:
    """`Mask.seen` for arrays that broadcast against each other."""
    behind = q_position - k_position
    seen = (q_segment == k_segment) & (k_segment > 0) & (behind >= 0)
    return seen if window is None else seen & (behind < window)


def _same(x: jax.Array) -> jax.Array:
    return x


def _next(x: jax.Array) -> jax.Array:
    return jnp.roll(x, -1, axis=1)


def _previous(x: jax.Array) -> jax.Array:
    return jnp.roll(x, 1, axis=1)


class SequenceLayout(NamedTuple):
    """Token order across devices, with an attention function for it.

    Attributes:
        attend: the attention function; None: any that takes complete rows.
        place: `[B, T]` -> the same in the token order of the devices.
        restore: inverse of `place`.
        next, previous: `[B, T]` in row order -> the value of each token's successor or predecessor.
        fits: (head dim, dtype) -> True if `attend` supports such a model; otherwise `attend` is
            treated as None.
    """

    attend: Attend | None = None
    place: Callable[[jax.Array], jax.Array] = _same
    restore: Callable[[jax.Array], jax.Array] = _same
    next: Callable[[jax.Array], jax.Array] = _next
    previous: Callable[[jax.Array], jax.Array] = _previous
    fits: Callable[[int, Any], bool] = lambda head_dim, dtype: True


# (tokens per row, positions that every layer sees back or None) -> layout.
LayoutOf = Callable[[int, int | None], SequenceLayout]
_layout: contextvars.ContextVar[LayoutOf | None] = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def sequence_layout(of: LayoutOf | None) -> Iterator[None]:
    """Sets the layout while a call is traced; None: rows are not sharded."""
    token = _layout.set(of)
    try:
        yield
    finally:
        _layout.reset(token)


def current_layout(
    length: int, *, sight: int | None = None, head_dim: int | None = None, dtype: Any = None
) -> SequenceLayout:
    """Layout of rows of this length.

    Args:
        length: tokens per row.
        sight: positions that every layer of the model sees back; None: the whole row.
        head_dim, dtype: of the model's attention; None: only the order is requested.
    """
    of = _layout.get()
    found = SequenceLayout() if of is None else of(length, sight)
    fits = head_dim is None or found.fits(head_dim, dtype)
    return found if fits else found._replace(attend=None)

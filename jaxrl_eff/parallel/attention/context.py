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

Attend = Callable[..., jax.Array]  # with the signature of `models.attention.plain`


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

"""The sequence layout in force: how the tokens of rows lie over the devices that share them.

A step sets it while it traces a call; a model asks for it by the length of its rows, and is the
same model whatever the answer.
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
    """The order of tokens on the devices, and the attention over all of them.

    Attributes:
        attend: the attention; None: any that sees whole rows.
        place: `[B, T]` -> the same in the order in which devices hold tokens.
        restore: the converse.
        next, previous: `[B, T]` not placed -> what belongs to the token after, or before, each.
        fits: (head dim, dtype) -> whether `attend` takes such a model; if not, any attention does.
    """

    attend: Attend | None = None
    place: Callable[[jax.Array], jax.Array] = _same
    restore: Callable[[jax.Array], jax.Array] = _same
    next: Callable[[jax.Array], jax.Array] = _next
    previous: Callable[[jax.Array], jax.Array] = _previous
    fits: Callable[[int, Any], bool] = lambda head_dim, dtype: True


# (tokens of a row, positions that every layer sees back or None) -> layout.
LayoutOf = Callable[[int, int | None], SequenceLayout]
_layout: contextvars.ContextVar[LayoutOf | None] = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def sequence_layout(of: LayoutOf | None) -> Iterator[None]:
    """Sets the layout while a call is traced; None: rows are whole on a device."""
    token = _layout.set(of)
    try:
        yield
    finally:
        _layout.reset(token)


def current_layout(
    length: int, *, sight: int | None = None, head_dim: int | None = None, dtype: Any = None
) -> SequenceLayout:
    """The layout of rows of this length.

    Args:
        sight: how many positions back every layer of the model sees; None: the whole row.
        head_dim, dtype: of the model's attention; None: no attention is asked for.
    """
    of = _layout.get()
    found = SequenceLayout() if of is None else of(length, sight)
    fits = head_dim is None or found.fits(head_dim, dtype)
    return found if fits else found._replace(attend=None)

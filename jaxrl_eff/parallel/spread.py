"""The attention of a call whose rows are split over the sequence axis of its mesh."""

import functools
from collections.abc import Callable

from jaxrl_eff.parallel import ring
from jaxrl_eff.parallel.mesh import Placement, mesh
from jaxrl_eff.shapes import Array

WAYS = {"ring": ring.ring, "gathered": ring.gathered, "ulysses": ring.ulysses}


@functools.lru_cache(maxsize=256)
def attend(place: Placement, way: str = "ring") -> Callable[..., Array]:
    """Attention on global arrays whose rows, tokens and heads are split as `place` says.

    One function for equal arguments, since a program is traced anew for another one.

    Args:
        way: "ring", "gathered" or "ulysses".

    Raises:
        ValueError: an unknown way.
    """
    if way not in WAYS:
        raise ValueError(f"attention over the sequence axis is {way!r}; there are {list(WAYS)}.")
    out = ring.on_mesh(WAYS[way]("seq"), mesh(place))
    out.__name__ = way
    return out


def striped(x: Array, parts: int) -> Array:
    """`[B, T]` so that token i stands in piece i mod P, its stripe: `order.striped` on the device.

    Striped attention (Brandon et al., 2023, arXiv:2311.09431): equal work for any mixture of
    documents.
    """
    rows, length = x.shape
    return x.reshape(rows, length // parts, parts).swapaxes(1, 2).reshape(rows, length)


def unstriped(x: Array, parts: int) -> Array:
    """The converse of `striped`."""
    return striped(x, x.shape[1] // parts)

"""The attention of a call whose rows are split over the sequence axis of its mesh."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

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


@functools.lru_cache(maxsize=256)
def both(place: Placement, local: int) -> Callable[..., Array]:
    """Attention on rows that are split over all of data, fsdp and seq, each on a device.

    The first `local` tokens of a row attend to each other; the rest are a stripe of what the
    devices of a sequence axis share, and attend to all stripes by a ring. Neither waits for the
    other, so a compiler may compute the first while the others' keys are on their way.
    """
    ways = ring.local("seq"), ring.ring("seq")

    def attend(q: Array, k: Array, v: Array, **how: Any) -> Array:
        where = {name: how.pop(name) for name in _WHERE}
        outs = []
        for way, part in zip(ways, (slice(local), slice(local, None)), strict=True):
            mine = [x[:, part] for x in (q, k, v)]
            if mine[0].shape[1]:
                there = {name: x[:, part] for name, x in where.items()}
                outs.append(way(*mine, **there, **how))
        return jnp.concatenate(outs, axis=1)

    return ring.on_mesh(attend, mesh(place), split=False)


_WHERE = ("q_position", "k_position", "q_segment", "k_segment")


def joined(local: Array, shared: Array, parts: int) -> Array:
    """Rows of devices, `[G P, Tl]`, and rows of groups, `[G, P Td]`, as `[G P, Tl + Td]`.

    Rank r of a group gets stripe r of the group's row behind its own.
    """
    groups, length = shared.shape
    stripes = striped(shared, parts).reshape(groups * parts, length // parts)
    return jnp.concatenate([local, stripes], axis=1)


def divided(x: Array, local: int, parts: int) -> tuple[Array, Array]:
    """The converse of `joined`."""
    rows, length = x.shape
    stripes = x[:, local:].reshape(rows // parts, parts * (length - local))
    return x[:, :local], unstriped(stripes, parts)


def striped(x: Array, parts: int) -> Array:
    """`[B, T]` so that token i stands in piece i mod P, its stripe: `order.striped` on the device.

    Striped attention (Brandon et al., 2023, arXiv:2311.09431): equal work for any mixture of
    documents.
    """
    rows, length = x.shape
    return x.reshape(rows, length // parts, parts).swapaxes(1, 2).reshape(rows, length)


def unstriped(x: Array, parts: int) -> Array:
    """The converse of `striped`."""
    rows, length = x.shape
    return x.reshape(rows, parts, length // parts).swapaxes(1, 2).reshape(rows, length)

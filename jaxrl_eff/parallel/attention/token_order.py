"""Pieces of a row's tokens, one per rank of a mesh axis.

Distributed attention is correct under any order of tokens, since positions and segments travel with
them; orders differ in how evenly they balance the causal triangle (`sequence.striped`).
"""

import math

import jax.numpy as jnp

from jaxrl_eff.types import Array, Shaped


def pad(x: Shaped[Array, "B T ..."], multiple: int) -> Shaped[Array, "B T2 ..."]:
    """Pads tokens with zeros, and so of segment 0, to a multiple; at least one multiple."""
    short = max(1, -(-x.shape[1] // multiple)) * multiple - x.shape[1]
    return jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2)) if short else x


def reach(piece: float | int, sight: int | None) -> int | float:
    """Number of preceding pieces that a rank's queries see, in the contiguous order.

    Args:
        piece: tokens per rank.
        sight: positions that a query sees, including its own; None: all.
    """
    return math.inf if sight is None else math.ceil((sight - 1) / piece)

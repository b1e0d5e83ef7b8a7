"""Rows that are packed on the devices, from padded ones: what a micro-batch of a schedule computes.

Skrull (arXiv:2505.19609) keeps a short sequence whole on one device and shards a long one over the
devices of a sequence axis. For G groups of P devices a *micro-batch* has

    local     rows [G P, Tl]    packed sequences, one row per device
    shared    rows [G, P Td]    packed sequences, one row per group

gathered from padded arrays `[B, T]` by *maps*, which give the source index of every token. A
sequence, or both sides of a preference pair, is within one row, so a loss is the sum of the losses
of local and shared rows. Only the model's forward pass takes both together (`together`), so that
attention over local rows can overlap with the communication of keys of shared rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxrl_eff.core import meters
from jaxrl_eff.core.graph import TOKENS, Call
from jaxrl_eff.core.shardings import placed
from jaxrl_eff.data.balance.assignment import Assignment, Shape
from jaxrl_eff.parallel import Placement
from jaxrl_eff.parallel.attention import sequence
from jaxrl_eff.parallel.sharding import arrays, replicated

SIDES = ("local", "shared")
NOWHERE = 2**31 - 1  # out of bounds of any array

MicroBatch = Mapping[str, Mapping[str, Any]]  # "local", "shared" -> arrays by name


def maps(schedule: Assignment, picked: Sequence[int] | np.ndarray, *, width: int) -> list[dict]:
    """Maps each position of every micro-batch to its token in padded arrays `[B, T]`.

    Args:
        schedule: of the lengths of K rows.
        picked: int [K], their indices in the arrays; a row's tokens are at its start.
        width: T.

    Returns:
        For each micro-batch "local" [G P, Tl] and "shared" [G, P Td]: "source" int32, row * width +
        column in the arrays, or `NOWHERE` at padding; "unit" int32, 1, 2, .. for the source rows in
        this row, 0 at padding.
    """
    groups, parts = schedule.groups, schedule.parts
    out = []
    for shape in schedule.shapes:
        sizes = {"local": (groups * parts, shape.local), "shared": (groups, shape[1] * parts)}
        out.append(
            {
                side: {"source": np.full(n, NOWHERE, np.int32), "unit": np.zeros(n, np.int32)}
                for side, n in sizes.items()
            }
        )
    start: dict[Any, int] = {}
    units: dict[Any, int] = {}
    places = zip(schedule.step, schedule.group, schedule.rank, strict=True)
    for k, (step, group, rank) in enumerate(places):
        side, row = ("shared", group) if rank < 0 else ("local", group * parts + rank)
        n, first, where = int(schedule.lengths[k]), int(picked[k]) * width, (step, side, row)
        here = slice(start.get(where, 0), start.get(where, 0) + n)
        units[where], start[where] = units.get(where, 0) + 1, here.stop
        out[step][side]["source"][row, here] = np.arange(first, first + n)
        out[step][side]["unit"][row, here] = units[where]
    return out


def maps_of(place: Placement, shape: Shape) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Returns shapes and shardings of `maps` of one micro-batch."""
    sizes = {
        "local": (place.row_shards * place.seq, shape.local),
        "shared": (place.row_shards, shape.distributed * place.seq),
    }
    axes = {"local": ("packed",), "shared": ("batch", "length")}
    like = {side: jax.ShapeDtypeStruct(size, jnp.int32) for side, size in sizes.items()}
    return {
        side: dict.fromkeys(
            ("source", "unit"), placed(x, arrays(place).fitting(axes[side], x.shape))
        )
        for side, x in like.items()
    }


def gathered(
    place: Placement, prefix: str, args: Mapping[str, Any], maps: Any, *, segments: int
) -> dict[str, dict[str, jax.Array]]:
    """Gathers both kinds of rows from padded ones; per-row numbers are repeated for each token.

    Args:
        prefix: prefix of the names of the padded arrays.
        segments: maximum number of segments of a padded row. Those of the u-th row in a packed one
            become (u - 1) * segments + 1, 2, ...
    """
    whole, width = replicated(place), args[f"{prefix}segment"].shape[1]
    flat = {k: jax.lax.with_sharding_constraint(x.reshape(-1), whole) for k, x in args.items()}
    out = {}
    for side, like in maps_of(place, _shape_of(place, maps)).items():
        source, unit, where = maps[side]["source"], maps[side]["unit"], like["source"].sharding

        def taken(k: str, source: jax.Array = source, where: Any = where) -> jax.Array:
            at = source if args[k].ndim == 2 else source // width
            found = flat[k].at[at].get(mode="fill", fill_value=0)
            return jax.lax.with_sharding_constraint(found, where)

        there = {k: taken(k) for k in args}
        number = unit
        if segments > 1:
            number = jnp.where(unit > 0, (unit - 1) * segments + there[f"{prefix}segment"], 0)
        out[side] = there | {f"{prefix}segment": number}
    return out


def scattered(place: Placement, carry: Mapping[str, Any], found: Any, maps: Any) -> dict[str, Any]:
    """Scatters per-token numbers of both kinds of rows back to the padded arrays."""
    at = [maps[side]["source"].reshape(-1) for side in SIDES]

    def put(k: str, x: jax.Array) -> jax.Array:
        flat = x.reshape(-1)
        for side, source in zip(SIDES, at, strict=True):
            flat = flat.at[source].set(found[side][k].reshape(-1), mode="drop")
        return flat.reshape(x.shape)

    return {k: put(k, x) for k, x in carry.items()}


def _shape_of(place: Placement, maps: Any) -> Shape:
    local, shared = (maps[side]["source"].shape[1] for side in SIDES)
    return Shape(local, shared // place.seq)


def together(args: MicroBatch, parts: int, names: Sequence[str]) -> dict[str, jax.Array]:
    """Joins both kinds of rows for the forward pass, `[G P, Tl + Td]`."""
    both = {k: sequence.joined(args["local"][k], args["shared"][k], parts) for k in names}
    return {k: nn.with_logical_constraint(v, ("batch", "length")) for k, v in both.items()}


def apart(found: Any, local: int, parts: int) -> dict[str, Any]:
    """Splits per-token numbers, a tree of `[G P, Tl + Td]`, into the two kinds of rows.

    Args:
        local: Tl.
        parts: P.
    """
    leaves, structure = jax.tree.flatten(found)
    halves = [sequence.divided(x, local, parts) for x in leaves]
    return {side: structure.unflatten([h[i] for h in halves]) for i, side in enumerate(SIDES)}


def loss(
    c: Call, parts: int, params: Any, args: MicroBatch, key: jax.Array, *, prefix: str = ""
) -> Any:
    """Computes a train call's loss of both kinds of rows, after one forward pass.

    Args:
        parts: P.
        prefix: prefix of the names of the arrays it reads.
    """
    names = [prefix + k for k in TOKENS]
    both = together(args, parts, names)
    numbers = c.forward(params, *(both[k] for k in names))
    found = apart(numbers, args["local"][names[0]].shape[1], parts)
    done = [
        c.loss(found[side], there, key) for side, there in args.items() if there[names[0]].shape[1]
    ]
    total, weight, seen = done[0]
    for more, heavier, saw in done[1:]:
        total, weight = total + more, weight + heavier
        seen = {k: meters.add(seen[k], saw[k]) for k in seen}
    return total, weight, seen

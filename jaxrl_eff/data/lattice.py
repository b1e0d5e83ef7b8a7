"""Few shapes for many schedules, since every shape of a micro-step is a program to compile.

A lattice is a short list of shapes (local columns, distributed columns). A micro-step is planned
into the cheapest that holds it, and pads up to it. What it wants is mostly columns: local
sequences can be moved among the distributed ones where those have room left. So a shape (l, d) is
counted as holding a wanted one (l', d') if d' <= d and l' + d' <= l + d.

Among lattices of shelves, a few numbers of distributed columns and for each a few numbers of all
columns, dynamic programming finds the one that pads least, where every wanted shape takes the
lowest shelf that it can: sharing out more than that would be slower, though it might pad less.
"""

from collections.abc import Sequence

import numpy as np

from jaxrl_eff.data import skrull
from jaxrl_eff.data.schedules import Shape
from jaxrl_eff.data.skrull_cost import Cost

MULTIPLE = 128  # columns are rounded up to it: blocks of attention kernels
_LEVELS = 24  # of distributed columns, and of local ones, that are considered as edges


def lattice(
    lengths: Sequence[int] | np.ndarray,
    *,
    groups: int,
    parts: int,
    room: int,
    batch: int,
    cost: Cost,
    counts: Sequence[int] | np.ndarray | None = None,
    shapes: int = 12,
    batches: int = 64,
    seed: int = 0,
    multiple: int = MULTIPLE,
) -> tuple[Shape, ...]:
    """The shapes that schedules of such lengths should have.

    Batches are drawn from the lengths and planned with exact shapes; the lattice is the one that
    pads what these ask for least. One shape is (0, room): whatever fits memory fits there.

    Args:
        lengths: seen ones, or the values of a histogram with `counts`.
        groups, parts, room, cost: as of `skrull.plan`.
        batch: sequences of a global batch.
        shapes: how many, at most.
        batches: that are drawn.
        multiple: that columns are rounded up to, if the room allows.

    Raises:
        ValueError: a length that does not fit, or no shape to give.
    """
    if shapes < 1 or batch < 1 or batches < 1 or multiple < 1:
        raise ValueError(f"{shapes=}, {batch=}, {batches=} and {multiple=} must all be at least 1.")
    wanted = asked(
        lengths, groups=groups, parts=parts, room=room, batch=batch, cost=cost, counts=counts,
        batches=batches, seed=seed,
    )  # fmt: skip
    return chosen(wanted, room=room, shapes=shapes, multiple=multiple)


def asked(
    lengths: Sequence[int] | np.ndarray,
    *,
    groups: int,
    parts: int,
    room: int,
    batch: int,
    cost: Cost,
    counts: Sequence[int] | np.ndarray | None = None,
    batches: int = 64,
    seed: int = 0,
) -> list[Shape]:
    """The exact shapes of the schedules of batches drawn from lengths; arguments of `lattice`."""
    n = np.asarray(lengths)
    if n.size and n.max() > room * parts:
        raise ValueError(
            f"a sequence has {n.max()} tokens, but {parts} ranks of {room} tokens hold at most "
            f"{room * parts}."
        )
    share = None if counts is None else np.asarray(counts, np.float64) / np.sum(counts)
    rng = np.random.default_rng(seed)
    wanted: list[Shape] = []
    for _ in range(batches):
        drawn = n[rng.choice(len(n), size=batch, p=share)]
        found = skrull.plan(drawn, groups=groups, parts=parts, room=room, cost=cost)
        wanted += found.shapes
    return wanted


def chosen(
    wanted: Sequence[Shape], *, room: int, shapes: int, multiple: int = MULTIPLE
) -> tuple[Shape, ...]:
    """The lattice of at most so many shapes in which the wanted ones take the fewest columns.

    At most 24 levels of either number are told apart, by quantiles. What rounding up puts beyond
    the room is left to (0, room).
    """
    shared = np.array([_up(d, multiple) for _, d in wanted], np.int64)
    total = np.array([max(_up(s + d, multiple), _up(d, multiple)) for s, d in wanted], np.int64)
    full = Shape(0, room)
    fits = total <= room
    if shapes == 1 or not fits.any():
        return (full,)
    best = _shelves(shared[fits], total[fits], room, shapes - 1)
    return tuple(sorted({full, *best}, key=lambda s: (s.columns, s)))


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _levels(values: np.ndarray) -> list[int]:
    """At most `_LEVELS` of the values, ascending, the largest among them."""
    found = np.unique(values)
    if len(found) > _LEVELS:
        quantiles = np.arange(1, _LEVELS + 1) / _LEVELS
        found = np.unique(np.quantile(values, quantiles, method="higher"))
    return found.tolist()


def _shelves(shared: np.ndarray, total: np.ndarray, room: int, shapes: int) -> list[Shape]:
    """Dynamic programming over shelves: least[i][m], of the first i levels with m shapes."""
    levels = _levels(shared)
    least: list[dict[int, tuple[float, tuple[Shape, ...]]]] = [{0: (0.0, ())}]
    for i, top in enumerate(levels, start=1):
        row: dict[int, tuple[float, tuple[Shape, ...]]] = {}
        for j in range(i):
            here = (shared > (levels[j - 1] if j else -1)) & (shared <= top)
            options = _shelf(np.maximum(total[here], top), room, shapes)
            for m, (before, taken) in least[j].items():
                for k, (price, edges) in enumerate(options[: shapes - m + 1]):
                    if before + price < row.get(m + k, (np.inf, ()))[0]:
                        more = tuple(Shape(e - top, top) for e in edges)
                        row[m + k] = before + price, taken + more
        least.append(row)
    return list(min(least[-1].values(), key=lambda found: (found[0], len(found[1])))[1])


def _shelf(total: np.ndarray, room: int, shapes: int) -> list[tuple[float, tuple[int, ...]]]:
    """For 0, 1, .. edges: the columns that micro-steps of these totals take, and the edges.

    Each takes the next edge, and what is above all of them the whole room.
    """
    levels = _levels(total)
    below = [0.0, *(float((total <= e).sum()) for e in levels)]
    rest = [(below[-1] - b) * room for b in below]
    row: list[tuple[float, tuple[int, ...]]] = [(0.0, ())] + [(np.inf, ())] * len(levels)
    out = [(rest[0], ())]
    for _ in range(min(shapes, len(levels))):
        # row[i]: the last edge is the i-th level.
        row = [(np.inf, ())] + [
            min((row[j][0] + (below[i] - below[j]) * edge, (*row[j][1], edge)) for j in range(i))
            for i, edge in enumerate(levels, start=1)
        ]
        ends = [(price + r, edges) for (price, edges), r in zip(row, rest, strict=True)]
        out.append(min(ends))
    return out

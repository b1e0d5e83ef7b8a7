"""Few shapes for many schedules, since every shape of a micro-step is a program to compile.

A lattice is a short list of shapes (local columns, distributed columns). A micro-step takes the
cheapest that holds it, and pads up to it. Which shapes pad least is found exactly, by dynamic
programming, among lattices of shelves: a few numbers of distributed columns, and for each of them
a few numbers of local ones.
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
    batches: int = 24,
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
    return chosen(wanted, room=room, shapes=shapes, multiple=multiple)


def chosen(
    wanted: Sequence[Shape], *, room: int, shapes: int, multiple: int = MULTIPLE
) -> tuple[Shape, ...]:
    """The lattice of at most so many shapes that holds all wanted ones with the fewest columns.

    Wanted shapes that are near each other are one to it: at most 24 levels of either number are
    told apart. Where (0, room) is all that a shelf could be without breaking the room, it is.
    """
    asked = sorted({(_up(d, room, multiple), _up(s, room, multiple)) for s, d in wanted})
    weight = dict.fromkeys(asked, 0)
    for s, d in wanted:
        weight[_up(d, room, multiple), _up(s, room, multiple)] += 1
    points = np.array([(d, s) for d, s in asked], np.int64)
    times = np.array([weight[p] for p in asked], np.int64)
    full = Shape(0, room)
    if shapes == 1:
        return (full,)
    shelves = _levels(points[:, 0], times)
    best = _shelves(points, times, shelves, room, shapes - 1)
    return tuple(sorted({full, *best}, key=lambda s: (s.columns, s)))


def _up(n: int, room: int, multiple: int) -> int:
    return min(room, -(-n // multiple) * multiple)


def _levels(values: np.ndarray, times: np.ndarray) -> list[int]:
    """At most `_LEVELS` of the values, ascending: quantiles by how often each is asked for."""
    found, at = np.unique(values, return_inverse=True)
    if len(found) > _LEVELS:
        below = np.cumsum(np.bincount(at, weights=times)) / times.sum()
        edges = np.searchsorted(below, np.arange(1, _LEVELS + 1) / _LEVELS - 1e-9)
        found = found[np.unique(np.minimum(edges, len(found) - 1))]
    return found.tolist()


def _shelves(
    points: np.ndarray, times: np.ndarray, levels: list[int], room: int, shapes: int
) -> list[Shape]:
    """Dynamic programming over shelves: least[i][m] of the first i levels with m shapes.

    What a shelf cannot hold within the room goes to (0, room), at the price of its columns.
    """
    start = (0.0, ())
    least = [{0: start}]
    for i in range(1, len(levels) + 1):
        row: dict[int, tuple[float, tuple[Shape, ...]]] = {}
        for j in range(i):
            low, top = levels[j - 1] if j else -1, levels[i - 1]
            here = (points[:, 0] > low) & (points[:, 0] <= top)
            options = _shelf(points[here, 1], times[here], top, room, shapes)
            for m, (before, taken) in least[j].items():
                for k, (price, edges) in enumerate(options):
                    total = before + price
                    if m + k <= shapes and total < row.get(m + k, (np.inf, ()))[0]:
                        row[m + k] = total, (*taken, *(Shape(e, top) for e in edges))
        least.append(row)
    return list(min(least[-1].values(), key=lambda f: (f[0], len(f[1])))[1])


def _shelf(
    local: np.ndarray, times: np.ndarray, shared: int, room: int, shapes: int
) -> list[tuple[float, tuple[int, ...]]]:
    """For 0, 1, .. shapes with so many shared columns: all columns paid, and the local edges."""
    fits = local + shared <= room
    lost = float(times[~fits].sum() * room)
    local, times = local[fits], times[fits]
    nothing = lost + float(times.sum() * room)
    out: list[tuple[float, tuple[int, ...]]] = [(nothing, ())]
    if not len(local):
        return out
    levels = _levels(local, times)
    counts = [float(times[local <= e].sum()) for e in levels]
    rows = [[(0.0, ())] + [(np.inf, ())] * len(levels)]
    for _ in range(min(shapes, len(levels))):
        row = [(np.inf, ())]
        for i, edge in enumerate(levels, start=1):
            before = [
                (
                    rows[-1][j][0]
                    + (counts[i - 1] - (counts[j - 1] if j else 0)) * (edge + shared),
                    j,
                )
                for j in range(i)
            ]
            price, j = min(before)
            row.append((price, (*rows[-1][j][1], edge)))
        rows.append(row)
        # The largest may be left to (0, room).
        whole = float(times.sum())
        ends = [
            (p + (whole - c) * room, edges) for (p, edges), c in zip(row[1:], counts, strict=True)
        ]
        price, edges = min(ends, key=lambda end: end[0])
        out.append((lost + price, edges))
    return out

"""Selection of few shapes for many schedules, since each micro-step shape compiles a program.

A lattice is a short list of shapes (local columns, distributed columns). A micro-step is planned
into the cheapest one that holds it, and padded to it. The total number of columns matters most,
since local sequences can move into the distributed part where that has capacity left. So a shape
(l, d) counts as holding a wanted one (l', d') if d' <= d and l' + d' <= l + d.

Lattices of shelves have a few numbers of distributed columns, and for each a few numbers of total
columns. Among these, dynamic programming finds the one that pads least, where every wanted shape
takes the lowest shelf possible: distributing more would be slower, although it could pad less.

Plans depend less on how many tokens are distributed than on full columns, and fewer numbers of
distributed columns leave more shapes for totals. So batches are also planned with one or two
numbers of distributed columns, in several ways, and the lattice that is fastest on the batches is
chosen.
"""

import math
from collections.abc import Sequence

import numpy as np

from jaxrl_eff.data.balance import skrull
from jaxrl_eff.data.balance.assignment import Assignment, Shape
from jaxrl_eff.data.balance.batch import Batch
from jaxrl_eff.data.balance.cost import Cost

MULTIPLE = 128  # columns are rounded up to it: blocks of attention kernels
_LEVELS = 24  # candidate edges of distributed columns, and of total ones
_QUANTILES = (0.25, 0.5, 0.8)  # of distributed columns, for lattices with few numbers of them
_RARE = 6  # one shape in this many is for batches longer than those drawn
_JUDGES = 16  # batches on which lattices are compared

_Row = dict[int, tuple[float, tuple[Shape, ...]]]  # shapes used -> columns taken, the shapes


def lattice(
    lengths: Sequence[int] | np.ndarray,
    *,
    groups: int,
    parts: int,
    capacity: int,
    batch: int,
    cost: Cost,
    shapes: int = 12,
    batches: int = 64,
    seed: int = 0,
    multiple: int = MULTIPLE,
) -> tuple[Shape, ...]:
    """Chooses the shapes for schedules of such lengths.

    Batches are drawn from the lengths and planned with exact shapes, and with few numbers of
    distributed columns. For each, the lattice with the least padding is a candidate; the one with
    the least estimated time on the batches is chosen. One shape is (0, capacity), which holds every
    micro-step that fits memory.

    Args:
        lengths: observed ones.
        groups, parts, capacity, cost: as in `skrull.plan`.
        batch: sequences of a global batch.
        shapes: maximum number of shapes.
        batches: number of batches to draw.
        multiple: columns are rounded up to it, where the capacity allows.

    Raises:
        ValueError: a length exceeds the capacity, or a size is below 1.
    """
    if shapes < 1 or batch < 1 or batches < 1 or multiple < 1:
        raise ValueError(f"{shapes=}, {batch=}, {batches=} and {multiple=} must all be at least 1.")
    n = np.asarray(lengths)
    if n.size and n.max() > capacity * parts:
        raise ValueError(
            f"a sequence has {n.max()} tokens, but {parts} ranks of {capacity} tokens hold at most "
            f"{capacity * parts}."
        )
    rng = np.random.default_rng(seed)
    drawn = [n[rng.choice(len(n), size=batch)] for _ in range(batches)]
    return fitted(
        drawn, groups=groups, parts=parts, capacity=capacity, cost=cost,
        longest=int(n.max(initial=0)), shapes=shapes, multiple=multiple,
    )  # fmt: skip


def fitted(
    batches: Sequence[np.ndarray],
    *,
    groups: int,
    parts: int,
    capacity: int,
    cost: Cost,
    longest: int,
    shapes: int = 12,
    multiple: int = MULTIPLE,
) -> tuple[Shape, ...]:
    """Chooses shapes as `lattice`, for given batches.

    Args:
        batches: lengths of the sequences of each. Lattices are compared on the first 16.
        longest: most tokens of a sequence.
    """
    same = {"groups": groups, "parts": parts, "capacity": capacity, "cost": cost}
    exact = [skrull.plan(lengths, **same) for lengths in batches]
    wanted = [shape for s in exact for shape in s.shapes]
    rare = _rare(wanted, capacity=capacity, count=shapes // _RARE, multiple=multiple)
    shapes -= len(rare)
    found = [chosen(wanted, capacity=capacity, shapes=shapes, multiple=multiple)]
    longest = min(_up(-(-longest // parts), multiple), capacity)
    for depths in _depths(wanted, longest, capacity=capacity, multiple=multiple):
        asked = [shape for s in exact for shape in _on(s, depths, multiple)]
        found.append(_on_shelves(asked, depths, capacity=capacity, shapes=shapes))
    found = list(dict.fromkeys(_sorted([*one, *rare], capacity) for one in found))

    def seconds(shapes: tuple[Shape, ...]) -> float:
        judges = batches[:_JUDGES]
        return sum(skrull.plan(lengths, shapes=shapes, **same).seconds for lengths in judges)

    return min(found, key=seconds) if len(found) > 1 else found[0]


def _rare(wanted: Sequence[Shape], *, capacity: int, count: int, multiple: int) -> list[Shape]:
    """Shapes between the largest one wanted and the full capacity, if they are far apart.

    Without them, a sequence longer than those in the batches would cost the full capacity.
    """
    largest = max([s.columns for s in wanted], default=capacity)
    count = min(count, int(math.log2(capacity / largest)))
    ratio = (capacity / largest) ** (1 / (count + 1))
    return [Shape(0, _up(round(largest * ratio**i), multiple)) for i in range(1, count + 1)]


def _depths(
    wanted: Sequence[Shape], longest: int, *, capacity: int, multiple: int
) -> list[tuple[int, ...]]:
    """Sets of few numbers of distributed columns; each covers the longest wanted or possible."""
    deep = [d for _, d in wanted if d]
    if not deep:
        return []
    below = [min(_up(int(np.quantile(deep, q)), multiple), capacity) for q in _QUANTILES]
    tops = {min(_up(max(deep), multiple), capacity), longest}
    lows = [(), *((d,) for d in below)]
    return sorted({tuple(sorted({*low, top})) for low in lows for top in tops})


def _on(schedule: Assignment, depths: tuple[int, ...], multiple: int) -> list[Shape]:
    """Shapes of a schedule's micro-steps with one of these numbers of distributed columns.

    Micro-steps that fit none of them are left out.
    """
    out = []
    for i in range(len(schedule.shapes)):
        lengths = schedule.lengths[schedule.step == i]
        batch = Batch(lengths, schedule.groups, schedule.parts, schedule.capacity, schedule.cost)
        found = batch.pool(list(range(len(lengths))), depths)
        if found is not None:
            depth = next(d for d in depths if d >= found[1].distributed)
            columns = _up(found[1].local + depth, multiple)
            if columns <= schedule.capacity:
                out.append(Shape(columns - depth, depth))
    return out


def _on_shelves(
    wanted: Sequence[Shape], depths: tuple[int, ...], *, capacity: int, shapes: int
) -> tuple[Shape, ...]:
    """Lattice as from `chosen`, for shapes that all have one of these distributed columns."""
    least: _Row = {0: (0.0, ())}
    for depth in depths if shapes > 1 else ():
        total = np.array([s.columns for s in wanted if s.distributed == depth], np.int64)
        if total.size:
            row: _Row = {}
            _extend(row, least, _shelf(total, capacity, shapes - 1), depth, shapes - 1)
            least = row
    return _sorted(min(least.values(), key=lambda found: (found[0], len(found[1])))[1], capacity)


def chosen(
    wanted: Sequence[Shape], *, capacity: int, shapes: int, multiple: int = MULTIPLE
) -> tuple[Shape, ...]:
    """The lattice of at most `shapes` shapes in which the wanted ones take the fewest columns.

    At most 24 levels of either number are distinguished, by quantiles. What exceeds the capacity
    after rounding up takes (0, capacity).
    """
    shared = np.array([_up(d, multiple) for _, d in wanted], np.int64)
    total = np.array([max(_up(s + d, multiple), _up(d, multiple)) for s, d in wanted], np.int64)
    full = Shape(0, capacity)
    fits = total <= capacity
    if shapes == 1 or not fits.any():
        return (full,)
    return _sorted(_shelves(shared[fits], total[fits], capacity, shapes - 1), capacity)


def _sorted(shapes: Sequence[Shape], capacity: int) -> tuple[Shape, ...]:
    """Sorts shapes by columns, with (0, capacity) added."""
    return tuple(sorted({Shape(0, capacity), *shapes}, key=lambda s: (s.columns, s)))


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _levels(values: np.ndarray) -> list[int]:
    """At most `_LEVELS` of the values, ascending, including the largest."""
    found = np.unique(values)
    if len(found) > _LEVELS:
        quantiles = np.arange(1, _LEVELS + 1) / _LEVELS
        found = np.unique(np.quantile(values, quantiles, method="higher"))
    return found.tolist()


def _shelves(shared: np.ndarray, total: np.ndarray, capacity: int, shapes: int) -> list[Shape]:
    """Dynamic programming over shelves: least[i][m] is for the first i levels with m shapes."""
    levels = _levels(shared)
    least: list[_Row] = [{0: (0.0, ())}]
    for i, top in enumerate(levels, start=1):
        row: _Row = {}
        for j in range(i):
            here = (shared > (levels[j - 1] if j else -1)) & (shared <= top)
            options = _shelf(np.maximum(total[here], top), capacity, shapes)
            _extend(row, least[j], options, top, shapes)
        least.append(row)
    return list(min(least[-1].values(), key=lambda found: (found[0], len(found[1])))[1])


def _extend(
    row: _Row,
    least: _Row,
    options: list[tuple[float, tuple[int, ...]]],
    depth: int,
    shapes: int,
) -> None:
    """Updates `row` with the solutions in `least` extended by one shelf with an option's edges."""
    for m, (before, taken) in least.items():
        for k, (price, edges) in enumerate(options[: shapes - m + 1]):
            if before + price < row.get(m + k, (np.inf, ()))[0]:
                row[m + k] = before + price, taken + tuple(Shape(e - depth, depth) for e in edges)


def _shelf(total: np.ndarray, capacity: int, shapes: int) -> list[tuple[float, tuple[int, ...]]]:
    """For 0, 1, .. edges: the columns that micro-steps of these totals take, and the edges.

    Each takes the next edge, or the full capacity if it exceeds all of them.
    """
    levels = _levels(total)
    below = [0.0, *(float((total <= e).sum()) for e in levels)]
    rest = [(below[-1] - b) * capacity for b in below]
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

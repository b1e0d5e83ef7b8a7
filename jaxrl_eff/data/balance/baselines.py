"""Rules that the command `balance` compares schedules with, on many batches of one source."""

from typing import NamedTuple

import numpy as np

from jaxrl_eff.data.balance import skrull
from jaxrl_eff.data.balance.assignment import Assignment, Shape, quality
from jaxrl_eff.data.balance.batch import Batch
from jaxrl_eff.data.balance.cost import Cost
from jaxrl_eff.data.balance.shapes import lattice

EXACT = "exact"


def unpacked(batch: Batch) -> Assignment:
    """One sequence per group and micro-step, in the order given, over all ranks."""
    return _one_by_one(batch, np.argsort(batch.order).tolist(), "unpacked")


def by_length(batch: Batch) -> Assignment:
    """One sequence per group and micro-step, sorted by length, so that groups wait less for each
    other (LongAlign, arXiv:2401.18058)."""
    return _one_by_one(batch, list(range(len(batch.lengths))), "sorted")


def _one_by_one(batch: Batch, order: list[int], name: str) -> Assignment:
    steps = []
    for start in range(0, len(order), batch.groups):
        side = [batch.packed([k]) for k in order[start : start + batch.groups]]
        side += [batch.packed([])] * (batch.groups - len(side))
        steps.append((batch.shape(side), side))
    found = batch.summed(steps)
    return batch.schedule(found, name, {name: found.seconds})


def packed(batch: Batch) -> Assignment:
    """Packed context parallelism: every sequence over all ranks, in the best of `plan`'s cuts."""
    best = skrull.Best(batch)
    for way, cut in batch.cuts(skrull.MORE):
        best.offer("packed", way, skrull.placed(batch.packed, cut))
    return best.schedule()


def printed(batch: Batch) -> Assignment:
    """Skrull as printed except for its roll-back, in the fewest micro-steps that its rule finds."""
    best = skrull.Best(batch)
    best.offer("printed", "strided", skrull.printed(batch))
    return best.schedule()


def rivals(schedule: Assignment) -> dict[str, Assignment]:
    """Schedules of the same batch by other rules, by name, in exact shapes, which favors them."""
    s = schedule
    batch = Batch(s.lengths, s.groups, s.parts, s.capacity, s.cost)
    rules = {"unpacked": unpacked, "sorted": by_length, "packed": packed, "printed": printed}
    return {name: rule(batch) for name, rule in rules.items()}


class Study(NamedTuple):
    """Schedules of many batches by every rule.

    Attributes:
        shapes: the lattice; None: exact shapes.
        schedules: of every batch.
        rivals: rule -> its schedules of the same batches, in exact shapes; `EXACT` is the
            schedules' own rule, if they use a lattice.
    """

    shapes: tuple[Shape, ...] | None
    schedules: list[Assignment]
    rivals: dict[str, list[Assignment]]


class Row(NamedTuple):
    """Totals and means of one rule over all batches.

    Attributes:
        seconds: estimated, of all batches.
        gain: its seconds over those of the schedules.
        over_limit, padding, balance, distributed: as in `assignment.Quality`, with the balance of
            time; means over batches, weighted by their seconds.
        steps: number of micro-steps.
    """

    name: str
    seconds: float
    gain: float
    over_limit: float
    steps: int
    padding: float
    balance: float
    distributed: float


def study(
    lengths: np.ndarray,
    *,
    groups: int,
    parts: int,
    capacity: int,
    cost: Cost,
    batch: int,
    shapes: int,
) -> Study:
    """Schedules consecutive batches by every rule; the last batch takes the remainder.

    Args:
        lengths: int64 [n].
        groups, parts, capacity, cost: as in `skrull.plan`.
        batch: sequences of a batch.
        shapes: maximum size of the lattice; 0: exact shapes.

    Raises:
        ValueError: a sequence exceeds the capacity of a group.
    """
    same = {"groups": groups, "parts": parts, "capacity": capacity, "cost": cost}
    longest = int(lengths.max())
    if longest > capacity * parts:
        raise ValueError(
            f"length {int(lengths.argmax()) + 1} of {len(lengths)} is {longest}, but {parts} ranks "
            f"of {capacity} tokens hold at most {capacity * parts}."
        )
    chosen = lattice(lengths, batch=batch, shapes=shapes, **same) if shapes else None
    out = Study(chosen, [], {})
    for start in range(0, len(lengths), batch):
        found = skrull.plan(lengths[start : start + batch], **same, shapes=chosen)
        out.schedules.append(found)
        if chosen is not None:
            exact = skrull.plan(lengths[start : start + batch], **same)
            out.rivals.setdefault(EXACT, []).append(exact)
        for name, other in rivals(found).items():
            out.rivals.setdefault(name, []).append(other)
    return out


def rows(found: Study) -> list[Row]:
    """Totals of every rule over all batches, the schedules' own first; gains are relative to it."""
    own = sum(s.seconds for s in found.schedules)
    return [
        _row("skrull", found.schedules, own),
        *(_row(name, schedules, own) for name, schedules in found.rivals.items()),
    ]


def _row(name: str, schedules: list[Assignment], own: float) -> Row:
    qualities = [quality(s) for s in schedules]
    seconds = sum(q.seconds for q in qualities)
    weights = [q.seconds / seconds for q in qualities]

    def mean(field: str) -> float:
        return float(sum(w * getattr(q, field) for w, q in zip(weights, qualities, strict=True)))

    return Row(
        name=name,
        seconds=seconds,
        gain=seconds / own,
        over_limit=seconds / sum(q.seconds / q.over_limit for q in qualities),
        steps=sum(q.steps for q in qualities),
        padding=mean("padding"),
        balance=mean("time_balance"),
        distributed=mean("distributed"),
    )

"""Schedules a global batch of mixed lengths over data-parallel groups and a sequence axis.

Skrull (arXiv:2505.19609): within a micro-step a short sequence is *local*, whole on one rank and
without communication, and a long one *distributed* over the ranks of its group. Both that choice
and the sequences of each micro-step follow from lengths alone, by several rules: as the paper
prints it (with its roll-back repaired), by balance, and all distributed, as in packed context
parallelism. The plan with the least estimated time is used, so it is estimated no slower than the
first and the last of these, and it fits memory.

All groups run one program in a micro-step, so they share its shape and wait for the slowest. The
objective is therefore the sum over micro-steps of the largest time of a group, not, as in the
paper's equation 8, the largest sum. The plan does not depend on the order of the batch, and ties go
to the lower index, so every host can plan by itself.

`balanced_loader.arrange` makes arrays from a schedule; `shapes.lattice` keeps its shapes few.
"""

from collections.abc import Callable, Sequence

import numpy as np

from jaxrl_eff.data.balance.assignment import Assignment, Quality, Shape, quality
from jaxrl_eff.data.balance.batch import Batch, Cut, Part, Plan
from jaxrl_eff.data.balance.cost import Cost

SLACKS = (0.1, 0.0, 0.3)  # of the balance rule, over the fair load; the first is tried on all cuts
MORE = 3  # micro-steps to try beyond the fewest
FINALISTS = 3  # cuts that all rules are tried on
TIGHTENED = 2  # rules whose best plan is tightened

Rule = Callable[[list[int]], Part | None]


def plan(
    lengths: Sequence[int] | np.ndarray,
    *,
    groups: int,
    parts: int,
    room: int,
    cost: Cost,
    shapes: Sequence[Shape] | None = None,
    more: int = MORE,
    slacks: Sequence[float | int] = SLACKS,
    finalists: int = FINALISTS,
) -> Assignment:
    """Finds the schedule of a global batch with the least estimated time.

    For every number of micro-steps, from the fewest to `more` beyond, sequences are divided into
    micro-batches in three ways: as in the paper, with equal tokens, and with similar lengths
    together. Each cut is tried all distributed and by the balance rule, and the best cuts by all
    rules. `mixed` takes for each micro-batch the rule that is best for it alone; `pooled` places
    the sequences of a micro-step again, over all groups at once.

    Args:
        lengths: tokens of each sequence, K.
        groups, parts: data-parallel groups, and ranks of each along the sequence axis.
        room: capacity of a rank in tokens.
        cost: estimates the time of a plan.
        shapes: allowed shapes of a micro-step, see `lattice`; None: any.
        more, slacks, finalists: extent of the search.

    Raises:
        ValueError: a sequence is longer than room * parts, or empty.
    """
    batch = Batch(lengths, groups, parts, room, cost, shapes)
    rules = {f"balance {s:g}": _by_balance(batch, s) for s in slacks}
    first = {"packed": batch.packed, **dict(list(rules.items())[:1])}
    rules["printed"] = batch.printed
    search = _Search(batch)
    tried = []
    for way, cut in batch.cuts(more):
        if batch.least(cut) > search.seconds:
            continue
        found = {name: _placed(rule, cut) for name, rule in first.items()}
        seconds = search.offer(found, way)
        tried.append((seconds, len(tried), way, cut, found))
    for _, _, way, cut, found in sorted(tried, key=lambda t: t[:2])[:finalists]:
        rest = {name: _placed(rule, cut) for name, rule in rules.items() if name not in found}
        every = [ps for ps in (found | rest).values() if ps is not None]
        rest["mixed"] = [batch.best(same) for same in zip(*every, strict=True)]
        search.offer(rest, way)
    search.offer({"printed": _printed(batch)}, "strided")
    ranking = sorted(search.best.items(), key=lambda best: best[1][0].seconds)
    for name, (found, way) in ranking[:TIGHTENED]:
        search.take(batch.tightened(found), name, f"{way}, tightened")
        search.take(batch.pooled(found), "pooled", way)
    return search.schedule()


class _Search:
    """The best plans so far: rule -> plan, and the way its batch was cut."""

    def __init__(self, batch: Batch):
        self.batch = batch
        self.best: dict[str, tuple[Plan, str]] = {}
        self.seconds = float("inf")

    def offer(self, found: dict[str, list[Part] | None], way: str) -> float:
        """Adds plans, as rule -> parts or None, and returns the least seconds among them."""
        plans = {k: self.batch.planned(parts) for k, parts in found.items() if parts is not None}
        for name, plan in plans.items():
            self.take(plan, name, way)
        return min([p.seconds for p in plans.values()], default=float("inf"))

    def take(self, plan: Plan, rule: str, way: str) -> None:
        if rule not in self.best or plan.seconds < self.best[rule][0].seconds:
            self.best[rule] = plan, way
            self.seconds = min(self.seconds, plan.seconds)

    def schedule(self) -> Assignment:
        rule = min(self.best, key=lambda name: self.best[name][0].seconds)
        plan, way = self.best[rule]
        seconds = {name: plan.seconds for name, (plan, _) in self.best.items()}
        return self.batch.schedule(plan, f"{rule}, {way}", seconds)


def _by_balance(batch: Batch, slack: float | int) -> Rule:
    return lambda members: batch.balanced(members, slack=slack)


def _placed(rule: Rule, cut: Cut) -> list[Part] | None:
    out = []
    for members in cut:
        part = rule(members)
        if part is None:
            return None
        out.append(part)
    return out


# Baselines ------------------------------------------------------------------------------------


def unpacked(
    lengths: Sequence[int] | np.ndarray, *, groups: int, parts: int, room: int, cost: Cost
) -> Assignment:
    """One sequence per group and micro-step, in the order given, over all ranks."""
    batch = Batch(lengths, groups, parts, room, cost)
    return _one_by_one(batch, np.argsort(batch.order).tolist(), "unpacked")


def by_length(
    lengths: Sequence[int] | np.ndarray, *, groups: int, parts: int, room: int, cost: Cost
) -> Assignment:
    """One sequence per group and micro-step, sorted by length, so that groups wait less for each
    other (LongAlign, arXiv:2401.18058)."""
    batch = Batch(lengths, groups, parts, room, cost)
    return _one_by_one(batch, list(range(len(batch.lengths))), "sorted")


def _one_by_one(batch: Batch, order: list[int], name: str) -> Assignment:
    steps = []
    for start in range(0, len(order), batch.groups):
        side = [batch.packed([k]) for k in order[start : start + batch.groups]]
        side += [batch.packed([])] * (batch.groups - len(side))
        steps.append((batch.shape(side), side))
    found = batch.summed(steps)
    return batch.schedule(found, name, {name: found.seconds})


def packed(
    lengths: Sequence[int] | np.ndarray,
    *,
    groups: int,
    parts: int,
    room: int,
    cost: Cost,
    shapes: Sequence[Shape] | None = None,
    more: int = MORE,
) -> Assignment:
    """Packed context parallelism: every sequence over all ranks, in the best of `plan`'s cuts."""
    batch = Batch(lengths, groups, parts, room, cost, shapes)
    search = _Search(batch)
    for way, cut in batch.cuts(more):
        search.offer({"packed": _placed(batch.packed, cut)}, way)
    return search.schedule()


def printed(
    lengths: Sequence[int] | np.ndarray,
    *,
    groups: int,
    parts: int,
    room: int,
    cost: Cost,
    shapes: Sequence[Shape] | None = None,
) -> Assignment:
    """Skrull as printed except for its roll-back, in the fewest micro-steps that its rule finds."""
    batch = Batch(lengths, groups, parts, room, cost, shapes)
    plan = batch.planned(_printed(batch))
    return batch.schedule(plan, "printed, strided", {"printed": plan.seconds})


def _printed(batch: Batch) -> list[Part]:
    for cut in batch.strided():
        found = _placed(batch.printed, cut)
        if found is not None:
            return found
    raise AssertionError("a sequence alone always has a place")


def rivals(schedule: Assignment) -> dict[str, Assignment]:
    """Schedules of the same batch by other rules, by name, in exact shapes, which favors them."""
    same = {
        "groups": schedule.groups,
        "parts": schedule.parts,
        "room": schedule.room,
        "cost": schedule.cost,
    }
    return {
        "unpacked": unpacked(schedule.lengths, **same),
        "sorted": by_length(schedule.lengths, **same),
        "packed": packed(schedule.lengths, **same),
        "printed": printed(schedule.lengths, **same),
    }


def report(schedule: Assignment) -> dict[str, Quality]:
    """Quality of a schedule, as `skrull`, and of its rivals, by name."""
    found = {"skrull": schedule, **rivals(schedule)}
    return {name: quality(s) for name, s in found.items()}

"""A global batch of sequences of many lengths, over data-parallel groups and a sequence axis.

Skrull (arXiv:2505.19609): within a micro-step a short sequence is *local*, whole on one rank and
without communication, and a long one *distributed* over the ranks of its group. Which, and which
sequences make a micro-step, is chosen from lengths alone: as the paper prints it (with its
roll-back repaired), by balance, and all distributed, as packed context parallelism has it. The
least estimated time wins, so a plan is estimated no slower than those two; and it fits memory.

All groups run one program at a micro-step, so they share its shape and wait for the slowest: what
is minimized is the sum over micro-steps of the largest time of a group, not, as in the paper's
equation 8, the largest sum. The same batch in another order is planned the same way, and ties go
to the lower index, so every host can plan for itself.

`scheduled` makes arrays of a schedule, `lattice` keeps its shapes few.
"""

from collections.abc import Callable, Sequence

import numpy as np

from jaxrl_eff.data.balance.assignment import Assignment, Quality, Shape, quality
from jaxrl_eff.data.balance.batch import Batch, Cut, Part, Plan
from jaxrl_eff.data.balance.cost import Cost

SLACKS = (0.1, 0.0, 0.3)  # over the fair load, of the balance rule; the first is tried everywhere
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
    """The schedule of a global batch that is estimated to take least.

    For every number of micro-steps, from the fewest to `more` beyond, sequences are cut into
    micro-batches in three ways: as the paper does it, with equal tokens, and with like lengths
    side by side. Each cut is tried all distributed and by the balance rule, and the best of them
    by all rules. `mixed` takes for each micro-batch the rule that is best for it alone; `pooled`
    places the sequences of a micro-step anew, over all groups at once.

    Args:
        lengths: tokens of each sequence, K.
        groups, parts: data-parallel groups, and ranks of each along the sequence axis.
        room: tokens that a rank holds.
        shapes: that a micro-step may have, see `lattice`; None: any.
        more, slacks, finalists: what is tried.

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
    """The best plans so far: rule -> plan, and how its batch was cut."""

    def __init__(self, batch: Batch):
        self.batch = batch
        self.best: dict[str, tuple[Plan, str]] = {}
        self.seconds = float("inf")

    def offer(self, found: dict[str, list[Part] | None], way: str) -> float:
        """The least seconds of these: rule -> parts, or None."""
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


# Rivals ---------------------------------------------------------------------------------------


def unpacked(
    lengths: Sequence[int] | np.ndarray, *, groups: int, parts: int, room: int, cost: Cost
) -> Assignment:
    """One sequence a group and micro-step, in the order given, over all ranks."""
    batch = Batch(lengths, groups, parts, room, cost)
    return _one_by_one(batch, np.argsort(batch.order).tolist(), "unpacked")


def by_length(
    lengths: Sequence[int] | np.ndarray, *, groups: int, parts: int, room: int, cost: Cost
) -> Assignment:
    """As `unpacked`, but sorted, so that groups wait less for each other (LongAlign,
    arXiv:2401.18058)."""
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
    """Packed context parallelism: every sequence over all ranks, in the best cut of `plan`'s."""
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
    """Skrull as printed but for its roll-back: in the fewest micro-steps that its rule finds."""
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
    """The same batch by other rules: name -> schedule, in exact shapes, which favours them."""
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
    """A schedule, as `skrull`, and its rivals: name -> what each is like."""
    found = {"skrull": schedule, **rivals(schedule)}
    return {name: quality(s) for name, s in found.items()}

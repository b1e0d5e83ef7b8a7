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

`shapes.lattice` keeps the shapes of schedules few.
"""

from collections.abc import Callable, Sequence

import numpy as np

from jaxrl_eff.data.balance.assignment import Assignment, Shape
from jaxrl_eff.data.balance.batch import Batch, Cut, Part, Plan
from jaxrl_eff.data.balance.cost import Cost

MORE = 3  # micro-steps to try beyond the fewest


def plan(
    lengths: Sequence[int] | np.ndarray,
    *,
    groups: int,
    parts: int,
    capacity: int,
    cost: Cost,
    shapes: Sequence[Shape] | None = None,
    more: int = MORE,
) -> Assignment:
    """Finds the schedule of a global batch with the least estimated time.

    For every number of micro-steps, from the fewest to `more` beyond, sequences are divided into
    micro-batches in three ways: as in the paper, with equal tokens, and with similar lengths
    together. Each cut is tried all distributed, by the balance rule and by the paper's. `pooled`
    places the sequences of each micro-step of the best plans again, over all groups at once.

    Args:
        lengths: tokens of each sequence, K.
        groups, parts: data-parallel groups, and ranks of each along the sequence axis.
        capacity: of a rank in tokens.
        cost: estimates the time of a plan.
        shapes: allowed shapes of a micro-step, see `lattice`; None: any.
        more: extent of the search.

    Raises:
        ValueError: a sequence is longer than capacity * parts, or empty.
    """
    batch = Batch(lengths, groups, parts, capacity, cost, shapes)
    rules = {"packed": batch.packed, "balance": batch.balanced, "printed": batch.printed}
    best = Best(batch)
    for way, cut in batch.cuts(more):
        if batch.least(cut) <= best.seconds:
            for rule, place in rules.items():
                best.offer(rule, way, placed(place, cut))
    best.offer("printed", "strided", printed(batch))
    for found, way in list(best.plans.values()):
        best.take("pooled", way, batch.pooled(found))
    return best.schedule()


class Best:
    """The fastest plan of every rule so far, and the way its batch was cut."""

    def __init__(self, batch: Batch):
        self.batch = batch
        self.plans: dict[str, tuple[Plan, str]] = {}
        self.seconds = float("inf")

    def offer(self, rule: str, way: str, parts: list[Part] | None) -> None:
        """Takes the plan of these parts; None: the rule found none."""
        if parts is not None:
            self.take(rule, way, self.batch.planned(parts))

    def take(self, rule: str, way: str, plan: Plan) -> None:
        """Keeps the plan if it is the fastest of its rule."""
        if rule not in self.plans or plan.seconds < self.plans[rule][0].seconds:
            self.plans[rule] = plan, way
            self.seconds = min(self.seconds, plan.seconds)

    def schedule(self) -> Assignment:
        """The fastest plan of all as an assignment."""
        rule = min(self.plans, key=lambda name: self.plans[name][0].seconds)
        plan, way = self.plans[rule]
        seconds = {name: plan.seconds for name, (plan, _) in self.plans.items()}
        return self.batch.schedule(plan, f"{rule}, {way}", seconds)


def placed(rule: Callable[[list[int]], Part | None], cut: Cut) -> list[Part] | None:
    """The parts of a cut by a rule; None if it fails for one of them."""
    out = []
    for members in cut:
        part = rule(members)
        if part is None:
            return None
        out.append(part)
    return out


def printed(batch: Batch) -> list[Part]:
    """Parts by the paper's rule, in the fewest micro-steps for which it finds any."""
    for cut in batch.strided():
        found = placed(batch.printed, cut)
        if found is not None:
            return found
    raise AssertionError("a sequence alone always has a place")

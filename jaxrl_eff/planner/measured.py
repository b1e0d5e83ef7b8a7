"""Comparison of predicted with measured seconds, and the corrections that follow from it.

A correction is one factor per call or edge, which absorbs all that the arithmetic leaves out. A
call has one factor for every mesh shape that it was measured on, and one for all others. The first
measurement sets the factor; later ones move it less and less, so that noise averages out but drift
is still followed.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxrl_eff.planner.clusters import Cluster
from jaxrl_eff.planner.corrections import NONE, Corrections, measured_name
from jaxrl_eff.planner.problem import Plan, Problem
from jaxrl_eff.planner.simulate import Simulation, Simulator

LEAST_WEIGHT = 0.3  # of a new measurement, after any number of earlier ones
MOST_CHANGE = 64.0  # largest change of a factor in one refit

Seconds = float | int | Sequence[float | int]


class Row(NamedTuple):
    """Predicted and measured seconds of one call or edge."""

    name: str
    kind: str
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.measured / self.predicted if self.predicted else math.inf


def _middle(seconds: Seconds) -> float:
    return float(seconds) if isinstance(seconds, int | float) else statistics.median(seconds)


def _predicted(schedule: Simulation) -> dict[str, tuple[str, float]]:
    kinds = {s.name: s.kind for s in schedule.spans}
    out = {n: (kinds[n], c.seconds) for n, c in schedule.costs.items()}
    return out | {n: (kinds.get(n, "move"), t) for n, t in schedule.edges.items()}


def timed(
    problem: Problem, plan: Plan, cluster: Cluster, measured: Mapping[str, Seconds]
) -> dict[str, Seconds]:
    """Keeps the measured calls and edges that the simulator prices."""
    known = _predicted(Simulator(problem, cluster).run(plan))
    return {k: v for k, v in measured.items() if k in known and v}


def compare(
    problem: Problem,
    plan: Plan,
    cluster: Cluster,
    measured: Mapping[str, Seconds],
    corrections: Corrections = NONE,
) -> tuple[Row, ...]:
    """Pairs the predicted with the measured (median) seconds of every measured call and edge.

    Raises:
        ValueError: a name is neither a call nor an edge of the plan that takes time.
    """
    predicted = _predicted(Simulator(problem, cluster, corrections).run(plan))
    if unknown := sorted(set(measured) - set(predicted)):
        raise ValueError(f"measured {unknown}, but the plan has {sorted(predicted)}.")
    return tuple(
        Row(name, *predicted[name], _middle(measured[name]))
        for name in predicted
        if name in measured
    )


def error(rows: Sequence[Row]) -> float:
    """Mean |measured / predicted - 1|, weighted by measured seconds."""
    total = sum(r.measured for r in rows)
    return sum(abs(r.ratio - 1) * r.measured for r in rows) / total if total else 0.0


def text(rows: Sequence[Row]) -> str:
    """Formats the rows as a table for the console."""
    width = max([len(r.name) for r in rows] + [4])
    lines = [f"{'call':<{width}}  {'predicted':>10}  {'measured':>10}  {'ratio':>6}"]
    for r in rows:
        lines.append(
            f"{r.name:<{width}}  {r.predicted:>8.4f} s  {r.measured:>8.4f} s  {r.ratio:>6.2f}"
        )
    return "\n".join(lines)


def refit(
    problem: Problem,
    plan: Plan,
    cluster: Cluster,
    measured: Mapping[str, Seconds],
    corrections: Corrections = NONE,
) -> Corrections:
    """Computes new corrections after some steps of a plan.

    Args:
        measured: call or edge (see `prices.realloc_name`, `move_name`) -> seconds, or several
            values, whose median is used. A name without seconds above 0 keeps its correction.
    """
    seconds, counts = dict(corrections.seconds), dict(corrections.counts)
    edges: dict[str, list[float]] = {}
    for r in compare(problem, plan, cluster, measured, corrections):
        if r.measured <= 0 or r.predicted <= 0:
            continue
        edge, names = r.kind in ("realloc", "move"), [r.name]
        if r.name in plan:  # local calls have no placement
            used = corrections.call(r.name, plan[r.name])
            names.append(measured_name(r.name, plan[r.name]))
        else:
            used = corrections.edge(r.name, r.kind) if edge else seconds.get(r.name, 1.0)
        for name in names:
            seen = counts.get(name, 0)
            weight = max(LEAST_WEIGHT, 1 / (seen + 1))
            wanted = used * min(MOST_CHANGE, max(1 / MOST_CHANGE, r.ratio))
            old = seconds.get(name, used)
            seconds[name], counts[name] = old ** (1 - weight) * wanted**weight, seen + 1
        if edge:
            edges.setdefault(r.kind, []).append(seconds[r.name])
    for kind, factors in edges.items():
        seconds[f"*{kind}"] = statistics.median(factors)
    return dataclasses.replace(corrections, seconds=seconds, counts=counts)

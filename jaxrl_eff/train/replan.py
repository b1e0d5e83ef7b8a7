"""Correction of plans: compares predicted with measured times, and finds a better plan if any.

A searched plan is only as good as the cost model. After some steps the timed calls and
reallocations are compared with the predictions, the model's factors are refitted, and the search is
repeated from the current plan. Response lengths are measured too, since they drift in RL. For plans
that have run, measurements of whole steps override any prediction: a plan that was predicted to be
better but is not is abandoned.
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxrl_eff.core import program_order, timing
from jaxrl_eff.parallel import Placement
from jaxrl_eff.planner import clusters, measured
from jaxrl_eff.planner.clusters import Cluster
from jaxrl_eff.planner.corrections import NONE, Corrections
from jaxrl_eff.planner.problem import Lengths, Problem
from jaxrl_eff.planner.search import search as find
from jaxrl_eff.planner.simulate import Simulator
from jaxrl_eff.train.settings import SearchSettings


@dataclasses.dataclass(frozen=True)
class Searched:
    """A plan, and the inputs of its search.

    Attributes:
        seconds: predicted for a step; `gap`: fraction above a lower bound.
        rules: rule -> predicted seconds of its plan, for plans that fit.
    """

    problem: Problem
    cluster: Cluster
    corrections: Corrections
    settings: SearchSettings
    seed: int
    plan: dict[str, Placement]
    seconds: float
    gap: float
    rules: dict[str, float]

    def __str__(self) -> str:
        best = min(self.rules, key=self.rules.__getitem__, default=None)
        over = f", {self.rules[best] / self.seconds:.2f} x faster than '{best}'" if best else ""
        return (
            f"searched plan: {self.seconds:.3g} s a step predicted{over}, at most "
            f"{self.gap:.0%} above the lower bound"
        )


def search(
    problem: Problem,
    settings: SearchSettings,
    *,
    seed: int,
    corrections: Corrections = NONE,
    start: Mapping[str, Placement] | None = None,
) -> Searched:
    """Searches the best plan for this job's devices; the same on all its processes.

    Raises:
        ValueError: nothing fits, or the cluster is unknown or has another number of devices.
    """
    cluster = clusters.parse(settings.cluster)
    if cluster.devices != jax.device_count():
        raise ValueError(
            f"search.cluster {settings.cluster!r} has {cluster.devices} devices, but there are "
            f"{jax.device_count()}."
        )
    found = find(
        problem, cluster, evaluations=settings.evaluations, seed=seed,
        corrections=corrections, start=start,
    )  # fmt: skip
    rules = {k: s.seconds for k, s in found.heuristics.items() if not isinstance(s, str)}
    # Each process measures its own host; the first one's plan is used.
    plan = _from_first(found.plan)
    return Searched(
        problem, cluster, corrections, settings, seed, plan,
        found.schedule.seconds, found.gap, rules,
    )  # fmt: skip


def _from_first(plan: Mapping[str, Placement]) -> dict[str, Placement]:
    fields = {k: dataclasses.asdict(p) for k, p in plan.items()}
    sent = program_order.texts_of_all(json.dumps(fields))[0]
    return {
        k: Placement(**{**fields, "devices": tuple(fields["devices"])})
        for k, fields in json.loads(sent).items()
    }


class Calibration:
    """Compares measured with predicted times of a searched plan.

    Attributes:
        rows: predicted and measured seconds, from the last `corrected`.
    """

    def __init__(self, searched: Searched, first: int):
        """Starts without measurements.

        Args:
            first: step of the first calibration.
        """
        self.searched = searched
        self.rows: tuple[measured.Row, ...] = ()
        self._next, self._wait = first, searched.settings.calibrate
        self._measured: dict[str, list[float]] = defaultdict(list)
        self._steps: list[float] = []
        self._lengths: list[float] = []
        self._ran: dict[tuple, _Ran] = {}

    def see(
        self, spans: Iterable[timing.Span], length: float | None, seconds: float | None = None
    ) -> None:
        """Records a step's times.

        Args:
            spans: of its calls.
            length: its mean response length, if it sampled.
            seconds: from the end of the previous step to its own, if known.
        """
        for span in spans:
            self._measured[span.call].append(span.end - span.start)
        if length is not None:
            self._lengths.append(length)
        if seconds is not None:
            self._steps.append(seconds)

    def due(self, step: int) -> bool:
        """Returns True if calibration is due."""
        return step >= self._next

    def keep(self, new: Searched) -> None:
        """Keeps the current plan, with the corrected cost model."""
        plan = self.searched.plan
        self.take(dataclasses.replace(new, plan=plan, seconds=self._expected(new, plan)))

    def take(self, new: Searched) -> None:
        """Switches to a new plan."""
        self.searched = new
        self._wait *= 2
        self._next += self._wait

    def corrected(self) -> Searched:
        """Repeats the search with the measurements; its plan can be the current one."""
        old = self.searched
        problem = old.problem
        if self._lengths:
            problem = _with_length(problem, float(np.median(self._lengths)))
        where = problem, old.plan, old.cluster
        args = *where, measured.timed(*where, self._measured)
        self.rows = measured.compare(*args, old.corrections)
        new = measured.refit(*args, old.corrections)
        if self._steps:
            ran = _Ran(problem, old.plan, float(np.median(self._steps)))
            self._ran[_key(old.plan)] = ran
        for seen in (self._measured, self._lengths, self._steps):
            seen.clear()
        found = search(problem, old.settings, seed=old.seed, corrections=new, start=old.plan)
        plans = [found.plan, *(r.plan for r in self._ran.values())]
        best = _from_first(min(plans, key=lambda plan: self._expected(found, plan)))
        return dataclasses.replace(found, plan=best, seconds=self._expected(found, best))

    def gain(self, new: Searched) -> float:
        """Returns the fraction of a step's time that the new plan saves over the current one.

        The first process's value is used, since all must switch together.
        """
        running = self._expected(new, self.searched.plan)
        share = 0.0 if new.plan == self.searched.plan else 1.0 - new.seconds / running
        if jax.process_count() > 1:
            share = float(multihost_utils.broadcast_one_to_all(np.float32(share)))
        return share

    def _expected(self, new: Searched, plan: Mapping[str, Placement]) -> float:
        """Returns expected seconds of a step: predicted, times the error for measured steps.

        A plan that has not run yet is assumed to have the error of the current one.
        """

        def predicted(problem: Problem, plan: Mapping[str, Placement]) -> float:
            return Simulator(problem, new.cluster, new.corrections).run(plan).seconds

        ran = self._ran.get(_key(plan)) or self._ran.get(_key(self.searched.plan))
        off = ran.seconds / predicted(ran.problem, ran.plan) if ran else 1.0
        return predicted(new.problem, plan) * off


@dataclasses.dataclass(frozen=True)
class _Ran:
    """A plan, its measured seconds per step, and the problem (response lengths) at that time."""

    problem: Problem
    plan: dict[str, Placement]
    seconds: float


def _key(plan: Mapping[str, Placement]) -> tuple:
    return tuple(sorted(plan.items(), key=lambda item: item[0]))


def _with_length(problem: Problem, mean: float) -> Problem:
    """Returns the problem with responses of this mean length, none longer than allowed.

    The longest row ends the loop; of the distribution only the mean is known, so all other rows are
    assumed to have equal length.
    """

    def work(w: Any) -> Any:
        if w.packed is not None:
            most = w.length - w.packed.prompt
            if not 1 <= mean < most:
                return w
            found = dataclasses.replace(w.packed, responses=_two_sizes(mean, most, w.rows))
            return dataclasses.replace(w, packed=found)
        if w.kind != "generate" or not 1 <= mean < w.max_new:
            return w
        return dataclasses.replace(w, responses=_two_sizes(mean, w.max_new, w.rows))

    return dataclasses.replace(problem, works=tuple(work(w) for w in problem.works))


def _two_sizes(mean: float, most: int, rows: int) -> Lengths:
    last = min(0.5, 1.0 / max(2, rows))
    short = max(1, min(most - 1, round((mean - last * most) / (1 - last))))
    return Lengths((short, most), (1 - last, last))

"""Plans that correct themselves: predicted against measured times, and a better plan if there is.

A searched plan is as good as the cost model. So after some steps the calls and reallocations that
were timed are laid beside what was predicted, the model's factors are refitted, and the search is
repeated from the plan that runs. Response lengths count as measured too: they drift in RL. Of plans
that have run, whole steps were measured, and these count more than any prediction: a plan that
looked better and was not is left again.
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
from jaxrl_eff.planner import clusters
from jaxrl_eff.planner import corrections as profile
from jaxrl_eff.planner.clusters import Cluster
from jaxrl_eff.planner.cost import NONE, Corrections
from jaxrl_eff.planner.problem import Lengths, Problem
from jaxrl_eff.planner.search import search as find
from jaxrl_eff.planner.simulate import Simulator
from jaxrl_eff.train.settings import SearchSettings


@dataclasses.dataclass(frozen=True)
class Searched:
    """A plan, and what it was found with.

    Attributes:
        seconds: predicted, of a step; `gap`: how far above a lower bound.
        rules: rule -> predicted seconds of the plan that it gives, for those that fit.
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
    """The best plan found for this job's devices; the same on all its processes.

    Raises:
        ValueError: nothing fits, or the cluster is unknown or not of this many devices.
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
    # Processes measure their hosts each for itself; the first one's plan counts.
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
    """Watches the steps of a searched plan.

    Attributes:
        rows: predicted and measured seconds, as of the last `corrected`.
    """

    def __init__(self, searched: Searched, first: int):
        """Args:
        first: after which step to calibrate first.
        """
        self.searched = searched
        self.rows: tuple[profile.Row, ...] = ()
        self._next, self._wait = first, searched.settings.calibrate
        self._measured: dict[str, list[float]] = defaultdict(list)
        self._steps: list[float] = []
        self._lengths: list[float] = []
        self._ran: dict[tuple, _Ran] = {}

    def see(
        self, spans: Iterable[timing.Span], length: float | None, seconds: float | None = None
    ) -> None:
        """Notes a step's times.

        Args:
            spans: of its calls.
            length: its mean response length, if it sampled.
            seconds: from the end of the step before to its own, if that is known.
        """
        for span in spans:
            self._measured[span.call].append(span.end - span.start)
        if length is not None:
            self._lengths.append(length)
        if seconds is not None:
            self._steps.append(seconds)

    def due(self, step: int) -> bool:
        """Whether it is time to calibrate."""
        return step >= self._next

    def keep(self, new: Searched) -> None:
        """Goes on with the plan that runs, and with what was learned."""
        plan = self.searched.plan
        self.take(dataclasses.replace(new, plan=plan, seconds=self._expected(new, plan)))

    def take(self, new: Searched) -> None:
        """Goes on with a new plan."""
        self.searched = new
        self._wait *= 2
        self._next += self._wait

    def corrected(self) -> Searched:
        """The same search with what was learned; its plan may be the one that runs."""
        old = self.searched
        problem = old.problem
        if self._lengths:
            problem = _with_length(problem, float(np.median(self._lengths)))
        where = problem, old.plan, old.cluster
        args = *where, profile.timed(*where, self._measured)
        self.rows = profile.compare(*args, old.corrections)
        new = profile.refit(*args, old.corrections)
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
        """Share of a step's time that the new plan saves over the one that runs.

        As the first process sees it, since all must switch together.
        """
        running = self._expected(new, self.searched.plan)
        share = 0.0 if new.plan == self.searched.plan else 1.0 - new.seconds / running
        if jax.process_count() > 1:
            share = float(multihost_utils.broadcast_one_to_all(np.float32(share)))
        return share

    def _expected(self, new: Searched, plan: Mapping[str, Placement]) -> float:
        """Seconds of a step: as predicted, times what whole steps of the plan were off by.

        A plan that has not run yet is taken to be off by as much as the one that runs.
        """

        def predicted(problem: Problem, plan: Mapping[str, Placement]) -> float:
            return Simulator(problem, new.cluster, new.corrections).run(plan).seconds

        ran = self._ran.get(_key(plan)) or self._ran.get(_key(self.searched.plan))
        off = ran.seconds / predicted(ran.problem, ran.plan) if ran else 1.0
        return predicted(new.problem, plan) * off


@dataclasses.dataclass(frozen=True)
class _Ran:
    """A plan, its measured seconds a step, and the problem (response lengths) of that time."""

    problem: Problem
    plan: dict[str, Placement]
    seconds: float


def _key(plan: Mapping[str, Placement]) -> tuple:
    return tuple(sorted(plan.items(), key=lambda item: item[0]))


def _with_length(problem: Problem, mean: float) -> Problem:
    """The problem with responses that are this long on average, none longer than allowed.

    The longest row ends the loop; of the shape in between only the mean is known, so all others
    are taken to be alike.
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

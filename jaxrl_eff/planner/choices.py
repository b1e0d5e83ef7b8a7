"""A plan as a point in a table: one candidate and one mesh for every call.

`Choices` is the table: every call's candidates, priced once and pruned, and the meshes that they
can run on. A *state* picks from it; states are small tuples of integers, so a search can copy,
change and remember thousands of them. `Judge` simulates each state once.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxrl_eff.parallel.mesh import Placement
from jaxrl_eff.planner import space
from jaxrl_eff.planner.bound import Option
from jaxrl_eff.planner.clusters import Cluster
from jaxrl_eff.planner.corrections import Corrections
from jaxrl_eff.planner.cost import call_cost
from jaxrl_eff.planner.problem import Problem, Work
from jaxrl_eff.planner.simulate import Simulation, Simulator
from jaxrl_eff.planner.space import Candidate, Slice
from jaxrl_eff.planner.transfer import realloc_cost

State = tuple[tuple[int, int], ...]
"""Of every call with a model: the first device, and the candidate's index."""


@dataclasses.dataclass(frozen=True, eq=False)
class Choices:
    """The choices of a search: candidates and meshes of every call.

    Attributes:
        problem, cluster, corrections: what is planned, where, and how costs are corrected.
        works: the calls that are placed; local calls run where a train call does.
        all: every candidate, by call; states index it.
        kept: by call, mesh size -> indices that are worth trying, fastest first.
        starts: mesh size -> first devices of such meshes.
    """

    problem: Problem
    cluster: Cluster
    corrections: Corrections
    works: tuple[Work, ...]
    all: tuple[tuple[Candidate, ...], ...]
    kept: tuple[Mapping[int, tuple[int, ...]], ...]
    starts: Mapping[int, tuple[int, ...]]

    def slice(self, call: int, state: State) -> Slice:
        """The mesh of a call in a state."""
        start, index = state[call]
        return Slice(start, self.all[call][index].count)

    def plan(self, state: State) -> dict[str, Placement]:
        """The placements that a state represents."""
        return {
            w.name: self.all[i][index].at(start)
            for i, (w, (start, index)) in enumerate(zip(self.works, state, strict=True))
        }

    def options(self) -> dict[str, list[Option]]:
        """Options for the lower bound: every candidate, kept or not, that fits by itself."""
        memory, out = self.cluster.memory_bytes, {}
        for w in self.problem.works:
            if w.model is None:
                out[w.name] = [Option(self.local_seconds(w), 0.0)]
        for i, w in enumerate(self.works):
            fit = [c for c in self.all[i] if c.bytes <= memory] or self.all[i]
            out[w.name] = [Option(c.seconds, self._share(c)) for c in fit]
        return out

    def state(self, plan: Mapping[str, Placement]) -> State | None:
        """The state of a plan; None if the plan is not among the choices."""
        out = []
        for i, w in enumerate(self.works):
            p = plan.get(w.name)
            if p is None or p.devices[0] not in self.starts.get(len(p.devices), ()):
                return None
            start = p.devices[0]
            found = next((j for j, c in enumerate(self.all[i]) if c.at(start) == p), None)
            if found is None:
                return None
            out.append((start, found))
        return tuple(out)

    def local_seconds(self, work: Work) -> float:
        """Seconds of a call without a model, the same on every device."""
        where = Placement((0,))
        return call_cost(self.problem, work, where, self.cluster, self.corrections).seconds

    def _share(self, c: Candidate) -> float:
        """Share of the cluster that a call takes while it runs alone."""
        if self.cluster.shared_compute and self.cluster.hosts == 1:
            return self.cluster.demand(c.count)
        return c.count / self.cluster.devices

    def size(self) -> float:
        """Number of states made of kept candidates."""
        return math.prod(
            sum(len(self.starts[n]) * len(indices) for n, indices in kept.items())
            for kept in self.kept
        )


def _too_long(work: Work) -> str:
    if work.packed is None or not work.packed.capacity:
        return ""
    return f", or have {work.length} tokens, more than the room for {work.packed.capacity} a device"


def choices(
    problem: Problem,
    cluster: Cluster,
    *,
    corrections: Corrections,
    smallest: int = 1,
    executable: bool = True,
    offloads: Sequence[str] = ("",),
) -> Choices:
    """Prices and prunes the candidates of every call.

    Raises:
        ValueError: no call has a model, or the rows of a call divide evenly on no mesh.
    """
    works = tuple(w for w in problem.works if w.model is not None)
    if not works:
        raise ValueError("no call of the step has a model: there is nothing to place.")
    every, kept = [], []
    starts: dict[int, list[int]] = {}
    for m in space.meshes(cluster, min(smallest, cluster.devices)):
        starts.setdefault(m.count, []).append(m.start)

    def price(work: Work, where: Placement):
        return call_cost(problem, work, where, cluster, corrections)

    for work in works:
        found = space.candidates(
            problem, work, cluster, price,
            smallest=smallest, executable=executable, offloads=tuple(dict.fromkeys(offloads)),
        )  # fmt: skip
        if not any(found.values()):
            raise ValueError(
                f"{work.name}: {work.rows} rows in {work.minibatches} minibatches divide on no "
                f"mesh of {cluster.name} with at least {smallest} devices{_too_long(work)}."
            )
        flat = tuple(c for cs in found.values() for c in cs)
        index = {c: i for i, c in enumerate(flat)}
        fits = space.fitting(found, cluster.memory_bytes) or found
        best = {
            n: space.pareto(cs, moved=_moved(problem, work, n, cluster))
            for n, cs in fits.items()
            if cs
        }
        every.append(flat)
        kept.append({n: tuple(index[c] for c in cs) for n, cs in best.items()})
    return Choices(
        problem, cluster, corrections, works, tuple(every), tuple(kept),
        {n: tuple(s) for n, s in starts.items()},
    )  # fmt: skip


def _moved(problem: Problem, work: Work, count: int, cluster: Cluster) -> float:
    """Most seconds of reallocation that another layout of a call can cost, approximately."""
    if sum(w.model == work.model for w in problem.works) < 2:
        return 0.0
    here, all_of_it = Slice(0, count), Slice(0, cluster.devices)
    layouts = [
        space.placement(where, space.Strategy(1, *sizes))
        for where in dict.fromkeys((here, all_of_it))
        for sizes in ((where.count, 1, 1), (1, where.count, 1))
    ]
    return max(
        realloc_cost(problem, work.model, a, b, cluster, weights=work.weights)
        + realloc_cost(problem, work.model, b, a, cluster, weights=work.weights)
        for a in layouts[:2]
        for b in layouts
    )


class Verdict(NamedTuple):
    """The simulator's result for a state.

    Attributes:
        energy: what the search minimizes: the seconds, raised where memory is short.
        seconds: of a step.
        over_bytes: by how much the fullest device exceeds its memory; 0 if the plan fits.
    """

    energy: float
    seconds: float
    over_bytes: float

    @property
    def fits(self) -> bool:
        return self.over_bytes <= 0


class Judge:
    """Simulates states, each once.

    Attributes:
        table: the choices that states index.
        evaluated: number of simulations so far.
        best: the best state that fits, and its verdict; None until one fits.
        trace: (simulations, seconds of the best plan), added to whenever a better plan is found.
        known: the verdict of every state so far.
    """

    def __init__(self, table: Choices):
        self.table = table
        self.evaluated = 0
        self.best: tuple[State, Verdict] | None = None
        self.trace: list[tuple[int, float]] = []
        self._simulator = Simulator(table.problem, table.cluster, table.corrections)
        self.known: dict[State, Verdict] = {}

    def __call__(self, state: State) -> Verdict:
        found = self.known.get(state)
        if found is None:
            found = self.known[state] = self._simulate(state)
        return found

    def _simulate(self, state: State) -> Verdict:
        self.evaluated += 1
        seconds, over = self._simulator.score(self.table.plan(state))
        # ReaL's factor of 3 for plans that do not fit, plus a slope toward those that do.
        energy = seconds * (3 + over / self.table.cluster.memory_bytes) if over else seconds
        if not over and (self.best is None or seconds < self.best[1].seconds):
            self.best = (state, Verdict(energy, seconds, over))
            self.trace.append((self.evaluated, seconds))
        return Verdict(energy, seconds, over)

    def schedule(self, state: State) -> Simulation:
        """The full schedule of a state."""
        return self._simulator.run(self.table.plan(state))

"""Searches for a plan, and bounds its distance from the best one.

A plan's time is what `simulate` predicts; the search minimizes it over `choices.State`s:

    rules       the common plans of `rules`; the best ones are improved further
    descent     every change of one call among the meshes in use, until none helps
    tempering   `anneal`: Metropolis chains at several temperatures
    proof       where the space is small, branch and bound: every plan is tried or excluded

The certificate is `bound.lower_bound`, or the plan's own time once a proof is complete.
"""

import dataclasses
import functools
import random
import time
from collections.abc import Iterator, Sequence

from jaxrl_eff.parallel.mesh import OFFLOADS, Placement
from jaxrl_eff.planner import rules, shortage
from jaxrl_eff.planner.anneal import anneal, on_mesh
from jaxrl_eff.planner.bound import Bound, lower_bound
from jaxrl_eff.planner.choices import Choices, Judge, State, choices
from jaxrl_eff.planner.clusters import Cluster
from jaxrl_eff.planner.corrections import NONE, Corrections
from jaxrl_eff.planner.problem import Plan, Problem
from jaxrl_eff.planner.proof import prove
from jaxrl_eff.planner.simulate import Simulation
from jaxrl_eff.planner.space import Slice

CLOSE = 1e-4  # gap at which the search ends


@dataclasses.dataclass(frozen=True)
class Found:
    """Result of a search.

    Attributes:
        plan: a placement for every call with a model.
        schedule: its simulation.
        bound: a lower bound on the time of every plan of the space.
        evaluated: plans simulated.
        proven: every plan of the (pruned) space was tried or excluded.
        heuristics: rule -> its schedule, or the reason why it has none.
        plans: rule -> its plan, for those that have one.
        trace: (plans simulated, seconds of the best), added to whenever the best changed.
        seconds: duration of the search.
    """

    plan: dict[str, Placement]
    schedule: Simulation
    bound: Bound
    evaluated: int
    proven: bool
    heuristics: dict[str, Simulation | str]
    plans: dict[str, dict[str, Placement]]
    trace: tuple[tuple[int, float], ...]
    seconds: float

    @property
    def gap(self) -> float:
        """Relative excess of the plan's time over the bound."""
        return max(0.0, self.schedule.seconds / self.bound.seconds - 1.0)


@dataclasses.dataclass(frozen=True)
class _Budget:
    """A limit on simulations, or on seconds since `began`."""

    judge: Judge
    began: float
    seconds: float
    evaluations: int | None

    def over(self, share: float = 1.0) -> bool:
        """Returns True if this share of the budget is used up."""
        if self.evaluations is not None:
            return self.judge.evaluated >= share * self.evaluations
        return time.perf_counter() - self.began >= share * self.seconds

    def steps(self, each: int) -> int:
        """Most cheap steps to take, at `each` per simulation of the budget."""
        return each * self.evaluations if self.evaluations is not None else each * 10_000


def search(
    problem: Problem,
    cluster: Cluster,
    *,
    seconds: float | int = 10.0,
    evaluations: int | None = None,
    seed: int = 0,
    executable: bool = True,
    smallest: int = 1,
    offloads: Sequence[str] | None = None,
    corrections: Corrections = NONE,
    start: Plan | None = None,
) -> Found:
    """Searches for the best plan for a problem on a cluster.

    Args:
        problem: the step.
        cluster: the devices.
        seconds: how long to search.
        evaluations: how many plans to simulate instead; the result then depends on the seed alone.
        seed: of the random moves.
        executable: only plans that this package runs (no pipelining).
        smallest: devices of the smallest mesh of a call.
        offloads: what calls can keep in the host's memory: "params" of frozen roles, "opt"imizer
            states. None: nothing, unless no plan fits without.
        corrections: measured factors of the costs.
        start: a plan to start from in addition to the rules', e.g. the current one.

    Raises:
        ValueError: no plan fits into memory (the message says what is short, where, and what would
            fit), or the rows of a call divide evenly on no mesh.

    Example:
        >>> from jaxrl_eff import Graph, LMConfig, clusters, core, logprobs, search
        >>> from jaxrl_eff.planner import works
        >>> sizes = dict(layers=16, width=2048, heads=16, kv_heads=4, head_dim=128, ffn=8192)
        >>> lm = LMConfig(vocab=32000, **sizes)
        >>> reads = "tokens position segment"
        >>> call = core.infer("ref_inf", of="ref", fn=logprobs(lm), reads=reads, writes="logp")
        >>> shape = jax.ShapeDtypeStruct((64, 1024), jnp.int32)
        >>> problem = works(Graph(reads, (call,)), {"ref": lm}, dict.fromkeys(reads.split(), shape))
        >>> found = search(problem, clusters.parse("h100:8"), evaluations=100)
        >>> sorted(found.plan["ref_inf"].devices)
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    began = time.perf_counter()
    judge, heuristics, thriftiest = None, {}, None
    for allowed in (("",), OFFLOADS) if offloads is None else (("", *offloads),):
        table = choices(
            problem,
            cluster,
            corrections=corrections,
            smallest=smallest,
            executable=executable,
            offloads=allowed,
        )
        judge = Judge(table)
        budget = _Budget(judge, began, seconds, evaluations)
        heuristics = rules.heuristics(judge, lambda share: budget.over(0.25 * share))  # noqa: B023
        thriftiest = rules.repaired(judge, rules.frugal(table))
        judge(thriftiest)
        if judge.best is not None:
            break
    starts = [*(s for s in heuristics.values() if not isinstance(s, str)), thriftiest]
    if start is not None and (given := table.state(start)) is not None:
        starts.append(given)
    if judge.best is None:
        over = functools.partial(budget.over, 0.4)
        anneal(judge, starts, random.Random(seed), over)
    if judge.best is None:
        limits = {"executable": executable, "smallest": smallest, "offloads": allowed}
        raise ValueError(shortage.explain(judge, **limits))
    bound = lower_bound(problem, table.options())
    floor = bound.seconds * (1 + CLOSE)
    proven = _improve(judge, starts, random.Random(seed), budget, floor)
    state, verdict = judge.best
    if proven:
        bound = Bound(verdict.seconds, "every plan of the space was tried or excluded")
    return Found(
        plan=table.plan(state),
        schedule=judge.schedule(state),
        bound=bound,
        evaluated=judge.evaluated,
        proven=proven,
        heuristics={
            k: s if isinstance(s, str) else judge.schedule(s) for k, s in heuristics.items()
        },
        plans={k: table.plan(s) for k, s in heuristics.items() if not isinstance(s, str)},
        trace=tuple(judge.trace),
        seconds=time.perf_counter() - began,
    )


def _improve(
    judge: Judge, starts: Sequence[State], rng: random.Random, budget: _Budget, floor: float
) -> bool:
    """Lowers the best seconds until the budget is used up or `floor` is reached; returns True if it
    proved that no plan is better."""
    ordered = sorted(dict.fromkeys(starts), key=lambda s: judge(s).energy)
    for state in ordered[:2]:
        _descend(judge, state, budget, 0.3)
    if prove(judge, over=lambda: budget.over(0.4), most=budget.steps(2)):
        return True
    polished: set[State] = set()
    devices = judge.table.cluster.devices
    for share in (0.45, 1.0):
        over = functools.partial(budget.over, share - 0.05)
        anneal(judge, [judge.best[0], *ordered], rng, over, floor=floor)
        if judge.best[0] not in polished:
            polished.add(_descend(judge, judge.best[0], budget, share))
        if judge.best[1].seconds <= floor:
            return False
        until = 0.95 if devices <= 8 else 0.7
        give_up = functools.partial(budget.over, until)
        if devices <= 16 and prove(judge, over=give_up, most=budget.steps(20)):
            return True
    return False


def _descend(judge: Judge, state: State, budget: _Budget, share: float) -> State:
    """Moves to the first better neighbor until none is better."""
    score, better = judge(state), True
    while better and not budget.over(share):
        better = False
        for other in _neighbors(judge.table, state):
            if budget.over(share):
                return state
            if judge(other).energy < score.energy * (1 - 1e-9):
                state, score, better = other, judge(other), True
                break
    return state


def _neighbors(t: Choices, state: State) -> Iterator[State]:
    """Every change of one call to a mesh in use, a part of one, or all devices; swaps; joins."""
    used = {t.slice(i, state) for i in range(len(state))}
    near = set(used) | {Slice(0, t.cluster.devices)}
    for s in used:
        half = s.count // 2
        if half:
            near |= {Slice(s.start, half), Slice(s.start + half, s.count - half)}
        near.add(Slice(s.start - s.start % (2 * s.count), 2 * s.count))
        near |= {Slice(0, s.start), Slice(s.stop, t.cluster.devices - s.stop)}
    legal = {s for s in near if s.count in t.starts and s.start in t.starts[s.count]}
    for call in range(len(state)):
        for where in sorted(legal):
            for i in t.kept[call].get(where.count, ()):
                if (where.start, i) != state[call]:
                    yield (*state[:call], (where.start, i), *state[call + 1 :])
    for a in range(len(state)):
        for b in range(a):
            swapped = on_mesh(t, on_mesh(t, state, a, t.slice(b, state)), b, t.slice(a, state))
            if swapped is not None and swapped != state:
                yield swapped
            for where in sorted(legal):
                joined = on_mesh(t, on_mesh(t, state, a, where), b, where)
                if joined is not None and joined != state:
                    yield joined

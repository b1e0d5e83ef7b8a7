"""Searches for a plan, and bounds its distance from the best one.

A plan's time is what `simulate` predicts; the search minimizes it over `choices.State`s:

    rules       the common plans of `rules`; the best ones are improved further
    descent     every change of one call among the meshes in use, until none helps
    tempering   Metropolis chains at several temperatures, E = seconds: a change is accepted with
                probability min(1, exp(-(E' - E) / T)), and neighboring chains swap states with
                min(1, exp((1/T_i - 1/T_j) (E_i - E_j)))
    proof       where the space is small, branch and bound: every plan is tried or excluded

The moves are ReaL's (one call, any candidate; Mei et al. 2024, arXiv:2406.14088, Sec. 4.3) and some
that change several calls at once, since choosing each call alone seldom gives a good plan.
Proposals are not symmetric: the chains search, they do not sample.

The certificate is `bound.lower_bound`, or the plan's own time once a proof is complete.
"""

import dataclasses
import functools
import math
import random
import time
from collections.abc import Iterator, Sequence

from jaxrl_eff.parallel.mesh import OFFLOADS, Placement, span
from jaxrl_eff.planner import rules as seeds
from jaxrl_eff.planner.bound import Bound, lower_bound
from jaxrl_eff.planner.choices import Choices, Judge, State, choices
from jaxrl_eff.planner.clusters import Cluster
from jaxrl_eff.planner.cost import NONE, Corrections
from jaxrl_eff.planner.problem import Plan, Problem
from jaxrl_eff.planner.proof import prove
from jaxrl_eff.planner.simulate import Simulation
from jaxrl_eff.planner.space import Slice

CHAINS = 5
CLOSE = 1e-4  # gap at which the search ends
COLDEST, HOTTEST = 0.002, 0.08  # temperatures, as shares of the best seed's seconds


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
    judge, rules, thriftiest = None, {}, None
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
        rules = seeds.heuristics(judge, lambda share: budget.over(0.25 * share))  # noqa: B023
        thriftiest = seeds.repaired(judge, seeds.frugal(table))
        judge(thriftiest)
        if judge.best is not None:
            break
    starts = [*(s for s in rules.values() if not isinstance(s, str)), thriftiest]
    if start is not None and (given := table.state(start)) is not None:
        starts.append(given)
    if judge.best is None:
        _anneal(judge, starts, random.Random(seed), budget, 0.4, until_it_fits=True)
    if judge.best is None:
        limits = {"executable": executable, "smallest": smallest, "offloads": allowed}
        raise ValueError(_short(judge, **limits))
    bound = lower_bound(problem, table.options())
    floor = bound.seconds * (1 + CLOSE)
    proven = _improve(judge, starts, random.Random(seed), budget, floor)
    state, said = judge.best
    if proven:
        bound = Bound(said.seconds, "every plan of the space was tried or excluded")
    return Found(
        plan=table.plan(state),
        schedule=judge.schedule(state),
        bound=bound,
        evaluated=judge.evaluated,
        proven=proven,
        heuristics={k: s if isinstance(s, str) else judge.schedule(s) for k, s in rules.items()},
        plans={k: table.plan(s) for k, s in rules.items() if not isinstance(s, str)},
        trace=tuple(judge.trace),
        seconds=time.perf_counter() - began,
    )


def exhaustive(
    problem: Problem,
    cluster: Cluster,
    *,
    executable: bool = True,
    smallest: int = 1,
    offloads: Sequence[str] = ("",),
    corrections: Corrections = NONE,
    most: int | None = None,
) -> tuple[dict[str, Placement], Simulation]:
    """Finds the best plan of all by branch and bound; for small clusters.

    Args:
        most: gives up after this many steps.

    Raises:
        ValueError: no plan fits, or `most` steps do not suffice.
    """
    table = choices(
        problem,
        cluster,
        corrections=corrections,
        smallest=smallest,
        executable=executable,
        offloads=("", *offloads),
    )
    judge = Judge(table)
    if not prove(judge, most=most):
        raise ValueError(f"more than {most} steps for {table.size():.2g} plans.")
    if judge.best is None:
        raise ValueError("no plan fits into memory.")
    return table.plan(judge.best[0]), judge.schedule(judge.best[0])


# Search -----------------------------------------------------------------------------------------


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
        _anneal(judge, [judge.best[0], *ordered], rng, budget, share - 0.05, floor)
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
        for other in _neighbours(judge.table, state):
            if budget.over(share):
                return state
            if judge(other).energy < score.energy * (1 - 1e-9):
                state, score, better = other, judge(other), True
                break
    return state


def _neighbours(t: Choices, state: State) -> Iterator[State]:
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
            swapped = _on(t, _on(t, state, a, t.slice(b, state)), b, t.slice(a, state))
            if swapped is not None and swapped != state:
                yield swapped
            for group in ([a, b],):
                for where in sorted(legal):
                    joined = state
                    for call in group:
                        joined = _on(t, joined, call, where)
                    if joined is not None and joined != state:
                        yield joined


def _on(
    t: Choices, state: State | None, call: int, where: Slice, rng: random.Random | None = None
) -> State | None:
    """The state with a call moved to another mesh: with its present strategy if possible, else the
    fastest (or a random) one; None if it cannot run there."""
    if state is None:
        return None
    found = t.kept[call].get(where.count, ())
    if not found or where.start not in t.starts[where.count]:
        return None
    now = t.all[call][state[call][1]]
    same = [i for i in found if t.all[call][i].strategy == now.strategy]
    i = rng.choice(found) if rng is not None and rng.random() < 0.5 else (same or found)[0]
    return (*state[:call], (where.start, i), *state[call + 1 :])


def _anneal(
    judge: Judge,
    starts: Sequence[State],
    rng: random.Random,
    budget: _Budget,
    share: float,
    floor: float = 0.0,
    *,
    until_it_fits: bool = False,
) -> None:
    """Runs parallel tempering from the given states, until this share of the budget is used up, the
    floor is reached, or no new state has been found for a while."""
    starts = list(dict.fromkeys(starts))
    states = [starts[i % len(starts)] for i in range(CHAINS)]
    scores = [judge(s) for s in states]
    unit = min(s.energy for s in scores)
    heat = [unit * COLDEST * (HOTTEST / COLDEST) ** (i / (CHAINS - 1)) for i in range(CHAINS)]
    idle = 0
    while not budget.over(share) and idle < 20_000:
        before = judge.evaluated
        for i, state in enumerate(states):
            other = _move(judge.table, state, rng)
            if other is None or other == state:
                continue
            score = judge(other)
            worse = score.energy - scores[i].energy
            if worse <= 0 or rng.random() < math.exp(-worse / heat[i]):
                states[i], scores[i] = other, score
        i = rng.randrange(CHAINS - 1)
        better = scores[i].energy - scores[i + 1].energy
        if better > 0 or rng.random() < math.exp(better * (1 / heat[i] - 1 / heat[i + 1])):
            states[i], states[i + 1] = states[i + 1], states[i]
            scores[i], scores[i + 1] = scores[i + 1], scores[i]
        idle = idle + 1 if judge.evaluated == before else 0
        if judge.best is not None and (until_it_fits or judge.best[1].seconds <= floor):
            return


def _move(t: Choices, state: State, rng: random.Random) -> State | None:
    """A random change of a state; None if the one drawn is not possible."""
    kind = rng.random()
    call = rng.randrange(len(state))
    start, index = state[call]
    if kind < 0.2:  # ReaL's: one call, any candidate anywhere
        count = rng.choice(list(t.kept[call]))
        i = rng.choice(t.kept[call][count])
        return (*state[:call], (rng.choice(t.starts[count]), i), *state[call + 1 :])
    if kind < 0.4:  # another strategy on the same mesh
        i = rng.choice(t.kept[call][t.all[call][index].count])
        return (*state[:call], (start, i), *state[call + 1 :])
    if kind < 0.55:  # a mesh twice or half as large, or an adjacent one
        here = t.slice(call, state)
        near = [Slice(here.start - here.start % (2 * here.count), 2 * here.count)]
        near += [Slice(here.start, here.count // 2)] if here.count > 1 else []
        near += [Slice(here.stop, here.count), Slice(here.start - here.count, here.count)]
        near += [Slice(here.stop - here.count // 2, here.count // 2)] if here.count > 1 else []
        where = rng.choice(near)
        return _on(t, state, call, where, rng) if where.count in t.starts else None
    if len(state) == 1:
        return None
    other = rng.choice([i for i in range(len(state)) if i != call])
    if kind < 0.65:  # two calls swap meshes
        a, b = t.slice(call, state), t.slice(other, state)
        return _on(t, _on(t, state, call, b, rng), other, a, rng)
    if kind < 0.8:  # one call moves to another's mesh
        return _on(t, state, call, t.slice(other, state), rng)
    if kind < 0.9:  # another call of the model takes this one's layout, so nothing is reallocated
        return _follow(t, state, call, rng)
    return _shift(t, state, rng)


def _follow(t: Choices, state: State, call: int, rng: random.Random) -> State | None:
    kin = [i for i, w in enumerate(t.works) if w.model == t.works[call].model and i != call]
    if not kin:
        return None
    other = rng.choice(kin)
    start, index = state[call]
    c = t.all[call][index]
    found = t.kept[other].get(c.count, ())
    same = [i for i in found if t.all[other][i].strategy == c.strategy]
    if not same:
        return None
    return (*state[:other], (start, rng.choice(same)), *state[other + 1 :])


def _shift(t: Choices, state: State, rng: random.Random) -> State | None:
    """Moves a boundary between devices; all calls that begin or end there follow."""
    slices = [t.slice(i, state) for i in range(len(state))]
    borders = sorted({s.start for s in slices} | {s.stop for s in slices})
    borders = [b for b in borders if 0 < b < t.cluster.devices]
    old = rng.choice(borders) if borders else None
    new = rng.choice(seeds.cuts(t)) if t.cluster.devices > 1 else None
    if new is None:
        return None
    if old is None:  # every call is on all devices: choose a side for each
        sides = [rng.randrange(3) for _ in slices]
        parts = (Slice(0, new), Slice(new, t.cluster.devices - new), Slice(0, t.cluster.devices))
        moved = [parts[s] for s in sides]
    else:
        moved = []
        for s in slices:
            a, b = (new if x == old else x for x in (s.start, s.stop))
            moved.append(Slice(a, b - a))
    out: State | None = state
    for i, where in enumerate(moved):
        if where != slices[i]:
            out = _on(t, out, i, where, rng) if where.count in t.starts else None
    return out


# Errors -----------------------------------------------------------------------------------------


def _short(judge: Judge, *, executable: bool, smallest: int, offloads: Sequence[str]) -> str:
    """Message that says what is short, where, by how much, and the nearest setup that would fit."""
    t, state = judge.table, min(judge.known, key=lambda s: judge(s).over_bytes)
    done = judge.schedule(state)
    group = max(done.groups, key=lambda g: g.bytes)
    held: dict[str, float] = {}
    for w, p in zip(t.works, t.plan(state).values(), strict=True):
        if set(p.devices) & set(group.devices):
            held[w.model] = max(held.get(w.model, 0.0), done.costs[w.name].static_bytes)
    most = sorted(((b, m) for m, b in held.items() if b >= 1e-3 * group.bytes), reverse=True)
    models = ", ".join(f"{m} {_gib(b)}" for b, m in most)
    text = (
        f"no plan fits into the {_gib(t.cluster.memory_bytes)} a device of {t.cluster.name}. The "
        f"thriftiest one found needs {_gib(group.bytes)} on devices {span(group.devices)}, "
        f"{_gib(done.over_bytes)} too much: {_gib(group.static_bytes)} all the time ({models}) and "
        f"{_gib(group.active_bytes)} while {group.busiest} runs."
    )
    options = {"executable": executable, "smallest": smallest, "corrections": t.corrections}
    if set(offloads) < set(OFFLOADS):
        found = _some_plan(t.problem, t.cluster, offloads=OFFLOADS, **options)
        if found is not None:
            return f"{text} It fits with {_offloaded(found)} in the hosts' memory."
    for wider in _larger(t.cluster):
        found = _some_plan(t.problem, wider, offloads=offloads, **options)
        if found is not None:
            name = max(found, key=lambda n: done.costs[n].static_bytes + done.costs[n].active_bytes)
            return (
                f"{text} It fits on {wider.name}, {wider.devices} devices; there {name} runs on "
                f"{found[name]}."
            )
    return f"{text} No cluster of this kind with up to {wider.devices} devices fits it either."


def _some_plan(problem: Problem, cluster: Cluster, **options) -> dict[str, Placement] | None:
    """A plan that fits, from two quick attempts; None if both fail."""
    try:
        table = choices(problem, cluster, **options)
    except ValueError:
        return None
    judge = Judge(table)
    for state in (seeds.colocated(table), seeds.frugal(table)):
        if judge.best is None and state is not None:
            judge(seeds.repaired(judge, state))
    return table.plan(judge.best[0]) if judge.best is not None else None


def _larger(c: Cluster) -> list[Cluster]:
    """Clusters of the same devices, each a little larger than the one before."""
    out, kind = [], c.name.partition(":")[0]
    torus = c.domain > c.per_host  # a slice, priced as one domain
    per_host, hosts = c.per_host, c.hosts
    while len(out) < 24 and per_host * hosts < 16_384:
        if hosts == 1 and per_host < 8 and not torus:
            per_host *= 2
        else:
            hosts += max(1, hosts // 4)
        n = per_host * hosts
        name = f"{kind}:{n}" if torus or hosts == 1 else f"{kind}:{hosts}x{per_host}"
        out.append(c.with_(name=name, devices=n, per_host=per_host, domain=n if torus else 0))
    return out


def _offloaded(plan: Plan) -> str:
    words = {"opt": "the optimizer states of {}", "params": "the weights of {}"}
    found: dict[str, list[str]] = {}
    for name, p in plan.items():
        if p.offload:
            found.setdefault(p.offload, []).append(name)
    return " and ".join(words[k].format(", ".join(names)) for k, names in found.items())


def _gib(value: float) -> str:
    return f"{value / 2**30:,.1f} GiB"

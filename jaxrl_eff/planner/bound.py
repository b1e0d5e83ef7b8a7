"""A lower bound on the step time of every plan: the planner's certificate.

It combines two constraints. Work: call i on n devices for t seconds takes n t device-seconds, and G
devices provide G T of them per step,

    T >= sum_i min(n t)_i / G.

Order: calls that wait for each other, in this step or through the weights into the next, never
overlap. For a set A of such calls, and a set B of calls that never overlap with any call of A (but
may overlap with each other),

    T >= sum_{i in A} min t_i + sum_{j in B} min(n t)_j / G,

and along a cycle of dependencies that spans d steps, T >= sum t_i / d. A candidate with few seconds
often takes many device-seconds, so the best bound weighs the two: for every 0 <= w <= 1

    T >= sum_i min over candidates of  w [i in A] t + (w [i in B] + 1 - w) n t / G.

Reallocation, transfers and fragmentation are left out, so in general no plan reaches the bound.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxrl_eff.planner.problem import Problem


class Edge(NamedTuple):
    """A dependency: `after` in a step waits for `before` of `steps` steps earlier."""

    before: str
    after: str
    steps: int


class Option(NamedTuple):
    """A way to run a call: its seconds, and the share of the cluster's devices that it takes."""

    seconds: float
    share: float


class Bound(NamedTuple):
    """A lower bound on the step time.

    Attributes:
        seconds: of a step, for every plan.
        reason: what limits it, in words.
    """

    seconds: float
    reason: str


def dependencies(problem: Problem) -> tuple[Edge, ...]:
    """Dependencies between calls: arrays, weights read before an update, and updated weights."""
    writer = {k: w.name for w in problem.works for k in w.writes}
    out = [Edge(writer[k], w.name, 0) for w in problem.works for k in w.reads if k in writer]
    for model in problem.roles:
        mine = [w for w in problem.works if w.model == model]
        trains = [w for w in mine if w.kind == "train"]
        for w in mine if trains else ():
            if w.kind != "train":
                out.append(Edge(w.name, trains[0].name, 0))
                out.append(Edge(trains[-1].name, w.name, 1 + w.staleness))
        for k, t in enumerate(trains):
            out.append(Edge(trains[k - 1].name, t.name, 0 if k else 1))
    return tuple(dict.fromkeys(out))


def lower_bound(problem: Problem, options: Mapping[str, Sequence[Option]]) -> Bound:
    """Computes the best lower bound for plans that choose one option per call.

    Args:
        problem: the step. A call without options (a local one) takes its own seconds and no device.
        options: call -> the ways to run it.
    """
    names = [w.name for w in problem.works]
    table = {
        w.name: list(options.get(w.name, ())) or [Option(w.seconds, 0.0)] for w in problem.works
    }
    table = {name: _hull(found) for name, found in table.items()}
    best = Bound(sum(min(area for _, area in table[n]) for n in names), "the work of all calls")
    for chain, beside, steps in _chains(problem):
        seconds = _best_mix(table, chain, beside, steps)
        if seconds > best.seconds * (1 + 1e-9):
            best = Bound(seconds, _reason(chain, beside, steps))
    return best


def _hull(found: Sequence[Option]) -> list[tuple[float, float]]:
    """(seconds, share of the cluster's time) of the options that no other beats in both."""
    pairs = sorted({(o.seconds, o.seconds * o.share) for o in found})
    out: list[tuple[float, float]] = []
    for pair in pairs:
        if not out or pair[1] < out[-1][1]:
            out.append(pair)
    return out


def _best_mix(
    table: Mapping[str, Sequence[tuple[float, float]]],
    chain: frozenset[str],
    beside: frozenset[str],
    steps: int,
) -> float:
    """Maximum over w, by bisection on the slope: the bound is concave and piecewise linear in w."""

    def at(w: float) -> tuple[float, float]:
        """Value and slope at w."""
        value = slope = 0.0
        for name, pairs in table.items():
            time = 1.0 / steps if name in chain else 0.0
            share = 1.0 if name in beside else 0.0
            cost, s, a = min((w * time * s + (w * share + 1 - w) * a, s, a) for s, a in pairs)
            value += cost
            slope += time * s + share * a - a
        return value, slope

    low, high = 0.0, 1.0
    best = max(at(low)[0], at(high)[0])
    for _ in range(24):
        middle = (low + high) / 2
        value, slope = at(middle)
        best = max(best, value)
        low, high = (middle, high) if slope > 0 else (low, middle)
    return best


def _chains(problem: Problem) -> list[tuple[frozenset[str], frozenset[str], int]]:
    """Lists (calls that never overlap, calls that never overlap with any of those, steps)."""
    names = [w.name for w in problem.works]
    far = distances(problem)
    apart = {(a, b): far[a, b] + far[b, a] <= 1 for a, b in itertools.permutations(names, 2)}
    found: dict[tuple[frozenset[str], int], frozenset[str]] = {}
    # Cliques of calls that exclude each other, grown in the order of the names.
    stack: list[tuple[list[str], list[str]]] = [([], names)]
    while stack and len(found) < 4096:
        clique, rest = stack.pop()
        for i, name in enumerate(rest):
            grown = [*clique, name]
            members = frozenset(grown)
            found[members, 1] = frozenset(
                n for n in names if n not in members and all(apart[n, m] for m in members)
            )
            stack.append((grown, [n for n in rest[i + 1 :] if apart[name, n]]))
    for members, steps in _cycles(problem):
        found.setdefault((members, steps), frozenset())
    return [(members, beside, steps) for (members, steps), beside in found.items()]


def distances(problem: Problem) -> dict[tuple[str, str], float]:
    """Fewest steps from a call to one that depends on it, even indirectly; infinite if none."""
    names = [w.name for w in problem.works]
    far = {(a, b): float("inf") for a in names for b in names}
    for e in dependencies(problem):
        far[e.before, e.after] = min(far[e.before, e.after], float(e.steps))
    for k, a, b in itertools.product(names, names, names):
        far[a, b] = min(far[a, b], far[a, k] + far[k, b])
    return far


def _cycles(problem: Problem, most: int = 2000) -> list[tuple[frozenset[str], int]]:
    """Simple cycles of dependencies that span more than one step."""
    after: dict[str, list[Edge]] = {w.name: [] for w in problem.works}
    for e in dependencies(problem):
        after[e.before].append(e)
    order, out = {w.name: i for i, w in enumerate(problem.works)}, []
    for first in order:
        stack: list[tuple[str, tuple[str, ...], int]] = [(first, (first,), 0)]
        while stack and len(out) < most:
            at, path, steps = stack.pop()
            for e in after[at]:
                total = steps + e.steps
                if e.after == first and total > 1:
                    out.append((frozenset(path), total))
                elif order[e.after] > order[first] and e.after not in path:
                    stack.append((e.after, (*path, e.after), total))
    return out


def _reason(chain: frozenset[str], beside: frozenset[str], steps: int) -> str:
    text = ", ".join(sorted(chain))
    text = f"{text} run one after the other" if len(chain) > 1 else f"{text} at its fastest"
    if steps > 1:
        text += f" over {steps} steps"
    if beside:
        text += f"; the work of {', '.join(sorted(beside))} fits beside none of them"
    return text

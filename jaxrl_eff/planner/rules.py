"""Plans made by common rules: starting points of a search, and baselines for its result.

Each rule decides where calls run. How each is parallelized there follows: by its fastest candidate,
then, while memory is short, by the change that costs the fewest seconds per byte saved.

    all       every call on all devices, models replicated
    fsdp      every call on all devices, models sharded over all of them
    symmetric every call on all devices, one strategy for all calls: the best one
    colocated every call on all devices, each with its own strategy (HybridFlow's hybrid engine)
    split     generation on all devices; calls that can run at once share them
    halves    the actor's calls on one half, the others' on the other
    disaggregated  generation on some devices, everything else on the rest: the best ratio
    by model  models in groups with separate devices: the best partition (HybridFlow, Alg. 1)
    by call   calls in groups with separate devices, the most balanced loads first
    greedy    every call where it is fastest by itself (ReaL's first state)

Mei et al. 2024, arXiv:2406.14088; Sheng et al. 2024, arXiv:2409.19256.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxrl_eff.planner.bound import distances
from jaxrl_eff.planner.choices import Choices, Judge, State
from jaxrl_eff.planner.shares import params
from jaxrl_eff.planner.space import Slice, Strategy

_REPAIRS = 64
_CALLS, _LEVEL = 8, 64


def heuristics(judge: Judge, over: Callable[[float], bool]) -> dict[str, State | str]:
    """Finds the best state of every rule, or a message why it has none.

    Args:
        judge: simulates.
        over: returns True if this share (0 to 1) of the budget of all rules together is used up;
            every rule tries at least one state.
    """
    t = judge.table
    rules: dict[str, Callable[[Choices], Iterator[State]]] = {
        "all": lambda t: _uniform(t, [Strategy(1, t.cluster.devices, 1, 1)]),
        "fsdp": lambda t: _uniform(t, [Strategy(1, 1, t.cluster.devices, 1)]),
        "symmetric": lambda t: _uniform(t, None),
        "colocated": lambda t: filter(None, [colocated(t)]),
        "split": lambda t: _arranged(t, _split(t)),
        "halves": lambda t: _arranged(t, _halves(t)),
        "disaggregated": lambda t: _arranged(t, _disaggregated(t)),
        "by model": lambda t: _arranged(t, _partitions(t)),
        "by call": lambda t: _arranged(t, _leveled(t)),
        "greedy": _greedy,
    }
    out: dict[str, State | str] = {}
    for nth, (name, rule) in enumerate(rules.items(), start=1):
        same = name in ("all", "fsdp", "symmetric")
        best, short, tried = None, float("inf"), False
        for state in rule(t):
            tried = True
            found = repaired(judge, state, same_strategy=same)
            score = judge(found)
            short = min(short, score.over_bytes)
            if score.fits and (best is None or score.seconds < judge(best).seconds):
                best = found
            if over(nth / len(rules)):
                break
        if best is not None:
            out[name] = best
        elif tried:
            out[name] = f"does not fit: {short / 2**30:,.1f} GiB a device short"
        else:
            out[name] = "not possible: rows or models do not divide so"
    return out


def repaired(judge: Judge, state: State, *, same_strategy: bool = False) -> State:
    """Changes a state while memory is short, each time by what costs least per byte saved."""
    t = judge.table
    for _ in range(_REPAIRS):
        score = judge(state)
        if score.fits:
            break
        best, change = float("inf"), None
        for call, (start, index) in enumerate(state):
            now = t.all[call][index]
            for i, c in enumerate(t.all[call]):
                if c.count != now.count or (same_strategy and c.strategy != now.strategy):
                    continue
                saved = max(now.bytes - c.bytes, now.static_bytes - c.static_bytes)
                if saved <= 1e-3 * score.over_bytes:
                    continue
                worse = max(c.bytes - now.bytes, c.static_bytes - now.static_bytes, 0.0)
                rate = (max(c.seconds - now.seconds, 0.0) + 1e-9) / min(saved, score.over_bytes)
                rate *= 1 + worse / saved
                if worse < saved and rate < best:
                    best, change = rate, (call, start, i)
        if change is None:
            break
        call, start, i = change
        tried = (*state[:call], (start, i), *state[call + 1 :])
        if judge(tried).over_bytes >= score.over_bytes * (1 - 1e-6):
            # Other calls hold what is short: take all that this call can save, then change those.
            smaller = smallest(t, tried)
            return smaller if judge(smaller).fits and not same_strategy else tried
        state = tried
    return state


def smallest(t: Choices, state: State) -> State:
    """The state with the same meshes in which every call has its candidate with fewest bytes."""
    out = []
    for call, (start, _) in enumerate(state):
        count = t.slice(call, state).count
        fit = [i for i, c in enumerate(t.all[call]) if c.count == count]
        out.append(
            (start, min(fit, key=lambda i: (t.all[call][i].static_bytes, t.all[call][i].bytes)))
        )
    return tuple(out)


def frugal(t: Choices) -> State:
    """The state with the fewest bytes: every call on its candidate that needs least memory."""
    out = []
    for call in range(len(t.works)):
        best = min(
            range(len(t.all[call])),
            key=lambda i: (
                t.all[call][i].bytes,
                t.all[call][i].static_bytes,
                t.all[call][i].seconds,
            ),
        )
        out.append((0, best))
    return tuple(out)


def colocated(t: Choices) -> State | None:
    """Every call on all devices (or as many as its rows divide on), with its fastest candidate."""
    return arrange(t, [_whole(t)] * len(t.works))


def _whole(t: Choices) -> Slice:
    return Slice(0, t.cluster.devices)


def _uniform(t: Choices, allowed: Sequence[Strategy] | None) -> Iterator[State]:
    """Yields states with all devices and one strategy; models of a few numbers keep their own."""
    n, small = t.cluster.devices, 1000
    first: list[dict[Strategy, int]] = []
    for found, w in zip(t.all, t.works, strict=True):
        if params(t.problem.roles[w.model].lm) < small:
            continue
        by_strategy: dict[Strategy, int] = {}
        for i, c in enumerate(found):
            if c.count == n and not c.offload:
                by_strategy.setdefault(c.strategy.without_nodes, i)
        first.append(by_strategy)
    rest = colocated(t)
    for s in first[0] if first and rest is not None else ():
        if (allowed is None or s in allowed) and all(s in found for found in first):
            chosen = iter([found[s] for found in first])
            yield tuple(
                spot if params(t.problem.roles[w.model].lm) < small else (0, next(chosen))
                for spot, w in zip(rest, t.works, strict=True)
            )


def _greedy(t: Choices) -> Iterator[State]:
    out = []
    for call, kept in enumerate(t.kept):
        every = [i for indices in kept.values() for i in indices]
        out.append((0, min(every, key=lambda i: t.all[call][i].seconds)))
    yield tuple(out)


def _arranged(t: Choices, arrangements: Sequence[Sequence[Slice]] | Iterator) -> Iterator[State]:
    """Yields the state of each arrangement (a mesh per call) in which every call can run."""
    for slices in arrangements:
        state = arrange(t, slices)
        if state is not None:
            yield state


def arrange(t: Choices, slices: Sequence[Slice]) -> State | None:
    """The fastest candidate of every call on its mesh, or on the largest mesh inside it that the
    call's rows divide on; None if a call can run on none."""
    out = []
    for call, where in enumerate(slices):
        inside = [
            (count, start)
            for count in t.kept[call]
            if count <= where.count
            for start in t.starts.get(count, ())
            if where.start <= start and start + count <= where.stop
        ]
        if not inside:
            return None
        count = max(inside)[0]
        start = min(s for n, s in inside if n == count)
        out.append((start, t.kept[call][count][0]))
    return tuple(out)


def cuts(t: Choices) -> list[int]:
    """Device numbers at which the cluster can be cut in two, those near the middle first."""
    c = t.cluster
    found = set(range(c.per_host, c.devices, c.per_host))
    size = 1
    while size < c.per_host:
        found |= {size, c.devices - size}
        size *= 2
    return sorted((k for k in found if 0 < k < c.devices), key=lambda k: abs(2 * k - c.devices))


def _disaggregated(t: Choices) -> Iterator[list[Slice]]:
    """Generation on [0, k), the rest on [k, G): each call on all of that, or side by side."""
    generates = [w.kind == "generate" for w in t.works]
    if not any(generates) or all(generates) or t.cluster.devices == 1:
        return
    others = [g for g in _together(t) if not generates[g[0]]]
    for k in cuts(t):
        rest = Slice(k, t.cluster.devices - k)
        slices = [Slice(0, k) if first else rest for first in generates]
        yield slices
        beside = slices.copy()
        for g in others:
            for i, where in zip(g, shares(t, g, rest), strict=True):
                beside[i] = where
        if beside != slices:
            yield beside


def _halves(t: Choices) -> Iterator[list[Slice]]:
    if t.cluster.devices > 1 and any(w.model != "actor" for w in t.works):
        half, rest = Slice(0, t.cluster.devices // 2), t.cluster.devices // 2
        yield [half if w.model == "actor" else Slice(half.stop, rest) for w in t.works]


def _together(t: Choices) -> list[list[int]]:
    """Groups calls of one kind that do not wait for each other within a step."""
    far = distances(t.problem)
    groups: list[list[int]] = []
    for i, w in enumerate(t.works):
        for g in groups:
            names = [t.works[j].name for j in g]
            waits = any(min(far[w.name, n], far[n, w.name]) == 0 for n in names)
            if not waits and t.works[g[0]].kind == w.kind:
                g.append(i)
                break
        else:
            groups.append([i])
    return groups


def _split(t: Choices) -> Iterator[list[Slice]]:
    """Yields meshes with independent calls side by side, in shares of their work."""
    groups = _together(t)
    for whole in ((), ("generate",), ("generate", "infer"), ("generate", "train")):
        slices = [_whole(t)] * len(t.works)
        for g in groups:
            if t.works[g[0]].kind not in whole:
                for i, where in zip(g, shares(t, g, _whole(t)), strict=True):
                    slices[i] = where
        yield slices


def shares(t: Choices, calls: Sequence[int], where: Slice) -> list[Slice]:
    """Cuts a run of devices into legal meshes, one per call, about in proportion to their work; if
    it cannot be cut so, every call gets all of it."""
    best, out = float("inf"), [where] * len(calls)
    work = [_work(t, i) or 1e-12 for i in calls]
    order = sorted(range(len(calls)), key=lambda j: -work[j])
    for sizes in tilings(t, len(calls), where):
        # Large shares go to large calls.
        sized = dict(zip(order, sorted(sizes, key=lambda s: -s.count), strict=True))
        longest = max(work[j] / sized[j].count for j in order)
        if longest < best:
            best, out = longest, [sized[j] for j in range(len(calls))]
    return out


def tilings(t: Choices, parts: int, where: Slice, most: int = 512) -> list[list[Slice]]:
    """Ways to cut a run of devices into `parts` legal meshes, in order of decreasing size."""
    starts = {n: set(s) for n, s in t.starts.items()}
    out: list[list[Slice]] = []

    def cut(start: int, left: int, cap: int, path: list[Slice]) -> None:
        if len(out) >= most:
            return
        rest = where.stop - start
        if left == 1:
            if rest <= cap and start in starts.get(rest, ()):
                out.append([*path, Slice(start, rest)])
            return
        for n in sorted(starts, reverse=True):
            if n <= min(cap, rest - 1) and n * left >= rest and start in starts[n]:
                cut(start + n, left - 1, n, [*path, Slice(start, n)])

    cut(where.start, parts, where.count, [])
    return out


def _partitions(t: Choices) -> Iterator[list[Slice]]:
    """Yields meshes for set partitions of the models, each set on its own devices."""
    models = list(dict.fromkeys(w.model for w in t.works))
    for partition in sorted(_set_partitions(models), key=len):
        if len(partition) == 1:
            continue
        groups = [[i for i, w in enumerate(t.works) if w.model in g] for g in partition]
        work = [sum(_work(t, i) for i in g) for g in groups]
        order = sorted(range(len(groups)), key=lambda j: -work[j])
        found = tilings(t, len(groups), _whole(t))
        share = [work[j] / (sum(work) or 1.0) * t.cluster.devices for j in order]
        found.sort(key=lambda ss: sum(abs(s.count - x) for s, x in zip(ss, share, strict=True)))
        for sizes in found[:4]:
            slices: list[Slice] = [_whole(t)] * len(t.works)
            for j, where in zip(order, sizes, strict=True):
                for i in groups[j]:
                    slices[i] = where
            yield slices


def _leveled(t: Choices) -> Iterator[list[Slice]]:
    """Yields meshes for set partitions of at most `_CALLS` calls into two to four groups, each on
    its own devices: the `_LEVEL` ones whose most loaded device has the least work."""
    calls = range(len(t.works))
    if len(calls) > _CALLS or t.cluster.devices == 1:
        return
    work = [_work(t, i) for i in calls]
    every, found = _set_partitions(list(calls)), []
    for n in (2, 3, 4):
        cut = tilings(t, n, _whole(t))
        partitions = [
            sorted(groups, key=lambda g: -sum(work[i] for i in g))
            for groups in every
            if len(groups) == n
        ]
        if not cut or not partitions:
            continue
        sums = np.array([[sum(work[i] for i in g) for g in groups] for groups in partitions])
        sizes = np.array([[s.count for s in slices] for slices in cut])
        loads = (sums[:, None] / sizes).max(axis=-1)
        for at in np.argsort(loads, axis=None, kind="stable")[:_LEVEL]:
            k, m = np.unravel_index(at, loads.shape)
            where = {i: s for g, s in zip(partitions[k], cut[m], strict=True) for i in g}
            found.append((loads[k, m], [where[i] for i in calls]))
    yield from (slices for _, slices in sorted(found, key=lambda x: x[0])[:_LEVEL])


def _work(t: Choices, call: int) -> float:
    """Device-seconds of a call by its thriftiest candidate."""
    return min(c.seconds * c.count for c in t.all[call])


def _set_partitions(items: Sequence) -> list[list[list]]:
    if not items:
        return [[]]
    first, rest = items[0], items[1:]
    out = []
    for partition in _set_partitions(rest):
        out.append([[first], *partition])
        for i in range(len(partition)):
            out.append([*partition[:i], [first, *partition[i]], *partition[i + 1 :]])
    return out

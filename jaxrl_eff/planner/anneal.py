"""Parallel tempering over states: random changes, accepted by their energy and a temperature.

E = seconds: a change is accepted with probability min(1, exp(-(E' - E) / T)), and neighboring
chains swap states with min(1, exp((1/T_i - 1/T_j) (E_i - E_j))). The moves are ReaL's (one call,
any candidate; Mei et al. 2024, arXiv:2406.14088, Sec. 4.3) and some that change several calls at
once, since choosing each call alone seldom gives a good plan. Proposals are not symmetric: the
chains search, they do not sample.
"""

import math
import random
from collections.abc import Callable, Sequence

from jaxrl_eff.planner import rules
from jaxrl_eff.planner.choices import Choices, Judge, State
from jaxrl_eff.planner.space import Slice

CHAINS = 5
COLDEST, HOTTEST = 0.002, 0.08  # temperatures, as shares of the best start's seconds


def anneal(
    judge: Judge,
    starts: Sequence[State],
    rng: random.Random,
    over: Callable[[], bool],
    *,
    floor: float = math.inf,
) -> None:
    """Runs the chains from the given states until `over`, or no new state is found for a while.

    Args:
        floor: ends once a plan that fits takes at most these seconds.
    """
    starts = list(dict.fromkeys(starts))
    states = [starts[i % len(starts)] for i in range(CHAINS)]
    scores = [judge(s) for s in states]
    unit = min(s.energy for s in scores)
    heat = [unit * COLDEST * (HOTTEST / COLDEST) ** (i / (CHAINS - 1)) for i in range(CHAINS)]
    idle = 0
    while not over() and idle < 20_000:
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
        if judge.best is not None and judge.best[1].seconds <= floor:
            return


def on_mesh(
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
        return on_mesh(t, state, call, where, rng) if where.count in t.starts else None
    if len(state) == 1:
        return None
    other = rng.choice([i for i in range(len(state)) if i != call])
    if kind < 0.65:  # two calls swap meshes
        a, b = t.slice(call, state), t.slice(other, state)
        return on_mesh(t, on_mesh(t, state, call, b, rng), other, a, rng)
    if kind < 0.8:  # one call moves to another's mesh
        return on_mesh(t, state, call, t.slice(other, state), rng)
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
    like = c.strategy.without_nodes
    same = [i for i in found if t.all[other][i].strategy.without_nodes == like]
    if not same:
        return None
    return (*state[:other], (start, rng.choice(same)), *state[other + 1 :])


def _shift(t: Choices, state: State, rng: random.Random) -> State | None:
    """Moves a boundary between devices; all calls that begin or end there follow."""
    slices = [t.slice(i, state) for i in range(len(state))]
    borders = sorted({s.start for s in slices} | {s.stop for s in slices})
    borders = [b for b in borders if 0 < b < t.cluster.devices]
    old = rng.choice(borders) if borders else None
    new = rng.choice(rules.cuts(t)) if t.cluster.devices > 1 else None
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
            out = on_mesh(t, out, i, where, rng) if where.count in t.starts else None
    return out

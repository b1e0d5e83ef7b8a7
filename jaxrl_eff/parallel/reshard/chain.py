"""Resharding between two layouts of the same devices, as a shortest path over collectives.

Both meshes are refined to common axes, of prime size if these are few. A state assigns axes to the
dimensions that they shard, slowest first. Its neighbors: *slice* along an unused axis (free), and
*all-to-all* of a dimension's fastest axes to another dimension, which preserves the shard size. A
path ends with *all-gathers* of dimensions' fastest axes. If all-gathers alone do not lead to the
target, one *permute* of entire shards precedes them. Renaming axes commutes with all other steps,
so one permute suffices, and it is cheapest there, where shards are smallest. The bytes that a path
receives are known exactly, and no shard on it is larger than the larger of source and target.

Primitives: Rink et al. 2021, arXiv:2112.01075, memory-efficient array redistribution.
"""

import dataclasses
import functools
import heapq
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxrl_eff.parallel.reshard.collectives import (
    AllToAll,
    Collective,
    Gather,
    Permute,
    Slice,
    seconds,
)
from jaxrl_eff.parallel.reshard.layout import DeviceLayout, Network

State = tuple[tuple[int, ...], ...]  # for each dimension its axes, slowest first
MOST_PRIMES = 5  # limit on axes of prime size; with more, the axes are not refined to primes
MOST_AXES = 8


def chain(
    source: DeviceLayout,
    target: DeviceLayout,
    room: tuple[int, ...],
    nbytes: float | int,
    network: Network,
    *,
    thrifty: bool = False,
) -> tuple[Collective, ...] | None:
    """Fastest sequence of steps; None if the meshes have no common refinement of few enough axes.

    Args:
        source, target: layouts of the same devices, in any order.
        room: for each dimension, a number that its split must divide: the greatest common divisor
            of its size and the number of devices.
        nbytes: of the full tensor; weighs bandwidth against latency.
        network: bandwidths and latencies.
        thrifty: minimize received bytes first, then time.
    """
    split = [i for i, (a, b) in enumerate(zip(source.spec, target.spec, strict=True)) if a or b]
    ends = [dataclasses.replace(e, spec=tuple(e.spec[i] for i in split)) for e in (source, target)]
    steps = _chain(*ends, tuple(room[i] for i in split), nbytes, network, thrifty)
    return None if steps is None else tuple(_renumbered(step, split) for step in steps)


@functools.cache
def _chain(
    source: DeviceLayout,
    target: DeviceLayout,
    room: tuple[int, ...],
    nbytes: float | int,
    network: Network,
    thrifty: bool,
) -> tuple[Collective, ...] | None:
    """`chain` for tensors without the dimensions that neither layout shards."""
    axes = _common(source, target, primes=True)
    if axes is not None and len(axes.used) > MOST_PRIMES:
        axes = _common(source, target, primes=False)
    if axes is None or len(axes.used) > MOST_AXES:
        return None
    return tuple(_step(axes, move) for move in _shortest(axes, room, nbytes, network, thrifty))


def _renumbered(step: Collective, dims: list[int]) -> Collective:
    if isinstance(step, AllToAll):
        return dataclasses.replace(step, split=dims[step.split], join=dims[step.join])
    if isinstance(step, Slice | Gather):
        return dataclasses.replace(step, dim=dims[step.dim])
    return step


class _Move(NamedTuple):
    """Edge of the graph.

    Attributes:
        kind: of the collective.
        shard: fraction of the tensor that a device holds before it.
        dim, join: dimensions that the collective splits and joins.
        block: the axes that move.
        before, after: states around a permute.
    """

    kind: type[Collective]
    shard: float
    dim: int = 0
    join: int = 0
    block: tuple[int, ...] = ()
    before: State = ()
    after: State = ()


class _Axes:
    """Common axes of two meshes over one list of devices, with both layouts expressed in them."""

    def __init__(self, devices: tuple[int, ...], bounds: list[int], source: State, target: State):
        self.devices, self.source, self.target = devices, source, target
        self.sizes = [b // a for a, b in itertools.pairwise(bounds)]
        self.used = sorted({a for dim in (*source, *target) for a in dim})
        place = np.arange(len(devices))
        self.digits = [place // s % n for s, n in zip(bounds, self.sizes, strict=False)]
        self._groups: dict[tuple[int, ...], tuple[tuple[int, ...], ...]] = {}
        self._shards: dict[State, np.ndarray] = {}
        self._endings: dict[tuple[int, ...], list[State]] = {}

    def count(self, axes: tuple[int, ...]) -> int:
        return math.prod(self.sizes[a] for a in axes)

    def groups(self, block: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Groups of devices that differ only along the axes of `block`, in the order of these."""
        if block not in self._groups:
            others = tuple(a for a in range(len(self.sizes)) if a not in block)
            order = np.lexsort((self.numbers((block,)), self.numbers((others,))))
            rows = order.reshape(-1, self.count(block))
            self._groups[block] = tuple(tuple(self.devices[i] for i in row) for row in rows)
        return self._groups[block]

    def numbers(self, state: State) -> np.ndarray:
        """Shard number of every device."""
        if state not in self._shards:
            number = np.zeros(len(self.devices), int)
            for a in itertools.chain(*state):
                number = number * self.sizes[a] + self.digits[a]
            self._shards[state] = number
        return self._shards[state]

    def endings(self, state: State) -> list[State]:
        """States with the same shard counts from which all-gathers alone lead to the target."""
        if all(dim[: len(t)] == t for dim, t in zip(state, self.target, strict=True)):
            return [state]
        counts = tuple(self.count(dim) for dim in state)
        if counts not in self._endings:
            free = [a for a in self.used if all(a not in dim for dim in self.target)]
            self._endings[counts] = list(self._ending(counts, free, ()))
        return self._endings[counts]

    def _ending(self, counts: tuple[int, ...], free: list[int], made: State) -> Iterator[State]:
        i = len(made)
        if i == len(counts):
            yield made
            return
        have = self.count(self.target[i])
        if counts[i] % have:
            return
        for k in range(len(free) + 1):
            for extra in itertools.permutations(free, k):
                if self.count(extra) * have == counts[i]:
                    rest = [a for a in free if a not in extra]
                    yield from self._ending(counts, rest, (*made, self.target[i] + extra))


def _common(source: DeviceLayout, target: DeviceLayout, *, primes: bool) -> _Axes | None:
    """Expresses both layouts on one mesh; None if impossible."""
    if set(source.devices) != set(target.devices):
        return None
    place = {d: i for i, d in enumerate(source.devices)}
    parts = _strides(np.array([place[d] for d in target.devices]).reshape(target.mesh))
    if parts is None:
        return None
    own = [math.prod(source.mesh[a + 1 :]) for a in range(len(source.mesh))]
    steps = {s for axis in parts for s, _ in axis} | {s * n for axis in parts for s, n in axis}
    ladder = sorted({1, len(source.devices), *own, *steps})
    if any(b % a for a, b in itertools.pairwise(ladder)):
        return None
    ladder = _with_primes(ladder) if primes else ladder
    number = {b: i for i, b in enumerate(ladder)}

    def between(low: int, high: int) -> tuple[int, ...]:  # slowest first
        return tuple(range(number[high] - 1, number[low] - 1, -1))

    from_source = [between(own[a], own[a] * n) for a, n in enumerate(source.mesh)]
    from_target = [sum((between(s, s * n) for s, n in axis), ()) for axis in parts]
    return _Axes(
        source.devices,
        ladder,
        tuple(sum((from_source[a] for a in dim), ()) for dim in source.spec),
        tuple(sum((from_target[a] for a in dim), ()) for dim in target.spec),
    )


def _strides(grid: np.ndarray) -> list[list[tuple[int, int]]] | None:
    """Factors each axis of a grid of positions into (stride, size), slowest first; or None."""
    total = np.zeros((1,) * grid.ndim, int)
    out = []
    for axis in range(grid.ndim):
        todo = grid[tuple(slice(None) if i == axis else 0 for i in range(grid.ndim))]
        parts, made = [], np.zeros(1, int)
        while len(todo) > 1:
            stride, n = int(todo[1]), len(todo)
            run = next(m for m in range(2, n + 1) if m == n or todo[m] != m * stride)
            while n % run:
                run -= 1
            if stride <= 0 or run < 2:
                return None
            parts.insert(0, (stride, run))
            made = (np.arange(run)[:, None] * stride + made).reshape(-1)
            todo = todo[::run]
        out.append(parts)
        total = total + made.reshape([-1 if i == axis else 1 for i in range(grid.ndim)])
    return out if np.array_equal(total, grid) else None


def _with_primes(ladder: list[int]) -> list[int]:
    out = [ladder[0]]
    for low, high in itertools.pairwise(ladder):
        ratio, p = high // low, 2
        while ratio > 1:
            while ratio % p:
                p += 1
            ratio //= p
            out.append(out[-1] * p)
    return out


def _shortest(
    axes: _Axes, room: tuple[int, ...], nbytes: float | int, network: Network, thrifty: bool
) -> list[_Move]:
    """Dijkstra's algorithm with costs (seconds, total received bytes), or reversed if thrifty."""

    @functools.cache
    def price(move: _Move) -> tuple[float, float]:
        paid = _seconds_and_total(axes, move, nbytes, network)
        return paid[::-1] if thrifty else paid

    best = {axes.source: (0.0, 0.0)}
    came: dict[State, tuple[State, _Move]] = {}
    done: set[State] = set()
    queue = [((0.0, 0.0), 0, axes.source)]
    order = itertools.count(1)
    goal, last, tail = (math.inf, math.inf), axes.source, []
    while queue:
        cost, _, state = heapq.heappop(queue)
        if cost >= goal:
            break
        if state in done:
            continue
        done.add(state)
        for end in axes.endings(state):
            moves = _finish(axes, state, end)
            paid = _sum(cost, *map(price, moves))
            if paid < goal:
                goal, last, tail = paid, state, moves
        for after, move in _moves(axes, state, room):
            if after not in done:
                there = _sum(cost, price(move))
                if there < goal and (after not in best or there < best[after]):
                    best[after], came[after] = there, (state, move)
                    heapq.heappush(queue, (there, next(order), after))
    path = []
    while last != axes.source:
        last, move = came[last]
        path.append(move)
    return path[::-1] + tail


def _sum(*pairs: tuple[float, float]) -> tuple[float, float]:
    return tuple(map(sum, zip(*pairs, strict=True)))


def _moves(axes: _Axes, state: State, room: tuple[int, ...]) -> Iterator[tuple[State, _Move]]:
    """Yields all-to-alls and slices from a state."""
    counts = [axes.count(dim) for dim in state]
    shard = 1.0 / math.prod(counts)

    def fits(j: int, block: tuple[int, ...]) -> bool:
        return room[j] % (counts[j] * axes.count(block)) == 0

    for i, dim in enumerate(state):
        for k in range(1, len(dim) + 1):
            block, rest = dim[-k:], _replaced(state, i, dim[:-k])
            for j in range(len(state)):
                if j != i and fits(j, block):
                    after = _replaced(rest, j, state[j] + block)
                    yield after, _Move(AllToAll, shard, j, i, block)
    for a in (a for a in axes.used if all(a not in dim for dim in state)):
        for j, dim in enumerate(state):
            if fits(j, (a,)):
                yield _replaced(state, j, (*dim, a)), _Move(Slice, shard, j, block=(a,))


def _replaced(state: State, i: int, dim: tuple[int, ...]) -> State:
    return (*state[:i], dim, *state[i + 1 :])


def _finish(axes: _Axes, state: State, end: State) -> list[_Move]:
    """Final moves of a path: a permute if needed, then all-gathers."""
    shard = 1.0 / math.prod(axes.count(dim) for dim in state)
    moves = [_Move(Permute, shard, before=state, after=end)] if end != state else []
    for i, (dim, target) in enumerate(zip(end, axes.target, strict=True)):
        block = dim[len(target) :]
        if block:
            moves.append(_Move(Gather, shard, i, block=block))
            shard *= axes.count(block)
    return moves


def _seconds_and_total(
    axes: _Axes, move: _Move, nbytes: float | int, network: Network
) -> tuple[float, float]:
    """Cost of a move; a permute, expensive to construct, is assumed to cross hosts if it can."""
    if move.kind is Slice:
        return 1e-9, 0.0  # not quite free, so that no slice is added needlessly
    if move.kind is Permute:
        moved = int((axes.numbers(move.before) != axes.numbers(move.after)).sum())
        hosts = {network.hosts[d] for d in axes.devices}
        rate = network.link_bytes_per_s if len(hosts) == 1 else network.nic_bytes_per_s
        return network.latency(len(hosts) > 1) + move.shard * nbytes / rate, move.shard * moved
    step = _step(axes, move)
    return seconds(step, nbytes, network), step.total


def _step(axes: _Axes, move: _Move) -> Collective:
    n, shard = len(axes.devices), move.shard
    if move.kind is Permute:
        pairs = _matching(axes, move.before, move.after)
        moved = sum(a != b for a, b in pairs)
        return Permute(pairs, shard if moved else 0.0, shard * moved)
    groups, g = axes.groups(move.block), axes.count(move.block)
    if move.kind is Slice:
        return Slice(move.dim, groups)
    if move.kind is Gather:
        return Gather(move.dim, groups, shard * (g - 1), n * shard * (g - 1))
    share = shard * (g - 1) / g
    return AllToAll(move.dim, move.join, groups, share, n * share)


def _matching(axes: _Axes, before: State, after: State) -> tuple[tuple[int, int], ...]:
    """(sender, receiver) pairs of a permute; devices that already hold the right shard keep it."""
    have, want = axes.numbers(before).tolist(), axes.numbers(after).tolist()
    spare: dict[int, list[int]] = {}
    for i, (h, w) in enumerate(zip(have, want, strict=True)):
        if h != w:
            spare.setdefault(h, []).append(i)
    pairs = []
    for i, (h, w) in enumerate(zip(have, want, strict=True)):
        source = i if h == w else spare[w].pop(0)
        pairs.append((axes.devices[source], axes.devices[i]))
    return tuple(pairs)

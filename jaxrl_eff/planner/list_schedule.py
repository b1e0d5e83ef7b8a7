"""Two list schedulers over unrolled iterations: for exclusive devices, and for shared cores.

The node that was ready first begins first, as soon as its devices are free. A node enters the queue
when its inputs are ready, and keeps its position.
"""

import heapq
from collections.abc import Callable
from typing import NamedTuple

from jaxrl_eff.planner.clusters import Cluster


class Node(NamedTuple):
    """A node of one iteration."""

    name: str
    kind: str
    seconds: float | int
    mask: int
    devices: tuple[int, ...]


class Edge(NamedTuple):
    """`reader` waits for `writer` of `lag` iterations earlier, plus `delay` seconds."""

    writer: int
    reader: int
    lag: int
    delay: float


def exclusive(
    nodes: list[Node],
    edges: list[Edge],
    count: int,
    overlapping: Callable[[tuple[int, ...]], list[list[int]]],
) -> tuple[list[float], list[float]]:
    """Start and end seconds: node k of iteration i at i * len(nodes) + k.

    Args:
        count: iterations.
        overlapping: masks -> for each, the indices of those that share a bit with it.
    """
    size = len(nodes)
    seen: dict[int, int] = {}
    where = [seen.setdefault(n.mask, len(seen)) for n in nodes]
    overlaps = overlapping(tuple(seen))
    touched = [overlaps[w] for w in where]
    seconds = [n.seconds for n in nodes]
    children: list[list[tuple[int, int, float]]] = [[] for _ in nodes]
    pending = [0] * (size * count)
    first = [0] * size
    for writer, reader, lag, delay in edges:
        # Distance from writer to reader in the unrolled order.
        children[writer].append((reader - writer + lag * size, lag, delay))
        first[reader] += 1
        for i in range(lag):
            if i < count:
                pending[i * size + reader] -= 1
    for i in range(count):
        base = i * size
        for k in range(size):
            pending[base + k] += first[k]
    total = size * count
    ready, start, end = [0.0] * total, [0.0] * total, [0.0] * total
    busy = [0.0] * len(seen)
    heap = [(0.0, n) for n in range(total) if not pending[n]]
    pop, push = heapq.heappop, heapq.heappush
    while heap:
        now, n = pop(heap)
        k = n % size
        free = busy[where[k]]
        if free > now:
            now = free
        start[n] = now
        now += seconds[k]
        end[n] = now
        for u in touched[k]:
            if busy[u] < now:
                busy[u] = now
        for step, _, delay in children[k]:
            child = n + step
            if child < total:
                at = now + delay
                if ready[child] < at:
                    ready[child] = at
                pending[child] -= 1
                if not pending[child]:
                    push(heap, (ready[child], child))
    return start, end


def sharing(
    nodes: list[Node], edges: list[Edge], count: int, cluster: Cluster
) -> tuple[list[float], list[float]]:
    """Start and end seconds, as from `exclusive`, for devices that share the cores of one host.

    Nodes that run at once share the cores in proportion to what each would take alone.
    """
    size = len(nodes)
    total = size * count
    waits = [0] * total
    children: list[list[tuple[int, float]]] = [[] for _ in range(total)]
    for writer, reader, lag, delay in edges:
        for i in range(count - lag):
            child = (i + lag) * size + reader
            children[i * size + writer].append((child, delay))
            waits[child] += 1
    need = [
        0.0 if n.kind == "move" or not n.mask else cluster.demand(max(1, len(n.devices)))
        for n in nodes
    ]
    ready = [0.0] * total
    start, end = [0.0] * total, [0.0] * total
    queue = [(0.0, n) for n in range(total) if not waits[n]]
    running: dict[int, float] = {}  # node -> seconds left if it were alone
    now = 0.0
    while queue or running:
        queue.sort()
        taken, later = 0, []
        for n in running:
            taken |= nodes[n % size].mask
        for at, n in queue:
            mask = nodes[n % size].mask
            if at <= now + 1e-15 and not mask & taken:
                running[n], start[n] = nodes[n % size].seconds, now
            else:
                later.append((at, n))
            if at <= now + 1e-15:
                taken |= mask
        queue = later
        rate = 1.0 / max(1.0, sum(need[n % size] for n in running))
        coming = min((at for at, _ in queue if at > now + 1e-15), default=float("inf"))
        finish = now + min((left for left in running.values()), default=float("inf")) / rate
        then = min(coming, finish)
        for n in list(running):
            running[n] -= (then - now) * rate
            if running[n] <= 1e-12:
                del running[n]
                end[n] = then
                for child, delay in children[n]:
                    ready[child] = max(ready[child], then + delay)
                    waits[child] -= 1
                    if not waits[child]:
                        queue.append((ready[child], child))
        now = then
    return start, end

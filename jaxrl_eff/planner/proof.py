"""Branch and bound over a table of choices: finds the best plan where that is feasible.

Calls are placed one by one, long ones first. A branch ends when a lower bound reaches the best
known plan's time. The bound takes the calls placed so far and the others at their best, and is the
largest of: the work of all devices, the load of one device, and the sum of calls that cannot
overlap because they depend on each other or share devices. Plans that differ only by swapping equal
parts of the cluster are tried once.
"""

from collections.abc import Callable, Sequence

from jaxrl_eff.planner.bound import distances
from jaxrl_eff.planner.choices import Choices, Judge

Spot = tuple[int, int]  # first device and number of devices


def prove(
    judge: Judge, *, over: Callable[[], bool] = lambda: False, most: int | None = None
) -> bool:
    """Tries or excludes every plan of kept candidates, so that `judge.best` becomes the best plan.

    Args:
        judge: simulates; the better its best plan, the faster the proof.
        over: polled occasionally; True means give up.
        most: gives up after this many steps.

    Returns:
        True if the search completed.
    """
    t = judge.table
    order = sorted(range(len(t.works)), key=lambda call: -_least(t, call)[0])
    relaxed = _Relaxation(t, order)
    path: list[tuple[int, int]] = []
    steps = 0

    def hopeless(least: float) -> bool:
        return judge.best is not None and least >= judge.best[1].seconds * (1 - 1e-9)

    def branch(spots: tuple[Spot, ...], seconds: list[float], load: list[float]) -> bool:
        nonlocal steps
        depth = len(spots)
        if depth == len(order):
            judge(tuple(pair for _, pair in sorted(zip(order, path, strict=True))))
            return True
        call, ways = order[depth], []
        for count, indices in t.kept[call].items():
            for start in _different(t, count, spots):
                node = relaxed.node((*spots, (start, count)), seconds, load)
                for i in indices:
                    took = t.all[call][i].seconds
                    least = node.least(took)
                    if hopeless(least):
                        break  # the remaining candidates are slower
                    ways.append((least, took, start, count, i))
        for least, took, start, count, i in sorted(ways):
            steps += 1
            if (most is not None and steps > most) or (steps % 16 == 0 and over()):
                return False
            if hopeless(least):
                return True  # the remaining ways are no better
            path.append((start, i))
            grown = [x + took * (start <= d < start + count) for d, x in enumerate(load)]
            done = branch((*spots, (start, count)), [*seconds, took], grown)
            path.pop()
            if not done:
                return False
        return True

    return branch((), [], [0.0] * t.cluster.devices)


def _least(t: Choices, call: int) -> tuple[float, float]:
    """A call's fewest seconds, and its least work in device-seconds."""
    kept = [t.all[call][i] for indices in t.kept[call].values() for i in indices]
    return min(c.seconds for c in kept), min(c.seconds * c.count for c in kept)


class _Relaxation:
    """Lower bounds for partial plans, in which the first calls of an order are placed."""

    def __init__(self, t: Choices, order: Sequence[int]):
        far = distances(t.problem)
        fixed = [w for w in t.problem.works if w.model is None]
        names = [*(t.works[call].name for call in order), *(w.name for w in fixed)]
        # Bit j of apart[k]: calls k and j never overlap, wherever they run.
        self.apart = [
            sum(1 << j for j, b in enumerate(names) if far[a, b] + far[b, a] <= 1 and a != b)
            for a in names
        ]
        least = [_least(t, call) for call in order]
        self.fastest = [seconds for seconds, _ in least] + [t.local_seconds(w) for w in fixed]
        self.rest = [sum(work for _, work in least[k:]) for k in range(len(least) + 1)]

    def node(
        self, spots: Sequence[Spot], seconds: Sequence[float], load: Sequence[float]
    ) -> "_Node":
        """A path whose newest call has a mesh, but no seconds yet.

        Args:
            spots: meshes of the calls that are placed, the newest last.
            seconds: of those before it; `load`: their sum on each device.
        """
        return _Node(self, spots, seconds, load)


class _Node:
    def __init__(
        self,
        relaxed: _Relaxation,
        spots: Sequence[Spot],
        seconds: Sequence[float],
        load: Sequence[float],
    ):
        depth, (start, self._count) = len(spots), spots[-1]
        self._devices, self._new = len(load), depth - 1
        self._area, self._rest = sum(load), relaxed.rest[depth]
        self._here = max(load[start : start + self._count])
        self._most = max(load)
        self._seconds = [*seconds, 0.0, *relaxed.fastest[depth:]]
        self._exclude = relaxed.apart.copy()
        for a, (first, n) in enumerate(spots):
            for b, (other, m) in enumerate(spots[:a]):
                if first < other + m and other < first + n:
                    self._exclude[a] |= 1 << b
                    self._exclude[b] |= 1 << a

    def least(self, took: float) -> float:
        """Lower bound on the seconds of a plan on this path if the newest call takes `took`."""
        area = self._area + took * self._count + self._rest
        bound = max(area / self._devices, self._here + took, self._most)
        seconds = self._seconds
        seconds[self._new] = took
        ranked = sorted(range(len(seconds)), key=seconds.__getitem__, reverse=True)
        for first in ranked:  # sums calls that pairwise cannot overlap, longest first
            total, allowed = seconds[first], self._exclude[first]
            for k in ranked:
                if allowed >> k & 1:
                    total += seconds[k]
                    allowed &= self._exclude[k]
            bound = max(bound, total)
        return bound


def _different(t: Choices, count: int, spots: tuple[Spot, ...]) -> list[int]:
    """First devices for a mesh of this size, one of each set that only swaps equal parts."""
    out, known = [], set()
    for start in t.starts.get(count, ()):
        form = _form(t, (*spots, (start, count)))
        if form not in known:
            known.add(form)
            out.append(start)
    return out


def _form(t: Choices, spots: tuple[Spot, ...]) -> str:
    """Canonical form of the meshes by call: equal for plans that differ only by swapping halves
    (of halves) of a host, or by numbering the hosts in reverse."""
    per_host, hosts = t.cluster.per_host, t.cluster.hosts
    inside = []
    for h in range(hosts):
        first = h * per_host
        mine = [
            (k, s - first, n)
            for k, (s, n) in enumerate(spots)
            if n < per_host and first <= s < first + per_host
        ]
        inside.append(_halves(mine, 0, per_host))
    outside = [(k, s // per_host, n // per_host) for k, (s, n) in enumerate(spots) if n >= per_host]
    mirrored = [(k, hosts - s - n, n) for k, s, n in outside]
    return min(repr((outside, inside)), repr((mirrored, inside[::-1])))


def _halves(mine: list[tuple[int, int, int]], start: int, size: int) -> list:
    """Meshes inside a block of devices: those that fill it, then those of its halves, sorted."""
    if not mine:
        return []
    if size == 1 or size & (size - 1):  # cannot be halved evenly
        return [(k, s - start, n) for k, s, n in mine]
    half = size // 2
    parts = [
        _halves([m for m in mine if m[2] < size and at <= m[1] < at + half], at, half)
        for at in (start, start + half)
    ]
    return [[k for k, _, n in mine if n == size], *sorted(parts, key=repr)]

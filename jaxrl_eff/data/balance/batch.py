"""Division of a batch into micro-batches, and their combination into micro-steps of all groups.

Indices in this module refer to the lengths sorted, longest first.
"""

import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxrl_eff.data.balance import rules
from jaxrl_eff.data.balance.assignment import Assignment, Shape
from jaxrl_eff.data.balance.cost import Cost

_SHARES_OF_FAIR = (1.0, 0.7, 0.5, 0.35, 0.25, 0.1)  # lengths above which all are distributed

Cut = list[list[int]]  # micro-batches, each longest first; groups times micro-steps of them


class Part(NamedTuple):
    """The work of one group in one micro-step."""

    members: list[int]
    places: list[int]
    local: int  # tokens of the fullest rank
    distributed: int
    attention: float  # seconds of the slowest rank
    shared: float


class Plan(NamedTuple):
    """Micro-steps, each a shape and a part for every group."""

    seconds: float
    steps: list[tuple[Shape, list[Part]]]


class Batch:
    """The lengths of a batch, with the quantities that the rules need.

    Raises:
        ValueError: see `skrull.plan`.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        groups: int,
        parts: int,
        capacity: int,
        cost: Cost,
        shapes: Sequence[Shape] | None = None,
    ):
        self.given = _checked(lengths, groups, parts, capacity)
        self.groups, self.parts, self.capacity, self.cost = groups, parts, capacity, cost
        self.order = np.argsort(-self.given, kind="stable")
        n = self.given[self.order]
        attention = cost.attention(n)
        self.lengths: list[int] = n.tolist()
        self.stripes: list[int] = (-(-n // parts)).tolist()
        self.attention: list[float] = attention.tolist()
        self.shared: list[float] = cost.attention(n, parts).tolist()
        self.weights: list[float] = (cost.linear * n / cost.flops_per_s + attention).tolist()
        self.shapes = None if shapes is None else self._sorted(shapes)

    def _sorted(self, shapes: Sequence[Shape]) -> list[Shape]:
        shapes = [Shape(*s) for s in shapes]
        if Shape(0, self.capacity) not in shapes or any(s.columns > self.capacity for s in shapes):
            raise ValueError(
                f"shapes must have at most {self.capacity} columns, and one must be "
                f"(0, {self.capacity}), which holds whatever fits; they are "
                f"{list(map(tuple, shapes))}."
            )
        return sorted(shapes, key=lambda s: (self.cost.seconds(*s, self.parts), s))

    # Micro-batches --------------------------------------------------------------------------------

    def cuts(self, more: int) -> list[tuple[str, Cut]]:
        """(way, micro-batches), from the fewest micro-steps that fit to `more` beyond.

        Every micro-batch fits fully distributed. So for any combination of them there is a shape
        in which all groups can run.
        """
        shares, out = self._shares(), []
        count = max(1, -(-sum(self.stripes) // (self.capacity * self.groups)))
        last = None
        while last is None or count <= last:
            for way, cut in (
                ("strided", self._strided(shares, count)),
                ("levelled", self._levelled(count)),
                ("graded", self._graded(count)),
            ):
                if cut is not None and all(cut != other for _, other in out[-2:]):
                    out.append((way, cut))
                    last = count + more if last is None else last
            count += 1
            if count > len(self.lengths):
                break
        return out

    def strided(self) -> Iterator[Cut]:
        """Yields the cuts of the paper's Algorithm 2, for every number of micro-steps that fits."""
        shares = self._shares()
        for count in range(1, len(self.lengths) + 1):
            cut = self._strided(shares, count)
            if cut is not None:
                yield cut

    def least(self, cut: Cut) -> float:
        """Lower bound on the seconds of any placement of these micro-batches."""
        steps = -(-sum(map(bool, cut)) // self.groups)
        bound = self.cost.bound(self.given, self.groups, self.parts, steps=steps)
        return bound * (1 - 1e-9)  # rounding

    def _shares(self) -> Cut:
        """Each group's sequences: longest first, to the group with the least work."""
        heap = [(0.0, g) for g in range(self.groups)]
        out: Cut = [[] for _ in heap]
        for k, w in enumerate(self.weights):
            load, g = heap[0]
            out[g].append(k)
            heapq.heapreplace(heap, (load + w, g))
        return out

    def _strided(self, shares: Cut, count: int) -> Cut | None:
        """Every group's share in strided slices, so that each has long and short sequences."""
        out = [share[j::count] for share in shares for j in range(count)]
        stripes = self.stripes.__getitem__
        return None if any(sum(map(stripes, s)) > self.capacity for s in out) else out

    def _levelled(self, count: int) -> Cut | None:
        """Micro-batches with about equal tokens, long and short sequences in each."""
        out: Cut = [[] for _ in range(self.groups * count)]
        whole = sum(self.stripes) + 1
        return out if self._fill(out, 0, whole) == len(self.stripes) else None

    def _graded(self, count: int) -> Cut | None:
        """Micro-steps with about equal tokens, those of the longest sequences first."""
        out, k, whole = [], 0, sum(self.stripes)
        for j in range(1, count + 1):
            step: Cut = [[] for _ in range(self.groups)]
            k = self._fill(step, k, whole * j / count if j < count else whole + 1)
            out += step
        return out if k == len(self.stripes) else None

    def _fill(self, into: Cut, first: int, until: float | int) -> int:
        """Fills micro-batches with sequences from `first` on, each where the fewest tokens are.

        Stops when nothing fits, or when the total tokens are nearest to `until`; returns the first
        sequence left.
        """
        heap = [(0, i) for i in range(len(into))]
        done = sum(self.stripes[:first])
        for k in range(first, len(self.stripes)):
            c = self.stripes[k]
            load, i = heap[0]
            if done + 0.5 * c >= until or load + c > self.capacity:
                return k
            into[i].append(k)
            heapq.heapreplace(heap, (load + c, i))
            done += c
        return len(self.stripes)

    # Parts ----------------------------------------------------------------------------------------

    def packed(self, members: list[int]) -> Part:
        """The part with all members distributed."""
        stripes = sum(map(self.stripes.__getitem__, members))
        shared = sum(map(self.shared.__getitem__, members))
        return Part(members, [-1] * len(members), 0, stripes, 0.0, float(shared))

    def printed(self, members: list[int]) -> Part | None:
        """The part by the paper's rule, repaired; None if it fails."""
        places = rules.printed(*self._of(members[::-1]), parts=self.parts, capacity=self.capacity)
        return None if places is None else self._part(members, places[::-1])

    def balanced(self, members: list[int], caps: Shape | None = None) -> Part | None:
        """The part by the balance rule; `caps`: most local and distributed tokens of a rank."""
        local, shared = caps or (self.capacity, self.capacity)
        places = rules.balanced(
            *self._of(members),
            parts=self.parts,
            capacity=self.capacity,
            local=local,
            shared=shared,
        )
        return None if places is None else self._part(members, places)

    def _of(self, members: list[int]) -> tuple[list[int], list[int], list[float]]:
        return (
            list(map(self.lengths.__getitem__, members)),
            list(map(self.stripes.__getitem__, members)),
            list(map(self.weights.__getitem__, members)),
        )

    def _part(self, members: list[int], places: list[int]) -> Part:
        used, scores = [0] * self.parts, [0.0] * self.parts
        spread, shared = 0, 0.0
        for k, t in zip(members, places, strict=True):
            if t < 0:
                spread += self.stripes[k]
                shared += self.shared[k]
            else:
                used[t] += self.lengths[k]
                scores[t] += self.attention[k]
        return Part(members, places, max(used), spread, max(scores), shared)

    # Micro-steps ----------------------------------------------------------------------------------

    def seconds(self, shape: Shape, parts: Sequence[Part]) -> float:
        """Seconds of the slowest group, as `Cost.seconds`; the shape's terms are computed once."""
        sent = self.cost.exchange(shape.distributed, self.parts)
        mine = self.cost.products(shape.local)
        rest = self.cost.products(shape.columns) - mine
        kept = self.cost.overlap
        slowest = max(
            [max(sent, mine + p.attention + kept * p.shared) + (1 - kept) * p.shared for p in parts]
        )
        return self.cost.micro_seconds + rest + slowest

    def planned(self, parts: Sequence[Part]) -> Plan:
        """A plan of parts in any order, each combined with parts of similar size."""
        order = sorted(parts, key=lambda p: (-p.distributed, -p.local, p.members))
        steps = [
            self._joined(order[i : i + self.groups]) for i in range(0, len(order), self.groups)
        ]
        return self.summed([step for step in steps if step[0].columns])

    def summed(self, steps: list[tuple[Shape, list[Part]]]) -> Plan:
        """The plan of these micro-steps."""
        return Plan(self.cost.step_seconds + sum(self.seconds(*step) for step in steps), steps)

    def shape(self, parts: Sequence[Part]) -> Shape | None:
        """The shape that holds all groups' parts, exact or an allowed one; None if none does."""
        local, shared = max([p.local for p in parts]), max([p.distributed for p in parts])
        if self.shapes is None:
            return Shape(local, shared) if local + shared <= self.capacity else None
        for s in self.shapes:
            if local <= s.local and shared <= s.distributed:
                return s
        return None

    def _joined(self, parts: list[Part]) -> tuple[Shape, list[Part]]:
        """A micro-step of these parts, or of the same sequences placed again if no shape holds it.

        Every group is then planned within the first shape in which all fit. If there is none, all
        sequences are distributed, which always fits.
        """
        shape = self.shape(parts)
        if shape is not None:
            return shape, parts
        for caps in self.shapes or self._eighths():
            again = self._within(caps, parts)
            if again is not None:
                return caps if self.shapes else self.shape(again) or caps, again
        again = [self.packed(p.members) for p in parts]
        return self.shape(again) or Shape(0, self.capacity), again

    def pooled(self, plan: Plan) -> Plan:
        """The same micro-steps with sequences moved between groups, where that is faster."""
        return self.summed([self._pooled(*step) for step in plan.steps])

    def _pooled(self, shape: Shape, parts: list[Part]) -> tuple[Shape, list[Part]]:
        members = sorted(k for p in parts for k in p.members)
        best = (self.seconds(shape, parts), shape, parts)
        again = self.pool(members, self._depths(members))
        return min(best, again or best, key=lambda b: b[0])[1:]

    def pool(
        self, members: list[int], depths: Sequence[int]
    ) -> tuple[float, Shape, list[Part]] | None:
        """A micro-step of these members by `rules.pooled`: its seconds, its shape, its parts.

        Args:
            depths: sizes to try for the distributed part.
        """
        found = []
        for shared in depths:
            parts = self._levelled_out(members, shared)
            held = None if parts is None else self.shape(parts)
            if held is not None:
                found.append((self.seconds(held, parts), held, parts))
        return min(found, key=lambda b: b[0], default=None)

    def _depths(self, members: list[int]) -> list[int]:
        """Sizes to try for a rank's distributed part, in tokens.

        Those that let all above some share of the fair load be distributed, and those of shapes.
        """
        fair = sum(map(self.lengths.__getitem__, members)) / (self.groups * self.parts)
        found = {0}
        for share in _SHARES_OF_FAIR:
            heap = [0] * self.groups
            for k in members:
                if self.lengths[k] <= share * fair:
                    break
                heapq.heapreplace(heap, heap[0] + self.stripes[k])
            found.add(max(heap))
        allowed = {s.distributed for s in self.shapes or ()}
        return sorted(d for d in found | allowed if d <= self.capacity)

    def _levelled_out(self, members: list[int], shared: int) -> list[Part] | None:
        lengths, stripes, _ = self._of(members)
        places = rules.pooled(
            lengths,
            stripes,
            groups=self.groups,
            parts=self.parts,
            capacity=self.capacity,
            shared=shared,
        )
        if places is None:
            return None
        there: list[tuple[list[int], list[int]]] = [([], []) for _ in range(self.groups)]
        for k, (g, t) in zip(members, places, strict=True):
            there[g][0].append(k)
            there[g][1].append(t)
        return [self._part(*one) for one in there]

    def _within(self, caps: Shape, parts: list[Part]) -> list[Part] | None:
        out = []
        for p in parts:
            again = self.balanced(p.members, caps)
            if again is None:
                return None
            out.append(again)
        return out

    def _eighths(self) -> list[Shape]:
        """Shapes to try where any is allowed: some eighths of the capacity are distributed."""
        shared = [self.capacity * e // 8 for e in range(1, 8)]
        return [Shape(self.capacity - d, d) for d in shared]

    def schedule(self, plan: Plan, rule: str, candidates: dict[str, float]) -> Assignment:
        """Converts a plan to an assignment, with the sequences in their given order."""
        step, group, rank = (np.zeros(len(self.lengths), np.int32) for _ in range(3))
        for i, (_, parts) in enumerate(plan.steps):
            for g, p in enumerate(parts):
                where = self.order[p.members]
                step[where], group[where], rank[where] = i, g, p.places
        return Assignment(
            lengths=self.given,
            groups=self.groups,
            parts=self.parts,
            capacity=self.capacity,
            cost=self.cost,
            shapes=tuple(shape for shape, _ in plan.steps),
            step=step,
            group=group,
            rank=rank,
            seconds=float(plan.seconds),
            rule=rule,
            candidates={name: float(seconds) for name, seconds in candidates.items()},
        )


def _checked(
    lengths: Sequence[int] | np.ndarray, groups: int, parts: int, capacity: int
) -> np.ndarray:
    if min(groups, parts, capacity) < 1:
        raise ValueError(f"{groups=}, {parts=} and {capacity=} must all be at least 1.")
    n = np.asarray(lengths)
    if n.ndim != 1 or not n.size or not np.issubdtype(n.dtype, np.integer):
        raise ValueError(f"lengths must be a list of integers, but are {n.dtype}{list(n.shape)}.")
    n = n.astype(np.int64)
    if n.min() < 1:
        raise ValueError(f"sequence {n.argmin()} has {n.min()} tokens, but needs at least 1.")
    if n.max() > capacity * parts:
        raise ValueError(
            f"sequence {n.argmax()} has {n.max()} tokens, but {parts} ranks of {capacity} tokens "
            f"hold at most {capacity * parts}."
        )
    return n

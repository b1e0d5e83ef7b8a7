"""A global batch of sequences of many lengths, over data-parallel groups and a sequence axis.

Skrull (arXiv:2505.19609): within a micro-step a short sequence is *local*, whole on one rank and
without communication, and a long one *distributed* over the ranks of its group. Which, and which
sequences make a micro-step, is chosen from lengths alone: as the paper prints it (with its
roll-back repaired), by balance, and all distributed; the least estimated time wins, so that a plan
is never estimated slower than packed context parallelism. It fits memory by construction.

All groups run one program at a micro-step, so they share its shape and wait for the slowest: what
is minimised is the sum over micro-steps of the largest time of a group, not, as in the paper's
equation 8, the largest sum. The same batch in another order is planned the same way, and ties go
to the lower index, so every host can plan for itself.

`skrull_layout` makes arrays of a schedule, `lattice` keeps its shapes few.
"""

import dataclasses
import heapq
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxrl_eff.data import skrull_rules
from jaxrl_eff.data.skrull_cost import Cost

SLACKS = (0.0, 0.1, 0.3)  # over the fair load, of the balance rule
MORE = 3  # micro-steps to try beyond the fewest
_EIGHTHS = 8  # of the room, for the shapes of a micro-step whose groups fit one by one only


class Shape(NamedTuple):
    """Columns of every rank's row in one micro-step, local sequences first."""

    local: int
    distributed: int

    @property
    def columns(self) -> int:
        return self.local + self.distributed


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """Where every sequence of a global batch is computed.

    Attributes:
        lengths: int64 [K], tokens of each sequence.
        groups, parts, room: data-parallel groups, ranks of the sequence axis, tokens of a rank.
        cost: that it was judged by.
        shapes: of each micro-step.
        step, group: int32 [K].
        rank: int32 [K], within the group; -1: distributed over it.
        seconds: estimated, of the whole batch.
        rule: who found it.
        candidates: rule -> estimated seconds of the best schedule that it found.
    """

    lengths: np.ndarray
    groups: int
    parts: int
    room: int
    cost: Cost
    shapes: tuple[Shape, ...]
    step: np.ndarray
    group: np.ndarray
    rank: np.ndarray
    seconds: float
    rule: str
    candidates: dict[str, float]

    def stripes(self) -> np.ndarray:
        """int64 [K]: tokens of each sequence on every rank, were it distributed."""
        return -(-self.lengths // self.parts)

    def tokens(self) -> np.ndarray:
        """int64 [steps, groups, parts, 2]: columns in use by local and by distributed sequences."""
        out = np.zeros((len(self.shapes), self.groups, self.parts, 2), np.int64)
        here = self.rank >= 0
        at = (self.step[here], self.group[here], self.rank[here], 0)
        np.add.at(out, at, self.lengths[here])
        over = np.zeros(out.shape[:2], np.int64)
        np.add.at(over, (self.step[~here], self.group[~here]), self.stripes()[~here])
        out[..., 1] = over[..., None]
        return out

    def attention(self) -> np.ndarray:
        """float64 [steps, groups, parts, 2]: seconds of attention, local and distributed."""
        out = np.zeros((len(self.shapes), self.groups, self.parts, 2))
        here = self.rank >= 0
        at = (self.step[here], self.group[here], self.rank[here], 0)
        np.add.at(out, at, self.cost.attention(self.lengths[here]))
        over = np.zeros(out.shape[:2])
        each = self.cost.attention(self.lengths[~here], self.parts)
        np.add.at(over, (self.step[~here], self.group[~here]), each)
        out[..., 1] = over[..., None]
        return out

    def rank_seconds(self) -> np.ndarray:
        """float64 [steps, groups, parts]: estimated, each rank for itself."""
        attention = self.attention()
        return np.array(
            [
                [
                    [
                        self.cost.seconds(*shape, self.parts, float(mine), float(shared))
                        for mine, shared in ranks
                    ]
                    for ranks in groups
                ]
                for shape, groups in zip(self.shapes, attention, strict=True)
            ]
        ).reshape(attention.shape[:-1])

    def terms(self) -> np.ndarray:
        """What the slowest ranks pay, float64 [6]: the row of this step for `refit`."""
        out, attention = np.zeros(6), self.attention()
        slowest = self.rank_seconds().reshape(len(self.shapes), -1).argmax(1)
        for shape, at, seconds in zip(self.shapes, slowest, attention, strict=True):
            mine, shared = seconds.reshape(-1, 2)[at]
            out += self.cost.terms(*shape, self.parts, float(mine), float(shared))
        out[0] = 1.0
        return out


class _Part(NamedTuple):
    """What one group does in one micro-step."""

    members: list[int]  # of the sorted lengths
    places: list[int]
    local: int  # tokens of the fullest rank
    distributed: int
    attention: float  # seconds of the slowest rank
    shared: float


class _Plan(NamedTuple):
    seconds: float
    steps: list[tuple[Shape, list[_Part]]]


Rule = Callable[[list[int]], list[int] | None]


class _Batch:
    """The lengths of a batch, longest first, with what a rule asks of them."""

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        groups: int,
        parts: int,
        room: int,
        cost: Cost,
        shapes: Sequence[Shape] | None,
    ):
        self.given = _checked(lengths, groups, parts, room)
        self.groups, self.parts, self.room, self.cost = groups, parts, room, cost
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
        if Shape(0, self.room) not in shapes or any(s.columns > self.room for s in shapes):
            raise ValueError(
                f"shapes must be at most {self.room} columns, and one must be "
                f"(0, {self.room}), which holds whatever fits; they are {shapes}."
            )
        return sorted(shapes, key=lambda s: (self.cost.seconds(*s, self.parts), s))

    # Rules, each on one micro-batch, longest first ------------------------------------------------

    def packed(self, members: list[int]) -> list[int]:
        return skrull_rules.distributed(members)

    def printed(self, members: list[int]) -> list[int] | None:
        back = members[::-1]
        places = skrull_rules.printed(*self._of(back), parts=self.parts, room=self.room)
        return None if places is None else places[::-1]

    def balanced(
        self, members: list[int], *, slack: float, caps: Shape | None = None
    ) -> list[int] | None:
        local, shared = caps or (None, None)
        return skrull_rules.balanced(
            *self._of(members),
            parts=self.parts,
            room=self.room,
            slack=slack,
            local=local,
            shared=shared,
        )

    def _of(self, members: list[int]) -> tuple[list[int], list[int], list[float]]:
        return (
            [self.lengths[k] for k in members],
            [self.stripes[k] for k in members],
            [self.weights[k] for k in members],
        )

    # Micro-batches --------------------------------------------------------------------------------

    def shares(self) -> list[list[int]]:
        """For each group its sequences, longest first: each to the group with the least to do."""
        heap = [(0.0, g) for g in range(self.groups)]
        out: list[list[int]] = [[] for _ in range(self.groups)]
        for k, w in enumerate(self.weights):
            load, g = heap[0]
            out[g].append(k)
            heapq.heapreplace(heap, (load + w, g))
        return out

    def cut(self, shares: list[list[int]], count: int) -> list[list[list[int]]] | None:
        """Every group's micro-batches, or None if one does not fit a rank distributed whole.

        Slices of the sorted lengths with a stride, so that each has long and short ones. What fits
        distributed can run beside any other group's micro-batch.
        """
        out = []
        for share in shares:
            slices = [share[j::count] for j in range(count)]
            if any(sum(map(self.stripes.__getitem__, s)) > self.room for s in slices):
                return None
            out.append(slices)
        return out

    def cuts(self, more: int) -> list[tuple[int, list[list[list[int]]]]]:
        """(count, micro-batches) of the fewest micro-steps that fit, and of up to `more` beyond."""
        shares = self.shares()
        whole = max(sum(map(self.stripes.__getitem__, share)) for share in shares)
        count, out = max(1, -(-whole // self.room)), []
        longest = max(map(len, shares))
        while len(out) <= more and (not out or count <= longest):
            found = self.cut(shares, count)
            if found is not None:
                out.append((count, found))
            count += 1
        return out

    def part(self, members: list[int], places: list[int]) -> _Part:
        used, scores = [0] * self.parts, [0.0] * self.parts
        spread, shared = 0, 0.0
        lengths, stripes = self.lengths, self.stripes
        for k, t in zip(members, places, strict=True):
            if t < 0:
                spread += stripes[k]
                shared += self.shared[k]
            else:
                used[t] += lengths[k]
                scores[t] += self.attention[k]
        return _Part(members, places, max(used), spread, max(scores), shared)

    # Micro-steps ----------------------------------------------------------------------------------

    def seconds(self, shape: Shape, parts: Sequence[_Part]) -> float:
        return max(
            self.cost.seconds(*shape, self.parts, p.attention, p.shared) for p in parts
        )

    def shape(self, parts: Sequence[_Part]) -> Shape | None:
        """The shape that holds all groups' parts, or None."""
        local, spread = max(p.local for p in parts), max(p.distributed for p in parts)
        if self.shapes is None:
            return Shape(local, spread) if local + spread <= self.room else None
        for s in self.shapes:
            if local <= s.local and spread <= s.distributed:
                return s
        return None

    def joined(self, parts: list[_Part]) -> tuple[Shape, list[_Part]]:
        """A micro-step of these parts; where no shape holds them, of the same sequences.

        Then every group is planned anew within the first shape in which all can be. One always is:
        that in which all is distributed.
        """
        shape = self.shape(parts)
        if shape is not None:
            return shape, parts
        for caps in self.shapes or self._eighths():
            again = []
            for p in parts:
                places = self.balanced(p.members, slack=SLACKS[1], caps=caps)
                if places is None:
                    break
                again.append(self.part(p.members, places))
            else:
                held = caps if self.shapes else self.shape(again)
                if held is not None:
                    return held, again
        again = [self.part(p.members, self.packed(p.members)) for p in parts]
        return self.shape(again) or Shape(0, self.room), again

    def _eighths(self) -> list[Shape]:
        shared = [self.room * e // _EIGHTHS for e in range(1, _EIGHTHS)]
        return [Shape(self.room - d, d) for d in shared]

    def planned(self, parts: list[list[_Part]]) -> _Plan:
        """Every group's parts, those with most to share first, side by side."""
        aligned = [sorted(ps, key=lambda p: (-p.distributed, -p.local, p.members)) for ps in parts]
        steps = [self.joined(list(side)) for side in zip(*aligned, strict=True)]
        steps = [(shape, side) for shape, side in steps if shape.columns]
        total = self.cost.step_seconds + sum(self.seconds(*step) for step in steps)
        return _Plan(total, steps)

    def finished(self, plan: _Plan, rule: str, candidates: dict[str, float]) -> Schedule:
        step, group, rank = (np.zeros(len(self.lengths), np.int32) for _ in range(3))
        for i, (_, parts) in enumerate(plan.steps):
            for g, p in enumerate(parts):
                where = self.order[p.members]
                step[where], group[where], rank[where] = i, g, p.places
        return Schedule(
            lengths=self.given,
            groups=self.groups,
            parts=self.parts,
            room=self.room,
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
    lengths: Sequence[int] | np.ndarray, groups: int, parts: int, room: int
) -> np.ndarray:
    if min(groups, parts, room) < 1:
        raise ValueError(f"{groups=}, {parts=} and {room=} must all be at least 1.")
    n = np.asarray(lengths)
    if n.ndim != 1 or not n.size or not np.issubdtype(n.dtype, np.integer):
        raise ValueError(f"lengths must be a list of integers, but are {n.dtype}{list(n.shape)}.")
    n = n.astype(np.int64)
    if n.min() < 1:
        raise ValueError(f"sequence {n.argmin()} has {n.min()} tokens, but needs at least 1.")
    if n.max() > room * parts:
        raise ValueError(
            f"sequence {n.argmax()} has {n.max()} tokens, but {parts} ranks of {room} tokens hold "
            f"at most {room * parts}."
        )
    return n


def plan(
    lengths: Sequence[int] | np.ndarray,
    *,
    groups: int,
    parts: int,
    room: int,
    cost: Cost,
    shapes: Sequence[Shape] | None = None,
    more: int = MORE,
    slacks: Sequence[float] = SLACKS,
) -> Schedule:
    """The schedule of a global batch that is estimated to take least.

    Sequences are shared out over the groups by their work, longest first. For every number of
    micro-steps, from the fewest to `more` beyond, every rule places those of each micro-batch;
    micro-batches of all groups are put side by side by what they distribute. `mixed` takes for
    each micro-batch the rule that is best for it alone.

    Args:
        lengths: tokens of each sequence, K.
        groups, parts: data-parallel groups, and ranks of each along the sequence axis.
        room: tokens that a rank holds.
        shapes: that a micro-step may have, see `lattice`; None: any.
        more, slacks: what is tried.

    Raises:
        ValueError: a sequence is longer than room * parts, or empty.
    """
    batch = _Batch(lengths, groups, parts, room, cost, shapes)
    rules: dict[str, Rule] = {"packed": batch.packed, "printed": batch.printed}
    for slack in slacks:
        rules[f"balance {slack:g}"] = _with_slack(batch, slack)
    best, candidates = None, {}
    for count, cut in batch.cuts(more):
        tried: dict[str, list[list[_Part]]] = {}
        for name, rule in rules.items():
            found = _placed(batch, rule, cut)
            if found is not None:
                tried[name] = found
        tried["mixed"] = _mixed(batch, list(tried.values()))
        for name, parts_ in tried.items():
            found = batch.planned(parts_)
            candidates[name] = min(found.seconds, candidates.get(name, found.seconds))
            if best is None or found.seconds < best[0].seconds:
                best = found, f"{name}, {_count(count)}"
    return batch.finished(*best, candidates)


def _with_slack(batch: _Batch, slack: float) -> Rule:
    return lambda members: batch.balanced(members, slack=slack)


def _count(n: int) -> str:
    return f"{n} micro-step{'s' * (n > 1)}"


def _placed(batch: _Batch, rule: Rule, cut: list[list[list[int]]]) -> list[list[_Part]] | None:
    out = []
    for slices in cut:
        parts = []
        for members in slices:
            places = rule(members)
            if places is None:
                return None
            parts.append(batch.part(members, places))
        out.append(parts)
    return out


def _mixed(batch: _Batch, tried: list[list[list[_Part]]]) -> list[list[_Part]]:
    def alone(p: _Part) -> float:
        return batch.cost.seconds(p.local, p.distributed, batch.parts, p.attention, p.shared)

    return [
        [min(same, key=alone) for same in zip(*slices, strict=True)]
        for slices in zip(*tried, strict=True)
    ]


# Rivals ---------------------------------------------------------------------------------------


def unpacked(
    lengths: Sequence[int] | np.ndarray, *, groups: int, parts: int, room: int, cost: Cost
) -> Schedule:
    """One sequence a group and micro-step, in the order given, over all ranks."""
    return _one_by_one("unpacked", lengths, groups, parts, room, cost, in_order=True)


def by_length(
    lengths: Sequence[int] | np.ndarray, *, groups: int, parts: int, room: int, cost: Cost
) -> Schedule:
    """As `unpacked`, but sorted, so that groups wait less for each other (LongAlign,
    arXiv:2401.18058)."""
    return _one_by_one("sorted", lengths, groups, parts, room, cost, in_order=False)


def _one_by_one(name, lengths, groups, parts, room, cost, *, in_order: bool) -> Schedule:
    batch = _Batch(lengths, groups, parts, room, cost, None)
    order = np.argsort(batch.order).tolist() if in_order else list(range(len(batch.lengths)))
    empty = batch.part([], [])
    steps = []
    for start in range(0, len(order), groups):
        side = [batch.part([k], [-1]) for k in order[start : start + groups]]
        side += [empty] * (groups - len(side))
        steps.append((batch.shape(side), side))
    total = cost.step_seconds + sum(batch.seconds(*step) for step in steps)
    return batch.finished(_Plan(total, steps), name, {name: total})


def packed(
    lengths: Sequence[int] | np.ndarray,
    *,
    groups: int,
    parts: int,
    room: int,
    cost: Cost,
    shapes: Sequence[Shape] | None = None,
    more: int = MORE,
) -> Schedule:
    """Packed context parallelism: every sequence over all ranks, in the best number of steps."""
    batch = _Batch(lengths, groups, parts, room, cost, shapes)
    found = [batch.planned(_placed(batch, batch.packed, cut)) for _, cut in batch.cuts(more)]
    best = min(found, key=lambda p: p.seconds)
    return batch.finished(best, "packed", {"packed": best.seconds})


def printed(
    lengths: Sequence[int] | np.ndarray,
    *,
    groups: int,
    parts: int,
    room: int,
    cost: Cost,
    shapes: Sequence[Shape] | None = None,
) -> Schedule:
    """Skrull as printed but for its roll-back: the fewest micro-steps in which its rule succeeds."""
    batch = _Batch(lengths, groups, parts, room, cost, shapes)
    for _, cut in batch.cuts(len(batch.lengths)):
        placed = _placed(batch, batch.printed, cut)
        if placed is not None:
            found = batch.planned(placed)
            return batch.finished(found, "printed", {"printed": found.seconds})
    raise AssertionError("a sequence alone always has a place")


def rivals(schedule: Schedule, *, shapes: Sequence[Shape] | None = None) -> dict[str, Schedule]:
    """The same batch by other rules: name -> schedule.

    Args:
        shapes: for those that pack. Those that take one sequence at a time have exact ones, which
            favours them.
    """
    same = {
        "groups": schedule.groups,
        "parts": schedule.parts,
        "room": schedule.room,
        "cost": schedule.cost,
    }
    return {
        "unpacked": unpacked(schedule.lengths, **same),
        "sorted": by_length(schedule.lengths, **same),
        "packed": packed(schedule.lengths, **same, shapes=shapes),
        "printed": printed(schedule.lengths, **same, shapes=shapes),
    }


# What a schedule is like ----------------------------------------------------------------------


class Quality(NamedTuple):
    """A schedule in numbers.

    Attributes:
        seconds: estimated.
        over_limit: seconds over those of perfect balance, see `Cost.perfect`.
        steps: micro-steps.
        padding: share of columns without a token.
        distributed: share of tokens in distributed sequences.
        time_balance: mean over max of the ranks' estimated seconds, micro-steps added up.
        token_balance: the same of their tokens.
    """

    seconds: float
    over_limit: float
    steps: int
    padding: float
    distributed: float
    time_balance: float
    token_balance: float


def quality(schedule: Schedule) -> Quality:
    """What a schedule costs and why."""
    ranks = schedule.groups * schedule.parts
    columns = sum(shape.columns for shape in schedule.shapes)
    total = int(schedule.lengths.sum())
    tokens = schedule.tokens().sum(-1).reshape(-1, ranks)
    seconds = schedule.rank_seconds().reshape(-1, ranks)
    limit = schedule.cost.perfect(schedule.lengths, ranks)
    return Quality(
        seconds=schedule.seconds,
        over_limit=schedule.seconds / limit,
        steps=len(schedule.shapes),
        padding=1 - total / (columns * ranks),
        distributed=float(schedule.lengths[schedule.rank < 0].sum()) / total,
        time_balance=float(seconds.mean(1).sum() / seconds.max(1).sum()),
        token_balance=float(tokens.mean(1).sum() / tokens.max(1).sum()),
    )


def report(schedule: Schedule, *, shapes: Sequence[Shape] | None = None) -> dict[str, Quality]:
    """A schedule, as `skrull`, and its rivals: name -> what each is like."""
    found = {"skrull": schedule, **rivals(schedule, shapes=shapes)}
    return {name: quality(s) for name, s in found.items()}

"""Assignment of a global batch's sequences to devices and micro-steps, and its estimated cost."""

import dataclasses
from typing import NamedTuple

import numpy as np

from jaxrl_eff.data.balance.cost import Cost


class Shape(NamedTuple):
    """Columns of every rank's row in one micro-step, local sequences first."""

    local: int
    distributed: int

    @property
    def columns(self) -> int:
        return self.local + self.distributed


@dataclasses.dataclass(frozen=True, eq=False)
class Assignment:
    """A schedule of a global batch: the micro-step, group and rank that compute each sequence.

    Attributes:
        lengths: int64 [K], tokens of each sequence.
        groups, parts, capacity: data-parallel groups, ranks of the sequence axis, and tokens that a
            rank can hold.
        cost: the cost model that estimated it.
        shapes: of each micro-step.
        step, group: int32 [K].
        rank: int32 [K], within the group; -1: distributed over it.
        seconds: estimated, of the whole batch.
        rule: name of the rule that found it.
        candidates: rule -> estimated seconds of the best schedule that it found.
    """

    lengths: np.ndarray
    groups: int
    parts: int
    capacity: int
    cost: Cost
    shapes: tuple[Shape, ...]
    step: np.ndarray
    group: np.ndarray
    rank: np.ndarray
    seconds: float
    rule: str
    candidates: dict[str, float]

    def stripes(self) -> np.ndarray:
        """int64 [K]: tokens of each sequence on every rank, if it were distributed."""
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
        """float64 [steps, groups, parts]: estimated seconds of each rank by itself."""
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
        """Cost terms of the slowest ranks, float64 [6]: a row for `refit`."""
        out, attention = np.zeros(6), self.attention()
        slowest = self.rank_seconds().reshape(len(self.shapes), -1).argmax(1)
        for shape, at, seconds in zip(self.shapes, slowest, attention, strict=True):
            mine, shared = seconds.reshape(-1, 2)[at]
            out += self.cost.terms(*shape, self.parts, float(mine), float(shared))
        out[0] = 1.0
        return out


class Quality(NamedTuple):
    """Quality measures of a schedule.

    Attributes:
        seconds: estimated.
        over_limit: seconds over those of perfect balance, see `Cost.perfect`.
        steps: number of micro-steps.
        padding: share of columns without a token.
        distributed: share of tokens in distributed sequences.
        time_balance: mean over max of the ranks' estimated seconds, each summed over micro-steps.
    """

    seconds: float
    over_limit: float
    steps: int
    padding: float
    distributed: float
    time_balance: float


def quality(schedule: Assignment) -> Quality:
    """Computes a schedule's quality measures."""
    ranks = schedule.groups * schedule.parts
    columns = sum(shape.columns for shape in schedule.shapes)
    total = int(schedule.lengths.sum())
    seconds = schedule.rank_seconds().reshape(-1, ranks)
    limit = schedule.cost.perfect(schedule.lengths, ranks)
    return Quality(
        seconds=schedule.seconds,
        over_limit=schedule.seconds / limit,
        steps=len(schedule.shapes),
        padding=1 - total / (columns * ranks),
        distributed=float(schedule.lengths[schedule.rank < 0].sum()) / total,
        time_balance=float(seconds.mean(1).sum() / seconds.max(1).sum()),
    )

"""Prices calls whose rows are packed by a schedule (`core.packed`).

A batch with the expected lengths is scheduled as a step would do it, with the same cost. Here a
placement's microbatch count sets the capacity of a device: with m microbatches it holds one m-th of
its fair share of tokens, but at least its part of the longest row.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np

from jaxrl_eff.data.balance import skrull
from jaxrl_eff.data.balance.cost import Cost
from jaxrl_eff.parallel.mesh import Placement
from jaxrl_eff.planner.clusters import Cluster
from jaxrl_eff.planner.problem import ExpectedRows, Lengths, Shape, Work
from jaxrl_eff.planner.schedule_cost import cost_on, model_of

SPARE = 1.25  # capacity over a device's fair share of tokens
MOST = 64  # sequences to schedule; a larger batch is scaled down in groups or in microbatches
PASSES = 3  # forward passes that a schedule's seconds cover


class Laid(NamedTuple):
    """The microbatches of one update or pass of a packed call.

    Attributes:
        steps: how many.
        columns: per device in one of them, padding included, on average; `largest`: at most.
        seconds: of training, without starting microbatches: those of the slowest devices, summed.
        exchange: seconds more for keys and values that no computation hides.
    """

    steps: int
    columns: float
    largest: int
    seconds: float
    exchange: float


def laid(work: Work, shape: Shape, p: Placement, c: Cluster) -> Laid:
    """Packs a call's rows for a placement.

    Raises:
        ValueError: the longest row does not fit, see `fits`.
    """
    cost = cost_on(
        c, model_of(shape), seq=p.seq, tensor=p.tensor, itemsize=int(shape.compute_bytes)
    )
    if shape.value:  # no vocabulary
        cost = dataclasses.replace(cost, linear=model_of(shape)._replace(vocab=1).linear)
    rows = max(1, work.rows // work.minibatches)
    return _laid(work.packed, rows, work.length, p.row_shards, p.seq, p.microbatches, cost)


def fits(work: Work, seq: int) -> bool:
    """Returns True if the longest row of a packed call fits on a `seq` axis of this size."""
    return not work.packed.room or work.packed.room * seq >= work.length


def batch(packed: ExpectedRows, rows: int) -> np.ndarray:
    """Lengths of `rows` rows, int64: quantiles of the expected distribution."""
    at = (np.arange(rows) + 0.5) / rows
    ends = np.cumsum(packed.responses.share)
    found = np.asarray(packed.responses.tokens)[
        np.minimum(np.searchsorted(ends, at), len(ends) - 1)
    ]
    return packed.prompt + found.astype(np.int64)


@functools.lru_cache(maxsize=1 << 14)
def _laid(
    packed: ExpectedRows,
    rows: int,
    longest: int,
    groups: int,
    parts: int,
    microbatches: int,
    cost: Cost,
) -> Laid:
    times = 1
    while rows > MOST and rows % 2 == 0:
        if groups % 2 == 0:
            rows, groups = rows // 2, groups // 2
        elif microbatches % 2 == 0 and not packed.room:
            rows, microbatches, times = rows // 2, microbatches // 2, 2 * times
        else:
            break
    lengths = np.minimum(batch(packed, rows), longest)
    fair = SPARE * float(lengths.sum()) / (groups * parts * microbatches)
    room = packed.room or math.ceil(max(fair, longest / parts))
    done = skrull.plan(
        lengths, groups=groups, parts=parts, room=room, cost=cost,
        more=0, slacks=skrull.SLACKS[:1], finalists=1,
    )  # fmt: skip
    steps = len(done.shapes)
    alone = dataclasses.replace(done, cost=dataclasses.replace(cost, wire=0, laps=0))
    slowest = alone.rank_seconds().reshape(steps, -1).max(1).sum()
    columns = [s.columns for s in done.shapes]
    return Laid(
        times * steps, sum(columns) / steps, max(columns),
        times * (float(slowest) - steps * cost.micro_seconds),
        times * max(0.0, done.seconds - cost.step_seconds - float(slowest)),
    )  # fmt: skip


def tokens(work: Work) -> float:
    """Tokens of all rows of a call: expected tokens if packed, else with padding."""
    if work.packed is None:
        return float(work.rows * work.length)
    return work.rows * min(work.packed.mean, float(work.length))


def told(work: Work) -> str:
    """Describes a packed call in words."""
    return (
        f"{work.name}: packed, {tokens(work):,.0f} tokens expected of {work.rows * work.length:,} "
        "padded ones"
    )


def guessed(responses: np.ndarray, levels: int = 32) -> Lengths:
    """Lengths with at most `levels` values: means, rounded up, of equal shares of `responses`."""
    parts = np.array_split(np.sort(responses), levels)
    found = [math.ceil(part.mean()) for part in parts if len(part)]
    values, counts = np.unique(found, return_counts=True)
    return Lengths(tuple(values.tolist()), tuple((counts / counts.sum()).tolist()))

"""Cost of rows that are packed by a schedule, and of calls with such rows (`core.packed`).

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
from jaxrl_eff.models import LMConfig
from jaxrl_eff.parallel.mesh import Placement
from jaxrl_eff.planner.clusters import Cluster
from jaxrl_eff.planner.problem import ExpectedRows, Lengths, Work
from jaxrl_eff.planner.shares import compute_bytes, head_params, layer_params

SPARE = 1.25  # capacity over a device's fair share of tokens
MOST = 64  # sequences to schedule; a larger batch is scaled down in groups or in microbatches
PASSES = 3  # forward and backward, in forward passes


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


def laid(work: Work, lm: LMConfig, p: Placement, c: Cluster) -> Laid:
    """Packs a call's rows for a placement.

    Raises:
        ValueError: the longest row does not fit, see `fits`.
    """
    cost = cost_on(c, lm, seq=p.seq, tensor=p.tensor)
    rows = max(1, work.rows // work.minibatches)
    return _laid(work.packed, rows, work.length, p.row_shards, p.seq, p.microbatches, cost)


def cost_on(cluster: Cluster, lm: LMConfig, *, seq: int, tensor: int) -> Cost:
    """Cost of training micro-batches, with neighbors on the `seq` axis next to each other.

    The ring sends while it computes, so attention of distributed sequences hides the exchange.

    Args:
        seq, tensor: sizes of these axes.
    """
    if seq * tensor <= cluster.domain:
        rate, start = cluster.link_bytes_per_s * cluster.link_efficiency, cluster.link_latency
    else:
        rate, start = cluster.nic_bytes_per_s * cluster.nic_efficiency, cluster.nic_latency
    return cost_of(
        lm,
        flops_per_s=tensor * cluster.train_efficiency * cluster.peak(compute_bytes(lm)),
        bytes_per_s=tensor * rate,  # each tensor rank sends its share of the heads
        hop_seconds=start,
        attention_half=cluster.attention_half,
        overlap=1.0,
    )


def cost_of(
    lm: LMConfig,
    *,
    flops_per_s: float | int,
    bytes_per_s: float | int,
    attention_share: float | int = 0.75,
    **others: float | int,
) -> Cost:
    """Cost of training a model on ranks with these rates.

    Args:
        attention_share: share of `flops_per_s` that attention reaches.
        others: further fields of `Cost`.
    """
    return Cost(
        linear=PASSES * 2 * (lm.layers * layer_params(lm) + head_params(lm)),
        square=PASSES * 2 * lm.layers * lm.heads * lm.head_dim,
        # Keys and values take two bytes per number, forward and again backward; their gradients
        # four.
        bytes_per_token=lm.layers * 16 * lm.kv_heads * lm.head_dim,
        ring_rounds=3 * lm.layers,  # keys and values forward and backward, gradients backward
        flops_per_s=flops_per_s,
        attention_per_s=attention_share * flops_per_s,
        window=lm.window or 0,
        windowed=sum(lm.windowed) / lm.layers,
        bytes_per_s=bytes_per_s,
        **others,
    )


def fits(work: Work, seq: int) -> bool:
    """Returns True if the longest row of a packed call fits on a `seq` axis of this size."""
    return not work.packed.capacity or work.packed.capacity * seq >= work.length


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
        elif microbatches % 2 == 0 and not packed.capacity:
            rows, microbatches, times = rows // 2, microbatches // 2, 2 * times
        else:
            break
    lengths = np.minimum(batch(packed, rows), longest)
    fair = SPARE * float(lengths.sum()) / (groups * parts * microbatches)
    capacity = packed.capacity or math.ceil(max(fair, longest / parts))
    done = skrull.plan(
        lengths, groups=groups, parts=parts, capacity=capacity, cost=cost,
        more=0,
    )  # fmt: skip
    steps = len(done.shapes)
    alone = dataclasses.replace(
        done, cost=dataclasses.replace(cost, bytes_per_token=0, ring_rounds=0)
    )
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


def describe(work: Work) -> str:
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

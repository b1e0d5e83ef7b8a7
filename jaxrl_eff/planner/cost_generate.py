"""Cost of a generate call: one pass over the prompts, then a loop over tokens.

The loop ends with its longest row, so its number of steps is the expected maximum of the lengths.
With b rows and c cached tokens on a device a step takes, for each layer,

    max(2 w b / (t F), w / (t B)) + KV(b, c) / (t B) + 2 all-reduces + layer_seconds

with w matrix entries, t = tensor, F and B the rates of products and of memory.
"""

import functools
import math

from jaxrl_eff.parallel.mesh import Placement
from jaxrl_eff.planner import passes
from jaxrl_eff.planner.clusters import Cluster
from jaxrl_eff.planner.collectives import all_reduce, gather, grid, hand_on
from jaxrl_eff.planner.problem import Lengths, Role, Work
from jaxrl_eff.planner.shares import (
    compute_bytes,
    head_params,
    layer_share,
    params_share,
    seen,
    split,
    state_bytes,
)


@functools.lru_cache(maxsize=4096)
def longest(lengths: Lengths, rows: int) -> float:
    """Expected longest of `rows` independent lengths: sum_i l_i (F_i^n - F_{i-1}^n)."""
    total, below, before = 0.0, 0.0, 0.0
    for tokens, share in zip(lengths.tokens, lengths.share, strict=True):
        below = min(1.0, below + share)
        now = below ** max(1, rows)
        total += tokens * (now - before)
        before = now
    return total + lengths.tokens[-1] * (1.0 - before)


def quantile(lengths: Lengths, q: float | int) -> float:
    """Smallest length that a share `q` of the rows does not exceed."""
    below = 0.0
    for tokens, share in zip(lengths.tokens, lengths.share, strict=True):
        below += share
        if below >= q - 1e-9:
            return float(tokens)
    return float(lengths.tokens[-1])


def phases(work: Work, rows: int) -> list[tuple[float, float, float]]:
    """Phases (share of the rows, first step, last step) of a decoding loop between compactions.

    The k-th compaction leaves a batch of a share 2^-k, as soon as no more rows than that are
    unfinished. The loop ends with its longest row.
    """
    lengths = work.responses or Lengths.all(work.max_new)
    end = longest(lengths, rows)
    out, start, share = [], 0.0, 1.0
    for _ in range(work.compactions):
        if rows * share <= 1:
            break
        stop = min(end, max(start, quantile(lengths, 1 - share / 2)))
        out.append((share, start, stop))
        start, share = stop, math.ceil(rows * share / 2) / rows
    out.append((share, start, max(start, end)))
    return [x for x in out if x[2] > x[1]] or [(1.0, 0.0, end)]


def _slots(work: Work, start: float | int, stop: float | int) -> float:
    """Cache slots that a step reads, on average over steps `start` to `stop`.

    With `growths` = g the cache first has capacity for max_new / g tokens and grows by as much when
    that is used up; with 0 a step reads only what has been written.
    """
    if not work.growths:
        return work.prompt + (start + stop) / 2
    each, total, at = work.max_new / work.growths, 0.0, start
    while at < stop - 1e-9:
        capacity = (math.floor(at / each + 1e-9) + 1) * each
        until = min(stop, capacity)
        total += (until - at) * capacity
        at = until
    return work.prompt + total / (stop - start)


def generate(
    role: Role, work: Work, p: Placement, c: Cluster
) -> tuple[dict[str, float], float, float]:
    """Seconds by part, and static and active bytes of a device; see `cost.Cost`."""
    lm, g, cut, s = role.lm, grid(p, c), split(role.lm, p), p.stage
    split_rows = max(p.microbatches, s)  # microbatches follow each other through the stages
    groups = max(1, split_rows // s)
    rows = work.rows / (p.row_shards * split_rows)
    prompts = (work.prompts or work.rows) / (p.row_shards * split_rows)
    param, _ = state_bytes(role, p)
    whole = gathered = 0.0
    if cut.fsdp > 1:
        whole = params_share(lm, p) * cut.fsdp * min(compute_bytes(lm), role.param_bytes)
        gathered = gather(whole, g.fsdp, c)

    total = _decode(role, work, p, c, rows, groups)
    one = passes.forward(lm, p, c, prompts, work.prompt, prompts, c.forward_efficiency)
    total["compute"] += groups * s * one.compute
    total["memory"] += groups * s * one.memory
    total["tensor"] += groups * s * one.tensor
    total["bubble"] += groups * (s - 1) * one.total
    total["data"] = gathered  # once: XLA hoists the gather out of the loop over tokens
    total["overhead"] += groups * s * one.overhead + c.launch
    active = _cache_bytes(role, work, p, rows * s) + 2 * 4.0 * rows * lm.vocab / cut.vocab
    active += passes.layer_activations(lm, prompts * work.prompt, cut)
    active += whole
    if p.offload == "params":  # every step reads every layer, so all are brought in once
        total["offload"] = param / (c.host_bytes_per_s * c.host_efficiency)
        active, param = active + param, 0.0
    return total, param, active


def _decode(
    role: Role, work: Work, p: Placement, c: Cluster, rows: float | int, groups: int
) -> dict[str, float]:
    """Seconds by part of the loop over tokens.

    Args:
        rows: of a device in one microbatch.
        groups: batches that go through the pipeline one after the other.
    """
    lm, g, cut, s = role.lm, grid(p, c), split(role.lm, p), p.stage
    peak = c.peak(compute_bytes(lm)) * c.decode_efficiency
    rate = c.memory_bytes_per_s * c.memory_efficiency
    layer, cb = layer_share(lm, cut), compute_bytes(lm)
    head = head_params(lm) / cut.head
    reading, head_reading = lm.layers * layer * cb / rate, head * cb / rate
    names = ("compute", "memory", "bubble", "tensor", "data", "pipeline", "overhead")
    total = dict.fromkeys(names, 0.0)
    for share, start, stop in phases(work, max(1, round(work.rows / groups))):
        b, steps = rows * share, groups * (stop - start)
        compute, head_compute = lm.layers * 2.0 * layer * b / peak, 2.0 * head * b / peak
        slots = seen(lm, _slots(work, start, stop))
        cache = 2.0 * b * slots * lm.kv_heads / cut.kv * lm.head_dim * cb / rate
        drawing = 4 * 4.0 * b * lm.vocab / cut.vocab / rate
        memory = max(0.0, reading - compute) + max(0.0, head_reading - head_compute)
        total["compute"] += steps * (compute + head_compute)
        total["memory"] += steps * (memory + cache + drawing)
        total["tensor"] += steps * 2 * lm.layers * all_reduce(b * lm.width * cb, g.tensor, c)
        total["overhead"] += steps * passes.starting(lm.layers, p, c)
        if s > 1:
            hop = hand_on(b * lm.width * cb, g.stage, c) + c.stage_seconds
            total["pipeline"] += steps * s * hop
    return total


def _cache_bytes(role: Role, work: Work, p: Placement, rows: float | int) -> float:
    lm, cut = role.lm, split(role.lm, p)
    slots = work.prompt + work.max_new
    entries = 2.0 * rows * slots * lm.layers / p.stage * lm.kv_heads / cut.kv * lm.head_dim
    return entries * compute_bytes(lm)

"""Seconds and bytes of one microbatch's forward pass through one pipeline stage, on a device."""

import math
from typing import NamedTuple

from jaxrl_eff.models import LMConfig
from jaxrl_eff.parallel.attention import token_order
from jaxrl_eff.parallel.mesh import Placement
from jaxrl_eff.planner import packed_rows
from jaxrl_eff.planner.clusters import Cluster
from jaxrl_eff.planner.collectives import all_reduce, grid, hand_on
from jaxrl_eff.planner.problem import Work
from jaxrl_eff.planner.shares import Split, compute_bytes, head_params, layer_share, seen, split

# Most logits that exist at once, as in models.heads.
CHUNK_LOGITS, CHUNK_LOGITS_CPU = 2**27, 2**25
RING_CHUNK = 512  # tokens, of attention over a sequence axis; as `attention.kernels.CHUNK`


class Pass(NamedTuple):
    """Seconds of one microbatch through one stage, forward only."""

    compute: float
    memory: float  # by how much reading the weights exceeds computing
    tensor: float
    seq: float
    overhead: float

    @property
    def device(self) -> float:
        """Seconds on the device, which can hide traffic."""
        return self.compute + self.memory

    @property
    def total(self) -> float:
        return sum(self)


def forward(
    lm: LMConfig,
    p: Placement,
    c: Cluster,
    rows: float | int,
    length: float | int,
    head_rows: float | int,
    efficiency: float | int,
) -> Pass:
    """Seconds of a forward pass of `rows` rows per device through one stage.

    Args:
        head_rows: positions of a device that reach the output head.
        efficiency: share of the peak that matrix products reach.
    """
    g, cut = grid(p, c), split(lm, p)
    tokens = rows * length / p.seq
    products = 2.0 * lm.layers * layer_share(lm, cut) * tokens
    scores = 4.0 * lm.head_dim * lm.heads / cut.heads * seen(lm, (length + 1) / 2) * tokens
    last = 2.0 * head_params(lm) / cut.head * head_rows / p.seq
    flops = (products + scores + last) / p.stage
    one = _with_tokens(lm, p, c, flops / (c.peak(compute_bytes(lm)) * efficiency), tokens)
    if p.seq == 1:
        return one
    kv = 2.0 * tokens * lm.kv_heads / cut.kv * lm.head_dim * compute_bytes(lm)
    hops = min(p.seq - 1, token_order.reach(length / p.seq, lm.sight))
    seq = lm.layers / p.stage * hops * hand_on(kv, g.seq, c)
    return one._replace(seq=max(0.0, seq - c.overlap * one.device))


def _with_tokens(
    lm: LMConfig, p: Placement, c: Cluster, compute: float | int, tokens: float | int
) -> Pass:
    """A pass with `compute` seconds, plus the costs of a device's tokens; `seq` is 0."""
    g, cut, layers = grid(p, c), split(lm, p), lm.layers / p.stage
    weights = layer_share(lm, cut) * layers * compute_bytes(lm)
    reading = weights / (c.memory_bytes_per_s * c.memory_efficiency)
    moved = tokens * lm.width * compute_bytes(lm)
    tensor = 2.0 * layers * all_reduce(moved, g.tensor, c)
    tensor = max(0.0, tensor - c.tensor_overlap * max(compute, reading))
    return Pass(compute, max(0.0, reading - compute), tensor, 0.0, starting(layers, p, c))


def starting(layers: float | int, p: Placement, c: Cluster) -> float:
    """Seconds to start the kernels of `layers` layers."""
    return layers * (c.layer_seconds + c.tensor_seconds * math.log2(p.tensor))


class Microbatches(NamedTuple):
    """The rows that a call computes at once: one of its microbatches, scheduled ones if packed.

    Attributes:
        count: number of them in an update or pass.
        one: seconds of one, on average.
        tokens: of a device in the largest one, padding included.
        scores_bytes: of attention scores that exist at once.
    """

    count: int
    one: Pass
    tokens: float
    scores_bytes: float


def microbatches(
    lm: LMConfig, work: Work, p: Placement, c: Cluster, efficiency: float | int
) -> Microbatches:
    """The microbatches of an infer or train call, forward only."""
    cut = split(lm, p)
    if work.packed is None:
        rows = work.rows / (work.minibatches * p.row_shards * p.microbatches)
        one = forward(lm, p, c, rows, work.length, rows * work.length, efficiency)
        scores = _scores_bytes(lm, rows, work.length, p, cut, c)
        return Microbatches(p.microbatches, one, rows * work.length / p.seq, scores)
    done = packed_rows.laid(work, lm, p, c)
    each = 1.0 / (packed_rows.PASSES * done.steps)
    compute = done.seconds * each * c.train_efficiency / efficiency
    one = _with_tokens(lm, p, c, compute, done.columns)._replace(seq=done.exchange * each)
    scores = _scores_bytes(lm, 1, done.largest * p.seq, p, cut, c)
    return Microbatches(done.steps, one, done.largest, scores)


def logits_bytes(lm: LMConfig, tokens: float | int, cut: Split, c: Cluster) -> float:
    """Bytes of what the head returns for `tokens` tokens, and of logits on the way."""
    if lm.head == "value":
        return 4.0 * tokens
    at_once = CHUNK_LOGITS_CPU if c.shared_compute else CHUNK_LOGITS
    return 3 * 4.0 * min(tokens * lm.vocab, at_once) / cut.vocab


def layer_activations(lm: LMConfig, tokens: float | int, cut: Split) -> float:
    """Bytes of one layer's residuals for the backward pass, without attention scores."""
    inner = (2 * lm.heads / cut.heads + 2 * lm.kv_heads / cut.kv) * lm.head_dim
    inner += 4 * lm.ffn / cut.ffn
    return tokens * compute_bytes(lm) * (4 * lm.width + inner)


def _scores_bytes(
    lm: LMConfig, rows: float | int, length: float | int, p: Placement, cut: Split, c: Cluster
) -> float:
    if c.fused and compute_bytes(lm) <= 2:
        return 0.0
    if p.seq > 1:  # attention over a sequence axis holds one chunk of them at a time
        return rows * lm.heads / cut.heads * min(length, RING_CHUNK) ** 2 * 8.0
    return rows * lm.heads / cut.heads * length * length / p.seq * (4 + compute_bytes(lm))

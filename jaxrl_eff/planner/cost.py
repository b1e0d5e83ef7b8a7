"""Cost of a call, a reallocation and a transfer: seconds and bytes, computed from shapes alone.

A roofline per pass, corrected by measurements. With T tokens on a device, w matrix entries of a
layer, t = tensor, s = stage, m microbatches, a pass over one microbatch and one stage takes

    u  = max(FLOPs / (peak e), weights / bandwidth) + tensor + seq + layers/s * layer_seconds
    infer     (m + s - 1) u
    train     updates * [(m + s - 1) u' + gradient traffic not hidden + optimizer],  u': 3 or 4 u
    generate  (2 s - 1) u  +  steps * [L * layer(b, context) + head(b) + s * hop]

    layer(b, c) = max(2 w b / (t F), w / (t B)) + KV(b, c) / (t B) + 2 all-reduces + layer_seconds

A decoding loop ends with its longest row: `steps` is the expected maximum of the lengths.
Collectives are priced in `collectives`, reallocations and transfers in `transfer`, and the
microbatches of a packed call in `packed_rows`.

ReaL (Mei et al. 2024, arXiv:2406.14088) profiles calls and leaves gradient traffic out. Here all is
arithmetic, and `Corrections` apply what was measured. Weights sharded over fsdp are gathered for
every pass, but only once for all tokens of a generate call. Left out: stages of unequal length.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from typing import NamedTuple

from jaxrl_eff.parallel.attention import token_order
from jaxrl_eff.parallel.mesh import Placement
from jaxrl_eff.planner import packed_rows
from jaxrl_eff.planner.clusters import Cluster
from jaxrl_eff.planner.collectives import Axis, all_reduce, gather, grid, hand_on
from jaxrl_eff.planner.problem import Lengths, Problem, Role, Shape, Work
from jaxrl_eff.planner.shares import Split, layer_share, params_share, seen, split, state_bytes
from jaxrl_eff.planner.transfer import (
    Moved,
    crosses,
    layout,
    move_cost,
    moved,
    realloc_bytes,
    realloc_cost,
    same_rows,
)

__all__ = [
    "NONE", "Corrections", "Cost", "Moved", "call_cost", "crosses", "demand", "layout", "longest",
    "move_cost", "moved", "realloc_bytes", "realloc_cost", "same_rows",
]  # fmt: skip

# Most logits that exist at once, as in models.heads.
CHUNK_LOGITS, CHUNK_LOGITS_CPU = 2**27, 2**25
RING_CHUNK = 512  # tokens, of attention over a sequence axis; as `attention.kernels.CHUNK`


@dataclasses.dataclass(frozen=True)
class Corrections:
    """Measured over predicted, by name of a call, a reallocation or a transfer; 1 where unknown.

    Attributes:
        seconds: factor on the whole time. A call has one under its name, for placements that were
            not measured, and one under `measured_name` for each that was. The keys "*realloc" and
            "*move" apply to edges that were not measured themselves.
        flops: factor on a call's FLOPs, e.g. from `compiled.cost_analysis()`.
        active_bytes: factor on a call's transient memory, e.g. from `compiled.memory_analysis()`.
        counts: number of measurements behind a factor of `seconds`.
    """

    seconds: Mapping[str, float | int] = dataclasses.field(default_factory=dict)
    flops: Mapping[str, float | int] = dataclasses.field(default_factory=dict)
    active_bytes: Mapping[str, float | int] = dataclasses.field(default_factory=dict)
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def call(self, name: str, placement: Placement) -> float | int:
        """Factor of a call: the one measured with this mesh shape, else the call's general one."""
        return self.seconds.get(measured_name(name, placement), self.seconds.get(name, 1.0))

    def edge(self, name: str, kind: str) -> float | int:
        """Factor of a reallocation ("realloc") or transfer ("move")."""
        return self.seconds.get(name, self.seconds.get(f"*{kind}", 1.0))

    def to_json(self) -> dict[str, dict[str, float | int]]:
        """Returns the factors as plain data."""
        return {f.name: dict(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, data: str | Mapping[str, Mapping[str, float | int]]) -> "Corrections":
        """Builds corrections from `to_json`'s data, or from that data as JSON text.

        Raises:
            ValueError: a field is unknown, or a factor is not a positive number.
        """
        data = json.loads(data) if isinstance(data, str) else data
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ValueError(
                f"corrections have unknown fields {unknown}; there is {sorted(known)}."
            )
        for field, table in data.items():
            for name, value in table.items():
                if not (isinstance(value, int | float) and 0 < value < math.inf):
                    raise ValueError(f"corrections: {field}[{name!r}] is {value!r}, not above 0.")
        return cls(**{k: dict(v) for k, v in data.items()})


NONE = Corrections()


def measured_name(call: str, p: Placement) -> str:
    """Key in `Corrections` of a call on a mesh of this shape, on any devices."""
    form = "x".join(str(p.axes[axis]) for axis in p.axes)
    return f"{call}@{form}/{p.microbatches}{p.offload and '/' + p.offload}"


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one call on one placement.

    Attributes:
        seconds: the sum of `parts`.
        parts: "compute" (matrix products), "memory" (time that reading weights and caches adds),
            "bubble", "tensor", "seq", "data" (gradients and gathered parameters), "optimizer",
            "pipeline" (sends between stages), "overhead" (startup), "offload", "correction".
        static_bytes: bytes that a device holds all the time: its share of the parameters and, for a
            trainer, of the optimizer state.
        active_bytes: bytes that a device needs in addition while the call runs.
    """

    seconds: float | int
    parts: Mapping[str, float | int]
    static_bytes: float | int
    active_bytes: float | int


# Passes


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


def _forward(
    shape: Shape,
    p: Placement,
    c: Cluster,
    rows: float | int,
    length: float | int,
    head_rows: float | int,
    efficiency: float | int,
    flops_factor: float | int,
) -> Pass:
    """Seconds of a forward pass of `rows` rows per device through one stage.

    Args:
        head_rows: positions of a device that reach the output head.
    """
    g, cut = grid(p, c), split(shape, p)
    tokens = rows * length / p.seq
    layers = shape.layers / p.stage
    products = 2.0 * shape.layers * layer_share(shape, cut) * tokens
    scores = 4.0 * shape.head_dim * shape.heads / cut.heads * seen(shape, (length + 1) / 2) * tokens
    last = 2.0 * shape.head_params / (1 if shape.value else cut.vocab) * head_rows / p.seq
    flops = flops_factor * (products + scores + last) / p.stage
    compute = flops / (c.peak(shape.compute_bytes) * efficiency)
    one = _beside(shape, p, c, compute, tokens)
    if p.seq == 1:
        return one
    kv = 2.0 * tokens * shape.kv_heads / cut.kv * shape.head_dim * shape.compute_bytes
    hops = min(p.seq - 1, token_order.reach(length / p.seq, shape.sight))
    seq = max(0.0, layers * hops * hand_on(kv, g.seq, c) - c.overlap * one.device)
    return one._replace(seq=seq)


def _beside(
    shape: Shape, p: Placement, c: Cluster, compute: float | int, tokens: float | int
) -> Pass:
    """A pass with `compute` seconds, plus the costs of a device's tokens; `seq` is 0."""
    g, cut, layers = grid(p, c), split(shape, p), shape.layers / p.stage
    weights = layer_share(shape, cut) * layers * shape.compute_bytes
    reading = weights / (c.memory_bytes_per_s * c.memory_efficiency)
    moved = tokens * shape.width * shape.compute_bytes
    tensor = 2.0 * layers * all_reduce(moved, g.tensor, c)
    tensor = max(0.0, tensor - c.tensor_overlap * max(compute, reading))
    return Pass(compute, max(0.0, reading - compute), tensor, 0.0, _starting(layers, p, c))


class Part(NamedTuple):
    """The unit that a call computes at once: one of its microbatches, scheduled ones if packed.

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


def _parts(
    shape: Shape,
    work: Work,
    p: Placement,
    c: Cluster,
    efficiency: float | int,
    factor: float | int,
) -> Part:
    """The microbatches of an infer or train call, forward only."""
    cut = split(shape, p)
    if work.packed is None:
        rows = work.rows / (work.minibatches * p.row_shards * p.microbatches)
        one = _forward(shape, p, c, rows, work.length, rows * work.length, efficiency, factor)
        scores = _scores_bytes(shape, rows, work.length, p, cut, c)
        return Part(p.microbatches, one, rows * work.length / p.seq, scores)
    done = packed_rows.laid(work, shape, p, c)
    each = 1.0 / (packed_rows.PASSES * done.steps)
    compute = factor * done.seconds * each * c.train_efficiency / efficiency
    one = _beside(shape, p, c, compute, done.columns)._replace(seq=done.exchange * each)
    scores = _scores_bytes(shape, 1, done.largest * p.seq, p, cut, c)
    return Part(done.steps, one, done.largest, scores)


def _starting(layers: float | int, p: Placement, c: Cluster) -> float:
    """Seconds to start the kernels of `layers` layers."""
    return layers * (c.layer_seconds + c.tensor_seconds * math.log2(p.tensor))


def call_cost(
    problem: Problem,
    work: Work,
    placement: Placement,
    cluster: Cluster,
    corrections: Corrections = NONE,
) -> Cost:
    """Seconds and bytes of one call, independent of other calls.

    Args:
        placement: where it runs; `stage > 1` is priced as a pipeline.
    """
    if work.kind == "local":
        parts = {"compute": work.seconds, "overhead": cluster.launch}
        return _finish(parts, 0.0, 0.0, work, placement, corrections)
    role = problem.roles[work.model]
    c = shared(cluster, len(placement.devices))
    price = {"train": _train, "infer": _infer, "generate": _generate}[work.kind]
    return price(role, work, placement, c, corrections)


def shared(c: Cluster, used: int) -> Cluster:
    """The cluster's rates for a program that runs alone on `used` devices of a host."""
    if not c.shared_compute or used >= c.per_host:
        return c
    return _shared(c, used)


@functools.lru_cache(maxsize=1024)
def _shared(c: Cluster, used: int) -> Cluster:
    gain = demand(c, used) * c.per_host / used
    return c.with_(
        flops_per_s=c.flops_per_s * gain,
        flops32_per_s=c.flops32_per_s * gain,
        memory_bytes_per_s=c.memory_bytes_per_s * gain,
    )


def demand(c: Cluster, used: int) -> float:
    """Share of a host's cores that a program on `used` of its devices takes."""
    share = min(1.0, used / c.per_host)
    return share + (1 - share) * c.shared_compute if c.shared_compute else share


def _finish(
    parts: dict[str, float | int],
    static: float | int,
    active: float | int,
    work: Work,
    placement: Placement,
    corrections: Corrections,
) -> Cost:
    seconds = sum(parts.values())
    factor = corrections.call(work.name, placement)
    if factor != 1.0:
        parts["correction"] = seconds * (factor - 1.0)
        seconds *= factor
    active *= corrections.active_bytes.get(work.name, 1.0)
    return Cost(seconds, {k: v for k, v in parts.items() if v}, static, active)


def _logits_bytes(shape: Shape, tokens: float | int, cut: Split, c: Cluster) -> float:
    if shape.value:
        return 4.0 * tokens
    at_once = CHUNK_LOGITS_CPU if c.shared_compute else CHUNK_LOGITS
    return 3 * 4.0 * min(tokens * shape.vocab, at_once) / cut.vocab


def _layer_activations(shape: Shape, tokens: float | int, cut: Split) -> float:
    """Bytes of one layer's residuals for the backward pass, without attention scores."""
    inner = (2 * shape.heads / cut.heads + 2 * shape.kv_heads / cut.kv) * shape.head_dim
    inner += (4 if shape.gated else 2) * shape.ffn / cut.ffn
    return tokens * shape.compute_bytes * (4 * shape.width + inner)


def _scores_bytes(
    shape: Shape, rows: float | int, length: float | int, p: Placement, cut: Split, c: Cluster
) -> float:
    if c.fused and shape.compute_bytes <= 2:
        return 0.0
    if p.seq > 1:  # attention over a sequence axis holds one chunk of them at a time
        return rows * shape.heads / cut.heads * min(length, RING_CHUNK) ** 2 * 8.0
    return rows * shape.heads / cut.heads * length * length / p.seq * (4 + shape.compute_bytes)


def _train(role: Role, work: Work, p: Placement, c: Cluster, corrections: Corrections) -> Cost:
    shape, g, cut, s = role.shape, grid(p, c), split(role.shape, p), p.stage
    updates = work.epochs * work.minibatches
    factor = corrections.flops.get(work.name, 1.0)
    m, one, tokens, scores = _parts(shape, work, p, c, c.train_efficiency, factor)
    passes = role.passes + bool(shape.remat)
    u = passes * (one.compute + one.memory + one.overhead)
    collectives = (3 if shape.remat else 2) * one.tensor + passes * one.seq
    n = params_share(shape, p)
    hidden = c.overlap * passes * one.device * m
    reduces = 1 if s > 1 else m  # gradients are summed per microbatch, in a pipeline once
    data = reduces * all_reduce(n * role.grad_bytes, Axis(*g.data), c)
    data += reduces * all_reduce(n * role.grad_bytes, Axis(*g.seq), c)
    if cut.fsdp > 1:
        whole = n * cut.fsdp
        data += 2 * m * gather(whole * min(shape.compute_bytes, shape.param_bytes), g.fsdp, c)
        data += m * gather(whole * role.grad_bytes, g.fsdp, c)
    data = max(0.0, data - hidden)
    param, opt = state_bytes(role, p)
    if role.zero:
        data += gather(param, g.data, c)
    traffic = 2 * param + 2 * opt + n * role.grad_bytes
    optimizer = traffic / (c.memory_bytes_per_s * c.memory_efficiency)
    hop = 0.0
    if s > 1:
        moved = tokens * shape.width * shape.compute_bytes
        hop = 2 * (m + s - 1) * (hand_on(moved, g.stage, c) + c.stage_seconds)
    exposed = 0.0
    where = p.offload
    if where == "opt":
        way = opt / (c.host_bytes_per_s * c.host_efficiency)
        exposed = max(0.0, way - passes * one.device * m) + way
    parts = {
        "compute": updates * m * passes * one.compute,
        "memory": updates * m * passes * one.memory,
        "bubble": updates * (s - 1) * (u + collectives),
        "tensor": updates * m * (collectives - passes * one.seq),
        "seq": updates * m * passes * one.seq,
        "data": updates * data,
        "optimizer": updates * optimizer,
        "pipeline": updates * hop,
        "overhead": updates * m * passes * one.overhead + c.launch,
        "offload": exposed,
    }
    flight = min(m, s)
    layers = shape.layers / s
    kept = tokens * shape.width * shape.compute_bytes if shape.remat else 0.0
    work_set = _layer_activations(shape, tokens, cut)
    if shape.remat:
        activations = flight * layers * kept + work_set + scores
    else:
        activations = flight * layers * (work_set + scores)
    grads = n * role.grad_bytes * (2 if m > 1 else 1)
    gathered = 2 * layer_share(shape, cut) * shape.compute_bytes if cut.fsdp > 1 else 0.0
    active = grads + activations + gathered + _logits_bytes(shape, tokens, cut, c)
    if where == "opt":
        active += opt
    return _finish(parts, param + (0.0 if where == "opt" else opt), active, work, p, corrections)


def _stream(
    param: float | int, layers: float | int, compute: float | int, c: Cluster
) -> tuple[float, float]:
    """Seconds not hidden, and bytes, of streaming weights in from the host layer by layer."""
    way = param / (c.host_bytes_per_s * c.host_efficiency)
    return way / layers + max(0.0, way * (1 - 1 / layers) - compute), 2 * param / layers


def _infer(role: Role, work: Work, p: Placement, c: Cluster, corrections: Corrections) -> Cost:
    shape, g, cut, s = role.shape, grid(p, c), split(role.shape, p), p.stage
    factor = corrections.flops.get(work.name, 1.0)
    m, one, tokens, scores = _parts(shape, work, p, c, c.forward_efficiency, factor)
    param, _ = state_bytes(role, p)
    data = 0.0
    if cut.fsdp > 1:
        whole = params_share(shape, p) * cut.fsdp * min(shape.compute_bytes, shape.param_bytes)
        data = max(0.0, m * gather(whole, g.fsdp, c) - c.overlap * one.device * m)
    hop = 0.0
    if s > 1:
        moved = tokens * shape.width * shape.compute_bytes
        hop = (m + s - 1) * (hand_on(moved, g.stage, c) + c.stage_seconds)
    active = _layer_activations(shape, tokens, cut) + _logits_bytes(shape, tokens, cut, c)
    active += scores
    active += 2 * layer_share(shape, cut) * shape.compute_bytes if cut.fsdp > 1 else 0.0
    exposed = 0.0
    if p.offload == "params":
        exposed, more = _stream(param, shape.layers / s, one.device * m, c)
        active, param = active + more, 0.0
    parts = {
        "compute": m * one.compute,
        "memory": m * one.memory,
        "bubble": (s - 1) * one.total,
        "tensor": m * one.tensor,
        "seq": m * one.seq,
        "data": data,
        "pipeline": hop,
        "overhead": m * one.overhead + c.launch,
        "offload": exposed,
    }
    return _finish(parts, param, active, work, p, corrections)


# Decoding


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
        room = (math.floor(at / each + 1e-9) + 1) * each
        until = min(stop, room)
        total += (until - at) * room
        at = until
    return work.prompt + total / (stop - start)


def _generate(role: Role, work: Work, p: Placement, c: Cluster, corrections: Corrections) -> Cost:
    shape, g, cut = role.shape, grid(p, c), split(role.shape, p)
    s = p.stage
    parts_ = max(p.microbatches, s)  # microbatches follow each other through the stages
    groups = max(1, parts_ // s)
    rows = work.rows / (p.row_shards * parts_)
    prompts = (work.prompts or work.rows) / (p.row_shards * parts_)
    factor = corrections.flops.get(work.name, 1.0)
    one = _forward(shape, p, c, prompts, work.prompt, prompts, c.forward_efficiency, factor)
    param, _ = state_bytes(role, p)
    whole = params_share(shape, p) * cut.fsdp * min(shape.compute_bytes, shape.param_bytes)
    gathered = gather(whole, g.fsdp, c) if cut.fsdp > 1 else 0.0

    peak = c.peak(shape.compute_bytes) * c.decode_efficiency
    rate = c.memory_bytes_per_s * c.memory_efficiency
    layer, cb = layer_share(shape, cut), shape.compute_bytes
    total = dict.fromkeys(
        ("compute", "memory", "bubble", "tensor", "data", "pipeline", "overhead"), 0.0
    )
    for share, start, stop in phases(work, max(1, round(work.rows / groups))):
        b, steps = rows * share, groups * (stop - start)
        context = _slots(work, start, stop)
        compute = shape.layers * factor * 2.0 * layer * b / peak
        reading = shape.layers * layer * cb / rate
        slots = seen(shape, context)
        cache = 2.0 * b * slots * shape.kv_heads / cut.kv * shape.head_dim * cb / rate
        head = shape.head_params / (1 if shape.value else cut.vocab)
        head_compute = factor * 2.0 * head * b / peak
        head_reading = head * cb / rate
        drawing = 4 * 4.0 * b * shape.vocab / cut.vocab / rate
        memory = max(0.0, reading - compute) + max(0.0, head_reading - head_compute)
        total["compute"] += steps * (compute + head_compute)
        total["memory"] += steps * (memory + cache + drawing)
        sums = all_reduce(b * shape.width * cb, g.tensor, c)
        total["tensor"] += steps * 2 * shape.layers * sums
        total["overhead"] += steps * _starting(shape.layers, p, c)
        if s > 1:
            hop = hand_on(b * shape.width * cb, g.stage, c) + c.stage_seconds
            total["pipeline"] += steps * s * hop
    total["compute"] += groups * s * one.compute
    total["memory"] += groups * s * one.memory
    total["tensor"] += groups * s * one.tensor
    total["bubble"] += groups * (s - 1) * one.total
    total["data"] += gathered  # once: XLA hoists the gather out of the loop over tokens
    total["overhead"] += groups * s * one.overhead + c.launch
    slots = work.prompt + work.max_new
    here = rows * s
    cache = 2.0 * here * slots * shape.layers / s * shape.kv_heads / cut.kv * shape.head_dim * cb
    active = cache + 2 * 4.0 * rows * shape.vocab / cut.vocab
    active += _layer_activations(shape, prompts * work.prompt, cut)
    active += whole if cut.fsdp > 1 else 0.0
    if p.offload == "params":  # every step reads every layer, so all are brought in once
        total["offload"] = param / (c.host_bytes_per_s * c.host_efficiency)
        active, param = active + param, 0.0
    return _finish(total, param, active, work, p, corrections)

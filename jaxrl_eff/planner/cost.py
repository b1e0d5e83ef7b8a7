"""Cost of a call: seconds and bytes, computed from shapes alone.

A roofline per pass, corrected by measurements. With T tokens on a device, w matrix entries of a
layer, t = tensor, s = stage, m microbatches, a pass over one microbatch and one stage takes

    u  = max(FLOPs / (peak e), weights / bandwidth) + tensor + seq + layers/s * layer_seconds
    infer     (m + s - 1) u
    train     updates * [(m + s - 1) u' + gradient traffic not hidden + optimizer],  u': 3 or 4 u
    generate  (2 s - 1) u  +  steps * [L * layer(b, context) + head(b) + s * hop]

Passes are priced in `passes`, decoding in `cost_generate`, collectives in `collectives`, what is
sent between nodes at a level in `node_traffic`, reallocations and transfers in `transfer`, and the
microbatches of a packed call in `packed_rows`.

ReaL (Mei et al. 2024, arXiv:2406.14088) profiles calls and leaves gradient traffic out. Here all is
arithmetic, and `Corrections` apply what was measured. Weights sharded over fsdp are gathered for
every pass, but only once for all tokens of a generate call. Left out: stages of unequal length.
"""

import dataclasses
from collections.abc import Mapping

from jaxrl_eff.models import LMConfig
from jaxrl_eff.parallel.mesh import Placement
from jaxrl_eff.planner import node_traffic
from jaxrl_eff.planner.clusters import Cluster
from jaxrl_eff.planner.collectives import Grid, all_reduce, gather, grid, hand_on
from jaxrl_eff.planner.corrections import NONE, Corrections
from jaxrl_eff.planner.cost_generate import generate
from jaxrl_eff.planner.passes import Microbatches, layer_activations, logits_bytes, microbatches
from jaxrl_eff.planner.problem import Problem, Role, Work
from jaxrl_eff.planner.shares import (
    Split,
    compute_bytes,
    layer_share,
    params_share,
    split,
    state_bytes,
)


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
        parts, static, active = {"compute": work.seconds, "overhead": cluster.launch}, 0.0, 0.0
    else:
        c = cluster.shared(len(placement.devices))
        price = {"train": _train, "infer": _infer, "generate": generate}[work.kind]
        parts, static, active = price(problem.roles[work.model], work, placement, c)
    seconds = sum(parts.values())
    factor = corrections.call(work.name, placement)
    if factor != 1.0:
        parts["correction"] = seconds * (factor - 1.0)
        seconds *= factor
    return Cost(seconds, {k: v for k, v in parts.items() if v}, static, active)


def _train(
    role: Role, work: Work, p: Placement, c: Cluster
) -> tuple[dict[str, float], float, float]:
    """Seconds by part, and static and active bytes of a device."""
    lm, g, s = role.lm, grid(p, c), p.stage
    updates = work.epochs * work.minibatches
    micro = microbatches(lm, work, p, c, c.train_efficiency)
    m, one = micro.count, micro.one
    passes = role.passes + role.remat
    hidden = c.overlap * passes * one.device * m
    tensor = (3 if role.remat else 2) * one.tensor
    filling = passes * (one.compute + one.memory + one.overhead)
    param, opt = state_bytes(role, p)
    traffic = 2 * param + 2 * opt + params_share(lm, p) * role.grad_bytes
    optimizer = traffic / (c.memory_bytes_per_s * c.memory_efficiency)
    hop = 2 * _hops(lm, micro, s, g, c)
    active = _training_bytes(role, p, micro, c)
    if role.nodes is not None:
        param += node_traffic.kept_bytes(role, p)
        active += node_traffic.active_bytes(role, p, m)
    exposed, static = 0.0, param + opt
    if p.offload == "opt":
        way = opt / (c.host_bytes_per_s * c.host_efficiency)
        exposed, static, active = max(0.0, way - passes * one.device * m) + way, param, active + opt
    parts = {
        "compute": updates * m * passes * one.compute,
        "memory": updates * m * passes * one.memory,
        "bubble": updates * (s - 1) * (filling + (tensor + passes * one.seq)),
        "tensor": updates * m * tensor,
        "seq": updates * m * passes * one.seq,
        "data": updates * _gradient_traffic(role, p, m, hidden, c),
        "optimizer": updates * optimizer,
        "pipeline": updates * hop,
        "overhead": updates * m * passes * one.overhead + c.launch,
        "offload": exposed,
    }
    return parts, static, active


def _gradient_traffic(role: Role, p: Placement, m: int, hidden: float | int, c: Cluster) -> float:
    """Seconds of an update to sum gradients and gather parameters, beyond the `hidden` ones.

    Args:
        m: microbatches.
    """
    if role.nodes is not None:
        return max(0.0, node_traffic.seconds(role, p, m, c) - hidden)
    lm, g, cut = role.lm, grid(p, c), split(role.lm, p)
    n = params_share(lm, p)
    reduces = 1 if p.stage > 1 else m  # gradients are summed per microbatch, in a pipeline once
    seconds = reduces * all_reduce(n * role.grad_bytes, g.data, c)
    seconds += reduces * all_reduce(n * role.grad_bytes, g.seq, c)
    if cut.fsdp > 1:
        whole = n * cut.fsdp
        seconds += 2 * m * gather(whole * min(compute_bytes(lm), role.param_bytes), g.fsdp, c)
        seconds += m * gather(whole * role.grad_bytes, g.fsdp, c)
    seconds = max(0.0, seconds - hidden)
    if role.zero:
        seconds += gather(state_bytes(role, p)[0], g.data, c)
    return seconds


def _training_bytes(role: Role, p: Placement, micro: Microbatches, c: Cluster) -> float:
    """A device's bytes of gradients, residuals, gathered layers and logits."""
    lm, cut = role.lm, split(role.lm, p)
    flight, layers = min(micro.count, p.stage), lm.layers / p.stage
    one_layer = layer_activations(lm, micro.tokens, cut)
    if role.remat:
        kept = micro.tokens * lm.width * compute_bytes(lm)
        activations = flight * layers * kept + one_layer + micro.scores_bytes
    else:
        activations = flight * layers * (one_layer + micro.scores_bytes)
    grads = params_share(lm, p) * role.grad_bytes * (2 if micro.count > 1 else 1)
    return grads + activations + _gathered(lm, cut) + logits_bytes(lm, micro.tokens, cut, c)


def _gathered(lm: LMConfig, cut: Split) -> float:
    """Bytes of the two layers that are gathered over fsdp at once."""
    return 2 * layer_share(lm, cut) * compute_bytes(lm) if cut.fsdp > 1 else 0.0


def _hops(lm: LMConfig, micro: Microbatches, stages: int, g: Grid, c: Cluster) -> float:
    """Seconds to send all microbatches forward from stage to stage."""
    if stages == 1:
        return 0.0
    moved = micro.tokens * lm.width * compute_bytes(lm)
    return (micro.count + stages - 1) * (hand_on(moved, g.stage, c) + c.stage_seconds)


def _infer(
    role: Role, work: Work, p: Placement, c: Cluster
) -> tuple[dict[str, float], float, float]:
    """Seconds by part, and static and active bytes of a device."""
    lm, g, cut, s = role.lm, grid(p, c), split(role.lm, p), p.stage
    micro = microbatches(lm, work, p, c, c.forward_efficiency)
    m, one = micro.count, micro.one
    param, _ = state_bytes(role, p)
    data = 0.0
    if cut.fsdp > 1:
        whole = params_share(lm, p) * cut.fsdp * min(compute_bytes(lm), role.param_bytes)
        data = max(0.0, m * gather(whole, g.fsdp, c) - c.overlap * one.device * m)
    active = layer_activations(lm, micro.tokens, cut) + logits_bytes(lm, micro.tokens, cut, c)
    active += micro.scores_bytes
    active += _gathered(lm, cut)
    exposed = 0.0
    if p.offload == "params":
        exposed, more = _stream(param, lm.layers / s, one.device * m, c)
        active, param = active + more, 0.0
    parts = {
        "compute": m * one.compute,
        "memory": m * one.memory,
        "bubble": (s - 1) * one.total,
        "tensor": m * one.tensor,
        "seq": m * one.seq,
        "data": data,
        "pipeline": _hops(lm, micro, s, g, c),
        "overhead": m * one.overhead + c.launch,
        "offload": exposed,
    }
    return parts, param, active


def _stream(
    param: float | int, layers: float | int, compute: float | int, c: Cluster
) -> tuple[float, float]:
    """Seconds not hidden, and bytes, of streaming weights in from the host layer by layer."""
    way = param / (c.host_bytes_per_s * c.host_efficiency)
    return way / layers + max(0.0, way * (1 - 1 / layers) - compute), 2 * param / layers

"""Cost of a train call whose weights and gradients are sent between nodes at a level (`core.zero`).

Weights are gathered over the slow axis and then over the devices of a node, gradients reduced in
the opposite order. Several micro-batches share what crosses the slow axis. Bits are those of the
level; scales of blocks are left out, as in `zero_advice`.
"""

from typing import NamedTuple

from jaxrl_eff.parallel.mesh import Placement
from jaxrl_eff.planner.clusters import Cluster
from jaxrl_eff.planner.collectives import all_reduce, gather, node_axes
from jaxrl_eff.planner.problem import Role
from jaxrl_eff.planner.shares import compute_bytes, params_share, split


class _Bytes(NamedTuple):
    """Bytes of one entry of a weight.

    Attributes:
        sent: over the slow axis in one update, as a weight; `reduced`: as a gradient.
        near: over the axis of a node's devices in one micro-batch, in both directions.
    """

    sent: float
    reduced: float
    near: float


def seconds(role: Role, p: Placement, m: int, c: Cluster) -> float:
    """Seconds of all gathers and reductions of one update in `m` micro-batches."""
    axes, each = node_axes(p, c), _bytes(role, m)
    whole = params_share(role.lm, p) * split(role.lm, p).fsdp
    part = whole / p.fsdp
    found = gather(part * each.sent, axes.slow, c) + m * gather(whole * each.near, axes.fast, c)
    if role.nodes.partly:  # summed by all devices, once
        for axis in (axes.slow, axes.copies, axes.fast):
            found += all_reduce(whole * role.grad_bytes, axis, c)
        return found + m * all_reduce(whole * role.grad_bytes, axes.seq, c)
    found += gather(part * each.reduced, axes.slow, c) + all_reduce(4 * part, axes.copies, c)
    return found + m * all_reduce(whole * compute_bytes(role.lm), axes.seq, c)


def _bytes(role: Role, m: int) -> _Bytes:
    nodes = role.nodes
    level, partly = nodes.level, nodes.partly
    once = m > 1 or level.secondary or level.delta_bits
    sent = (level.delta_bits or level.weight_bits) / 8 * (1 if once else 2)
    fast = 32 if level.slow_only else level.grad_bits  # as `ZeroConfig.fast_bits`
    near = 2 * level.weight_bits / 8 + (0 if partly else fast / 8)
    return _Bytes(0.0 if nodes.frozen else sent, level.grad_bits / 8, near)


def kept_bytes(role: Role, p: Placement) -> float:
    """A device's bytes of residuals and of its node's copy of the weights, between updates."""
    nodes, level = role.nodes, role.nodes.level
    if nodes.frozen:
        return 0.0
    left = 4.0 if level.feedback and not nodes.partly else 0.0
    held = level.weight_bits / 8 if level.delta_bits else 0.0
    return _of_node(role, p) * (left + held)


def active_bytes(role: Role, p: Placement, m: int) -> float:
    """A device's bytes of weights gathered over the slow axis, and of gradients before they are
    sent over it."""
    nodes, level = role.nodes, role.nodes.level
    hoisted = m > 1 or level.delta_bits
    copy = level.weight_bits / 8 if hoisted or (level.secondary and not nodes.frozen) else 0.0
    slots = 4.0 if hoisted and not nodes.partly else 0.0
    return _of_node(role, p) * (copy + slots)


def _of_node(role: Role, p: Placement) -> float:
    """Entries of a device's part of the weights of a node."""
    return params_share(role.lm, p) * split(role.lm, p).fsdp / p.fsdp

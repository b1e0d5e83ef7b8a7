"""Cost of moving parameters or rows from one placement to another, by pair of placements.

Parameters are stored in boxes of (layers, fsdp dimension, tensor dimension). With I(d) and J(d)
what device d has and needs, and h its domain (a host, or a slice of a torus), a reallocation takes
at least

    max( max_d |J(d) - I(d)| / link,  max_h |J(h) - I(h)| / cards(h),  outside / cards(source) )

which is the price here, at the efficiencies of the links, plus a fixed cost per reallocation. For a
call that reads rounded weights the codes and scales count.
"""

import functools
from typing import NamedTuple

import numpy as np

from jaxrl_eff.parallel.mesh import Placement
from jaxrl_eff.parallel.reshard.rounded import sent_bytes
from jaxrl_eff.planner.clusters import Cluster
from jaxrl_eff.planner.collectives import run, sizes
from jaxrl_eff.planner.problem import Problem, Role
from jaxrl_eff.planner.shares import params, params_share

BUCKET_BYTES = 2.0**28  # per device, of a reallocation in flight


def layout(p: Placement) -> tuple:
    """Key of where parameters are stored: with equal layouts, nothing is moved.

    Parameters are replicated over both data and seq, so adjacent ones count by their product.
    """
    axes: list[tuple[str, int]] = []
    names = ("stage", "copy", "fsdp", "copy", "tensor")
    for name, n in zip(names, sizes(p), strict=True):
        if n == 1:
            continue
        if axes and axes[-1][0] == name:
            n *= axes.pop()[1]
        axes.append((name, n))
    return (p.devices, tuple(axes))


class Moved(NamedTuple):
    """A reallocation, as shares of the model.

    Attributes:
        received: the most that one device receives; `imported`: the most that one domain receives,
            of distinct parameters; `exported`: all that must leave the source's domains.
        source, target: a device's share before and after.
        domains: number of domains of the source.
    """

    received: float
    imported: float
    exported: float
    source: float
    target: float
    domains: int


class _Held(NamedTuple):
    """The boxes of (stage, fsdp, tensor) that a mesh's devices hold, and those of each domain."""

    boxes: np.ndarray  # [n, 3, 2] lower and upper ends
    number: np.ndarray  # [n] equal for equal boxes
    domains: np.ndarray  # [h] ascending
    distinct: np.ndarray  # [h, k, 3, 2] padded with empty boxes
    counts: np.ndarray  # [h] number of nonempty boxes


@functools.lru_cache(maxsize=1 << 14)
def _held(devices: range | tuple[int, ...], sizes: tuple[int, ...], domain: int) -> _Held:
    n = len(devices)
    index = np.stack(np.unravel_index(np.arange(n), sizes), axis=1)[:, [0, 2, 4]]
    ways = np.array([sizes[0], sizes[2], sizes[4]])
    boxes = np.stack([index / ways, (index + 1) / ways], axis=2)
    number = np.ravel_multi_index(tuple(index.T), tuple(ways))
    home = np.array(devices) // domain
    _, first = np.unique(np.stack([home, number]), axis=1, return_index=True)
    domains, counts = np.unique(home[first], return_counts=True)
    distinct = np.zeros((len(domains), counts.max(), 3, 2))
    row = np.searchsorted(domains, home[first])
    column = np.arange(len(first)) - np.concatenate([[0], np.cumsum(counts)])[row]
    distinct[row, column] = boxes[first]
    return _Held(boxes, number, domains, distinct, counts)


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    low = np.maximum(a[..., 0], b[..., 0])
    high = np.minimum(a[..., 1], b[..., 1])
    return np.maximum(high - low, 0.0).prod(axis=-1)


def moved(source: Placement, target: Placement, domain: int) -> Moved:
    """Computes what must move between two placements of one model, whatever the method.

    With I(d) and J(d) what device d has and needs, it receives |J(d)| - |J(d) & I(d)|; a domain
    imports the union of its J minus the union of its I.
    """
    origin = min(source.devices[0], target.devices[0]) // domain * domain
    a, b = run(source.devices, origin), run(target.devices, origin)
    return _moved(a, sizes(source), b, sizes(target), domain)


@functools.lru_cache(maxsize=1 << 18)
def _moved(
    a: range | tuple[int, ...],
    a_sizes: tuple[int, ...],
    b: range | tuple[int, ...],
    b_sizes: tuple[int, ...],
    domain: int,
) -> Moved:
    have, need = _held(a, a_sizes, domain), _held(b, b_sizes, domain)
    others, devices = np.array(a), np.array(b)
    volume_a = 1.0 / (a_sizes[0] * a_sizes[2] * a_sizes[4])
    volume = 1.0 / (b_sizes[0] * b_sizes[2] * b_sizes[4])
    low = min(others.min(), devices.min())
    where = np.full(max(others.max(), devices.max()) - low + 1, -1)
    where[others - low] = np.arange(len(a))
    mine = where[devices - low]
    kept = np.where(mine >= 0, _overlap(have.boxes[mine], need.boxes), 0.0)
    received = float((volume - kept).max())

    common, i, j = np.intersect1d(have.domains, need.domains, return_indices=True)
    imported = need.counts * volume
    if len(common):
        there = _overlap(need.distinct[j][:, :, None], have.distinct[i][:, None])
        imported[j] -= there.sum(axis=(1, 2))
    outside = ~np.isin(devices // domain, have.domains)
    exported = len(np.unique(need.number[outside])) * volume
    imported = float(imported.max())
    if imported < 1e-12:
        imported = 0.0
    return Moved(received, imported, exported, volume_a, volume, len(have.domains))


def _parameter_bytes(role: Role, weights: str) -> float:
    """Bytes that are sent for a parameter."""
    stored = float(role.param_bytes)
    return min(stored, sent_bytes(weights)) if weights else stored


def realloc_cost(
    problem: Problem,
    model: str,
    source: Placement,
    target: Placement,
    cluster: Cluster,
    *,
    weights: str = "",
) -> float:
    """Seconds to move a model's parameters from one placement to another; 0 if the layout is equal.

    The slowest of: a device's links, a domain's network cards on the way in, and those of the
    source's domains on the way out.

    Args:
        weights: precision in which they are sent, as in `Work`.
    """
    if layout(source) == layout(target):
        return 0.0
    role = problem.roles[model]
    m = moved(source, target, cluster.domain)
    size = params(role.lm) * _parameter_bytes(role, weights)
    nic = cluster.nic_bytes_per_s * cluster.nic_efficiency
    seconds = m.received * size / (cluster.link_bytes_per_s * cluster.link_efficiency)
    if m.imported:
        cards = min(len(target.devices), cluster.domain)
        out = min(len(source.devices), cluster.domain * m.domains)
        seconds = max(seconds, m.imported * size / (nic * cards), m.exported * size / (nic * out))
        seconds += cluster.nic_latency
    return seconds + cluster.move_seconds


def realloc_bytes(
    problem: Problem, model: str, source: Placement, target: Placement, *, weights: str = ""
) -> float:
    """Extra bytes that a device of the target needs in a reallocation, beyond both layouts.

    These are two buckets and, of rounded weights, the codes until they are decoded.

    Args:
        weights: precision in which they are sent, as in `Work`.
    """
    role = problem.roles[model]
    size = params_share(role.lm, target) * _parameter_bytes(role, weights)
    codes = size if weights else 0.0
    if layout(source) == layout(target):
        return codes
    return codes + 2 * min(BUCKET_BYTES, size)


def same_rows(source: Placement, target: Placement) -> bool:
    """Returns True if rows of arrays are sharded alike on both placements."""
    return source.devices == target.devices and (
        (source.row_shards, source.seq, source.stage)
        == (target.row_shards, target.seq, target.stage)
    )


def crosses(source: Placement, target: Placement, cluster: Cluster) -> bool:
    """Returns True if a transfer between the two placements needs the network."""
    return {d // cluster.domain for d in target.devices} != {
        d // cluster.domain for d in source.devices
    }


def move_cost(bytes_: float | int, source: Placement, target: Placement, cluster: Cluster) -> float:
    """Seconds to move arrays of `bytes_` bytes in total to their reader's placement."""
    if same_rows(source, target):
        return 0.0
    share = bytes_ / target.row_shards
    if crosses(source, target, cluster):
        rate, latency = cluster.nic_bytes_per_s * cluster.nic_efficiency, cluster.nic_latency
    else:
        rate, latency = cluster.link_bytes_per_s * cluster.link_efficiency, cluster.link_latency
    return share / rate + latency + cluster.move_seconds

"""Cost of all-reduces, all-gathers and sends over a mesh axis: alpha + bytes / beta.

A ring over n devices moves (n-1)/n of the bytes per device. Across hosts, each device of a host
sends its share of the bytes through its own network card, as hierarchical collectives do.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

from jaxrl_eff.parallel.mesh import Placement
from jaxrl_eff.planner.clusters import Cluster


class Axis(NamedTuple):
    """One group of a mesh axis: its size, and the number of domains (hosts) that it spans."""

    size: int
    domains: int


class Grid(NamedTuple):
    """The groups of a placement's axes."""

    stage: Axis
    data: Axis
    fsdp: Axis
    seq: Axis
    tensor: Axis


def run(devices: tuple[int, ...], origin: int) -> range | tuple[int, ...]:
    """Device numbers from `origin`: a range if consecutive, since ranges compare quickly."""
    first, last = devices[0] - origin, devices[-1] - origin
    if last - first == len(devices) - 1 and (last == first or devices[1] == devices[0] + 1):
        return range(first, last + 1)
    return tuple(d - origin for d in devices)


class NodeAxes(NamedTuple):
    """The groups of the axes of a call that sends weights between nodes."""

    slow: Axis
    copies: Axis
    fast: Axis
    seq: Axis


@functools.lru_cache(maxsize=1 << 16)
def _groups(
    devices: range | tuple[int, ...], shape: tuple[int, ...], domain: int
) -> tuple[Axis, ...]:
    out, stride = [], 1
    domains = np.array(devices) // domain
    for size in reversed(shape):
        groups = domains.reshape(-1, size, stride)[
            :, :, 0
        ]  # all groups of a block span equally many
        most = max(len(set(g)) for g in groups.tolist()) if size > 1 else 1
        out.append(Axis(size, most))
        stride *= size
    return tuple(reversed(out))


def grid(p: Placement, cluster: Cluster) -> Grid:
    """The groups of a placement's axes on a cluster."""
    return Grid(*_groups(_placed(p, cluster), sizes(p), cluster.domain))


def node_axes(p: Placement, cluster: Cluster) -> NodeAxes:
    """The groups of the axes of a placement on nodes."""
    shape = tuple(p.axes.values())[1:]  # no stages
    return NodeAxes(*_groups(_placed(p, cluster), shape, cluster.domain)[:4])


def _placed(p: Placement, cluster: Cluster) -> range | tuple[int, ...]:
    return run(p.devices, p.devices[0] // cluster.domain * cluster.domain)


def sizes(p: Placement) -> tuple[int, ...]:
    """Sizes of the mesh axes, in order. Nodes (dcn) are priced as the outer part of fsdp."""
    return (p.stage, p.data, p.weight_shards, p.seq, p.tensor)


def _ring(bytes_: float | int, axis: Axis, c: Cluster, trips: int) -> float:
    """Seconds for every device to pass (n-1)/n of the bytes around the ring `trips` times."""
    n, hosts = axis
    if n == 1:
        return 0.0
    inside = max(1, n // hosts)
    seconds = 0.0
    if inside > 1:
        rate = c.link_bytes_per_s * c.link_efficiency
        seconds += (
            trips * bytes_ * (inside - 1) / inside / rate + math.log2(inside) * c.link_latency
        )
    if hosts > 1:
        rate = c.nic_bytes_per_s * c.nic_efficiency
        share = bytes_ / inside
        seconds += trips * share * (hosts - 1) / hosts / rate + math.log2(hosts) * c.nic_latency
    return seconds


def all_reduce(bytes_: float | int, axis: Axis, cluster: Cluster) -> float:
    """Seconds to all-reduce `bytes_` per device over an axis."""
    return _ring(bytes_, axis, cluster, 2)


def gather(bytes_: float | int, axis: Axis, cluster: Cluster) -> float:
    """Seconds to all-gather (or reduce-scatter) `bytes_`, the full size, over an axis."""
    return _ring(bytes_, axis, cluster, 1)


def hand_on(bytes_: float | int, axis: Axis, c: Cluster) -> float:
    """Seconds to send `bytes_` to the next device of an axis."""
    if axis.domains > 1:
        return bytes_ / (c.nic_bytes_per_s * c.nic_efficiency) + c.nic_latency
    return bytes_ / (c.link_bytes_per_s * c.link_efficiency) + c.link_latency

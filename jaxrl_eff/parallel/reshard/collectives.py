"""Collectives of a resharding plan, as plain data, with their bytes and estimated seconds.

Devices are indices into `jax.devices()`. `share` is what the busiest device receives, and `total`
what all devices together receive, as fractions of the full tensor.
"""

import dataclasses
import math

from jaxrl_eff.parallel.reshard.layout import Coords, DeviceLayout, Network

Groups = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Slice:
    """Local slice, free: the i-th device of a group keeps the i-th part along `dim`."""

    dim: int
    groups: Groups
    share: float = 0.0
    total: float = 0.0


@dataclasses.dataclass(frozen=True)
class Gather:
    """All-gather: concatenates the shards of a group along `dim`."""

    dim: int
    groups: Groups
    share: float
    total: float


@dataclasses.dataclass(frozen=True)
class AllToAll:
    """All-to-all: the i-th device of a group gets all i-th parts on `split`, joined on `join`."""

    split: int
    join: int
    groups: Groups
    share: float
    total: float


@dataclasses.dataclass(frozen=True)
class Permute:
    """Permutation of shards: (from, to) pairs, with every device once on each side."""

    pairs: tuple[tuple[int, int], ...]
    share: float
    total: float


@dataclasses.dataclass(frozen=True)
class Box:
    """Part of a shard sent to another device; offsets within both shards, in units."""

    source: int
    start: Coords
    target: int
    put: Coords


@dataclasses.dataclass(frozen=True)
class Round:
    """Boxes of one shape, in which no device sends twice or receives twice."""

    size: Coords
    boxes: tuple[Box, ...]

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(from, to) of every box."""
        return tuple((b.source, b.target) for b in self.boxes)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Point-to-point messages from one layout to another.

    Attributes:
        units: units per source shard, by dimension.
        out_units: units per target shard, by dimension.
        kept: boxes that devices already have, by shape. No transfer.
        rounds: boxes to transfer.
        receivers: devices of the target.
        round_shares: `share` of every round.
    """

    units: Coords
    out_units: Coords
    kept: tuple[Round, ...]
    rounds: tuple[Round, ...]
    receivers: tuple[int, ...]
    share: float
    total: float
    round_shares: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Copies:
    """Copies of shards between devices of one process: (from, to) for every receiver."""

    pairs: tuple[tuple[int, int], ...]
    share: float
    total: float


Collective = Slice | Gather | AllToAll | Permute | Exchange | Copies


@dataclasses.dataclass(frozen=True)
class Phase:
    """Steps that run as one program on a list of devices, or a single `Copies`."""

    devices: tuple[int, ...]
    steps: tuple[Collective, ...]


@dataclasses.dataclass(frozen=True)
class RoutePlan:
    """Plan that takes tensors from one layout to another.

    Attributes:
        source, target: the layouts.
        stages: phases in order; empty if the layouts are the same.
        seconds: estimated time, for the bytes that the plan was chosen for.
        total: bytes received by all devices, as a fraction of the tensor.
    """

    source: DeviceLayout
    target: DeviceLayout
    stages: tuple[Phase, ...]
    seconds: float
    total: float


def seconds(step: Collective, nbytes: float | int, network: Network) -> float:
    """Estimated time of a step for a tensor of `nbytes` bytes: latency + bytes / slowest link."""
    if isinstance(step, Slice):
        return 0.0
    if isinstance(step, Exchange):
        return math.fsum(
            _slowest(r.pairs, share * nbytes, network)
            for r, share in zip(step.rounds, step.round_shares, strict=True)
        )
    if isinstance(step, Permute):
        return _slowest(step.pairs, step.share * nbytes, network)
    if isinstance(step, Copies):
        return _copies(step, nbytes, network)
    group = step.groups[0]
    hosts = [network.hosts[d] for d in group]
    here = min(hosts.count(h) for h in set(hosts))
    crosses = here < len(group)
    received = step.share * nbytes
    wires = [received / network.link_bytes_per_s]
    if crosses and isinstance(step, Gather):  # one ring per NIC of a host
        wires.append(received / (network.nic_bytes_per_s * here))
    elif crosses:
        away = (len(group) - here) / (len(group) - 1)
        wires = [
            received * (1 - away) / network.link_bytes_per_s,
            received * away / network.nic_bytes_per_s,
        ]
    return network.latency(crosses) + max(wires)


def _slowest(pairs, nbytes: float | int, network: Network) -> float:
    moved = [(a, b) for a, b in pairs if a != b]
    if not moved:
        return 0.0
    crosses = any(network.hosts[a] != network.hosts[b] for a, b in moved)
    rate = network.nic_bytes_per_s if crosses else network.link_bytes_per_s
    return network.latency(crosses) + nbytes / rate


def _copies(step: Copies, nbytes: float | int, network: Network) -> float:
    moved = [(a, b) for a, b in step.pairs if a != b]
    if not moved:
        return 0.0
    sent: dict[int, float] = {}
    for a, b in moved:
        sent[a] = sent.get(a, 0.0) + step.total / len(moved) * nbytes / network.rate(a, b)
    return len(moved) * network.copy_latency + max(sent.values())

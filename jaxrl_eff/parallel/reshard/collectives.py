"""The steps of which a reallocation is made, as plain data, with their bytes and seconds.

Devices are named by their index in `jax.devices()`. `share` is what the busiest device receives and
`total` what all devices receive together, as parts of the whole tensor.
"""

import dataclasses
import math

from jaxrl_eff.parallel.reshard.layout import Coords, DeviceLayout, Network

Groups = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Slice:
    """Of its shard, the i-th device of a group keeps the i-th part along `dim`. Free."""

    dim: int
    groups: Groups
    share: float = 0.0
    total: float = 0.0


@dataclasses.dataclass(frozen=True)
class Gather:
    """The shards of a group, one after the other along `dim`."""

    dim: int
    groups: Groups
    share: float
    total: float


@dataclasses.dataclass(frozen=True)
class AllToAll:
    """The i-th device of a group gets every member's i-th part along `split`, joined on `join`."""

    split: int
    join: int
    groups: Groups
    share: float
    total: float


@dataclasses.dataclass(frozen=True)
class Permute:
    """Whole shards change places: (from, to), every device once on either side."""

    pairs: tuple[tuple[int, int], ...]
    share: float
    total: float


@dataclasses.dataclass(frozen=True)
class Box:
    """A part of a shard, on its way; offsets are in units, inside the shards of both devices."""

    source: int
    start: Coords
    target: int
    put: Coords


@dataclasses.dataclass(frozen=True)
class Round:
    """Boxes of one shape; no device sends twice or receives twice."""

    size: Coords
    boxes: tuple[Box, ...]


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Point-to-point messages from one layout to another.

    Attributes:
        units: of a source shard; `out_units`: of a target shard.
        kept: what devices have already, by shape. No bytes move.
        rounds: what moves.
        receivers: devices of the target.
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
    """Whole shards copied from device to device by one process: (from, to) for every receiver."""

    pairs: tuple[tuple[int, int], ...]
    share: float
    total: float


Collective = Slice | Gather | AllToAll | Permute | Exchange | Copies


@dataclasses.dataclass(frozen=True)
class Phase:
    """Steps that run as one program on a list of devices (or, alone, `Copies`)."""

    devices: tuple[int, ...]
    steps: tuple[Collective, ...]


@dataclasses.dataclass(frozen=True)
class RoutePlan:
    """How tensors of one layout get to another.

    Attributes:
        stages: none if the layouts are the same.
        seconds: estimated, for the bytes that it was chosen for.
        total: bytes received by all devices, as a part of the tensor.
    """

    source: DeviceLayout
    target: DeviceLayout
    stages: tuple[Phase, ...]
    seconds: float
    total: float


def seconds(step: Collective, nbytes: float | int, network: Network) -> float:
    """Time of a step for a tensor of `nbytes` bytes: latency + bytes over the slowest wire."""
    if isinstance(step, Slice):
        return 0.0
    if isinstance(step, Exchange):
        return math.fsum(
            _slowest([(b.source, b.target) for b in r.boxes], share * nbytes, network)
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
    if crosses and isinstance(step, Gather):  # a ring for each NIC of a host
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

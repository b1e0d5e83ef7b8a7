"""Layouts as plain data: which part of a tensor every device holds, and what a move must cost.

A dimension of size n that a source splits s ways and a target t ways is n / lcm(s, t) times a
pattern of lcm(s, t) *units*, whatever n is. So everything below is a matter of layouts alone; sizes
only scale it, and one plan serves all tensors of two layouts.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxrl_eff.parallel.mesh import AXES, Placement

Coords = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class DeviceLayout:
    """How one tensor lies on devices.

    Attributes:
        devices: indices into `jax.devices()`, in mesh order (last axis fastest).
        mesh: sizes of the mesh axes.
        spec: for every dimension of the tensor the mesh axes that split it, slowest first.
    """

    devices: tuple[int, ...]
    mesh: tuple[int, ...]
    spec: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, sharding: Sharding, ndim: int) -> "DeviceLayout":
        """The layout of a tensor of `ndim` dimensions under a sharding.

        Raises:
            TypeError: the sharding is neither named nor of a single device.
        """
        if isinstance(sharding, SingleDeviceSharding):
            (device,) = sharding.device_set
            return cls((index_of(device),), (), ((),) * ndim)
        if not isinstance(sharding, NamedSharding):
            raise TypeError(f"a NamedSharding is needed, not {sharding}.")
        mesh = sharding.mesh
        devices = tuple(index_of(d) for d in mesh.devices.flat)
        return _layout(devices, mesh.axis_names, mesh.devices.shape, sharding.spec, ndim)

    @classmethod
    def placed(cls, placement: Placement, spec: PartitionSpec, ndim: int) -> "DeviceLayout":
        """The layout of a tensor on a placement, whose devices need not exist."""
        sizes = tuple(placement.axes[a] for a in AXES)
        return _layout(placement.devices, AXES, sizes, spec, ndim)

    @functools.cached_property
    def counts(self) -> Coords:
        """Into how many shards each dimension is split."""
        return tuple(math.prod(self.mesh[a] for a in axes) for axes in self.spec)

    @functools.cached_property
    def coords(self) -> dict[int, Coords]:
        """Device -> the coordinates of its shard."""
        digits = np.unravel_index(np.arange(len(self.devices)), self.mesh) if self.mesh else ()
        columns = []
        for axes in self.spec:
            column = np.zeros(len(self.devices), int)
            for a in axes:
                column = column * self.mesh[a] + digits[a]
            columns.append(column.tolist())
        rows = zip(*columns, strict=True) if columns else itertools.repeat(())
        return dict(zip(self.devices, rows, strict=False))

    @functools.cached_property
    def holders(self) -> dict[Coords, tuple[int, ...]]:
        """Coordinates of a shard -> the devices that have it."""
        found: dict[Coords, list[int]] = {}
        for device, at in self.coords.items():
            found.setdefault(at, []).append(device)
        return {k: tuple(v) for k, v in found.items()}

    @property
    def replica_axes(self) -> tuple[int, ...]:
        """Mesh axes along which the devices hold the same."""
        used = {a for axes in self.spec for a in axes}
        return tuple(a for a, n in enumerate(self.mesh) if a not in used and n > 1)

    def same(self, other: "DeviceLayout") -> bool:
        """Whether every device holds the same part under both."""
        return self.counts == other.counts and self.coords == other.coords


def _layout(
    devices: tuple[int, ...],
    names: tuple[str, ...],
    sizes: tuple[int, ...],
    spec: PartitionSpec,
    ndim: int,
) -> DeviceLayout:
    """Without axes of size 1, so that equal layouts are equal objects more often."""
    kept = [i for i, n in enumerate(sizes) if n > 1]
    number = {names[i]: k for k, i in enumerate(kept)}
    entries = [e if isinstance(e, tuple) else (e,) for e in spec]
    entries += [()] * (ndim - len(entries))
    dims = tuple(tuple(number[a] for a in e if a in number) for e in entries)
    return DeviceLayout(devices, tuple(sizes[i] for i in kept), dims)


@functools.cache
def _indices() -> dict[jax.Device, int]:
    return {d: i for i, d in enumerate(jax.devices())}


def index_of(device: jax.Device) -> int:
    """A device's index in `jax.devices()`."""
    return _indices()[device]


@dataclasses.dataclass(frozen=True)
class Network:
    """What joins the devices, for choosing among ways and for lower bounds.

    Attributes:
        hosts: for every device of `jax.devices()` the host that it sits in.
        link_bytes_per_s, nic_bytes_per_s: of one device, in each direction, inside a host and out.
        link_latency, nic_latency: seconds until a collective inside a host, or out, moves anything.
        copy_latency: seconds of the Python and the runtime for one plain copy.
        copies: whether plain device-to-device copies are legal: one process sees all devices.
    """

    hosts: tuple[int, ...]
    link_bytes_per_s: float | int = 100e9
    nic_bytes_per_s: float | int = 25e9
    link_latency: float | int = 10e-6
    nic_latency: float | int = 30e-6
    copy_latency: float | int = 10e-6
    copies: bool = False

    @classmethod
    def local(cls) -> "Network":
        """Of this job: its processes are the hosts; rates are typical of the platform."""
        return _local_network()

    def rate(self, a: int, b: int) -> float:
        """Bytes a second from one device to another."""
        same = self.hosts[a] == self.hosts[b]
        return self.link_bytes_per_s if same else self.nic_bytes_per_s

    def latency(self, crosses: bool) -> float:
        return self.nic_latency if crosses else self.link_latency


# Bytes a second and seconds. GPUs: NVLink of an A100 and a 200 Gb/s NIC; TPUs: one v5e's ICI. CPU:
# simulated devices, measured on two cores.
_TYPICAL = {
    "gpu": (300e9, 25e9, 10e-6, 30e-6, 10e-6),
    "tpu": (90e9, 12e9, 10e-6, 50e-6, 10e-6),
    "cpu": (4e9, 1e9, 120e-6, 300e-6, 40e-6),
}


@functools.cache
def _local_network() -> Network:
    devices = jax.devices()
    rates = _TYPICAL.get(devices[0].platform, _TYPICAL["gpu"])
    return Network(tuple(d.process_index for d in devices), *rates, copies=jax.process_count() == 1)


@dataclasses.dataclass(frozen=True)
class Units:
    """The common grid of two layouts.

    Attributes:
        whole: units of each dimension.
        source, target: units of a shard in each dimension.
    """

    whole: Coords
    source: Coords
    target: Coords

    @classmethod
    def of(cls, source: DeviceLayout, target: DeviceLayout) -> "Units":
        pairs = list(zip(source.counts, target.counts, strict=True))
        whole = tuple(math.lcm(s, t) for s, t in pairs)
        return cls(
            whole,
            tuple(n // s for n, (s, _) in zip(whole, pairs, strict=True)),
            tuple(n // t for n, (_, t) in zip(whole, pairs, strict=True)),
        )

    @property
    def volume(self) -> int:
        return math.prod(self.whole)


def _overlap(a: Coords, a_size: Coords, b: Coords, b_size: Coords) -> int:
    """Units in both of two shards, given by coordinates and sizes."""
    sides = (
        min((p + 1) * m, (q + 1) * n) - max(p * m, q * n)
        for p, m, q, n in zip(a, a_size, b, b_size, strict=True)
    )
    return math.prod(max(0, side) for side in sides)


def missing(source: DeviceLayout, target: DeviceLayout) -> dict[int, float]:
    """R(d): the share of the tensor that each device of the target must receive."""
    units = Units.of(source, target)
    out = {}
    for device, at in target.coords.items():
        need = math.prod(units.target)
        if device in source.coords:
            need -= _overlap(source.coords[device], units.source, at, units.target)
        out[device] = need / units.volume
    return out


def _held(layout: DeviceLayout, size: Coords, whole: Coords, devices: Iterable[int]) -> np.ndarray:
    """Which units a set of devices holds together."""
    held = np.zeros(whole, bool)
    for at in {layout.coords[d] for d in devices if d in layout.coords}:
        held[tuple(slice(c * n, (c + 1) * n) for c, n in zip(at, size, strict=True))] = True
    return held


@dataclasses.dataclass
class Bound:
    """Bytes that no schedule can avoid, summed over tensors, and the seconds that they take.

    T = max(max_d R(d)/link, max_h U(h)/nic_h, O/sum of the sources' nics), where d runs over the
    devices and h over the hosts: R is what a device lacks, U what a host lacks as a whole, O what
    must leave the hosts of the source. The bisection of a torus is left out.
    """

    network: Network
    received: dict[int, float] = dataclasses.field(default_factory=dict)
    imported: dict[int, float] = dataclasses.field(default_factory=dict)
    exported: float = 0.0
    source: set[int] = dataclasses.field(default_factory=set)
    target: set[int] = dataclasses.field(default_factory=set)

    def add(self, source: DeviceLayout, target: DeviceLayout, nbytes: float | int) -> None:
        """Counts a tensor of `nbytes` bytes on the wire."""
        for device, share in missing(source, target).items():
            self.received[device] = self.received.get(device, 0.0) + share * nbytes
        self.source.update(source.devices)
        self.target.update(target.devices)
        hosts = self.network.hosts
        if len({hosts[d] for d in (*source.devices, *target.devices)}) == 1:
            return
        units = Units.of(source, target)
        abroad = np.zeros(units.whole, bool)
        from_hosts = {hosts[d] for d in source.devices}
        for host in sorted({hosts[d] for d in target.devices}):
            mine = [d for d in range(len(hosts)) if hosts[d] == host]
            need = _held(target, units.target, units.whole, mine)
            lack = need & ~_held(source, units.source, units.whole, mine)
            share = lack.sum() / units.volume
            self.imported[host] = self.imported.get(host, 0.0) + share * nbytes
            if host not in from_hosts:
                abroad |= need
        self.exported += abroad.sum() / units.volume * nbytes

    @property
    def minimum(self) -> float:
        """Sum over devices of R(d), in bytes."""
        return math.fsum(self.received.values())

    @property
    def seconds(self) -> float:
        net = self.network
        times = [max(self.received.values(), default=0.0) / net.link_bytes_per_s]
        for host, nbytes in self.imported.items():
            nics = sum(net.hosts[d] == host for d in self.target)
            times.append(nbytes / nics / net.nic_bytes_per_s)
        if self.source:
            times.append(self.exported / len(self.source) / net.nic_bytes_per_s)
        return max(times)

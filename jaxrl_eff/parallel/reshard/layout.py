"""Device layouts as plain data: which part of a tensor every device holds, and minimum transfers.

A dimension of size n that the source splits s ways and the target t ways consists of lcm(s, t)
*units* of n / lcm(s, t) elements each. Everything below is in units and depends on the layouts
only; sizes merely scale it, so one plan serves all tensors with the same two layouts.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

Coords = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class DeviceLayout:
    """Sharding of a tensor over devices.

    Attributes:
        devices: indices into `jax.devices()`, in mesh order (last axis fastest).
        mesh: sizes of the mesh axes.
        spec: for every dimension of the tensor, the mesh axes that shard it, slowest first.
    """

    devices: tuple[int, ...]
    mesh: tuple[int, ...]
    spec: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, sharding: Sharding, ndim: int) -> "DeviceLayout":
        """Layout of a tensor of `ndim` dimensions under a sharding.

        Raises:
            TypeError: the sharding is neither a NamedSharding nor a SingleDeviceSharding.
        """
        if isinstance(sharding, SingleDeviceSharding):
            (device,) = sharding.device_set
            return cls((index_of(device),), (), ((),) * ndim)
        if not isinstance(sharding, NamedSharding):
            raise TypeError(f"a NamedSharding is needed, not {sharding}.")
        devices = tuple(index_of(d) for d in sharding.mesh.devices.flat)
        return cls.on(devices, sharding.mesh.shape, sharding.spec, ndim)

    @classmethod
    def on(
        cls, devices: tuple[int, ...], axes: Mapping[str, int], spec: PartitionSpec, ndim: int
    ) -> "DeviceLayout":
        """Layout on a mesh of devices, which need not exist.

        Axes of size 1 are left out, so that more of the equivalent layouts compare equal.
        """
        mesh = {a: n for a, n in axes.items() if n > 1}
        number = {a: i for i, a in enumerate(mesh)}
        entries = [e if isinstance(e, tuple) else (e,) for e in spec]
        entries += [()] * (ndim - len(entries))
        dims = tuple(tuple(number[a] for a in e if a in number) for e in entries)
        return cls(devices, tuple(mesh.values()), dims)

    @functools.cached_property
    def counts(self) -> Coords:
        """Number of shards of each dimension."""
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
        """Coordinates of a shard -> the devices that hold it."""
        found: dict[Coords, list[int]] = {}
        for device, at in self.coords.items():
            found.setdefault(at, []).append(device)
        return {k: tuple(v) for k, v in found.items()}

    @property
    def replica_axes(self) -> tuple[int, ...]:
        """Mesh axes along which the tensor is replicated."""
        used = {a for axes in self.spec for a in axes}
        return tuple(a for a, n in enumerate(self.mesh) if a not in used and n > 1)

    def same(self, other: "DeviceLayout") -> bool:
        """True if every device holds the same part under both layouts."""
        return self.counts == other.counts and self.coords == other.coords


@functools.cache
def _indices() -> dict[jax.Device, int]:
    return {d: i for i, d in enumerate(jax.devices())}


def index_of(device: jax.Device) -> int:
    """Index of a device in `jax.devices()`."""
    return _indices()[device]


@dataclasses.dataclass(frozen=True)
class Network:
    """Bandwidths and latencies between devices, for cost estimates and lower bounds.

    Attributes:
        hosts: host of every device of `jax.devices()`.
        link_bytes_per_s: bandwidth of a device, per direction, within a host.
        nic_bytes_per_s: bandwidth of a device, per direction, between hosts.
        link_latency: seconds of latency of a collective within a host.
        nic_latency: seconds of latency of a collective across hosts.
        copy_latency: seconds of Python and runtime overhead of one plain copy.
        copies: plain device-to-device copies are legal, since one process owns all devices.
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
        """Network of this job: processes count as hosts; rates are typical of the platform."""
        return _local_network()

    def rate(self, a: int, b: int) -> float:
        """Bandwidth from one device to another, in bytes/s."""
        same = self.hosts[a] == self.hosts[b]
        return self.link_bytes_per_s if same else self.nic_bytes_per_s

    def latency(self, crosses: bool) -> float:
        return self.nic_latency if crosses else self.link_latency


# Bytes/s and seconds, in the order of `Network`'s fields. GPU: NVLink of an A100, a 200 Gb/s NIC.
# TPU: ICI of a v5e. CPU: simulated devices, measured on two cores.
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
    """Common grid of two layouts.

    Attributes:
        whole: units of the tensor, by dimension.
        source, target: units of a shard, by dimension.
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
    """Number of units that two shards, given by coordinates and sizes, have in common."""
    sides = (
        min((p + 1) * m, (q + 1) * n) - max(p * m, q * n)
        for p, m, q, n in zip(a, a_size, b, b_size, strict=True)
    )
    return math.prod(max(0, side) for side in sides)


def missing(source: DeviceLayout, target: DeviceLayout) -> dict[int, float]:
    """R(d): the fraction of the tensor that each device of the target must receive."""
    units = Units.of(source, target)
    out = {}
    for device, at in target.coords.items():
        need = math.prod(units.target)
        if device in source.coords:
            need -= _overlap(source.coords[device], units.source, at, units.target)
        out[device] = need / units.volume
    return out

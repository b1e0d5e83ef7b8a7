"""Lower bound on the bytes and seconds of a reallocation."""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from jaxrl_eff.parallel.reshard.layout import Coords, DeviceLayout, Network, Units, missing


def _held(layout: DeviceLayout, size: Coords, whole: Coords, devices: Iterable[int]) -> np.ndarray:
    """Boolean grid of the units that a set of devices holds."""
    held = np.zeros(whole, bool)
    for at in {layout.coords[d] for d in devices if d in layout.coords}:
        held[tuple(slice(c * n, (c + 1) * n) for c, n in zip(at, size, strict=True))] = True
    return held


@dataclasses.dataclass
class Bound:
    """Lower bound on the bytes and seconds of any schedule, summed over tensors.

    T = max(max_d R(d)/link, max_h U(h)/nic_h, O/sum of the sources' NICs), where d runs over
    devices and h over hosts: R is what a device lacks, U what all devices of a host lack together,
    and O what must leave the source's hosts. A torus's bisection bandwidth is not considered.

    Attributes:
        network: bandwidths.
        received: R in bytes, by device.
        imported: U in bytes, by host.
        exported: O in bytes.
        source, target: devices of all tensors so far.
    """

    network: Network
    received: dict[int, float] = dataclasses.field(default_factory=dict)
    imported: dict[int, float] = dataclasses.field(default_factory=dict)
    exported: float = 0.0
    source: set[int] = dataclasses.field(default_factory=set)
    target: set[int] = dataclasses.field(default_factory=set)

    def add(self, source: DeviceLayout, target: DeviceLayout, nbytes: float | int) -> None:
        """Adds a tensor of `nbytes` bytes on the wire."""
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
        """Sum of R(d) over devices, in bytes."""
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

"""Clusters as numbers: rates, memory, latencies and efficiencies of their devices and links.

Peaks are datasheet values. The share of them that programs reach is in the efficiencies, which are
guesses until `planner.corrections` adjusts them to a run. `local` measures CPUs instead.

Example:
    >>> from jaxrl_eff import clusters
    >>> cluster = clusters.parse("h100:2x8")
    >>> cluster.devices, cluster.per_host
    (16, 8)
"""

import dataclasses
import functools
import json
import math
import re

from jaxrl_eff.parallel import devices as machine
from jaxrl_eff.parallel import processes

GIB = 2.0**30
USABLE = 0.92  # of a device's memory: the rest goes to the runtime and to fragmentation


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A cluster of equal devices in equal hosts.

    Units are seconds, bytes and FLOP; rates are per device.

    Attributes:
        name: as given to `parse`.
        devices, per_host: number of devices in all, and per host.
        flops_per_s: dense peak for 2-byte numbers; `flops32_per_s` for 4-byte ones.
        memory_bytes, memory_bytes_per_s: of a device's own memory, the part that programs can use.
        link_bytes_per_s: to devices of the same domain, in one direction.
        nic_bytes_per_s: to devices of other domains, in one direction.
        host_bytes_per_s: to the host's memory, in one direction.
        link_latency, nic_latency: startup time of a collective, per doubling of its devices.
        domain: number of devices connected by links: a host, or a slice of a torus. 0: those of a
            host.
        launch: seconds of one call before the device begins.
        move_seconds: of one reallocation or transfer, in addition to its bytes.
        layer_seconds: to start the kernels of one layer in one pass; `tensor_seconds` more for a
            layer's tensor-parallel all-reduces, per doubling of `tensor`.
        stage_seconds: of a send from one pipeline stage to the next, in addition to its bytes.
        train_efficiency, forward_efficiency, decode_efficiency: share of the peak that matrix
            products reach in a train call, in one forward pass, and in decoding.
        memory_efficiency, link_efficiency, nic_efficiency, host_efficiency: share of the byte rates
            that is reached.
        overlap: share of a pass's device time that can hide data and fsdp traffic;
            `tensor_overlap` the same for tensor-parallel traffic.
        fused: attention scores are never written to memory.
        attention_half: sequence length in tokens at which attention reaches half the rate that it
            has for long sequences.
        shared_compute: 0: every device computes by itself. Otherwise devices share their host's
            cores, and this is the share of all cores that a program on one device gets alone.
    """

    name: str
    devices: int
    per_host: int
    flops_per_s: float | int
    flops32_per_s: float | int
    memory_bytes: float | int
    memory_bytes_per_s: float | int
    link_bytes_per_s: float | int
    nic_bytes_per_s: float | int
    host_bytes_per_s: float | int
    link_latency: float | int = 6e-6
    nic_latency: float | int = 15e-6
    domain: int = 0
    launch: float | int = 2e-4
    move_seconds: float | int = 2e-3
    layer_seconds: float | int = 5e-6
    tensor_seconds: float | int = 0.0
    stage_seconds: float | int = 5e-5
    train_efficiency: float | int = 0.45
    forward_efficiency: float | int = 0.5
    decode_efficiency: float | int = 0.45
    memory_efficiency: float | int = 0.7
    link_efficiency: float | int = 0.75
    nic_efficiency: float | int = 0.75
    host_efficiency: float | int = 0.8
    overlap: float | int = 0.5
    tensor_overlap: float | int = 0.0
    fused: bool = True
    attention_half: float | int = 300
    shared_compute: float | int = 0.0

    def __post_init__(self):
        if self.devices < 1 or self.per_host < 1 or self.devices % self.per_host:
            raise ValueError(
                f"{self.name}: {self.devices} devices cannot be in hosts of {self.per_host}."
            )
        if not self.domain:
            object.__setattr__(self, "domain", self.per_host)

    @property
    def hosts(self) -> int:
        return self.devices // self.per_host

    def peak(self, compute_bytes: int) -> float:
        """FLOP/s of one device for products of numbers of `compute_bytes` bytes."""
        return self.flops_per_s if compute_bytes <= 2 else self.flops32_per_s

    def demand(self, used: int) -> float:
        """Share of a host's cores that a program on `used` of its devices takes."""
        share = min(1.0, used / self.per_host)
        return share + (1 - share) * self.shared_compute if self.shared_compute else share

    def shared(self, used: int) -> "Cluster":
        """This cluster with the rates of a program that runs alone on `used` devices of a host."""
        return self if not self.shared_compute or used >= self.per_host else _shared(self, used)

    def with_(self, **changes) -> "Cluster":
        """Returns a copy with other numbers."""
        return dataclasses.replace(self, **changes)


@functools.lru_cache(maxsize=1024)
def _shared(c: Cluster, used: int) -> Cluster:
    gain = c.demand(used) * c.per_host / used
    return c.with_(
        flops_per_s=c.flops_per_s * gain,
        flops32_per_s=c.flops32_per_s * gain,
        memory_bytes_per_s=c.memory_bytes_per_s * gain,
    )


# Memory GiB, memory TB/s, link GB/s, NIC GB/s, host GB/s (PCIe 4 or 5, x16).
#   A100, H100, H200: NVIDIA datasheets (A100 80GB SXM 2021; H100 SXM 2023; H200 SXM 2024). The
#   datasheets' NVLink rates, 600 and 900 GB/s, count both directions. NICs are those of DGX: one
#   per GPU, of 200 Gb/s (A100) or 400 Gb/s. B200: DGX B200 datasheet, an eighth.
_GPUS = {
    "a100": (80, 2.04, 300, 25, 25),
    "h100": (80, 3.35, 450, 50, 50),
    "h200": (141, 4.8, 450, 50, 50),
    "b200": (180, 8.0, 900, 50, 50),
}
# Memory GiB, memory TB/s, ICI GB/s of one mesh axis (a ring's two directions), data-center
# network GB/s, PCIe GB/s, chips per host, most chips of a slice.
#   Memory, slices: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. ICI, network and PCIe:
#   jax-ml.github.io/scaling-book/tpus ("How to Scale Your Model", 2025), table of TPU specs.
_TPUS = {
    "v4": (32, 1.2, 90, 6.25, 16, 4, 4096),
    "v5e": (16, 0.81, 90, 3.125, 16, 4, 256),
    "v5p": (95, 2.8, 180, 6.25, 16, 4, 8960),
    "v6e": (32, 1.6, 180, 12.5, 32, 4, 256),
}
NAMES = (*_GPUS, *_TPUS, "local")


def _rates(
    kind: str,
    gib: float | int,
    hbm: float | int,
    link: float | int,
    nic: float | int,
    pcie: float | int,
) -> dict[str, float]:
    """A device's numbers in bytes and seconds; MFU is measured against the same peaks."""
    return {
        "flops_per_s": machine.peak_flops_per_s(kind, "bfloat16"),
        "flops32_per_s": machine.peak_flops_per_s(kind, "float32"),
        "memory_bytes": USABLE * gib * GIB,
        "memory_bytes_per_s": hbm * 1e12,
        "link_bytes_per_s": link * 1e9,
        "nic_bytes_per_s": nic * 1e9,
        "host_bytes_per_s": pcie * 1e9,
    }


def gpus(name: str, hosts: int = 1, per_host: int = 8) -> Cluster:
    """A cluster of GPU hosts: `a100`, `h100`, `h200` or `b200`."""
    return Cluster(
        name=f"{name}:{hosts}x{per_host}" if hosts > 1 else f"{name}:{per_host}",
        devices=hosts * per_host,
        per_host=per_host,
        **_rates(name.upper(), *_GPUS[name]),
        attention_half=1350,  # measured on an H100: experiments/long_context
    )


def tpus(name: str, chips: int, slices: int = 1) -> Cluster:
    """A cluster of TPU slices of `chips` chips each: `v4`, `v5e`, `v5p` or `v6e`.

    A slice is priced as one domain: a mesh axis is a ring of its torus.
    """
    *rates, per_host, _ = _TPUS[name]
    per_host = chips if chips <= 8 else per_host
    return Cluster(
        name=f"{name}:{slices}*{chips}" if slices > 1 else f"{name}:{chips}",
        devices=slices * chips,
        per_host=per_host,
        **_rates(f"TPU {name}", *rates),
        link_latency=2e-6,
        nic_latency=5e-5,
        domain=chips,
        fused=False,
    )


def parse(text: str) -> Cluster:
    """Parses a cluster's name.

    `h100:8` is one host of 8 GPUs, `h100:16x8` 16 of them. For TPUs, `v5p:4x4x4` and `v5e:16` are
    slices of 64 and 16 chips, and `v5e:2*4x4` two slices of 16. `local` is this process's devices.

    Raises:
        ValueError: the name is unknown, or such sizes do not exist.
    """
    name, _, sizes = text.strip().lower().partition(":")
    if name == "local":
        if sizes:
            raise ValueError(f"cluster {text!r}: 'local' is what this process has, without sizes.")
        return local()
    if name not in NAMES:
        raise ValueError(
            f"cluster {text!r}: unknown hardware {name!r}; expected one of {list(NAMES)}."
        )
    example = f"{name}:16x8" if name in _GPUS else f"{name}:4x4"
    if not re.fullmatch(r"(\d+\*)?\d+(x\d+)*", sizes):
        raise ValueError(f"cluster {text!r}: sizes are missing or wrong; write e.g. {example!r}.")
    repeat, _, shape = sizes.rpartition("*")
    dims = [int(n) for n in shape.split("x")]
    slices = int(repeat or 1)
    if min(*dims, slices) < 1:
        raise ValueError(f"cluster {text!r}: sizes must be at least 1.")
    if name in _GPUS:
        if repeat or len(dims) > 2:
            raise ValueError(
                f"cluster {text!r}: GPUs are hosts x GPUs of a host, e.g. {example!r}."
            )
        hosts, per_host = (1, dims[0]) if len(dims) == 1 else dims
        if per_host > 8:
            raise ValueError(
                f"cluster {text!r}: a host has at most 8 GPUs; write {name}:{per_host // 8}x8."
            )
        return gpus(name, hosts, per_host)
    chips, most = math.prod(dims), _TPUS[name][-1]
    if len(dims) > (3 if name in ("v4", "v5p") else 2):
        raise ValueError(f"cluster {text!r}: a {name} slice has fewer dimensions.")
    if chips > most or (chips > 8 and chips % 4):
        raise ValueError(
            f"cluster {text!r}: a {name} slice of {chips} chips; there are up to {most}, by 4."
        )
    return tpus(name, chips, slices)


def local(*, measured: bool = True) -> Cluster:
    """This process's devices. CPUs are measured (about 2 s); other devices are looked up by name.

    In a process group (`processes.group`) all processes must call it, in the same order. All get
    what the first process measured, with the least memory of any.

    Args:
        measured: False gives CPUs the usual rates of a core.

    Raises:
        ValueError: the tables do not have this accelerator.
    """
    return _local(measured, processes.group())


@functools.cache
def _local(measured: bool, group: processes.Group | None) -> Cluster:
    mine = _here(measured)
    if group is None:
        return mine
    every = group.exchange(f"cluster {measured}", json.dumps(dataclasses.asdict(mine)))
    first, *others = (Cluster(**json.loads(text)) for text in every)
    return first.with_(memory_bytes=min(c.memory_bytes for c in (first, *others)))


def _here(measured: bool) -> Cluster:
    import jax

    kind, devices = jax.devices()[0].device_kind.lower(), jax.device_count()
    if jax.devices()[0].platform == "cpu":
        return _measured() if measured else _usual()
    for found in _GPUS:
        if found in kind:
            per_host = jax.local_device_count()
            return gpus(found, max(1, devices // per_host), per_host)
    for found, names in (
        ("v5e", ("v5 lite", "v5e")), ("v6e", ("v6 lite", "v6e")), ("v5p", ("v5",)), ("v4", ("v4",))
    ):  # fmt: skip
        if any(n in kind for n in names):
            return tpus(found, devices)
    raise ValueError(f"unknown device kind {kind!r}; expected one of {[*_GPUS, *_TPUS]}.")


def _usual() -> Cluster:
    import jax

    n = jax.local_device_count()
    memory = machine.memory_bytes(jax.local_devices()[0]) or 8e9
    return Cluster(
        name="local",
        devices=jax.device_count(),
        per_host=n,
        flops_per_s=machine.CORE_FLOPS_PER_S,
        flops32_per_s=machine.CORE_FLOPS_PER_S,
        memory_bytes=memory / n,
        memory_bytes_per_s=5e9,
        link_bytes_per_s=2e9,
        nic_bytes_per_s=2e9,
        host_bytes_per_s=2e9,
        link_latency=5e-5,
        nic_latency=5e-5,
        fused=False,
    )


def _measured() -> Cluster:
    from jaxrl_eff.planner import this_machine

    return this_machine.cpu()

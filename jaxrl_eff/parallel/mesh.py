"""Placement: the devices of a call and their mesh, as plain data.

A placement prints, hashes and serializes without touching a device; `mesh` builds its mesh. The
axes extend those of the paper's plans: `stage` (pipelining: priced by the planner, not executed),
`dcn` (nodes or slices, with slow links between them), `data`, `fsdp` (parameters sharded, gathered
on use), `seq` (sequence positions) and `tensor` (heads and feed-forward width). Parameters are
sharded over `dcn` and `fsdp` together, or over `fsdp` alone if they are replicated across nodes.
"""

import dataclasses
import functools
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

AXES = ("stage", "dcn", "data", "fsdp", "seq", "tensor")
OFFLOADS = ("", "params", "opt")


@dataclasses.dataclass(frozen=True)
class Placement:
    """Devices and mesh of one call.

    Attributes:
        devices: indices into `jax.devices()`, in mesh order (last axis fastest).
        stage, dcn, data, fsdp, seq, tensor: sizes of the mesh axes; their product is the number of
            devices. `data=0` uses the devices that the other axes leave.
        microbatches: number of parts that the call's rows are split into and processed one after
            the other, to save memory. Never changes a result beyond rounding.
        offload: what is kept in pinned host memory: "params", the parameters of a call that does
            not train, read layer by layer while it runs; "opt", the optimizer state of a train call
            between its updates; "": nothing.

    Raises:
        ValueError: the axes do not fit the devices, a device is named twice, or an unknown offload.

    Example:
        >>> from jaxrl_eff import Placement
        >>> place = Placement(devices=(0, 1, 2, 3), tensor=2, microbatches=8)
        >>> print(place)
        devices 0-3: data=2 tensor=2, 8 microbatches
        >>> place.row_shards
        2
    """

    devices: tuple[int, ...]
    stage: int = 1
    dcn: int = 1
    data: int = 0
    fsdp: int = 1
    seq: int = 1
    tensor: int = 1
    microbatches: int = 1
    offload: str = ""

    def __post_init__(self):
        if len(set(self.devices)) != len(self.devices) or not self.devices:
            raise ValueError(f"devices {list(self.devices)} must be distinct and at least one.")
        for axis in (*AXES, "microbatches"):
            low = 0 if axis == "data" else 1
            if getattr(self, axis) < low:
                raise ValueError(f"{axis} is {getattr(self, axis)}, but must be at least {low}.")
        if self.offload not in OFFLOADS:
            raise ValueError(f"unknown offload {self.offload!r}; expected one of {[*OFFLOADS]}.")
        others = self.stage * self.dcn * self.fsdp * self.seq * self.tensor
        data = self.data or len(self.devices) // others
        if data * others != len(self.devices):
            raise ValueError(
                f"{len(self.devices)} devices {list(self.devices)} cannot be meshed as "
                f"stage={self.stage} dcn={self.dcn} data={self.data or '(rest)'} "
                f"fsdp={self.fsdp} seq={self.seq} tensor={self.tensor}: the axes must multiply to "
                "the number of devices."
            )
        object.__setattr__(self, "data", data)

    @property
    def axes(self) -> dict[str, int]:
        """Axis name -> size, in mesh order."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def bare(self) -> "Placement":
        """The same mesh with one microbatch and no offload."""
        return dataclasses.replace(self, microbatches=1, offload="")

    @property
    def row_shards(self) -> int:
        """Number of shards of a batch's rows."""
        return self.dcn * self.data * self.fsdp

    @property
    def weight_shards(self) -> int:
        """Number of shards of a weight along `embed`."""
        return self.dcn * self.fsdp

    def __str__(self) -> str:
        shape = " ".join(f"{a}={n}" for a, n in self.axes.items() if n > 1) or "one device"
        parts = f", {self.microbatches} microbatches" if self.microbatches > 1 else ""
        away = f", {self.offload} in host memory" if self.offload else ""
        return f"devices {span(self.devices)}: {shape}{parts}{away}"

    def to_json(self) -> dict:
        """Plain data for the run's plan.json."""
        return {
            "devices": list(self.devices),
            "axes": self.axes,
            "microbatches": self.microbatches,
            **({"offload": self.offload} if self.offload else {}),
        }


def span(devices: tuple[int, ...]) -> str:
    """Formats device indices: `0-3` if consecutive, `0,2` otherwise."""
    first, last = devices[0], devices[-1]
    if len(devices) > 1 and devices == tuple(range(first, last + 1)):
        return f"{first}-{last}"
    return ",".join(map(str, devices))


@functools.cache
def mesh(placement: Placement) -> Mesh:
    """Mesh of a placement over this job's devices.

    Raises:
        ValueError: the placement names a device that does not exist, or uses pipelining.
    """
    devices = jax.devices()
    if placement.stage != 1:
        raise ValueError(
            f"stage is {placement.stage}, but pipelining can be priced and not executed; use "
            "stage=1."
        )
    if max(placement.devices) >= len(devices):
        raise ValueError(
            f"the placement names device {max(placement.devices)}, but there are {len(devices)} "
            f"devices, 0 to {len(devices) - 1}."
        )
    grid = np.array([devices[i] for i in placement.devices]).reshape(
        [placement.axes[a] for a in AXES]
    )
    assert math.prod(grid.shape) == len(placement.devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))

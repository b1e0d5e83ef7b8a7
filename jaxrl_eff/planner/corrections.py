"""Factors on predicted seconds, from measurements."""

import dataclasses
from collections.abc import Mapping

from jaxrl_eff.parallel.mesh import Placement


@dataclasses.dataclass(frozen=True)
class Corrections:
    """Measured over predicted seconds by name of a call, reallocation or transfer; 1 if unknown.

    Attributes:
        seconds: a call has one factor under its name, for placements that were not measured, and
            one under `measured_name` for each that was. The keys "*realloc" and "*move" apply to
            edges that were not measured themselves.
        counts: number of measurements behind a factor.
    """

    seconds: Mapping[str, float | int] = dataclasses.field(default_factory=dict)
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def call(self, name: str, placement: Placement) -> float | int:
        """Factor of a call: the one measured with this mesh shape, else the call's general one."""
        return self.seconds.get(measured_name(name, placement), self.seconds.get(name, 1.0))

    def edge(self, name: str, kind: str) -> float | int:
        """Factor of a reallocation ("realloc") or transfer ("move")."""
        return self.seconds.get(name, self.seconds.get(f"*{kind}", 1.0))


NONE = Corrections()


def measured_name(call: str, p: Placement) -> str:
    """Key in `Corrections` of a call on a mesh of this shape, on any devices."""
    form = "x".join(str(p.axes[axis]) for axis in p.axes)
    return f"{call}@{form}/{p.microbatches}{p.offload and '/' + p.offload}"

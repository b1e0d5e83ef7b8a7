"""Rules from logical axes to mesh axes, shared by all models and placements.

A model names the axes of its parameters and activations (`embed`, `heads`, `batch`, ...); the table
below maps each to the mesh axes that shard it. An axis whose size does not divide is replicated,
with a note, instead of raising an error: four key/value heads under eight-way tensor parallelism
are replicated on each device, as is common practice.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_eff.parallel.mesh import Placement, mesh

# Batch rows are sharded over fsdp too: every device computes its own rows with gathered parameters.
# With several nodes, `rules` puts dcn in front of fsdp for embed, and in front of data for batch.
TABLE: dict[str, tuple[str, ...]] = {
    "embed": ("fsdp",),
    "node_embed": ("fsdp",),  # of weights replicated across nodes
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffn": ("tensor",),
    "vocab": ("tensor",),
    "head_dim": (),
    "layers": (),
    "batch": ("data", "fsdp"),
    "packed": ("data", "fsdp", "seq"),  # rows that are packed on each device
    "length": ("seq",),
    "act_embed": (),
    "act_heads": ("tensor",),
    "act_kv_heads": ("tensor",),
    "act_ffn": ("tensor",),
    "act_vocab": ("tensor",),
}


@dataclasses.dataclass(frozen=True)
class Rules:
    """Sharding rules of one model on one placement.

    Attributes:
        placement: the devices and their mesh.
        table: logical axis -> mesh axes; None if replicated.
        notes: one sentence for each axis replicated because its size does not divide.
    """

    placement: Placement
    table: tuple[tuple[str, tuple[str, ...] | None], ...]
    notes: tuple[str, ...]

    def spec(self, axes: tuple[str | None, ...]) -> PartitionSpec:
        """Partition spec of an array with these logical axes.

        Raises:
            ValueError: an axis is unknown, or two axes map to the same mesh axis.
        """
        table, used, out = dict(self.table), set(), []
        for axis in axes:
            if axis is not None and axis not in table:
                raise ValueError(f"unknown logical axis {axis!r}; expected one of {sorted(table)}.")
            mesh_axes = table[axis] if axis is not None else None
            for name in mesh_axes or ():
                if name in used:
                    raise ValueError(f"logical axes {axes} put two axes on mesh axis {name!r}.")
                used.add(name)
            out.append(mesh_axes or None)
        return PartitionSpec(*out)

    def sharding(self, axes: tuple[str | None, ...]) -> NamedSharding:
        """`spec` on the placement's mesh; in host memory if parameters are offloaded."""
        place = NamedSharding(mesh(self.placement), self.spec(axes))
        return in_host(place) if self.placement.offload == "params" else place

    def fitting(self, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
        """Sharding, in device memory, of an array whose sizes differ from the model's.

        Args:
            axes: logical axes of the array's leading dimensions; other dimensions, and those whose
                size does not divide, are replicated.
            shape: of the array.
        """
        grid, table = mesh(self.placement), dict(self.table)
        ways = {axis: math.prod(grid.shape[a] for a in table.get(axis) or ()) for axis in axes}
        fit = [axis if n % ways[axis] == 0 else None for axis, n in zip(axes, shape, strict=False)]
        spec = [*self.spec(tuple(fit))]
        while spec and spec[-1] is None:  # equal shardings compare equal
            spec.pop()
        return NamedSharding(grid, PartitionSpec(*spec))

    def tree(self, axes: Any) -> Any:
        """Shardings for a tree whose leaves are tuples of logical axes."""
        return jax.tree.map(self.sharding, axes, is_leaf=lambda x: isinstance(x, tuple))


def rules(
    placement: Placement,
    sizes: Mapping[str, set[int]],
    *,
    lengths: bool = True,
    mixed: bool = False,
) -> Rules:
    """Sharding rules of a model whose logical axes have these sizes.

    Args:
        placement: devices and mesh of the call.
        sizes: logical parameter axis -> the sizes it takes in the model.
        lengths: True if the call's arrays have complete rows of T positions. Generation adds one
            position at a time, so its positions are not sharded over `seq`.
        mixed: shard rows, and not their positions, over `seq`.
    """
    table, notes = dict(TABLE), []
    if placement.dcn > 1:
        axes = row_axes(placement)
        table |= {"embed": ("dcn", "fsdp"), "batch": axes, "packed": (*axes, "seq")}
    if not lengths or mixed or placement.seq == 1:
        table["length"] = ()
    if mixed:
        table["batch"] = table["packed"]
    for axis, seen in sizes.items():
        ways = 1
        for name in table[axis]:
            ways *= placement.axes[name]
        bad = sorted(n for n in seen if n % ways)
        if bad:
            notes.append(f"{axis} of size {bad[0]} does not divide by {ways} and stays whole")
            table[axis] = ()
            if f"act_{axis}" in table:
                table[f"act_{axis}"] = ()
    return Rules(placement, tuple((k, v or None) for k, v in table.items()), tuple(notes))


def row_axes(placement: Placement) -> tuple[str, ...]:
    """Mesh axes that shard the rows of a batch."""
    return ("dcn", "data", "fsdp") if placement.dcn > 1 else ("data", "fsdp")


@functools.lru_cache(maxsize=1024)
def arrays(placement: Placement, *, lengths: bool = True) -> Rules:
    """Rules for the arrays of a call: `batch` and `length`, or `packed`, see `TABLE`.

    Args:
        lengths: as for `rules`.
    """
    return rules(placement, {}, lengths=lengths)


def in_host(sharding: NamedSharding) -> NamedSharding:
    """The same sharding in pinned host memory."""
    return sharding.with_memory_kind("pinned_host")


def replicated(placement: Placement) -> NamedSharding:
    """Sharding that replicates an array on every device of the placement."""
    return NamedSharding(mesh(placement), PartitionSpec())

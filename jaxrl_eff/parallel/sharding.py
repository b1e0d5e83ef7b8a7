"""Logical axes to mesh axes: one table for every model and every placement.

A model names the axes of its parameters and activations (`embed`, `heads`, `batch`, ...); the table
below says which mesh axis each is split over. An axis whose size does not divide is left whole,
with a note, rather than refused: four key/value heads on eight-way tensor parallelism stay whole on
each device, as every framework does.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_eff.parallel.mesh import Placement, mesh

# Batch rows are split over fsdp too: every device works on its own rows with gathered parameters.
# Where there are nodes (dcn), they come first wherever fsdp stands.
TABLE: dict[str, tuple[str, ...]] = {
    "embed": ("fsdp",),
    "node_embed": ("fsdp",),  # of weights that every node has whole
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffn": ("tensor",),
    "vocab": ("tensor",),
    "head_dim": (),
    "layers": (),
    "batch": ("data", "fsdp"),
    "length": ("seq",),
    "act_embed": (),
    "act_heads": ("tensor",),
    "act_kv_heads": ("tensor",),
    "act_ffn": ("tensor",),
    "act_vocab": ("tensor",),
}


@dataclasses.dataclass(frozen=True)
class Rules:
    """The table for one model on one placement.

    Attributes:
        placement: where.
        table: logical axis -> mesh axes, without those that do not divide.
        notes: one sentence for each axis that was left whole.
    """

    placement: Placement
    table: tuple[tuple[str, tuple[str, ...] | None], ...]
    notes: tuple[str, ...]

    def spec(self, axes: tuple[str | None, ...]) -> PartitionSpec:
        """The spec of an array with these logical axes.

        Raises:
            ValueError: an axis is unknown, or two axes land on one mesh axis.
        """
        table, used, out = dict(self.table), set(), []
        for axis in axes:
            if axis is not None and axis not in table:
                raise ValueError(f"unknown logical axis {axis!r}; there are {sorted(table)}.")
            mesh_axes = table[axis] if axis is not None else None
            for name in mesh_axes or ():
                if name in used:
                    raise ValueError(f"logical axes {axes} put two axes on mesh axis {name!r}.")
                used.add(name)
            out.append(mesh_axes or None)
        return PartitionSpec(*out)

    def sharding(self, axes: tuple[str | None, ...]) -> NamedSharding:
        """As `spec`, on the placement's mesh; in host memory if parameters wait there."""
        place = NamedSharding(mesh(self.placement), self.spec(axes))
        return in_host(place) if self.placement.offload == "params" else place

    def fitting(self, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
        """As `sharding` in device memory, of an array whose sizes are not the model's.

        Args:
            axes: of the first axes of the array; the others are whole, as are those of a size that
                does not divide.
        """
        grid, table = mesh(self.placement), dict(self.table)
        ways = {axis: math.prod(grid.shape[a] for a in table.get(axis) or ()) for axis in axes}
        fit = (axis if n % ways[axis] == 0 else None for axis, n in zip(axes, shape, strict=False))
        return NamedSharding(grid, self.spec(tuple(fit)))

    def tree(self, axes: Any) -> Any:
        """Shardings of a tree whose leaves are tuples of logical axes."""
        return jax.tree.map(self.sharding, axes, is_leaf=lambda x: isinstance(x, tuple))


def rules(
    placement: Placement,
    sizes: Mapping[str, set[int]],
    *,
    lengths: bool = True,
    mixed: bool = False,
) -> Rules:
    """The table for a model whose logical axes have these sizes.

    Args:
        placement: where the call runs.
        sizes: logical parameter axis -> the sizes it takes in the model.
        lengths: whether the call's arrays have whole rows of T positions. Generation adds one
            position at a time, so its rows are not split over `seq`.
        mixed: whether rows are split over `seq` as well, and their positions are not.
    """
    table, notes = dict(TABLE), []
    if placement.dcn > 1:
        table |= {"embed": ("dcn", "fsdp"), "batch": row_axes(placement)}
    if not lengths or mixed:
        table["length"] = ()
    if mixed:
        table["batch"] = (*table["batch"], "seq")
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
    """The mesh axes that split the rows of a batch."""
    return ("dcn", "data", "fsdp") if placement.dcn > 1 else ("data", "fsdp")


def rows(placement: Placement, shape: tuple[int, ...], *, lengths: bool = True) -> NamedSharding:
    """The sharding of a batch array: rows over dcn, data and fsdp, positions over seq.

    A dimension that does not divide stays whole.
    """
    spec: list[Any] = []
    if shape and shape[0] % placement.row_shards == 0:
        spec.append(row_axes(placement))
    elif shape:
        spec.append(None)
    if lengths and len(shape) > 1 and placement.seq > 1 and shape[1] % placement.seq == 0:
        spec.append("seq")
    return NamedSharding(mesh(placement), PartitionSpec(*spec))


def mixed_rows(placement: Placement, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of a batch array with a row, or several, on every device along seq too."""
    spec = PartitionSpec((*row_axes(placement), "seq")) if shape else PartitionSpec()
    return NamedSharding(mesh(placement), spec)


def in_host(sharding: NamedSharding) -> NamedSharding:
    """The same parts on the same devices' hosts, in pinned memory."""
    return sharding.with_memory_kind("pinned_host")


def replicated(placement: Placement) -> NamedSharding:
    """Whole on every device of the placement."""
    return NamedSharding(mesh(placement), PartitionSpec())

"""How each parameter is sharded and sent in a train call on nodes with slow links: ZeRO++.

Quantized: kernels of layers, embeddings and unembeddings. Norms, biases, value heads, adapters and
taps are small and are sent unquantized; so are the codes of a quantized base, and the gradients of
layers that are trained in turn (LISA), which are summed in full in float32. Unquantized arrays have
no residual, so error feedback applies to parameters that are trained in full, also by an
adaptation.

Weights frozen by an adapter never change, so every node has all of them (MixZ++ of DeepSpeed),
sharded over its devices, and none are sent between nodes: they have the logical axis `node_embed`
instead of `embed`. Within a node they are sent at the level's precision.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_eff import tree
from jaxrl_eff.core import programs
from jaxrl_eff.core.graph import Call
from jaxrl_eff.core.specs import Adaptation, Spec, is_kernel
from jaxrl_eff.parallel import Placement, Rules, host
from jaxrl_eff.parallel.codec import EXACT
from jaxrl_eff.parallel.mesh import mesh
from jaxrl_eff.parallel.sharding import row_axes
from jaxrl_eff.parallel.zero.weights import ShardLayout, exact


class Leaf(NamedTuple):
    """Sharding and communication of a parameter.

    Attributes:
        spec: partition over the axes that shard rows.
        cut: how it is gathered; None if it is replicated.
        late: True if a layer gathers it when it uses it.
        error_feedback: shape of the quantization residual of its gradient, over all nodes, and its
            partition spec; None if there is none.
        node_copy: the same for the copy of it that every node keeps.
    """

    spec: PartitionSpec
    cut: ShardLayout | None = None
    late: bool = False
    error_feedback: tuple[tuple[int, ...], PartitionSpec] | None = None
    node_copy: tuple[tuple[int, ...], PartitionSpec] | None = None


class Leaves:
    """The `Leaf` of every parameter of a model, for one train call.

    Attributes:
        plan: the model's `ZeroConfig`, on the placement's axes.
        place: the call's placement.
        rows: mesh axes that shard rows.
        trained: names of the differentiated arrays.
        codes: names of parameters that are codes or scales.
        by_name: name -> leaf.

    Raises:
        ValueError: the call's placement has another number of nodes, or does not shard the weights;
            or the model's adaptation does not support tensor parallelism.
    """

    def __init__(self, c: Call, place: Placement, rules: Rules, spec: Spec):
        self.plan = dataclasses.replace(
            spec.sends, slow="dcn", fast="fsdp", copies="data" if place.data > 1 else ""
        )
        _check(c, place, rules, spec)
        self.place, self.rows, self._rules = place, row_axes(place), rules
        self.trained, self.codes = _trained(spec), spec.codes
        shapes = tree.flat(spec.shapes)
        self.by_name = {
            name: self._leaf(axes, shapes[name], name in self.codes, name in self.trained)
            for name, axes in _flat_axes(spec.axes).items()
        }

    def of(self, name: str) -> Leaf:
        """Returns a parameter's leaf; extra leaves, such as taps, are replicated."""
        return self.by_name.get(name, Leaf(PartitionSpec()))

    def _leaf(
        self, axes: tuple[str | None, ...], like: jax.ShapeDtypeStruct, codes: bool, trained: bool
    ) -> Leaf:
        manual, local = self.manual(self._rules.spec(axes)), "node_embed" in axes
        if "embed" not in axes and not local:
            return Leaf(manual)
        layers = axes[0] == "layers"
        place, own = self.place, axes[1:] if layers else axes
        axis = own.index("node_embed" if local else "embed")
        shape = list(like.shape[1:] if layers else like.shape)
        shape[axis] //= place.fsdp if local else place.weight_shards
        table = dict(self._rules.table)
        apart = [
            i for i, a in enumerate(own)
            if place.tensor > 1 and a is not None and "tensor" in (table[a] or ())
        ]  # fmt: skip
        rounded = is_kernel(axes) and not codes
        late = layers and (rounded or codes)
        plan = self.plan if rounded or codes else exact(self.plan)
        if rounded and not late:  # gradients of embeddings are summed in the dtype of the table
            plan = dataclasses.replace(plan, dtype=str(like.dtype))
        cut = ShardLayout(tuple(shape), axis, plan, tuple(apart), raw=not rounded, local=local)
        if local or not rounded:
            return Leaf(manual, cut, late)
        feedback = copy = None
        sizes, split = self._by_node(like.shape, axes)
        if trained and plan.rung.feedback:  # one residual per sending node
            feedback = (place.dcn, *sizes), PartitionSpec("dcn", *split)
        if plan.deltas is not None:
            copy = sizes, split
        return Leaf(manual, cut, late, feedback, copy)

    def _by_node(
        self, shape: tuple[int, ...], axes: tuple[str | None, ...]
    ) -> tuple[tuple[int, ...], PartitionSpec]:
        """Splits embed: [..., nodes, embed / nodes, ...], for any number of devices per node."""
        at, nodes = axes.index("embed"), self.place.dcn
        sizes = (*shape[:at], nodes, shape[at] // nodes, *shape[at + 1 :])
        split = list(self._rules.spec(axes))
        return sizes, PartitionSpec(*split[:at], None, "fsdp", *split[at + 1 :])

    def manual(self, spec: PartitionSpec) -> PartitionSpec:
        """Drops the mesh axes that are left to the compiler."""

        def kept(names: Any) -> Any:
            names = (names,) if isinstance(names, str) else names or ()
            return tuple(n for n in names if n in self.rows) or None

        return PartitionSpec(*map(kept, spec))

    def error_feedback(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and shardings of the residuals: parameter -> float32, see `Model`."""
        shapes = {name: leaf.error_feedback for name, leaf in self.by_name.items()}
        return self._state(shapes, jnp.float32)

    def node_copy(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and shardings of every node's copy of the weights, see `Model`."""
        shapes = {name: leaf.node_copy for name, leaf in self.by_name.items()}
        return self._state(shapes, EXACT.get(self.plan.rung.weight_bits))

    def _state(self, shapes: Mapping[str, Any], dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
        grid = mesh(self.place)
        return {
            name: jax.ShapeDtypeStruct(x[0], dtype, sharding=NamedSharding(grid, x[1]))
            for name, x in shapes.items()
            if x is not None
        }


def _flat_axes(axes: Any) -> dict[str, tuple[str | None, ...]]:
    return tree.flat(axes, is_leaf=lambda x: isinstance(x, tuple))


def _trained(spec: Spec) -> frozenset[str]:
    """Returns the names of the differentiated arrays."""
    way = programs.way_of(spec.tx)
    opt = jax.eval_shape(way.init, spec.shapes)
    return frozenset(tree.flat(jax.eval_shape(way.leaves, spec.shapes, opt)))


def _check(c: Call, place: Placement, rules: Rules, spec: Spec) -> None:
    plan = spec.sends
    what = f"{c.name} sends {plan.rung.name!r}"
    if plan.nodes and place.dcn != plan.nodes:
        raise ValueError(
            f"{what} between {plan.nodes} nodes, but its placement has dcn={place.dcn}: {place}."
        )
    if mesh(place).devices.flat[0].platform == "cpu" and not host.in_order():
        raise ValueError(
            f"{what} on simulated devices, which may mix up its messages unless XLA_FLAGS has "
            f"{host.IN_ORDER} before JAX starts; config.simulate_devices sees to it."
        )
    split = dict(rules.table)
    if split["embed"] is None or split["node_embed"] is None:
        width = {
            n
            for axes, x in zip(
                _flat_axes(spec.axes).values(), tree.flat(spec.shapes).values(), strict=True
            )
            for a, n in zip(axes, x.shape, strict=True)
            if a in ("embed", "node_embed")
        }
        raise ValueError(
            f"{what}, but a model of width {sorted(width)} does not divide by "
            f"{place.weight_shards} = {place.dcn} (dcn) x {place.fsdp} (fsdp), so that no weight "
            "would be sharded."
        )
    if isinstance(spec.tx, Adaptation) and spec.tx.reselect is not None and place.tensor > 1:
        raise ValueError(
            f"{what} and trains entries or layers of its kernels, which goes with tensor=1 only; "
            f"its placement is {place}."
        )

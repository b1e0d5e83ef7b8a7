"""Gradient sums of a train call on nodes with slow links between them: ZeRO++ (arXiv:2306.10209).

Within `jax.shard_map` over the axes that shard rows, every device computes the gradient of its own
rows. Weights arrive as shards. Kernels of layers are all-gathered when a layer uses them;
embeddings, heads and small arrays once per call; gradients are reduce-scattered. The model's
`parallel.zero.levels.ZeroConfig` sets the precision. With several micro-batches nothing crosses the
slow axis between the first and the last, so their number does not change the rounding.

Quantized: kernels of layers, embeddings and unembeddings. Norms, biases, value heads, adapters and
taps are small and are sent unquantized; so are the codes of a quantized base, and the gradients of
layers that are trained in turn (LISA), which are summed in full in float32. Unquantized arrays have
no residual, so error feedback applies to parameters that are trained in full, also by an
adaptation.

Weights frozen by an adapter never change, so every node has all of them (MixZ++ of DeepSpeed),
sharded over its devices, and none are sent between nodes: they have the logical axis `node_embed`
instead of `embed`. Within a node they are sent at the level's precision.

Where weight differences are sent, every node keeps a 16- or 32-bit copy of the weights across
steps, sharded over its devices. An update first brings the copy up to date, identically on all
nodes, and then computes from it as micro-batches do.

Losses are sums over rows, so local sums add up like those of micro-batches.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_eff import tree
from jaxrl_eff.core import meters, programs
from jaxrl_eff.core.graph import Adaptation, Call, Model, Spec
from jaxrl_eff.parallel import Placement, Rules, host, jaxpr_bytes
from jaxrl_eff.parallel.codec import EXACT, Blocks
from jaxrl_eff.parallel.mesh import mesh
from jaxrl_eff.parallel.sharding import row_axes
from jaxrl_eff.parallel.zero.weights import NodeWeight, ShardedWeight, ShardLayout, exact

ROUNDED = ("kernel", "table")
CODES = ("kernel_codes", "kernel_scales")


class Leaf(NamedTuple):
    """Sharding and communication of a parameter.

    Attributes:
        spec: partition over the axes that shard rows.
        cut: how it is gathered; None if it is replicated.
        late: True if a layer gathers it when it uses it.
        left: shape of the quantization residual of its gradient, over all nodes, and its partition
            spec; None if there is none.
        held: the same for the copy of it that every node keeps.
    """

    spec: PartitionSpec
    cut: ShardLayout | None = None
    late: bool = False
    left: tuple[tuple[int, ...], PartitionSpec] | None = None
    held: tuple[tuple[int, ...], PartitionSpec] | None = None


class NodeGradients:
    """Computation of a train call's sums, for a model whose `Spec` sets `sends`.

    Attributes:
        plan: the model's `ZeroConfig`, on the placement's axes.

    Raises:
        ValueError: the call's placement has another number of nodes, shards sequences, or does not
            shard the weights; or the model's adaptation does not support tensor parallelism.
    """

    def __init__(self, c: Call, place: Placement, rules: Rules, spec: Spec):
        self.plan = dataclasses.replace(
            spec.sends, slow="dcn", fast="fsdp", copies="data" if place.data > 1 else ""
        )
        _check(c, place, rules, spec)
        self._call, self._place, self._rules = c, place, rules
        self._rows = row_axes(place)
        self._axes = _flat_axes(spec.axes)
        shapes, self._trained = tree.flat(spec.shapes), _trained(spec)
        self._leaves = {
            name: self._leaf(name, axes, shapes[name], name in self._trained)
            for name, axes in self._axes.items()
        }
        self._update: tuple[dict[str, float], float] = {}, 0.0

    def _leaf(
        self, name: str, axes: tuple[str | None, ...], like: jax.ShapeDtypeStruct, trained: bool
    ) -> Leaf:
        manual, local = self._manual(self._rules.spec(axes)), "node_embed" in axes
        if "embed" not in axes and not local:
            return Leaf(manual)
        last, layers = name.rpartition("/")[2], axes[0] == "layers"
        place, own = self._place, axes[1:] if layers else axes
        axis = own.index("node_embed" if local else "embed")
        shape = list(like.shape[1:] if layers else like.shape)
        shape[axis] //= place.fsdp if local else place.weight_shards
        table = dict(self._rules.table)
        apart = [
            i for i, a in enumerate(own)
            if place.tensor > 1 and a is not None and "tensor" in (table[a] or ())
        ]  # fmt: skip
        matrix = math.prod(shape) > shape[axis]
        rounded, codes = matrix and last in ROUNDED, last in CODES
        late = layers and (rounded or codes)
        plan = self.plan if rounded or codes else exact(self.plan)
        if rounded and not late:  # gradients of embeddings are summed in the dtype of the table
            plan = dataclasses.replace(plan, dtype=str(like.dtype))
        cut = ShardLayout(tuple(shape), axis, plan, tuple(apart), raw=not rounded, local=local)
        if local or not rounded:
            return Leaf(manual, cut, late)
        left = held = None
        sizes, split = self._by_node(like.shape, axes)
        if trained and plan.rung.feedback:  # one residual per sending node
            left = (place.dcn, *sizes), PartitionSpec("dcn", *split)
        if plan.deltas is not None:
            held = sizes, split
        return Leaf(manual, cut, late, left, held)

    def _by_node(
        self, shape: tuple[int, ...], axes: tuple[str | None, ...]
    ) -> tuple[tuple[int, ...], PartitionSpec]:
        """Splits embed: [..., nodes, embed / nodes, ...], for any number of devices per node."""
        at, nodes = axes.index("embed"), self._place.dcn
        sizes = (*shape[:at], nodes, shape[at] // nodes, *shape[at + 1 :])
        split = list(self._rules.spec(axes))
        return sizes, PartitionSpec(*split[:at], None, "fsdp", *split[at + 1 :])

    def _manual(self, spec: PartitionSpec) -> PartitionSpec:
        """Drops the mesh axes that are left to the compiler."""

        def kept(names: Any) -> Any:
            names = (names,) if isinstance(names, str) else names or ()
            return tuple(n for n in names if n in self._rows) or None

        return PartitionSpec(*map(kept, spec))

    def left(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and shardings of the residuals: parameter -> float32, see `Model`."""
        return self._state({name: leaf.left for name, leaf in self._leaves.items()}, jnp.float32)

    def held(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and shardings of every node's copy of the weights, see `Model`."""
        shapes = {name: leaf.held for name, leaf in self._leaves.items()}
        return self._state(shapes, EXACT.get(self.plan.rung.weight_bits))

    def _state(self, shapes: Mapping[str, Any], dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
        grid = mesh(self._place)
        return {
            name: jax.ShapeDtypeStruct(x[0], dtype, sharding=NamedSharding(grid, x[1]))
            for name, x in shapes.items()
            if x is not None
        }

    # The program

    def __call__(
        self,
        loss: Callable[..., Any],
        way: Adaptation,
        key: jax.Array,
        model: Model,
        leaves: Any,
        batch: Mapping[str, jax.Array],
        parts: int,
    ) -> tuple[programs.Sums, dict[str, Any]]:
        """Returns `programs.sums` of all rows in `parts` micro-batches, and new model fields.

        Must be traced in the call's context.
        """
        attached = way.attach(model.params, model.opt, leaves)
        arrays, trained = tree.flat(attached), [*tree.flat(leaves)]
        run = functools.partial(
            self._run, loss, jax.tree.structure(attached), frozenset(trained), parts
        )
        specs = {name: self._of(name).spec for name in arrays}
        kept = {"left": dict(model.left or {}), "held": dict(model.held or {})}
        there = {
            k: {n: self._manual(getattr(self._leaves[n], k)[1]) for n in kept[k]} for k in kept
        }
        rows, whole = PartitionSpec(self._rows), PartitionSpec()
        done, kept = jax.shard_map(
            run,
            in_specs=(specs, there, rows, whole),
            out_specs=(
                programs.Sums(whole, whole, whole, {n: specs[n] for n in trained}), there,
            ),
            axis_names=self._manual_axes(),
            check_vma=False,
        )(arrays, kept, dict(batch), key)  # fmt: skip
        grads = jax.tree.unflatten(
            jax.tree.structure(leaves), [done.grads[name] for name in trained]
        )
        return done._replace(grads=grads), {k: new for k, new in kept.items() if new}

    def _manual_axes(self) -> set[str]:
        """Returns all axes except `tensor` of size > 1, which is left to the compiler."""
        sizes = self._place.axes
        return {a for a in sizes if a != "tensor" or sizes[a] == 1}

    def _of(self, name: str) -> Leaf:
        """Returns a parameter's leaf; extra leaves, such as taps, are replicated."""
        return self._leaves.get(name, Leaf(PartitionSpec()))

    def _run(
        self,
        loss: Callable[..., Any],
        structure: Any,
        trained: frozenset[str],
        parts: int,
        arrays: dict[str, jax.Array],
        kept: dict[str, dict[str, jax.Array]],
        batch: dict[str, jax.Array],
        key: jax.Array,
    ) -> tuple[programs.Sums, dict[str, dict[str, jax.Array]]]:
        """Computes on one device: its rows, its shards, its part of the kept state."""
        with self._inside():
            hoisted = parts > 1 or self.plan.deltas is not None
            left = {name: x[0] for name, x in kept["left"].items()}  # this node's, as sender
            held = {n: self._of(n).cut.renewed(arrays[n], x) for n, x in kept["held"].items()}
            fixed, variables = self._opened(arrays, held, trained, hoisted)
            early = {n: x for n, x in left.items() if self._of(n).late and not hoisted}

            def total(variables: Any, early: Any, part: Any) -> Any:
                given = [
                    self._placed(n, variables.get(n), early.get(n), fixed.get(n), hoisted)
                    for n in arrays
                ]
                value, weight, seen = loss(structure.unflatten(given), part, key)
                return value, (weight, seen)

            def of(part: Any) -> tuple[programs.Sums, dict[str, jax.Array]]:
                grad = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
                (value, (weight, seen)), (grads, over) = grad(variables, early, part)
                return programs.Sums(value, weight, seen, grads), over

            if parts == 1:
                done, over = of(batch)
            else:
                split = programs.split(batch, parts)
                like, over = jax.eval_shape(of, jax.tree.map(lambda x: x[0], split))
                start = programs.Sums.zeros(like)
                done, _ = lax.scan(lambda sums, part: (sums.plus(of(part)[0]), None), start, split)
            self._noted(arrays, trained, parts, done)
            done, left = self._closed(done, left, over, hoisted)
            return done, {"left": left, "held": held}

    def _inside(self) -> Any:
        """Context with rules for logical axes, restricted to the `tensor` axis."""
        table = []
        if self._place.tensor > 1:
            table = [
                (k, tuple(a for a in v or () if a == "tensor") or None)
                for k, v in self._rules.table
            ]
        return nn.logical_axis_rules(table)

    def _opened(
        self,
        arrays: Mapping[str, jax.Array],
        held: Mapping[str, jax.Array],
        trained: frozenset[str],
        hoisted: bool,
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Splits the loss's inputs into constants and differentiated arrays, by name.

        An array that layers gather is a shard; if its slow traffic is hoisted, it is the node's
        part as a constant, and zeros that receive the gradient.
        """
        fixed, variables = {}, {}
        for name, x in arrays.items():
            leaf = self._of(name)
            if leaf.cut is not None and not leaf.late:
                x = leaf.cut.gathered(x, held.get(name))
            if leaf.late and hoisted:
                fixed[name] = leaf.cut.near(x, held.get(name))
                if name in trained:
                    apart = [leaf.cut.shape[i] for i in leaf.cut.apart]
                    shape = (x.shape[0], *apart, self._place.dcn, leaf.cut.m)
                    variables[name] = jnp.zeros(shape, jnp.float32)
            elif name in trained:
                variables[name] = x
            else:
                fixed[name] = x
        return fixed, variables

    def _placed(self, name: str, variable: Any, early: Any, fixed: Any, hoisted: bool) -> Any:
        """Returns the leaf for a parameter in the tree that the loss reads."""
        leaf = self._of(name)
        if not leaf.late:
            return fixed if variable is None else variable
        if hoisted:
            return NodeWeight(fixed, variable, leaf.cut)
        if variable is None:
            return ShardedWeight(fixed, None, leaf.cut, trained=False)
        return ShardedWeight(variable, early, leaf.cut, trained=True)

    def _closed(
        self,
        done: programs.Sums,
        left: Mapping[str, jax.Array],
        over: Mapping[str, jax.Array],
        hoisted: bool,
    ) -> tuple[programs.Sums, dict[str, jax.Array]]:
        """Reduces over all devices: sums, gradients of shards, residuals."""
        grads, new = {}, dict(over)
        for name, g in done.grads.items():
            leaf = self._of(name)
            if leaf.cut is None:
                grads[name] = lax.psum(g.astype(jnp.float32), self._rows)
            elif not leaf.late:
                grads[name], new[name] = leaf.cut.reduced(g, left.get(name))
            elif hoisted:
                grads[name], new[name] = leaf.cut.reduced_slow(g, left.get(name))
            else:
                grads[name] = g
        loss, weight = lax.psum((done.loss, done.weight), self._rows)
        seen = {k: meters.summed(v, self._rows) for k, v in done.seen.items()}
        return programs.Sums(loss, weight, seen, grads), {n: new[n][None] for n in left}

    # Traffic

    def _noted(
        self,
        arrays: Mapping[str, jax.Array],
        trained: frozenset[str],
        parts: int,
        done: programs.Sums,
    ) -> None:
        """Records, while a program is traced, the bytes that one update of it must send."""
        sizes = {a: self._place.axes[a] for a in self._rows}
        found, plain = dict.fromkeys(sizes, 0.0), 0.0
        for name, x in arrays.items():
            leaf = self._of(name)
            if leaf.cut is not None:
                vectors = x.size // math.prod(leaf.cut.shape)
                _add(found, self._promised(leaf, x, name in trained, parts), vectors)
                if not name.endswith(CODES[1]):
                    passes = (self._place.dcn - 1) * (2 + (name in trained)) * parts
                    shards = self._place.dcn if leaf.cut.local else 1
                    plain += passes * vectors * leaf.cut.sent(Blocks(16)) / shards
            elif name in trained:
                _add(found, jaxpr_bytes.summed(4 * x.size, sizes))
                plain += jaxpr_bytes.summed(2 * x.size, sizes)["dcn"] * parts
        numbers = (done.loss, done.weight, done.seen)
        for x in jax.tree.leaves(numbers):
            _add(found, jaxpr_bytes.summed(x.size * x.dtype.itemsize, sizes))
        self._update = found, plain

    def _promised(self, leaf: Leaf, x: jax.Array, trained: bool, parts: int) -> dict[str, float]:
        """Returns the bytes of one weight (of a layer) in one update, by mesh axis.

        Let w, g and h be the bytes of a shard as a weight, as a gradient on the slow axis and as a
        gradient on the fast axis. A weight is gathered twice per micro-batch if late, else once per
        update; but over the slow axis once where a secondary copy is kept or micro-batches share
        it, and as a difference where nodes keep a copy. A weight that every node has in full counts
        as on one node.
        """
        cut, place = leaf.cut, self._place
        w = math.prod(cut.shape) * x.dtype.itemsize if cut.raw else cut.sent(cut.plan.weights)
        g = cut.sent(cut.plan.gradients) if trained else 0
        h = cut.sent(cut.plan.fast_gradients) if trained else 0
        fast = parts if leaf.late else 1
        again = 2 if leaf.late else 1
        slow = w if cut.plan.rung.secondary or parts > 1 else again * w
        if leaf.held is not None:
            slow = cut.sent(cut.plan.deltas)
        nodes = 1 if cut.local else place.dcn  # nodes whose shards a device gathers
        found = {
            "dcn": (nodes - 1) * (slow + g),
            "fsdp": (place.fsdp - 1) * nodes * fast * (again * w + h),
        }
        if trained and place.data > 1:
            sums = cut.rows * cut.m * place.dcn * 4
            found["data"] = jaxpr_bytes.summed(sums, {"data": place.data})["data"]
        return {k: float(v) for k, v in found.items()}

    def traffic(self, program: Any) -> "Traffic":
        """Counts the bytes of the traced train call and checks them against the expected bytes.

        Raises:
            ValueError: a mesh axis carries more than expected.
        """
        promised, plain = self._update
        updates = self._call.epochs * self._call.minibatches
        promised = {a: updates * n for a, n in promised.items()}
        counted = jaxpr_bytes.count(program, self._place.axes)
        try:
            jaxpr_bytes.contract(counted, promised)
        except ValueError as error:
            raise ValueError(f"{self._call.name}: {error}") from None
        counted = {a: counted[a] for a in self._rows}
        return Traffic(self.plan.rung.name, counted, promised, updates * plain, self._notes())

    def _notes(self) -> tuple[str, ...]:
        """Returns notes on partial training that the level's name omits."""
        leaves, notes = self._leaves, []
        rounded = {n for n, leaf in leaves.items() if leaf.cut is not None and not leaf.cut.raw}
        if not rounded & self._trained:
            notes.append("gradients travel exactly, in float32")
        if any(leaf.cut.local for leaf in leaves.values() if leaf.cut is not None):
            notes.append("every node has what is frozen")
        return tuple(notes)


class Traffic(NamedTuple):
    """Bytes received per device in one run of a train call.

    Attributes:
        name: of the level.
        counted: in the call's program, by mesh axis.
        promised: by closed form.
        plain: bytes of 16-bit ZeRO-3 over the slow axis.
        notes: further remarks.
    """

    name: str
    counted: dict[str, float]
    promised: dict[str, float]
    plain: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        slow = self.counted["dcn"]
        return (
            f"{self.name} sends {slow / 1e6:,.3f} MB a device and step between nodes, "
            f"{slow / self.plain:.2f} of ZeRO-3's in 16 bits{''.join(f'; {n}' for n in self.notes)}"
        )


def _add(total: dict[str, float], more: Mapping[str, float], times: int = 1) -> None:
    for axis, n in more.items():
        total[axis] += times * n


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
    if place.seq > 1:
        raise ValueError(f"{what}, which cannot be over a seq axis; its placement is {place}.")
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

"""Gradient sums of a train call on nodes with slow links between them: ZeRO++ (arXiv:2306.10209).

Within `jax.shard_map` over the axes that shard rows, every device computes the gradient of its own
rows. Weights arrive as shards. Kernels of layers are all-gathered when a layer uses them;
embeddings, heads and small arrays once per call; gradients are reduce-scattered. The model's
`parallel.zero.levels.ZeroConfig` sets the precision. With several micro-batches nothing crosses the
slow axis between the first and the last, so their number does not change the rounding.

Where weight differences are sent, every node keeps a 16- or 32-bit copy of the weights across
steps, sharded over its devices. An update first brings the copy up to date, identically on all
nodes, and then computes from it as micro-batches do.

Losses are sums over rows, so local sums add up like those of micro-batches.

Axes that shard no rows, `seq` and `tensor`, are left to the compiler, which sums gradients over
`seq` before they are sent. Attention over `seq` is a `jax.shard_map` within this one.
"""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxrl_eff import tree
from jaxrl_eff.core import meters, programs, token_layouts, zero_bytes
from jaxrl_eff.core.graph import Call
from jaxrl_eff.core.specs import Adaptation, Model, Spec
from jaxrl_eff.core.zero_bytes import Traffic
from jaxrl_eff.core.zero_leaves import Leaves
from jaxrl_eff.parallel import Placement, Rules
from jaxrl_eff.parallel.attention.context import sequence_layout
from jaxrl_eff.parallel.zero.weights import NodeWeight, ShardedWeight


class Read(NamedTuple):
    """The arrays that a loss reads.

    Attributes:
        arrays: by name; `structure`: of their tree.
        trained: names of the differentiated ones; `leaves`: the structure of their tree.
    """

    arrays: dict[str, jax.Array]
    structure: Any
    trained: list[str]
    leaves: Any

    @classmethod
    def of(cls, way: Adaptation, model: Model, leaves: Any) -> "Read":
        attached = way.attach(model.params, model.opt, leaves)
        structure = jax.tree.structure(attached)
        return cls(tree.flat(attached), structure, [*tree.flat(leaves)], jax.tree.structure(leaves))

    def back(self, done: programs.Sums) -> programs.Sums:
        """Returns sums with gradients in the tree of the differentiated arrays."""
        grads = [done.grads[name] for name in self.trained]
        return done._replace(grads=jax.tree.unflatten(self.leaves, grads))


class NodeGradients:
    """Computation of a train call's sums, for a model whose `Spec` sets `sends`.

    Attributes:
        plan: the model's `ZeroConfig`, on the placement's axes.

    Raises:
        ValueError: see `zero_leaves.Leaves`.
    """

    def __init__(self, c: Call, place: Placement, rules: Rules, spec: Spec):
        self.leaves = Leaves(c, place, rules, spec)
        self.call, self.place = c, place
        self.rows, self.of, self.plan = self.leaves.rows, self.leaves.of, self.leaves.plan
        self._compiled = [a for a in ("seq", "tensor") if place.axes[a] > 1]
        self._update = zero_bytes.Update({}, 0.0)

    def error_feedback(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and shardings of the residuals: parameter -> float32, see `Model`."""
        return self.leaves.error_feedback()

    def node_copy(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and shardings of every node's copy of the weights, see `Model`."""
        return self.leaves.node_copy()

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
        read = Read.of(way, model, leaves)
        run = functools.partial(self._run, loss, read, parts)
        kept = {
            "error_feedback": dict(model.error_feedback or {}),
            "node_copy": dict(model.node_copy or {}),
        }
        there = {k: self.kept_specs(k, kept[k]) for k in kept}
        specs = self.specs(read.arrays)
        done, kept = self.over_devices(
            run,
            (specs, there, PartitionSpec(self.rows), PartitionSpec()),
            (self.sums_specs(read), there),
        )(read.arrays, kept, dict(batch), key)
        return read.back(done), {k: new for k, new in kept.items() if new}

    def over_devices(self, run: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """Returns `run` of one device as a function of global arrays."""
        return jax.shard_map(
            run,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=self._manual_axes(),
            check_vma=False,
        )

    def specs(self, names: Iterable[str]) -> dict[str, PartitionSpec]:
        return {name: self.of(name).spec for name in names}

    def kept_specs(self, field: str, names: Iterable[str]) -> dict[str, PartitionSpec]:
        """Returns the partition specs of a field of `Model`: "error_feedback" or "node_copy"."""
        return {n: self.leaves.manual(getattr(self.of(n), field)[1]) for n in names}

    def sums_specs(self, read: "Read") -> programs.Sums:
        whole = PartitionSpec()
        return programs.Sums(whole, whole, whole, self.specs(read.trained))

    def _manual_axes(self) -> set[str]:
        """Returns all axes except `seq` and `tensor` of size > 1, left to the compiler."""
        return {*self.place.axes} - {*self._compiled}

    def _run(
        self,
        loss: Callable[..., Any],
        read: "Read",
        parts: int,
        arrays: dict[str, jax.Array],
        kept: dict[str, dict[str, jax.Array]],
        batch: dict[str, jax.Array],
        key: jax.Array,
    ) -> tuple[programs.Sums, dict[str, dict[str, jax.Array]]]:
        """Computes on one device: its rows, its shards, its part of the kept state."""
        with self.inside():
            hoisted = parts > 1 or self.plan.deltas is not None
            feedback = {
                name: x[0] for name, x in kept["error_feedback"].items()
            }  # this node's, as sender
            copies = {n: self.of(n).cut.renewed(arrays[n], x) for n, x in kept["node_copy"].items()}
            found = {n: self.opened(n, x, copies.get(n), hoisted) for n, x in arrays.items()}
            early = {n: x for n, x in feedback.items() if self.of(n).late and not hoisted}
            of = self.sums_of(loss, read, found, early, hoisted, key)
            if parts == 1:
                done, over = of(batch)
            else:
                split = programs.split(batch, parts)
                like, over = jax.eval_shape(of, jax.tree.map(lambda x: x[0], split))
                start = programs.Sums.zeros(like)
                done, _ = lax.scan(lambda sums, part: (sums.plus(of(part)[0]), None), start, split)
            self._update = zero_bytes.of_update(self.leaves, arrays, parts, done)
            done, feedback = self.closed(done, feedback, over, hoisted)
            return done, {"error_feedback": feedback, "node_copy": copies}

    def sums_of(
        self,
        loss: Callable[..., Any],
        read: "Read",
        found: Mapping[str, jax.Array],
        early: Mapping[str, jax.Array],
        hoisted: bool,
        key: jax.Array,
    ) -> Callable[[Any], tuple[programs.Sums, dict[str, jax.Array]]]:
        """Returns a function of a device's rows that computes their sums and new residuals.

        Args:
            found: what `opened` makes of every array that the loss reads.
            early: residuals of weights that are sent when a layer uses them.
        """
        fixed, variables = self._divided(found, read.trained, hoisted)

        def total(variables: Any, early: Any, part: Any) -> Any:
            given = [
                self._placed(n, variables.get(n), early.get(n), fixed.get(n), hoisted)
                for n in found
            ]
            value, weight, seen = loss(read.structure.unflatten(given), part, key)
            return value, (weight, seen)

        def of(part: Any) -> tuple[programs.Sums, dict[str, jax.Array]]:
            grad = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
            (value, (weight, seen)), (grads, over) = grad(variables, early, part)
            return programs.Sums(value, weight, seen, grads), over

        return of

    @contextlib.contextmanager
    def inside(self, local: int | None = None) -> Iterator[None]:
        """Context with the sequence layout and the rules for logical axes of a device's own rows.

        Rules are restricted to axes left to the compiler.
        """
        table = []
        if self._compiled:
            table = [
                (k, tuple(a for a in v or () if a in self._compiled) or None)
                for k, v in nn.get_logical_axis_rules()
            ]
        over = token_layouts.of_call(self.place, local, nested=True)
        with nn.logical_axis_rules(table), sequence_layout(over):
            yield

    def opened(self, name: str, x: jax.Array, copies: jax.Array | None, hoisted: bool) -> jax.Array:
        """Gathers what is gathered before the forward pass: the full weight, or the node's part.

        An array that layers gather stays a shard, unless its slow traffic is hoisted.
        """
        leaf = self.of(name)
        if leaf.cut is None or (leaf.late and not hoisted):
            return x
        return (leaf.cut.near if leaf.late else leaf.cut.gathered)(x, copies)

    def _divided(
        self, found: Mapping[str, jax.Array], trained: Collection[str], hoisted: bool
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Splits the loss's inputs into constants and differentiated arrays, by name.

        A node's part of a weight is a constant, beside zeros that receive the gradient.
        """
        fixed, variables = {}, {}
        for name, x in found.items():
            leaf = self.of(name)
            if leaf.late and hoisted:
                fixed[name] = x
                if name in trained:
                    apart = [leaf.cut.shape[i] for i in leaf.cut.apart]
                    shape = (x.shape[0], *apart, self.place.dcn, leaf.cut.m)
                    variables[name] = jnp.zeros(shape, jnp.float32)
            elif name in trained:
                variables[name] = x
            else:
                fixed[name] = x
        return fixed, variables

    def _placed(self, name: str, variable: Any, early: Any, fixed: Any, hoisted: bool) -> Any:
        """Returns the leaf for a parameter in the tree that the loss reads."""
        leaf = self.of(name)
        if not leaf.late:
            return fixed if variable is None else variable
        if hoisted:
            return NodeWeight(fixed, variable, leaf.cut)
        if variable is None:
            return ShardedWeight(fixed, None, leaf.cut, trained=False)
        return ShardedWeight(variable, early, leaf.cut, trained=True)

    def closed(
        self,
        done: programs.Sums,
        feedback: Mapping[str, jax.Array],
        over: Mapping[str, jax.Array],
        hoisted: bool,
    ) -> tuple[programs.Sums, dict[str, jax.Array]]:
        """Reduces over all devices: sums, gradients of shards, residuals."""
        grads, new = {}, dict(over)
        for name, g in done.grads.items():
            leaf = self.of(name)
            if leaf.cut is None:
                grads[name] = lax.psum(g.astype(jnp.float32), self.rows)
            elif not leaf.late:
                grads[name], new[name] = leaf.cut.reduced(g, feedback.get(name))
            elif hoisted:
                grads[name], new[name] = leaf.cut.reduced_slow(g, feedback.get(name))
            else:
                grads[name] = g
        loss, weight = lax.psum((done.loss, done.weight), self.rows)
        seen = {k: meters.summed(v, self.rows) for k, v in done.seen.items()}
        return programs.Sums(loss, weight, seen, grads), {n: new[n][None] for n in feedback}

    def traffic(self, program: Any) -> Traffic:
        """Counts the bytes of the traced train call and checks them against the expected bytes.

        Raises:
            ValueError: a mesh axis carries more than expected.
        """
        found = zero_bytes.count(self.leaves, [program])
        return zero_bytes.checked(self.leaves, self.call, found, self._update)

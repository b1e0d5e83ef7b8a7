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
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxrl_eff import tree
from jaxrl_eff.core import meters, programs, zero_bytes
from jaxrl_eff.core.graph import Call
from jaxrl_eff.core.specs import Adaptation, Model, Spec
from jaxrl_eff.core.zero_bytes import Traffic
from jaxrl_eff.core.zero_leaves import Leaves
from jaxrl_eff.parallel import Placement, Rules
from jaxrl_eff.parallel.zero.weights import NodeWeight, ShardedWeight


class NodeGradients:
    """Computation of a train call's sums, for a model whose `Spec` sets `sends`.

    Attributes:
        plan: the model's `ZeroConfig`, on the placement's axes.

    Raises:
        ValueError: see `zero_leaves.Leaves`.
    """

    def __init__(self, c: Call, place: Placement, rules: Rules, spec: Spec):
        self._leaves = Leaves(c, place, rules, spec)
        self._call, self._place, self._rules = c, place, rules
        self._rows, self._of, self.plan = self._leaves.rows, self._leaves.of, self._leaves.plan
        self._update = zero_bytes.Update({}, 0.0)

    def error_feedback(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and shardings of the residuals: parameter -> float32, see `Model`."""
        return self._leaves.error_feedback()

    def node_copy(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and shardings of every node's copy of the weights, see `Model`."""
        return self._leaves.node_copy()

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
        kept = {k: dict(getattr(model, k) or {}) for k in ("error_feedback", "node_copy")}
        there = {
            k: {n: self._leaves.manual(getattr(self._of(n), k)[1]) for n in kept[k]} for k in kept
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
            feedback, copies = kept["error_feedback"], kept["node_copy"]
            feedback = {name: x[0] for name, x in feedback.items()}  # this node's, as sender
            copies = {n: self._of(n).cut.renewed(arrays[n], x) for n, x in copies.items()}
            fixed, variables = self._opened(arrays, copies, trained, hoisted)
            early = {n: x for n, x in feedback.items() if self._of(n).late and not hoisted}

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
            self._update = zero_bytes.of_update(self._leaves, arrays, parts, done)
            done, feedback = self._closed(done, feedback, over, hoisted)
            return done, {"error_feedback": feedback, "node_copy": copies}

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
        copies: Mapping[str, jax.Array],
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
                x = leaf.cut.gathered(x, copies.get(name))
            if leaf.late and hoisted:
                fixed[name] = leaf.cut.near(x, copies.get(name))
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
        feedback: Mapping[str, jax.Array],
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
                grads[name], new[name] = leaf.cut.reduced(g, feedback.get(name))
            elif hoisted:
                grads[name], new[name] = leaf.cut.reduced_slow(g, feedback.get(name))
            else:
                grads[name] = g
        loss, weight = lax.psum((done.loss, done.weight), self._rows)
        seen = {k: meters.summed(v, self._rows) for k, v in done.seen.items()}
        return programs.Sums(loss, weight, seen, grads), {n: new[n][None] for n in feedback}

    def traffic(self, program: Any) -> Traffic:
        """Counts the bytes of the traced train call and checks them against the expected bytes.

        Raises:
            ValueError: a mesh axis carries more than expected.
        """
        updates = self._call.epochs * self._call.minibatches
        return zero_bytes.counted(self._leaves, self._call.name, program, updates, self._update)

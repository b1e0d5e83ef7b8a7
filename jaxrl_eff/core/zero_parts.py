"""Gradient sums of `zero` in several programs: micro-batches of any number and shape.

`open` sends all that crosses the slow axis before the first micro-batch, `part` computes one
micro-batch and sends within nodes only, `close` sends what follows the last. So, as in one program,
the number of micro-batches changes neither the bytes between nodes nor the rounding.

Between programs, arrays that differ from device to device are stacked on a leading axis, which is
sharded: `[devices, ...]`.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_eff.core import programs, zero_bytes
from jaxrl_eff.core.specs import Adaptation, Model
from jaxrl_eff.core.zero import NodeGradients, Read
from jaxrl_eff.core.zero_bytes import Traffic
from jaxrl_eff.parallel.mesh import mesh


class Opened(NamedTuple):
    """Weights that `NodeParts.open` has sent.

    Attributes:
        near: name -> the node's part of a weight that layers gather, `[devices of a node, ...]`; or
            a full weight.
        copies: name -> every node's copy of a weight, see `Model`.
    """

    near: dict[str, jax.Array]
    copies: dict[str, jax.Array]


class NodeParts:
    """The programs of one update of a train call whose model's `Spec` sets `sends`.

    All must be traced in the call's context; arguments are those of `NodeGradients`.
    """

    def __init__(self, nodes: NodeGradients):
        self._nodes, self._each = nodes, PartitionSpec(nodes.rows)
        self._shards: dict[str, jax.ShapeDtypeStruct] = {}
        self._update = zero_bytes.Update({}, 0.0)

    def open(self, way: Adaptation, model: Model, leaves: Any) -> Opened:
        """Renews nodes' copies of weights, and gathers weights over the slow axis."""
        nodes, copies = self._nodes, dict(model.node_copy or {})
        arrays = Read.of(way, model, leaves).arrays

        def run(arrays: Any, copies: Any) -> Opened:
            self._shards = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in arrays.items()}
            with nodes.inside():
                copies = {n: nodes.of(n).cut.renewed(arrays[n], x) for n, x in copies.items()}
                near = {}
                for n, x in arrays.items():
                    if nodes.of(n).cut is not None:
                        x = nodes.opened(n, x, copies.get(n), hoisted=True)
                        near[n] = x[None] if nodes.of(n).late else x
                return Opened(near, copies)

        there = nodes.kept_specs("node_copy", copies)
        near = self._near_specs(n for n in arrays if nodes.of(n).cut is not None)
        sent = nodes.over_devices(run, (nodes.specs(arrays), there), Opened(near, there))
        return sent(arrays, copies)

    def _near_specs(self, names: Iterable[str]) -> dict[str, PartitionSpec]:
        each = PartitionSpec(self._nodes.plan.fast)
        return {n: each if self._nodes.of(n).late else PartitionSpec() for n in names}

    def part(
        self,
        loss: Callable[..., Any],
        way: Adaptation,
        key: jax.Array,
        model: Model,
        leaves: Any,
        opened: Opened,
        batch: Any,
        local: int,
    ) -> programs.Sums:
        """Returns the sums of every device's rows of a micro-batch, `[devices, ...]`.

        Args:
            batch: rows of both kinds, see `core.rows`.
            local: see `Shardings.context`.
        """
        nodes, read = self._nodes, Read.of(way, model, leaves)
        small = {n: x for n, x in read.arrays.items() if n not in opened.near}

        def run(small: Any, near: Any, batch: Any, key: jax.Array) -> programs.Sums:
            near = {n: x[0] if nodes.of(n).late else x for n, x in near.items()}
            found = {n: near[n] if n in near else small[n] for n in read.arrays}
            with nodes.inside(local):
                done, _ = nodes.sums_of(loss, read, found, {}, True, key)(batch)
            return jax.tree.map(lambda x: x[None], done)

        near = self._near_specs(opened.near)
        given = nodes.specs(small), near, self._each, PartitionSpec()
        return nodes.over_devices(run, given, self._each)(small, opened.near, batch, key)

    def close(
        self, way: Adaptation, model: Model, leaves: Any, done: programs.Sums, opened: Opened
    ) -> tuple[programs.Sums, dict[str, Any]]:
        """Returns the total of `part`s, and new model fields."""
        nodes, read, feedback = (
            self._nodes,
            Read.of(way, model, leaves),
            dict(model.error_feedback or {}),
        )

        def run(done: Any, feedback: Any) -> Any:
            done, feedback = jax.tree.map(lambda x: x[0], (done, feedback))
            self._update = zero_bytes.of_update(nodes.leaves, self._shards, 1, done, hoisted=True)
            return nodes.closed(done, feedback, {}, hoisted=True)

        there = nodes.kept_specs("error_feedback", feedback)
        sent = nodes.over_devices(run, (self._each, there), (nodes.sums_specs(read), there))
        done, feedback = sent(done, feedback)
        kept = {"error_feedback": feedback, "node_copy": opened.copies}
        return read.back(done), {k: new for k, new in kept.items() if new}

    def opened_shardings(self, like: Opened) -> Opened:
        """Returns the shardings of what `open` returns."""
        specs, copies = self._near_specs(like.near), self._nodes.node_copy()
        near = {n: self._sharding(n, x.ndim, specs[n]) for n, x in like.near.items()}
        return Opened(near, {n: copies[n].sharding for n in like.copies})

    def sums_shardings(self, like: programs.Sums) -> programs.Sums:
        """Returns the shardings of what `part` returns."""
        grid = mesh(self._nodes.place)
        where = jax.tree.map(lambda x: NamedSharding(grid, self._each), like._replace(grads=()))
        grads = {
            n: self._sharding(n, x.ndim, self._each, gradient=True) for n, x in like.grads.items()
        }
        return where._replace(grads=grads)

    def _sharding(
        self, name: str, ndim: int, first: PartitionSpec, *, gradient: bool = False
    ) -> NamedSharding:
        """Adds the axes that the compiler shards over `tensor` to the spec of the leading axis."""
        leaf, grid = self._nodes.of(name), mesh(self._nodes.place)
        cut, split = leaf.cut, [*first]
        if cut is not None and cut.apart:
            if leaf.late and (gradient or not cut.raw):
                split += [None] * (1 if gradient else 2) + ["tensor"] * len(cut.apart)
            else:
                split += [None] * (ndim - len(split) - len(cut.shape))
                split += ["tensor" if i in cut.apart else None for i in range(len(cut.shape))]
        return NamedSharding(grid, PartitionSpec(*split))

    def traffic(self, traced: Iterable[Any]) -> Traffic:
        """Counts the bytes of the call with one micro-batch an update.

        Args:
            traced: the programs of such an update.

        Raises:
            ValueError: a mesh axis carries more than expected.
        """
        nodes = self._nodes
        found = zero_bytes.count(nodes.leaves, traced)
        updates = nodes.call.epochs * nodes.call.minibatches
        found = {axis: updates * n for axis, n in found.items()}
        return zero_bytes.checked(nodes.leaves, nodes.call, found, self._update)

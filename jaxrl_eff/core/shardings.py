"""Shardings of a graph's arrays and models under a plan.

A model's home is the placement of the call that trains it, else of its first call; its optimizer
state stays there. Other calls borrow the parameters in their own layout.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxrl_eff import tree
from jaxrl_eff.core import token_layouts
from jaxrl_eff.core.graph import Call, Graph, order
from jaxrl_eff.core.specs import Adaptation, Model, Spec, viewed
from jaxrl_eff.core.zero import NodeGradients
from jaxrl_eff.optim import state_shardings
from jaxrl_eff.parallel import Placement, Rules, arrays, global_arrays, rules
from jaxrl_eff.parallel.attention.context import sequence_layout
from jaxrl_eff.parallel.mesh import mesh
from jaxrl_eff.parallel.sharding import in_host, replicated


class Shardings:
    """The layouts of a graph under a plan.

    Attributes:
        graph, plan, specs: the constructor's arguments.
        calls: calls of the graph, in the order in which they run, with functions of parameters as
            they are stored.
        rules: call -> sharding rules of logical axes on its placement.
        sharded: train calls whose model's `Spec` sets `sends` -> computation of their sums.
    """

    def __init__(
        self,
        graph: Graph,
        plan: Mapping[str, Placement],
        specs: Mapping[str, Spec],
    ):
        self.graph, self.plan, self.specs = graph, plan, specs
        self.calls = tuple(viewed(c, specs.get(c.of)) for c in order(graph))
        self.rules = {c.name: self._rules_of(c) for c in self.calls}
        self.sharded = {
            c.name: NodeGradients(c, plan[c.name], self.rules[c.name], specs[c.of])
            for c in self.calls
            if c.kind == "train" and specs[c.of].sends is not None
        }
        self._opt_shapes = {
            name: jax.eval_shape(spec.tx.init, spec.shapes) if self.trained(name) else ()
            for name, spec in specs.items()
            if name in graph.models
        }

    def _rules_of(self, c: Call, *, mixed: bool = False) -> Rules:
        sizes: dict[str, set[int]] = {}
        if c.of is not None:
            spec = self.specs[c.of]
            leaves = jax.tree.leaves(spec.axes, is_leaf=lambda x: isinstance(x, tuple))
            for axes, leaf in zip(leaves, jax.tree.leaves(spec.shapes), strict=True):
                for axis, n in zip(axes, leaf.shape, strict=True):
                    if axis is not None:
                        sizes.setdefault(axis, set()).add(n)
        return rules(self.plan[c.name], sizes, lengths=c.kind != "generate", mixed=mixed)

    def trained(self, model: str) -> bool:
        """Returns True if a call of the graph trains the model."""
        return any(c.kind == "train" for c in self.graph.of(model))

    def params(self, c: Call) -> Any:
        """Returns the tree of shardings of the call's model on the call's placement."""
        return self.rules[c.name].tree(self.specs[c.of].axes)

    def borrowed(self, c: Call) -> Any:
        """Returns `params` with shapes and dtypes: a tree of `jax.ShapeDtypeStruct`."""
        return jax.tree.map(placed, self.specs[c.of].shapes, self.params(c))

    def home(self, model: str) -> Model:
        """Returns shapes and shardings of a model at home: a tree of `jax.ShapeDtypeStruct`.

        Optimizer state is sharded like the parameter that it belongs to.
        """
        call = self.graph.home(model)
        params, whole = self.borrowed(call), self.whole(call)
        shapes = self._opt_shapes[model]
        where = state_shardings(shapes, params, otherwise=whole)
        tx, rules_ = self.specs[model].tx, self.rules[call.name]
        if isinstance(tx, Adaptation):  # state of selected entries has its own axes

            def of_entries(name: str, leaf: jax.ShapeDtypeStruct, sharding: Any) -> Any:
                axes = tx.axes(name)
                return sharding if axes is None else rules_.fitting(axes, leaf.shape)

            where = tree.map_with_name(of_entries, shapes, where)
        opt = jax.tree.map(placed, shapes, where)
        if self.plan[call.name].offload == "opt":
            opt = jax.tree.map(lambda x: placed(x, in_host(x.sharding)), opt)
        stale = {c.name: (self.borrowed(c),) * c.staleness for c in self.graph.stale(model)}
        sharded = self.sharded.get(call.name)
        if sharded is None:
            return Model(params, opt, stale or ())
        feedback, copy = sharded.error_feedback(), sharded.node_copy()
        return Model(params, opt, stale or (), feedback or (), copy or ())

    def gradients(self, model: str) -> Any:
        """Returns shapes and shardings of the differentiated arrays of a trained model, at home."""
        home, tx = self.home(model), self.specs[model].tx
        if not isinstance(tx, Adaptation):
            return home.params
        there, rules_ = tree.flat(home.params), self.rules[self.graph.home(model).name]

        def of(name: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            if name in there:
                return there[name]
            return placed(leaf, rules_.fitting(tx.axes(name) or (), leaf.shape))

        shapes = jax.eval_shape(tx.leaves, self.specs[model].shapes, home.opt)
        return {name: of(name, leaf) for name, leaf in shapes.items()}

    def rows(self, c: Call, shapes: Mapping[str, Any]) -> dict[str, Any]:
        """Adds the shardings in which a call reads or writes arrays."""
        place, lengths = self.plan[c.name], c.kind != "generate"
        found = arrays(place, lengths=lengths)
        return {
            k: placed(v, found.fitting(("batch", "length"), v.shape)) for k, v in shapes.items()
        }

    def whole(self, c: Call) -> jax.sharding.NamedSharding:
        """Returns the sharding of an array that is replicated on a call's devices."""
        return replicated(self.plan[c.name])

    def key(self, c: Call) -> Any:
        """Returns a key that is equal for calls that read the same weights in the same layout."""
        return c.of, c.weights, self.plan[c.name], self.rules[c.name].table

    def here(self, c: Call) -> bool:
        """Returns True if this process has devices of the call."""
        return global_arrays.here(self.whole(c))

    @contextlib.contextmanager
    def context(self, c: Call, local: int | None = None) -> Iterator[None]:
        """Context for tracing a call: its mesh, flax's logical axis rules, its sequence layout.

        Args:
            local: for rows of devices and of groups together (see `rows`), how many of their tokens
                belong to the device's own row.
        """
        place, rules_ = self.plan[c.name], self.rules[c.name]
        if local is not None:
            rules_ = self._rules_of(c, mixed=True)
        over = None if c.kind == "generate" else token_layouts.of_call(place, local)
        table = list(rules_.table)
        with jax.set_mesh(mesh(place)), nn.logical_axis_rules(table), sequence_layout(over):
            yield


def placed(like: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    """Returns shape and dtype of `like` with a sharding."""
    return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=sharding)


def held(like: Any) -> dict[Any, int]:
    """Returns the bytes per device of a tree of arrays, or of their shapes and shardings.

    Arrays in host memory do not count.
    """
    out: dict[Any, int] = {}
    for x in jax.tree.leaves(like):
        if x.sharding == in_host(x.sharding):
            continue
        for device in x.sharding.device_set:
            out[device] = out.get(device, 0) + shard_bytes(x)
    return out


def shard_bytes(x: Any, itemsize: int = 0) -> int:
    """Returns the bytes of one device's shard; `itemsize`, if not 0, replaces the element size."""
    return math.prod(x.sharding.shard_shape(x.shape)) * (itemsize or jnp.dtype(x.dtype).itemsize)

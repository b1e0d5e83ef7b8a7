"""A train call in pieces: zeros, sums over any number of micro-batches, one update from the sums.

Losses are sums, so a schedule can use any number and any shapes of micro-batches: gradients are
summed and divided once by the weight of all. Where weights are sent between nodes, one more
program sends them before the first micro-batch, and the update sends gradients.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxrl_eff import tree
from jaxrl_eff.core import lowering, programs
from jaxrl_eff.core.graph import Call
from jaxrl_eff.core.shardings import Shardings, placed
from jaxrl_eff.core.specs import Model
from jaxrl_eff.core.zero_bytes import Traffic
from jaxrl_eff.core.zero_parts import NodeParts


class Summed:
    """A train call over micro-batches.

    Attributes:
        carry: shapes and shardings of the sums; gradients are sharded like their parameters, or are
            those of each device where weights are sent between nodes.
        opened: shapes and shardings of what `open` returns.

    Args:
        layouts: of the graph.
        c: the call.
        rows: args -> rows of a micro-batch, see `core.rows`.
        loss: `(params, rows, key) -> (loss_sum, weight, meters)` of a micro-batch.
        args: of any one micro-batch, with shardings.
        local: see `Shardings.context`.
    """

    def __init__(
        self,
        layouts: Shardings,
        c: Call,
        rows: Callable[[Any], Any],
        loss: Callable[..., Any],
        args: Any,
        local: int,
    ):
        self._layouts, self._call, self._rows, self._loss = layouts, c, rows, loss
        self._way = programs.way_of(layouts.specs[c.of].tx)
        self._model = layouts.home(c.of)._replace(stale=())
        self._opt_in_host = layouts.plan[c.name].offload == "opt"
        self._nodes = NodeParts(layouts.sharded[c.name]) if c.name in layouts.sharded else None
        self._programs: list[Any] = []  # jaxprs that run in an update of one micro-batch
        self._opening, self.opened = self._open()
        first = functools.partial(self._sums, local)
        traced = lowering.traced(layouts, c, first, self._model, (self.opened, args), local)
        self._programs.append(traced.jaxpr)
        zeros = jax.eval_shape(programs.Sums.zeros, traced.out)
        self.carry = jax.tree.map(placed, zeros, self._shardings(zeros))

    def _open(self) -> tuple[lowering.Traced | None, Any]:
        """Traces `(model, {}, key) -> opened`, and adds shardings to the shapes of its results."""
        if self._nodes is None:
            return None, None

        def run(model: Model, args: Any, key: jax.Array) -> Any:
            del args, key
            return self._nodes.open(self._way, *self._with_leaves(model))

        found = lowering.traced(self._layouts, self._call, run, self._model, {})
        self._programs.append(found.jaxpr)
        return found, jax.tree.map(placed, found.out, self._nodes.opened_shardings(found.out))

    def _shardings(self, zeros: programs.Sums) -> programs.Sums:
        if self._nodes is not None:
            return self._nodes.sums_shardings(zeros)
        whole, there = self._layouts.whole(self._call), tree.flat(self._model.params)

        def beside(name: str, x: Any) -> Any:
            same = name in there and there[name].shape == x.shape
            return there[name].sharding if same else whole

        small = jax.tree.map(lambda x: whole, zeros._replace(grads=()))
        return small._replace(grads=tree.map_with_name(beside, zeros.grads))

    def _with_leaves(self, model: Model) -> tuple[Model, Any]:
        model = programs.with_state(model) if self._opt_in_host else model
        return model, self._way.leaves(model.params, model.opt)

    def _sums(self, local: int, model: Model, given: tuple, key: jax.Array) -> programs.Sums:
        opened, args = given
        model, leaves = self._with_leaves(model)
        key = programs.key_of(self._call.name, key)
        if self._nodes is None:

            def loss(params: Any, args: Any, key: jax.Array) -> Any:
                return self._loss(params, self._rows(args), key)

            return programs.sums(loss, self._way, key, model, leaves, args)
        return self._nodes.part(
            self._loss, self._way, key, model, leaves, opened, self._rows(args), local
        )

    @property
    def _where(self) -> Any:
        return jax.tree.map(lambda x: x.sharding, self.carry)

    def zero(self) -> lowering.Lowered:
        """Lowers `() -> carry`."""
        with self._layouts.context(self._call):
            run = jax.jit(lambda: programs.Sums.zeros(self.carry), out_shardings=self._where)
            return lowering.Lowered(run.lower())

    def open(self) -> dict[str, lowering.Lowered]:
        """Lowers `(model, {}, key) -> opened`, if weights are sent between nodes, see `zero_parts`.

        Where they are not, `opened` is None.
        """
        if self._opening is None:
            return {}
        where = jax.tree.map(lambda x: x.sharding, self.opened)
        return {"open": lowering.lowered(self._layouts, self._call, self._opening, where)}

    def sums(self, args: Any, local: int) -> lowering.Lowered:
        """Lowers `(carry, (model, opened, args), key) -> carry`, for one shape of a micro-batch."""

        def run(carry: programs.Sums, given: Any, key: jax.Array) -> programs.Sums:
            model, *rest = given
            return carry.plus(self._sums(local, model, tuple(rest), key))

        given = self._model, self.opened, args
        found = lowering.traced(self._layouts, self._call, run, self.carry, given, local)
        return lowering.lowered(self._layouts, self._call, found, self._where, donate=(0,))

    def traced(self, finish: Callable[[Mapping[str, Any]], Any]) -> lowering.Traced:
        """Traces `(model, (carry, opened), key) -> (model, finish(meters))`."""

        def run(model: Model, given: tuple, key: jax.Array) -> Any:
            del key
            carry, opened = given
            model, leaves = self._with_leaves(model)
            sent = None
            if self._nodes is not None:
                carry, sent = self._nodes.close(self._way, model, leaves, carry, opened)
            new, seen = programs.updated(self._way, model, leaves, carry, sent)
            return new, finish(seen)

        given = self.carry, self.opened
        return lowering.traced(self._layouts, self._call, run, self._model, given)

    def update(self, finish: Callable[[Mapping[str, Any]], Any]) -> lowering.Lowered:
        """Lowers `traced`."""
        found = self.traced(finish)
        self._programs.append(found.jaxpr)
        return lowering.update(self._layouts, self._call, found)

    def traffic(self) -> Traffic | None:
        """Returns the bytes of the call, once `update` is lowered; None without nodes."""
        return None if self._nodes is None else self._nodes.traffic(self._programs)


def read_one(seen: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Returns the metrics of a call with one update."""
    return programs.read(jax.tree.map(lambda x: x[None], seen))

"""A train call in pieces: zeros, sums over any number of micro-batches, one update from the sums.

Losses are sums, so a schedule can use any number and any shapes of micro-batches: gradients are
summed and divided once by the weight of all.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxrl_eff import tree
from jaxrl_eff.core import lowering, programs
from jaxrl_eff.core.graph import Call
from jaxrl_eff.core.shardings import Shardings, placed
from jaxrl_eff.core.specs import Model


class Summed:
    """A train call over micro-batches.

    Attributes:
        carry: shapes and shardings of the sums; gradients are sharded like their parameters.

    Args:
        layouts: of the graph.
        c: the call.
        loss: `(params, args, key) -> (loss_sum, weight, meters)` of a micro-batch.
        args: of any one micro-batch, with shardings.
        local: see `Shardings.context`.
    """

    def __init__(self, layouts: Shardings, c: Call, loss: Callable, args: Any, local: int):
        self._layouts, self._call, self._loss = layouts, c, loss
        self._way = programs.way_of(layouts.specs[c.of].tx)
        self._model = layouts.home(c.of)._replace(stale=())
        self._opt_in_host = layouts.plan[c.name].offload == "opt"
        like = lowering.traced(layouts, c, self._sums, self._model, args, local).out
        zeros = jax.eval_shape(programs.Sums.zeros, like)
        whole, there = layouts.whole(c), tree.flat(self._model.params)

        def beside(name: str, x: Any) -> Any:
            same = name in there and there[name].shape == x.shape
            return placed(x, there[name].sharding if same else whole)

        small = jax.tree.map(lambda x: placed(x, whole), zeros._replace(grads=()))
        self.carry = small._replace(grads=tree.map_with_name(beside, zeros.grads))

    def _fetched(self, model: Model) -> Model:
        return programs.with_state(model) if self._opt_in_host else model

    def _sums(self, model: Model, args: Any, key: jax.Array) -> programs.Sums:
        model = self._fetched(model)
        leaves = self._way.leaves(model.params, model.opt)
        key = programs.key_of(self._call.name, key)
        return programs.sums(self._loss, self._way, key, model, leaves, args)

    @property
    def _where(self) -> Any:
        return jax.tree.map(lambda x: x.sharding, self.carry)

    def zero(self) -> lowering.Lowered:
        """Lowers `() -> carry`."""
        with self._layouts.context(self._call):
            run = jax.jit(lambda: programs.Sums.zeros(self.carry), out_shardings=self._where)
            return lowering.Lowered(run.lower())

    def sums(self, args: Any, local: int) -> lowering.Lowered:
        """Lowers `(carry, (model, args), key) -> carry`, for micro-batches of these shapes."""

        def run(carry: programs.Sums, given: Any, key: jax.Array) -> programs.Sums:
            return carry.plus(self._sums(*given, key))

        given = self._model, args
        found = lowering.traced(self._layouts, self._call, run, self.carry, given, local)
        return lowering.lowered(self._layouts, self._call, found, self._where, donate=(0,))

    def traced(self, finish: Callable[[Mapping[str, Any]], Any]) -> lowering.Traced:
        """Traces `(model, carry, key) -> (model, finish(meters))`."""

        def run(model: Model, carry: programs.Sums, key: jax.Array) -> Any:
            del key
            model = self._fetched(model)
            leaves = self._way.leaves(model.params, model.opt)
            new, seen = programs.updated(self._way, model, leaves, carry)
            return new, finish(seen)

        return lowering.traced(self._layouts, self._call, run, self._model, self.carry)

    def update(self, finish: Callable[[Mapping[str, Any]], Any]) -> lowering.Lowered:
        """Lowers `traced`."""
        return lowering.update(self._layouts, self._call, self.traced(finish))


def read_one(seen: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Returns the metrics of a call with one update."""
    return programs.read(jax.tree.map(lambda x: x[None], seen))

"""One run of a step: its operations in order, and the arrays and models that they hand on."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxrl_eff.core import model_state, transfers
from jaxrl_eff.core.graph import Call
from jaxrl_eff.core.program_order import Operation
from jaxrl_eff.core.runners import RESELECT
from jaxrl_eff.core.specs import Model
from jaxrl_eff.core.timing import StepTimes
from jaxrl_eff.parallel import Placement, WeightSync, global_arrays
from jaxrl_eff.parallel.sharding import replicated

if TYPE_CHECKING:
    from jaxrl_eff.core.step import Step


@dataclasses.dataclass
class Running:
    """State of a running step.

    Attributes:
        step: the compiled graph.
        models: every model, at home.
        data: slot -> array, until its last reader.
        timing: of the calls.
        words: of the step's key.
        reselect: the models that reselect their trained part.
        borrowed: layout -> parameters that were reallocated to it.
        metrics: of the calls so far.
        keys: placement -> the step's key there.
    """

    step: "Step"
    models: dict[str, Model]
    data: dict[str, jax.Array]
    timing: StepTimes
    words: np.ndarray
    reselect: tuple[str, ...]
    borrowed: dict[Any, Any] = dataclasses.field(default_factory=dict)
    metrics: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    keys: dict[Placement, jax.Array] = dataclasses.field(default_factory=dict)

    def run(self, op: Operation, c: Call) -> None:
        """Runs one operation, of a call."""
        if op.kind == "move":
            moved = self.step.moves.routes[op.name]({k: self.data[k] for k in op.arrays})
            self.data |= {transfers.moved_name(k, c): v for k, v in moved.items()}
        elif op.kind == "realloc":
            self.borrowed[self.step.shardings.key(c)] = self._reallocate(op, c)
        elif op.kind == "keep":
            model, new = self.models[c.of], model_state.copied(self._reallocate(op, c))
            stale = {**model.stale, c.name: (*model.stale[c.name][1:], new)}
            self.models[c.of] = model._replace(stale=stale)
        elif op.kind == "tell":
            self._tell(c)
        else:
            self._call(c)

    def key(self, c: Call) -> jax.Array:
        """Returns the step's key on a call's devices."""
        place = self.step.plan[c.name]
        if place not in self.keys:
            self.keys[place] = global_arrays.from_whole(replicated(place), self.words)
        return self.keys[place]

    def _call(self, c: Call) -> None:
        """Runs one call; on a process without its devices, only makes placeholders."""
        step, dispatched = self.step, self.timing.now()
        here, kept = step.shardings.here(c), step.moves.last_use
        args = {k: self.data[step.moves.slots[c.name, k]] for k in c.reads}
        for slot in [slot for slot, call in kept.items() if call == c.name]:
            if slot not in step.keep:
                self.data.pop(slot, None)
        if not here:
            out, m = {k: global_arrays.placeholder(v) for k, v in step.made[c.name].items()}, {}
        elif c.host:
            _, out, m = step.runners[c.name](None, args, self.words)
        elif c.kind == "train":
            out, m = self._train(c, args)
        else:
            _, out, m = step.runners[c.name](self._params(c), args, self.key(c))
        if c.kind == "train":
            self.borrowed = {k: v for k, v in self.borrowed.items() if k[0] != c.of}
        del args
        if here:
            token = next(iter([*m.values(), *out.values()]), None)
            devices = step.plan[c.name].devices
            self.timing.add(c.name, devices, c.reads, c.writes, dispatched, token)
        self.data |= {k: v for k, v in out.items() if k in kept or k in step.keep}
        self.metrics |= {f"{c.name}/{k}": v for k, v in m.items()}

    def _train(self, c: Call, args: dict[str, Any]) -> tuple[dict, dict]:
        runner, model = self.step.runners[c.name], self.models.pop(c.of)
        bare, stale = model._replace(stale=()), model.stale
        del model  # donated: no other reference may remain
        if c.of in self.reselect:
            bare, _ = runner.programs[RESELECT](bare, args, self.key(c))
        trained, out, m = runner(bare, args, self.key(c))
        self.models[c.of] = trained._replace(stale=stale)
        return out, m

    def _params(self, c: Call) -> Any:
        """Returns the call's model in the call's layout."""
        if c.of is None:
            return None
        if c.staleness:
            return self.models[c.of].stale[c.name][0]
        return self.borrowed.get(self.step.shardings.key(c), self.models[c.of].params)

    def _reallocate(self, op: Operation, c: Call) -> Any:
        dispatched, old = self.timing.now(), self.models[c.of].params
        source = self.step.weights(c)
        new = source(old)
        moved = [n for n, o in zip(*map(jax.tree.leaves, (new, old)), strict=True) if n is not o]
        token = moved[-1] if moved else None
        if isinstance(source, WeightSync):  # the next sync donates its copy
            sent = source.done.numbers() if source.done is not None else {}
            self.metrics |= {f"{c.name}/sync_{k}": v for k, v in sent.items()}
            token = sent.get("changed")
        if token is not None and self.step.shardings.here(c):
            devices = self.step.plan[c.name].devices
            self.timing.add(op.name, devices, (), (), dispatched, token)
        return new

    def _tell(self, c: Call) -> None:
        """Sends a call's metrics to every process."""
        numbers: Mapping[str, Any] = self.step.numbers[c.name]
        mine = {
            k: self.metrics[k] if k in self.metrics else global_arrays.placeholder(number)
            for k, number in numbers.items()
        }
        self.metrics |= self.step.moves.routes[f"metrics of {c.name}"](mine)

"""RLHF as a dataflow graph of model function calls, and the step that runs it.

The terms are ReaL's (Mei et al. 2024, arXiv:2406.14088). A *graph* is a short list of named
*calls*; each applies one model to named arrays in one of three ways: generate, infer, train. A
*plan* gives every call a *placement*: devices, mesh, microbatches. `compile(graph, plan, specs)`
makes the step; between two calls of one model with different placements its parameters are
*reallocated*.

Invariant: beyond the rounding of reordered sums, a plan changes where and how fast results are
computed, never the results.

A plan becomes `shardings`, a runner per call (`runners`, `packed`) and one list of operations in a
total order (`transfers`); every process of a job runs the operations that involve its devices.
Dispatch is asynchronous, so operations on disjoint devices overlap once their inputs are ready.
Pipelining is not supported.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_eff.core import (
    glossary,
    lowering,
    model_state,
    program_order,
    runners,
    transfers,
)
from jaxrl_eff.core.graph import Call, Graph
from jaxrl_eff.core.packed_calls import PackedCalls
from jaxrl_eff.core.program_order import Operation
from jaxrl_eff.core.running import Running
from jaxrl_eff.core.schedules import Packing
from jaxrl_eff.core.shardings import Shardings
from jaxrl_eff.core.specs import Adaptation, Model, Spec
from jaxrl_eff.core.timing import Timeline
from jaxrl_eff.core.transfers import Transfers
from jaxrl_eff.core.weight_sources import WeightSources
from jaxrl_eff.core.zero import Traffic
from jaxrl_eff.parallel import Placement, SyncConfig, global_arrays


class Step:
    """A compiled graph. Call it as `models, data, metrics = step(models, batch, key)`.

    Metrics of packed calls are described at `schedules.Schedules.numbers`.

    Attributes:
        plan: a placement for every call.
        calls: in the order in which they run.
        packs: the packed calls and their schedules.
        traces: call -> number of times its function was traced; stays at one, or at one for every
            shape of a packed call's micro-batches.
        timeline: seconds of the calls of the last steps, measured without blocking.
        notes: call -> a sentence for each axis that its sharding left replicated.
        operations: all operations of a step, in order; set once checked.
        runners: call -> how it is run; set once checked.
        built: True once the calls of this process are compiled.
        share: (index, count): the block of a batch's rows that this process passes; (0, 1) is all.
        sync: the argument of `compile`.
    """

    def __init__(
        self,
        graph: Graph,
        plan: dict[str, Placement],
        specs: Mapping[str, Spec],
        keep: tuple[str, ...],
        sync: SyncConfig | None = None,
        pack: int = 0,
    ):
        self.graph, self.plan, self.specs, self.keep, self.sync = graph, plan, specs, keep, sync
        self.shardings = Shardings(graph, plan, specs)
        self.calls = self.shardings.calls
        self.packs = PackedCalls(self.shardings, pack)
        self.traces = dict.fromkeys((c.name for c in self.calls), 0)
        self.timeline = Timeline()
        self.notes = {c.name: self.shardings.rules[c.name].notes for c in self.calls}
        self.operations: tuple[Operation, ...] = ()
        self.runners: dict[str, runners.Runner] = {}
        self.built = False
        self.weights = WeightSources(
            self.shardings, sync, lambda c: self.runners[c.name].still.params
        )
        self._shown: Any = None
        self._signature: Any = None
        self._by_name = {c.name: c for c in self.calls}
        self._first_reader = {k: c.name for c in reversed(self.calls) for k in c.reads}
        readers = {self._first_reader[k] for k in graph.inputs.split() if k in self._first_reader}
        whole = self.packs.whole_batches() or any(_whole_batches(plan[call]) for call in readers)
        self.share = (0, 1) if whole else (jax.process_index(), jax.process_count())

    @property
    def traffic(self) -> dict[str, Traffic]:
        """Train call -> its bytes on every mesh axis, if its model's `Spec` sets `sends` and it has
        been traced.
        """
        found = {name: getattr(r, "traffic", None) for name, r in self.runners.items()}
        return {name: traffic for name, traffic in found.items() if traffic is not None}

    # Models

    def home(self, model: str) -> Model:
        """Returns shapes and shardings of a model at home: a tree of `jax.ShapeDtypeStruct`."""
        return self.shardings.home(model)

    def gradients(self, model: str) -> Any:
        """Returns shapes and shardings of the differentiated arrays of a trained model, at home."""
        return self.shardings.gradients(model)

    def init(self, model: str, params: Any) -> Model:
        """Makes a model at home from its parameters: adds a fresh optimizer state.

        Args:
            params: arrays with the shardings of `home(model).params`.
        """
        return model_state.initial(self.shardings, self.weights, model, params)

    def refreshed(self, model: str, now: Model) -> Model:
        """Returns the model with a `node_copy` of its weights sent in full.

        For parameters replaced by anything but a train call. Sending differences would also
        converge to them, but only approximately and over several steps.
        """
        return now._replace(node_copy=model_state.node_copy(self.shardings, model, now.params))

    # Compilation

    def check(self, batch: Mapping[str, Any]) -> "Step":
        """Walks the graph with shapes alone: nothing is compiled, loaded or run.

        Args:
            batch: name -> anything with `shape` and `dtype` (global sizes, all processes).

        Raises:
            ValueError: rows do not divide by a placement, or an output is missing or differs from
                the glossary.
        """
        wanted = set(self.graph.inputs.split())
        if wanted - set(batch):
            raise ValueError(f"the batch lacks {sorted(wanted - set(batch))}; it has {[*batch]}.")
        shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}
        self.args, self.made, self.runners = {}, {}, {}
        self.weights.begin()
        home: dict[str, jax.ShapeDtypeStruct] = {}
        for c in self.calls:
            glossary.check(c.name, {k: shapes[k] for k in c.reads})
            args = self.args[c.name] = self.shardings.rows(c, {k: shapes[k] for k in c.reads})
            runner = self.runners[c.name] = self._runner(c, args)
            runners.check_outputs(c, runner.out)
            shapes |= runner.out
            self.made[c.name] = self.shardings.rows(c, runner.out)
            home |= self.made[c.name]
        for k in self.graph.inputs.split():
            if k in self._first_reader:
                home[k] = self.args[self._first_reader[k]][k]
        self._home = home
        self.numbers = {c.name: self._metrics(c) for c in self.calls}
        self.moves = Transfers(self.shardings, self.weights, self.args, home, self.numbers)
        self.operations = self.moves.operations
        program_order.agree(self.operations)
        self._signature = {k: (tuple(v.shape), str(v.dtype)) for k, v in batch.items()}
        return self

    def _runner(self, c: Call, args: dict[str, Any]) -> runners.Runner:
        """Returns the runner of a call that reads arrays of these shapes."""

        def seen() -> None:
            self.traces[c.name] += 1

        if c.host:
            return runners.Host(c, args)
        if c.name in self.packs:
            return self.packs.runner(c, args, seen)
        kind = runners.Train if c.kind == "train" else runners.Apply
        return kind(self.shardings, c, args, seen)

    def _metrics(self, c: Call) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns a call's metrics, which are sent to processes without its devices, if any."""
        if jax.process_count() == 1:
            return {}
        number = jax.ShapeDtypeStruct((), jnp.float32, sharding=self.shardings.whole(c))
        return {f"{c.name}/{k}": number for k in self.runners[c.name].metrics}

    def scheduled(self, packings: Packing | Mapping[Placement, Packing]) -> "Step":
        """Sets the arguments of the schedules of packed calls, see `PackedCalls.schedule`."""
        self.packs.schedule(packings)
        return self

    def build(self, batch: Mapping[str, Any]) -> "Step":
        """Checks, traces and compiles every call for batches of these shapes, in parallel.

        Args:
            batch: as for `check`.
        """
        if self._signature != {k: (tuple(v.shape), str(v.dtype)) for k, v in batch.items()}:
            self.check(batch)
        here = [c for c in self.calls if self.shardings.here(c)]
        with ThreadPoolExecutor(max(4, len(here))) as pool:
            # Largest programs first; each compiles while the next is traced.
            started = {
                c.name: {
                    name: pool.submit(one.compile)
                    for name, one in self.runners[c.name].lower(self.made[c.name]).items()
                }
                for c in sorted(here, key=lambda c: _SLOWEST.index(c.kind))
            }
            routes = [
                pool.submit(route.compile)
                for route in (*self.weights.used(), *self.moves.routes.values())
            ]
            for name, programs in started.items():
                self.runners[name].programs = {k: one.result() for k, one in programs.items()}
            for route in routes:
                route.result()
        self.built = True
        program_order.meet("compiled")
        return self

    def due(self, step: int) -> tuple[str, ...]:
        """Returns the models that reselect their trained part before a stage's step, from 0."""
        adapted = {c.of: self.specs[c.of].tx for c in self.calls if c.kind == "train"}
        return tuple(
            model
            for model, tx in adapted.items()
            if isinstance(tx, Adaptation) and tx.due is not None and tx.due(step)
        )

    def program(self, name: str) -> Any:
        """Returns a compiled program for inspection, by its name in `analysis`."""
        call, _, piece = name.partition(" ")
        return self.runners[call].programs[piece]

    def analysis(self) -> dict[str, dict[str, float]]:
        """Returns XLA's analysis of every compiled program, see `lowering.analysis`.

        The names are the calls'; "call piece" if a call has several programs.
        """
        return {
            f"{name} {piece}".strip(): lowering.analysis(program)
            for name, runner in self.runners.items()
            for piece, program in runner.programs.items()
        }

    # Running

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Turns a batch into global arrays, in the shardings of their first readers.

        Args:
            batch: this process's rows, see `share`.
        """
        from_host = global_arrays.from_whole if self.share == (0, 1) else global_arrays.from_local
        return {
            k: from_host(self._home[k].sharding, np.asarray(batch[k]))
            for k in self.graph.inputs.split()
            if k in self._home
        }

    def __call__(
        self,
        models: Mapping[str, Model],
        batch: Mapping[str, np.ndarray],
        key: Any,
        *,
        reselect: tuple[str, ...] = (),
    ) -> tuple[dict[str, Model], dict[str, jax.Array], dict[str, jax.Array]]:
        """Runs the graph once.

        Args:
            models: every model, at home. Trained models are donated: use the returned ones.
            batch: the graph's inputs, as numpy arrays; see `put`.
            key: a jax random key, or its two uint32 words.
            reselect: models with an `Adaptation` that reselect their trained part, see `due`.

        Returns:
            models after the step; the arrays named by `keep`; metrics `call/name`, scalars on the
            device. Blocks only where a host call or a schedule needs its inputs.
        """
        if not self.built:
            if jax.process_count() > 1:
                raise ValueError("with several processes call build(...) with global shapes first.")
            self.build(batch)
        words, timing = runners.key_words(key), self.timeline.begin()
        run = Running(self, dict(models), self.put(batch), timing, words, reselect)
        self.packs.begin(batch, run.key)
        for op in self.operations:
            run.run(op, self._by_name[op.call])
        return (
            run.models,
            {k: run.data[k] for k in self.keep},
            run.metrics | self.packs.statistics(),
        )

    # Reports

    def shown(self, data: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns kept arrays with rows in every process. Every process must call.

        Each process gets its own rows if all processes have some of every array, else all rows.
        """
        if all(map(transfers.everywhere, data.values())):
            return dict(data)
        self._shown = self._shown or transfers.to_all(data)
        return self._shown(dict(data))

    def plan_table(self) -> dict[str, dict[str, Any]]:
        """Returns the plan as plain data: call -> placement, kind, and model bytes received."""
        received = self.reallocated()
        return {
            c.name: {
                **self.plan[c.name].to_json(),
                "of": c.of,
                "weights": c.weights,
                "kind": "host" if c.host else c.kind,
                "reallocated_bytes": received.get(c.name, 0),
            }
            for c in self.calls
        }

    def reallocated(self) -> dict[str, int]:
        """Returns the bytes of parameters that all devices of a call receive from home."""
        return {
            c.name: int(self.weights.route(c).report().received)
            for c in self.calls
            if c.of is not None
        }


_SLOWEST = ("train", "generate", "infer", "local")  # to compile


def _whole_batches(place: Placement) -> bool:
    """Returns True if every process must pass all rows for this placement, not just its own."""
    if jax.process_count() == 1:
        return False
    in_order = place.devices == tuple(range(jax.device_count()))
    return not in_order or place.row_shards % jax.process_count() != 0

"""RLHF as a dataflow graph of model function calls, and the step that runs it.

The terms are ReaL's (Mei et al. 2024, arXiv:2406.14088). A *graph* is a short list of named
*calls*; each applies one model to named arrays in one of three ways: generate, infer, train. A
*plan* gives every call a *placement*: devices, mesh, microbatches. `compile(graph, plan, specs)`
makes the step; between two calls of one model with different placements its parameters are
*reallocated*.

Invariant: beyond the rounding of reordered sums, a plan changes where and how fast results are
computed, never the results.

A plan becomes `shardings`, programs (`lowering`) and one list of operations in a total order
(`transfers`); every process of a job runs the operations that involve its devices. Dispatch is
asynchronous, so operations on disjoint devices overlap once their inputs are ready. Pipelining is
not supported.
"""

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_eff import tree
from jaxrl_eff.core import glossary, lowering, program_order, transfers
from jaxrl_eff.core.graph import (
    Adaptation,
    Call,
    Graph,
    Model,
    Plan,
    Spec,
    check_plan,
    draw,
    generate,
    infer,
    local,
    order,
    train,
)
from jaxrl_eff.core.program_order import Operation
from jaxrl_eff.core.shardings import Shardings
from jaxrl_eff.core.timing import StepTimes, Timeline
from jaxrl_eff.core.transfers import Transfers
from jaxrl_eff.core.zero import Traffic
from jaxrl_eff.parallel import Placement, Route, SyncConfig, WeightSync, global_arrays
from jaxrl_eff.parallel.sharding import replicated

__all__ = [
    "Adaptation", "Call", "Graph", "Model", "Placement", "Plan", "Spec", "Step",
    "check_plan", "compile", "draw", "generate", "infer", "local", "order", "train",
]  # fmt: skip


def compile(
    graph: Graph,
    plan: Plan,
    specs: Mapping[str, Spec],
    *,
    keep: str = "",
    sync: SyncConfig | None = None,
) -> "Step":
    """Compiles a graph and a plan into `step(models, batch, key) -> (models, data, metrics)`.

    Args:
        graph: the calls.
        plan: one placement per call.
        specs: a `Spec` for every model of the graph.
        keep: names of arrays to return in `data`; others are dropped after their last reader.
        sync: how trained parameters are sent to the calls that borrow them, as changes; None sends
            them in full.

    Raises:
        ValueError: the plan does not fit the graph or the devices, or a spec is missing.

    Example:
        >>> from jaxrl_eff import Graph, Placement, Spec, compile, core
        >>> def loss(params, batch, key):
        ...     return ((params["w"] * batch["x"] - 1) ** 2).sum(), jnp.float32(batch["x"].size), {}
        >>> graph = Graph("x", (core.train("fit", of="line", loss=loss, reads="x"),))
        >>> spec = Spec({"w": jax.ShapeDtypeStruct((), jnp.float32)}, {"w": ()}, optax.sgd(0.1))
        >>> step = compile(graph, {"fit": Placement((0,))}, {"line": spec})
        >>> home = step.home("line").params["w"].sharding
        >>> models = {"line": step.init("line", {"w": jax.device_put(jnp.float32(0), home)})}
        >>> key = np.zeros(2, np.uint32)
        >>> models, data, metrics = step(models, {"x": np.ones(4, np.float32)}, key)
        >>> round(float(models["line"].params["w"]), 3), float(metrics["fit/loss"])
        (0.2, 1.0)
    """
    missing = [m for m in graph.models if m not in specs]
    if missing:
        raise ValueError(f"no spec for the models {missing}; there are {sorted(specs)}.")
    for c in graph.calls:
        if c.kind == "train" and specs[c.of].tx is None:
            raise ValueError(f"{c.name} trains '{c.of}', whose spec has no optimizer (tx).")
    made = {k for c in graph.calls for k in c.writes} | set(graph.inputs.split())
    if unknown := sorted(set(keep.split()) - made):
        raise ValueError(f"keep names {unknown}, but the arrays are {sorted(made)}.")
    return Step(graph, check_plan(graph, plan), specs, tuple(keep.split()), sync)


class Step:
    """A compiled graph. Call it as `models, data, metrics = step(models, batch, key)`.

    Attributes:
        plan: a placement for every call.
        traces: call -> number of times its function was traced; stays at one.
        timeline: seconds of the calls of the last steps, measured without blocking.
        notes: call -> a sentence for each axis that its sharding left replicated.
        traffic: train call -> its bytes on every mesh axis, if its model's `Spec` sets `sends`;
            set once traced.
        operations: all operations of a step, in order; set once checked.
        built: True once the calls of this process are compiled.
        share: (index, count): the block of a batch's rows that this process passes; (0, 1) is all.
        sync: the argument of `compile`.
    """

    _mixed = False  # see `Shardings`

    def __init__(
        self,
        graph: Graph,
        plan: dict[str, Placement],
        specs: Mapping[str, Spec],
        keep: tuple[str, ...],
        sync: SyncConfig | None = None,
    ):
        self.graph, self.plan, self.specs, self.keep, self.sync = graph, plan, specs, keep, sync
        self._layouts = Shardings(graph, plan, specs, mixed=self._mixed)
        self.calls = self._layouts.calls
        self.traces = dict.fromkeys((c.name for c in self.calls), 0)
        self.timeline = Timeline()
        self.notes = {c.name: self._layouts.rules[c.name].notes for c in self.calls}
        self.traffic: dict[str, Traffic] = {}
        self.operations: tuple[Operation, ...] = ()
        self.built = False
        self._routes: dict[str, Route] = {}  # of parameters, by call
        self._ways: dict[str, Route | WeightSync] = {}  # the same, as used in steps
        self._programs: dict[str, Any] = {}
        self._reselections: dict[str, Any] = {}  # by train call
        self._shown: Route | None = None
        self._signature: Any = None
        self._by_name = {c.name: c for c in self.calls}
        self._first_reader = {k: c.name for c in reversed(self.calls) for k in c.reads}
        readers = {self._first_reader[k] for k in graph.inputs.split() if k in self._first_reader}
        whole = any(_whole_batches(plan[call]) for call in readers)
        self.share = (0, 1) if whole else (jax.process_index(), jax.process_count())

    # Models

    def params_sharding(self, call: str) -> Any:
        """Returns the tree of shardings of the call's model on the call's placement."""
        return self._layouts.params(self._by_name[call])

    def home(self, model: str) -> Model:
        """Returns shapes and shardings of a model at home: a tree of `jax.ShapeDtypeStruct`."""
        return self._layouts.home(model)

    def init(self, model: str, params: Any) -> Model:
        """Makes a model at home from its parameters: adds a fresh optimizer state.

        Args:
            params: arrays with the shardings of `home(model).params`.
        """
        abstract, home = self.home(model), self.graph.home(model)
        if not self._layouts.trained(model):
            return Model(params, ())
        if self._layouts.here(home):
            shardings = jax.tree.map(lambda x: x.sharding, abstract.opt)
            with self._layouts.context(home):
                opt = jax.jit(self.specs[model].tx.init, out_shardings=shardings)(params)
            left = jax.tree.map(_zeros, abstract.left)
        else:
            opt, left = jax.tree.map(global_arrays.placeholder, (abstract.opt, abstract.left))
        held = self._held(model, params)
        past = {
            c.name: tuple(_copied(self._route(c)(params)) for _ in range(c.staleness))
            for c in self.graph.stale(model)
        }
        return Model(params, opt, past or (), left, held)

    def refreshed(self, model: str, now: Model) -> Model:
        """Returns the model with every node's copy of its weights sent in full, see `Model.held`.

        For parameters replaced by anything but a train call. Sending differences would also
        converge to them, but only approximately and over several steps.
        """
        return now._replace(held=self._held(model, now.params))

    def _held(self, model: str, params: Any) -> Any:
        """Returns the nodes' copies of a model at home: its weights in a copy's precision."""
        abstract, home = self.home(model).held, self.graph.home(model)
        if not abstract:
            return ()
        if not self._layouts.here(home):
            return jax.tree.map(global_arrays.placeholder, abstract)
        there = {name: x.sharding for name, x in abstract.items()}

        def held(flat: Any) -> Any:
            return {k: flat[k].reshape(x.shape).astype(x.dtype) for k, x in abstract.items()}

        flat = tree.flat(params)
        return jax.jit(held, out_shardings=there)({k: flat[k] for k in abstract})

    def _route(self, c: Call) -> Route:
        """Returns the route of a call's parameters from home, all of them."""
        if c.name not in self._routes:
            home = self._layouts.borrowed(self.graph.home(c.of))
            self._routes[c.name] = Route(home, self._layouts.params(c))
        return self._routes[c.name]

    def _way(self, c: Call) -> Route | WeightSync:
        """Returns the route of a call's parameters from home in every step."""
        if c.name not in self._ways:
            route, trainer = self._route(c), self.graph.home(c.of)
            if self.sync is not None and trainer.kind == "train" and not route.alias:
                still = self._traced[trainer.name].still.params
                home = self._layouts.borrowed(trainer)
                route = WeightSync(home, self._layouts.params(c), still=still, changes=self.sync)
            self._ways[c.name] = route
        return self._ways[c.name]

    # Compilation

    def check(self, batch: Mapping[str, Any]) -> "Step":
        """Walks the graph with shapes alone: nothing is compiled, loaded or run.

        Args:
            batch: name -> anything with `shape` and `dtype` (global sizes, all processes).

        Raises:
            ValueError: rows do not divide by a placement, or an output is missing or differs from
                the glossary.
        """
        self._check_inputs(batch)
        shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}
        self._args, self._made, self._traced, self._numbers = {}, {}, {}, {}
        self._ways = {}
        home: dict[str, jax.ShapeDtypeStruct] = {}
        for c in self.calls:
            glossary.check(c.name, {k: shapes[k] for k in c.reads})
            self._check_rows(c, shapes)
            args = self._args[c.name] = self._layouts.rows(c, {k: shapes[k] for k in c.reads})
            out = self._outputs(c, args)
            self._check_outputs(c, out)
            shapes |= out
            self._made[c.name] = self._layouts.rows(c, out)
            home |= self._made[c.name]
        for k in self.graph.inputs.split():
            if k in self._first_reader:
                home[k] = self._args[self._first_reader[k]][k]
        self._home = home
        self._moves = Transfers(self._layouts, self._way, self._args, home, self._numbers)
        self.operations = self._moves.operations
        program_order.agree(self.operations)
        self._signature = {k: (tuple(v.shape), str(v.dtype)) for k, v in batch.items()}
        return self

    def build(self, batch: Mapping[str, Any]) -> "Step":
        """Checks, traces and compiles every call for batches of these shapes, in parallel.

        Args:
            batch: as for `check`.
        """
        if self._signature != {k: (tuple(v.shape), str(v.dtype)) for k, v in batch.items()}:
            self.check(batch)
        device = [c for c in self.calls if not c.host and self._layouts.here(c)]
        with ThreadPoolExecutor(max(1, len(device))) as pool:
            # Largest programs first; each compiles while the next is traced.
            started = {
                c.name: pool.submit(self._lower(c).compile)
                for c in sorted(device, key=lambda c: _SLOWEST.index(c.kind))
            }
            routes = [
                pool.submit(route.compile)
                for route in (*self._ways.values(), *self._moves.routes.values())
            ]
            again = {
                c.name: pool.submit(
                    lowering.lower_reselection(self._layouts, c, self._args[c.name]).compile
                )
                for c in device
                if lowering.reselects(self._layouts, c)
            }
            self._programs = {c.name: started[c.name].result() for c in device}
            self._reselections = {name: one.result() for name, one in again.items()}
            for route in routes:
                route.result()
        self.built = True
        program_order.meet("compiled")
        return self

    def _check_inputs(self, batch: Mapping[str, Any]) -> None:
        wanted = set(self.graph.inputs.split())
        if wanted - set(batch):
            raise ValueError(f"the batch lacks {sorted(wanted - set(batch))}; it has {[*batch]}.")

    def _check_rows(self, c: Call, shapes: Mapping[str, Any]) -> None:
        place = self.plan[c.name]
        parts = place.row_shards * place.microbatches * c.minibatches
        for k in c.reads:
            if c.of is not None and shapes[k].shape[0] % parts:
                raise ValueError(
                    f"{c.name} reads '{k}' with {shapes[k].shape[0]} rows, which do not divide by "
                    f"{parts} = {place.row_shards} (dcn x data x fsdp) x {place.microbatches} "
                    f"(microbatches) x {c.minibatches} (minibatches)."
                )

    def _outputs(self, c: Call, args: dict[str, Any]) -> dict[str, Any]:
        """Returns shapes of the arrays that a call writes."""
        if c.host:
            return glossary.shapes(c.writes, args)
        if c.kind == "train" and jax.process_count() == 1 and self.sync is None:
            return {}  # traced when it is compiled
        traced = self._traced[c.name] = self._trace(c)
        number = jax.ShapeDtypeStruct((), jnp.float32, sharding=self._layouts.whole(c))
        self._numbers[c.name] = {f"{c.name}/{k}": number for k in traced.out[1]}
        return {} if c.kind == "train" else traced.out[0]

    def _check_outputs(self, c: Call, out: dict[str, Any]) -> None:
        if set(out) != set(c.writes):
            raise ValueError(f"{c.name} wrote {sorted(out)}, but declares {sorted(c.writes)}.")
        glossary.check(c.name, out)

    def _trace(self, c: Call) -> lowering.Traced:
        def seen() -> None:
            self.traces[c.name] += 1

        traced = lowering.trace(self._layouts, c, self._args[c.name], seen)
        if c.name in self._layouts.sharded:
            self.traffic[c.name] = self._layouts.sharded[c.name].traffic(traced.jaxpr)
        return traced

    def _lower(self, c: Call) -> Any:
        traced = self._traced.pop(c.name, None) or self._trace(c)
        return lowering.lower(self._layouts, c, traced, self._made[c.name])

    def saved(self) -> None:
        """Must be called whenever the state to resume a run from is saved.

        Weights sent as rounded differences are sent in full next, as in a run resumed from that
        state, so that both runs give the same results.
        """
        for way in self._ways.values():
            if isinstance(way, WeightSync) and self.sync.bits:
                way.restart()

    def due(self, step: int) -> tuple[str, ...]:
        """Returns the models that reselect their trained part before a stage's step, from 0."""
        ways = {
            c.of: self.specs[c.of].tx for c in self.calls if lowering.reselects(self._layouts, c)
        }
        return tuple(model for model, tx in ways.items() if tx.due(step))

    def memory(self, call: str, *, choosing: bool = False) -> Any:
        """Returns XLA's `memory_analysis` of a compiled call; with `choosing`, of the program that
        reselects its trained part. None if there is none.
        """
        programs = self._reselections if choosing else self._programs
        return programs[call].memory_analysis() if call in programs else None

    def program(self, call: str) -> Any:
        """Returns a compiled call for inspection."""
        return self._programs[call]

    def analysis(self) -> dict[str, dict[str, float]]:
        """Returns XLA's analysis of every compiled call, see `lowering.analysis`."""
        return {name: lowering.analysis(p) for name, p in self._programs.items()}

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
            device. Blocks only where a host call needs its inputs.
        """
        if not self.built:
            self._check_single_process()
            self.build(batch)
        words = key_words(key)
        timing = self.timeline.begin()
        run = _Running(dict(models), self.put(batch), {}, {}, timing, words, {}, reselect)
        for op in self.operations:
            c = self._by_name[op.call]
            if op.kind == "move":
                moved = self._moves.routes[op.name]({k: run.data[k] for k in op.arrays})
                run.data |= {transfers.moved_name(k, c): v for k, v in moved.items()}
            elif op.kind == "realloc":
                run.borrowed[self._layouts.key(c)] = self._reallocate(op, c, run)
            elif op.kind == "keep":
                model, new = run.models[c.of], _copied(self._reallocate(op, c, run))
                past = {**model.past, c.name: (*model.past[c.name][1:], new)}
                run.models[c.of] = model._replace(past=past)
            elif op.kind == "tell":
                run.metrics |= self._tell(c, run.metrics)
            else:
                self._run(c, run)
        return run.models, {k: run.data[k] for k in self.keep}, run.metrics

    def _check_single_process(self) -> None:
        if jax.process_count() > 1:
            raise ValueError("with several processes call build(...) with global shapes first.")

    def _run(self, c: Call, run: "_Running") -> None:
        """Runs one call; on a process without its devices, only makes placeholders."""
        dispatched = run.timing.now()
        args = {k: run.data[self._moves.slots[c.name, k]] for k in c.reads}
        for slot in [slot for slot, call in self._moves.last_use.items() if call == c.name]:
            if slot not in self.keep:
                run.data.pop(slot, None)
        if not self._layouts.here(c):
            out, m = {k: global_arrays.placeholder(v) for k, v in self._made[c.name].items()}, {}
        elif c.host:
            out, m = self._run_on_host(c, args, run.words), {}
        elif c.kind == "train":
            model = run.models.pop(c.of)
            bare, past = model._replace(past=()), model.past
            del model  # donated: no other reference may remain
            if c.of in run.reselect:
                bare, _ = self._reselections[c.name](bare, args, self._key(c, run))
            trained, m = self._programs[c.name](bare, args, self._key(c, run))
            run.models[c.of], out = trained._replace(past=past), {}
        else:
            out, m = self._programs[c.name](self._params(c, run), args, self._key(c, run))
        if c.kind == "train":
            run.borrowed = {k: v for k, v in run.borrowed.items() if k[0] != c.of}
        del args
        if self._layouts.here(c):
            token = next(iter([*m.values(), *out.values()]), None)
            devices = self.plan[c.name].devices
            run.timing.add(c.name, devices, c.reads, c.writes, dispatched, token)
        run.data |= {k: v for k, v in out.items() if k in self._moves.last_use or k in self.keep}
        run.metrics |= {f"{c.name}/{k}": v for k, v in m.items()}

    def _params(self, c: Call, run: "_Running") -> Any:
        """Returns the call's model in the call's layout."""
        if c.of is None:
            return None
        if c.staleness:
            return run.models[c.of].past[c.name][0]
        return run.borrowed.get(self._layouts.key(c), run.models[c.of].params)

    def _key(self, c: Call, run: "_Running") -> jax.Array:
        place = self.plan[c.name]
        if place not in run.keys:
            run.keys[place] = global_arrays.from_whole(replicated(place), run.words)
        return run.keys[place]

    def _reallocate(self, op: Operation, c: Call, run: "_Running") -> Any:
        dispatched, old = run.timing.now(), run.models[c.of].params
        way = self._way(c)
        new = way(old)
        moved = [n for n, o in zip(*map(jax.tree.leaves, (new, old)), strict=True) if n is not o]
        token = moved[-1] if moved else None
        if isinstance(way, WeightSync):  # the next sync donates its copy
            sent = way.done.numbers() if way.done is not None else {}
            run.metrics |= {f"{c.name}/sync_{k}": v for k, v in sent.items()}
            token = sent.get("changed")
        if token is not None and self._layouts.here(c):
            run.timing.add(op.name, self.plan[c.name].devices, (), (), dispatched, token)
        return new

    def _tell(self, c: Call, metrics: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Sends a call's metrics to every process."""
        mine = {
            k: metrics[k] if k in metrics else global_arrays.placeholder(number)
            for k, number in self._numbers[c.name].items()
        }
        return self._moves.routes[f"metrics of {c.name}"](mine)

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
                "kind": "host" if c.host else c.kind,
                "reallocated_bytes": received.get(c.name, 0),
            }
            for c in self.calls
        }

    def reallocated(self) -> dict[str, int]:
        """Returns the bytes of parameters that all devices of a call receive from home."""
        return {
            c.name: int(self._route(c).report().received) for c in self.calls if c.of is not None
        }

    def _run_on_host(
        self, c: Call, args: dict[str, jax.Array], words: np.ndarray
    ) -> dict[str, jax.Array]:
        out = c.fn({k: global_arrays.local_rows(v) for k, v in args.items()}, words)
        made = self._made[c.name]
        self._check_outputs(c, out)
        return {k: global_arrays.from_parts(made[k], v) for k, v in out.items()}


@dataclasses.dataclass
class _Running:
    """State of a running step.

    Attributes:
        data: slot -> array, until its last reader.
        borrowed: layout -> parameters that were reallocated to it.
        keys: placement -> the step's key there.
        reselect: the models that reselect their trained part.
    """

    models: dict[str, Model]
    data: dict[str, jax.Array]
    borrowed: dict[Any, Any]
    metrics: dict[str, jax.Array]
    timing: StepTimes
    words: np.ndarray
    keys: dict[Placement, jax.Array]
    reselect: tuple[str, ...]


_SLOWEST = ("train", "generate", "infer", "local")  # to compile


def key_words(key: Any) -> np.ndarray:
    """Returns the two words of a key. A typed key is fetched; pass words to avoid the transfer."""
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    words = np.asarray(key, np.uint32)
    if words.shape != (2,):
        raise ValueError(f"a key has two uint32 words, got an array of shape {words.shape}.")
    return words


def _whole_batches(place: Placement) -> bool:
    """Returns True if every process must pass all rows for this placement, not just its own."""
    if jax.process_count() == 1:
        return False
    in_order = place.devices == tuple(range(jax.device_count()))
    return not in_order or place.row_shards % jax.process_count() != 0


def _zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(like.shape, like.dtype), out_shardings=like.sharding)()


@jax.jit
def _copied(tree_: Any) -> Any:
    """Copies arrays, so that donation of the originals does not affect them."""
    return jax.tree.map(jnp.copy, tree_)

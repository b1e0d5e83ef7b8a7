"""RLHF as a dataflow graph of model function calls, and the step that runs it.

The terms are ReaL's (Mei et al. 2024, arXiv:2406.14088). A *graph* is a short list of named
*calls*; each applies one model to named arrays in one of three ways: generate, infer, train. A
*plan* gives every call a *placement*: devices, mesh, microbatches. `compile(graph, plan, specs)`
makes the step; between two calls of one model with different placements its parameters are
*reallocated*.

The law: a plan changes where and how fast, never what, beyond the rounding of reordered sums.

A plan becomes one list of operations in a total order (`operations`); every process of a job runs
the part of it that touches its devices. Dispatch is asynchronous, so operations on disjoint devices
overlap once their inputs are there. Left out: pipelining.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxrl_eff import arrays, edges, operations, programs, tree
from jaxrl_eff.graph import (
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
from jaxrl_eff.operations import Operation
from jaxrl_eff.optim import state_shardings
from jaxrl_eff.parallel import Placement, Route, Rules, mesh, rows, rules
from jaxrl_eff.parallel.sharding import in_host, replicated
from jaxrl_eff.timeline import StepTimes, Timeline

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
) -> "Step":
    """Turns a graph and a plan into `step(models, batch, key) -> (models, data, metrics)`.

    Args:
        graph: the calls.
        plan: a placement a call.
        specs: a `Spec` for every model of the graph.
        keep: names of arrays to return in `data`; others are dropped after their last reader.

    Raises:
        ValueError: the plan does not fit the graph or the devices, or a spec is missing.
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
    return Step(graph, check_plan(graph, plan), specs, tuple(keep.split()))


class Step:
    """A compiled graph. Call it as `models, data, metrics = step(models, batch, key)`.

    Attributes:
        plan: a placement for every call.
        traces: call -> how often its function was traced; stays at one.
        timeline: seconds of the calls of the last steps, measured without waiting.
        notes: what the sharding left whole, by call.
        operations: everything that a step does, in its order; known once checked.
        built: the calls of this process are compiled.
        share: (index, count): which block of a batch's rows this process brings; (0, 1) is all.
    """

    def __init__(
        self,
        graph: Graph,
        plan: dict[str, Placement],
        specs: Mapping[str, Spec],
        keep: tuple[str, ...],
    ):
        self.graph, self.plan, self.specs, self.keep = graph, plan, specs, keep
        self.calls = order(graph)
        self.traces = dict.fromkeys((c.name for c in self.calls), 0)
        self.timeline = Timeline()
        self._rules = {c.name: self._call_rules(c) for c in self.calls}
        self.notes = {c.name: self._rules[c.name].notes for c in self.calls}
        self.operations: tuple[Operation, ...] = ()
        self.built = False
        self._routes: dict[str, Route] = {}  # by operation
        self._programs: dict[str, Any] = {}
        self._reselections: dict[str, Any] = {}  # by train call
        self._signature: Any = None
        self._by_name = {c.name: c for c in self.calls}
        self._first_reader = {k: c.name for c in reversed(self.calls) for k in c.reads}
        readers = {self._first_reader[k] for k in graph.inputs.split() if k in self._first_reader}
        whole = any(_whole_batches(plan[call]) for call in readers)
        self.share = (0, 1) if whole else (jax.process_index(), jax.process_count())
        self._opt_shapes = {
            name: jax.eval_shape(spec.tx.init, spec.shapes) if self._trained(name) else ()
            for name, spec in specs.items()
            if name in graph.models
        }

    # Layouts

    def _call_rules(self, c: Call) -> Rules:
        sizes: dict[str, set[int]] = {}
        if c.of is not None:
            spec = self.specs[c.of]
            leaves = jax.tree.leaves(spec.axes, is_leaf=lambda x: isinstance(x, tuple))
            for axes, leaf in zip(leaves, jax.tree.leaves(spec.shapes), strict=True):
                for axis, n in zip(axes, leaf.shape, strict=True):
                    if axis is not None:
                        sizes.setdefault(axis, set()).add(n)
        return rules(self.plan[c.name], sizes, lengths=c.kind != "generate")

    def _trained(self, model: str) -> bool:
        return any(c.kind == "train" for c in self.graph.of(model))

    def params_sharding(self, call: str) -> Any:
        """Tree of shardings of the call's model on the call's placement."""
        return self._rules[call].tree(self.specs[self._by_name[call].of].axes)

    def home(self, model: str) -> Model:
        """Shapes and shardings of a model at home: a tree of `jax.ShapeDtypeStruct`.

        Optimizer state has the layout of the parameter that it belongs to.
        """
        call = self.graph.home(model)
        params = self._borrowed(call)
        shapes, whole = self._opt_shapes[model], replicated(self.plan[call.name])
        where = state_shardings(shapes, params, otherwise=whole)
        tx, rules_ = self.specs[model].tx, self._rules[call.name]
        if isinstance(tx, Adaptation):  # state of entries has axes of its own

            def of_entries(name: str, leaf: jax.ShapeDtypeStruct, sharding: Any) -> Any:
                axes = tx.axes(name)
                return sharding if axes is None else rules_.fitting(axes, leaf.shape)

            where = tree.map_with_name(of_entries, shapes, where)
        opt = jax.tree.map(_placed, shapes, where)
        if self.plan[call.name].offload == "opt":
            opt = jax.tree.map(_in_host, opt)
        past = {c.name: (self._borrowed(c),) * c.staleness for c in self.graph.stale(model)}
        return Model(params, opt, past or ())

    def init(self, model: str, params: Any) -> Model:
        """A model at home from parameters already there: adds a fresh optimizer state.

        Args:
            params: arrays with the shardings of `home(model).params`.
        """
        abstract = self.home(model)
        if not self._trained(model):
            return Model(params, ())
        if self._here(self.graph.home(model)):
            shardings = jax.tree.map(lambda x: x.sharding, abstract.opt)
            with self._context(self.graph.home(model)):
                opt = jax.jit(self.specs[model].tx.init, out_shardings=shardings)(params)
        else:
            opt = jax.tree.map(arrays.absent, abstract.opt)
        past = {
            c.name: tuple(_copied(self._realloc(c)(params)) for _ in range(c.staleness))
            for c in self.graph.stale(model)
        }
        return Model(params, opt, past or ())

    def _borrowed(self, c: Call) -> Any:
        """Shapes and shardings of a call's model where the call runs."""
        return jax.tree.map(_placed, self.specs[c.of].shapes, self.params_sharding(c.name))

    def _realloc(self, c: Call) -> Route:
        """The way of a call's parameters from home."""
        name = f"{c.of}->{c.name}"
        if name not in self._routes:
            home = self._borrowed(self.graph.home(c.of))
            self._routes[name] = Route(home, self.params_sharding(c.name))
        return self._routes[name]

    # Compilation

    def check(self, batch: Mapping[str, Any]) -> "Step":
        """Walks the graph with shapes alone: nothing is compiled, loaded or run.

        Args:
            batch: name -> anything with `shape` and `dtype` (global sizes, all processes).

        Raises:
            ValueError: rows do not divide by a placement, an output is missing or is not what the
                glossary says.
        """
        self._check_inputs(batch)
        shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}
        self._args, self._where, self._traced, self._routes = {}, {}, {}, {}
        self._made, self._numbers = {}, {}
        for c in self.calls:
            edges.check(c.name, {k: shapes[k] for k in c.reads})
            self._check_rows(c, shapes)
            args = self._args[c.name] = self._rows_at(c, {k: shapes[k] for k in c.reads})
            out = self._outputs(c, args)
            self._check_outputs(c, out)
            shapes |= out
            self._made[c.name] = self._rows_at(c, out)
            self._where |= {k: v.sharding for k, v in self._made[c.name].items()}
        for k in self.graph.inputs.split():
            if k in self._first_reader:
                self._where[k] = self._args[self._first_reader[k]][k].sharding
        self._shapes = shapes
        self.operations = self._in_order()
        operations.agree(self.operations)
        self._signature = {k: (tuple(v.shape), str(v.dtype)) for k, v in batch.items()}
        return self

    def build(self, batch: Mapping[str, Any]) -> "Step":
        """Checks, traces and compiles every call for batches of these shapes, in parallel.

        Args:
            batch: as for `check`.
        """
        if self._signature != {k: (tuple(v.shape), str(v.dtype)) for k, v in batch.items()}:
            self.check(batch)
        device = [c for c in self.calls if not c.host and self._here(c)]
        with ThreadPoolExecutor(max(1, len(device))) as pool:
            # The largest programs first; each compiles while the next is traced.
            started = {
                c.name: pool.submit(self._lower(c).compile)
                for c in sorted(device, key=lambda c: _SLOWEST.index(c.kind))
            }
            routes = [pool.submit(route.compile) for route in self._routes.values()]
            again = {
                c.name: pool.submit(self._lower_reselection(c).compile)
                for c in device
                if self._reselects(c)
            }
            self._programs = {c.name: started[c.name].result() for c in device}
            self._reselections = {name: one.result() for name, one in again.items()}
            for route in routes:
                route.result()
        self.built = True
        operations.meet("compiled")
        return self

    def _check_inputs(self, batch: Mapping[str, Any]) -> None:
        wanted = set(self.graph.inputs.split())
        if wanted - set(batch):
            raise ValueError(f"the batch lacks {sorted(wanted - set(batch))}; it has {[*batch]}.")

    def _rows_at(self, c: Call, shapes: Mapping[str, Any]) -> dict[str, Any]:
        """Arrays as a call reads or writes them where it runs."""
        place, lengths = self.plan[c.name], c.kind != "generate"
        return {k: _placed(v, rows(place, v.shape, lengths=lengths)) for k, v in shapes.items()}

    def _check_rows(self, c: Call, shapes: Mapping[str, Any]) -> None:
        place = self.plan[c.name]
        parts = place.row_shards * place.microbatches * c.minibatches
        for k in c.reads:
            if c.of is not None and shapes[k].shape[0] % parts:
                raise ValueError(
                    f"{c.name} reads '{k}' with {shapes[k].shape[0]} rows, which do not divide by "
                    f"{parts} = {place.row_shards} (data x fsdp) x {place.microbatches} "
                    f"(microbatches) x {c.minibatches} (minibatches)."
                )

    def _outputs(self, c: Call, args: dict[str, Any]) -> dict[str, Any]:
        """Shapes of what a call writes."""
        if c.host:
            return edges.shapes(c.writes, args)
        if c.kind == "train" and jax.process_count() == 1:
            return {}  # traced when it is compiled
        traced = self._traced[c.name] = self._trace(c, args)
        number = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(self.plan[c.name]))
        self._numbers[c.name] = {f"{c.name}/{k}": number for k in traced.out[1]}
        return {} if c.kind == "train" else traced.out[0]

    def _check_outputs(self, c: Call, out: dict[str, Any]) -> None:
        if set(out) != set(c.writes):
            raise ValueError(f"{c.name} wrote {sorted(out)}, but declares {sorted(c.writes)}.")
        edges.check(c.name, out)

    def _context(self, c: Call):
        return _Placed(self._rules[c.name])

    def _trace(self, c: Call, args: dict[str, Any]) -> "_Traced":
        place = self.plan[c.name]
        key = jax.ShapeDtypeStruct(_KEY.shape, _KEY.dtype, sharding=replicated(place))
        if c.kind == "train":
            operands = (self.home(c.of)._replace(past=()), args, key)
            tx = self.specs[c.of].tx
            away = place.offload == "opt"
            program = functools.partial(programs.train_program, c, tx, place.microbatches, away)
        else:
            operands = (None if c.of is None else self._borrowed(c), args, key)
            axes = self.specs[c.of].axes if place.offload == "params" else None
            program = functools.partial(programs.apply_program, c, place.microbatches, axes)

        def counted(*operands):
            self.traces[c.name] += 1
            return program(*operands)

        with self._context(c):
            jaxpr, out = jax.make_jaxpr(counted, return_shape=True)(*operands)
        return _Traced(jaxpr, operands, out)

    def _lower(self, c: Call) -> Any:
        """The traced call with the layouts of its results, ready to be compiled."""
        whole = replicated(self.plan[c.name])
        traced = self._traced.pop(c.name, None) or self._trace(c, self._args[c.name])
        if c.kind == "train":
            where = jax.tree.map(lambda x: x.sharding, traced.operands[0])
        else:
            where = {k: v.sharding for k, v in self._made[c.name].items()}
        run = traced.function(c.name)
        donated = (0,) if c.kind == "train" else ()
        jitted = jax.jit(run, out_shardings=(where, whole), donate_argnums=donated)
        with self._context(c):
            return jitted.lower(*traced.operands)

    def _reselects(self, c: Call) -> bool:
        tx = self.specs[c.of].tx if c.kind == "train" else None
        return isinstance(tx, Adaptation) and tx.due is not None

    def _lower_reselection(self, c: Call) -> Any:
        """The program that chooses anew what a call trains."""
        place, model = self.plan[c.name], self.home(c.of)._replace(past=())
        key = jax.ShapeDtypeStruct(_KEY.shape, _KEY.dtype, sharding=replicated(place))
        run = functools.partial(
            programs.reselect_program, c, self.specs[c.of].tx, place.offload == "opt"
        )
        where = jax.tree.map(lambda x: x.sharding, model)
        with self._context(c):
            jitted = jax.jit(run, out_shardings=where, donate_argnums=(0,))
            return jitted.lower(model, self._args[c.name], key)

    def due(self, step: int) -> tuple[str, ...]:
        """The models that choose anew what is trained before this step (from 0) of a stage."""
        adapted = {c.of: self.specs[c.of].tx for c in self.calls if self._reselects(c)}
        return tuple(model for model, tx in adapted.items() if tx.due(step))

    def memory(self, call: str, *, choosing: bool = False) -> Any:
        """XLA's `memory_analysis` of a compiled call; or of the program that chooses anew what it
        trains, None if there is none.
        """
        programs_ = self._reselections if choosing else self._programs
        return programs_[call].memory_analysis() if call in programs_ else None

    def analysis(self) -> dict[str, dict[str, float]]:
        """What XLA says of every compiled call: `bytes` a device needs and `flops` it executes.

        `flops` counts a loop's body once, so it is too low for generation and scanned layers.
        """
        out = {}
        for name, p in self._programs.items():
            m, cost = p.memory_analysis(), p.cost_analysis() or {}
            cost = cost[0] if isinstance(cost, list) else cost
            peak = 0
            if m is not None:
                peak = (
                    m.argument_size_in_bytes
                    + m.output_size_in_bytes
                    - m.alias_size_in_bytes
                    + m.temp_size_in_bytes
                )
            out[name] = {"bytes": float(peak), "flops": float(cost.get("flops", 0.0))}
        return out

    # The total order

    def _in_order(self) -> tuple[Operation, ...]:
        """Everything a step does. Also makes the routes, so that one that cannot be is found now.

        Sets `_slots`: under which name a call finds an array that it reads. An array that was moved
        for one call serves later ones that want it in the same layout.
        """
        out: list[Operation] = []
        borrowed: set[Any] = set()
        self._slots, there = {}, {(k, s): k for k, s in self._where.items()}
        for c in self.calls:
            for names in self._apart(c, there):
                op = self._move(names, c)
                if op is not None:
                    out.append(op)
                for k in names:
                    slot = k if op is None else f"{k} to {c.name}"
                    there[k, self._args[c.name][k].sharding] = slot
            for k in c.reads:
                self._slots[c.name, k] = there[k, self._args[c.name][k].sharding]
            if c.of is not None and c.kind != "train" and not c.staleness:
                if not self._realloc(c).alias and self._layout(c) not in borrowed:
                    out.append(self._weights("realloc", c))
                borrowed.add(self._layout(c))
            if c.kind == "train":
                out += [self._weights("keep", old) for old in self.graph.stale(c.of)]
                borrowed = {layout for layout in borrowed if layout[0] != c.of}
            mine = _processes(replicated(self.plan[c.name]))
            out.append(Operation("call", c.name, c.name, mine))
            if not c.host and len(mine) < jax.process_count():
                out.append(self._telling(c))
        turn = {c.name: i for i, c in enumerate(self.calls)}
        uses = [(slot, call) for (call, _), slot in self._slots.items()]
        uses += [(k, op.call) for op in out if op.kind == "move" for k in op.arrays]
        self._last_use = dict(sorted(uses, key=lambda use: turn[use[1]]))
        return tuple(out)

    def _apart(self, c: Call, there: Mapping[Any, str]) -> list[tuple[str, ...]]:
        """What a call reads and does not find in its layout, grouped by where it comes from."""
        groups: dict[Any, list[str]] = {}
        for k in c.reads:
            if (k, self._args[c.name][k].sharding) not in there:
                groups.setdefault(self._where[k].mesh, []).append(k)
        return [tuple(names) for names in groups.values()]

    def _move(self, names: tuple[str, ...], c: Call) -> Operation | None:
        """Brings arrays to where a call reads them; None if they are there under another name."""
        source = {k: _placed(self._shapes[k], self._where[k]) for k in names}
        target = {k: self._args[c.name][k].sharding for k in names}
        route = Route(source, target)
        if route.alias:
            return None
        name = f"{' '.join(names)} to {c.name}"
        self._routes[name] = route
        touched = _processes(self._where[names[0]], target[names[0]])
        return Operation("move", name, c.name, touched, names)

    def _weights(self, kind: str, c: Call) -> Operation:
        home = self.plan[self.graph.home(c.of).name]
        touched = _processes(replicated(home), replicated(self.plan[c.name]))
        return Operation(kind, f"{c.of}->{c.name}", c.name, touched)

    def _telling(self, c: Call) -> Operation:
        """A call's metrics to every process."""
        name, numbers = f"metrics of {c.name}", self._numbers[c.name]
        self._routes[name] = Route(numbers, dict.fromkeys(numbers, replicated(_everywhere())))
        return Operation("tell", name, c.name, tuple(range(jax.process_count())))

    def _layout(self, c: Call) -> Any:
        return c.of, self.plan[c.name], self._rules[c.name].table

    def _here(self, c: Call) -> bool:
        return arrays.here(replicated(self.plan[c.name]))

    # Running

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """A batch as global arrays where their first reader wants them.

        Args:
            batch: this process's rows, see `share`.
        """
        from_host = arrays.from_whole if self.share == (0, 1) else arrays.from_local
        return {
            k: from_host(self._where[k], np.asarray(batch[k]))
            for k in self.graph.inputs.split()
            if k in self._where
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
            models: every model, at home. Trained ones are donated: use the returned ones.
            batch: the graph's inputs, as numpy arrays; see `put`.
            key: a jax random key, or its two uint32 words.
            reselect: models with an `Adaptation` that choose anew what is trained, see `due`.

        Returns:
            models after the step; the arrays named by `keep`; metrics `call/name`, scalars on the
            device. Nothing is waited for, except where a host call needs numbers.
        """
        if not self.built:
            self._check_single_process()
            self.build(batch)
        words = _words(key)
        timing = self.timeline.begin()
        run = _Running(dict(models), self.put(batch), {}, {}, timing, words, {}, reselect)
        for op in self.operations:
            c = self._by_name[op.call]
            if op.kind == "move":
                moved = self._routes[op.name]({k: run.data[k] for k in op.arrays})
                run.data |= {f"{k} to {c.name}": v for k, v in moved.items()}
            elif op.kind == "realloc":
                run.borrowed[self._layout(c)] = self._reallocate(op, c, run)
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
        """One call; on a process without its devices only the names of what it makes."""
        dispatched = run.timing.now()
        args = {k: run.data[self._slots[c.name, k]] for k in c.reads}
        for slot in [slot for slot, call in self._last_use.items() if call == c.name]:
            if slot not in self.keep:
                run.data.pop(slot, None)
        if not self._here(c):
            out, m = {k: arrays.absent(v) for k, v in self._made[c.name].items()}, {}
        elif c.host:
            out, m = self._run_on_host(c, args, run.words), {}
        elif c.kind == "train":
            model = run.models.pop(c.of)
            bare, past = model._replace(past=()), model.past
            del model  # donated: nobody else may hold it
            if c.of in run.reselect:
                bare = self._reselections[c.name](bare, args, self._key(c, run))
            trained, m = self._programs[c.name](bare, args, self._key(c, run))
            run.models[c.of], out = trained._replace(past=past), {}
        else:
            out, m = self._programs[c.name](self._params(c, run), args, self._key(c, run))
        if c.kind == "train":
            run.borrowed = {k: v for k, v in run.borrowed.items() if k[0] != c.of}
        del args
        if self._here(c):
            token = next(iter([*m.values(), *out.values()]), None)
            devices = self.plan[c.name].devices
            run.timing.add(c.name, devices, c.reads, c.writes, dispatched, token)
        run.data |= {k: v for k, v in out.items() if k in self._last_use or k in self.keep}
        run.metrics |= {f"{c.name}/{k}": v for k, v in m.items()}

    def _params(self, c: Call, run: "_Running") -> Any:
        """The call's model where the call runs."""
        if c.of is None:
            return None
        if c.staleness:
            return run.models[c.of].past[c.name][0]
        return run.borrowed.get(self._layout(c), run.models[c.of].params)

    def _key(self, c: Call, run: "_Running") -> jax.Array:
        place = self.plan[c.name]
        if place not in run.keys:
            run.keys[place] = arrays.from_whole(replicated(place), run.words)
        return run.keys[place]

    def _reallocate(self, op: Operation, c: Call, run: "_Running") -> Any:
        dispatched, old = run.timing.now(), run.models[c.of].params
        new = self._realloc(c)(old)
        moved = [n for n, o in zip(*map(jax.tree.leaves, (new, old)), strict=True) if n is not o]
        if moved and self._here(c):
            run.timing.add(op.name, self.plan[c.name].devices, (), (), dispatched, moved[-1])
        return new

    def _tell(self, c: Call, metrics: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """A call's metrics on every process."""
        mine = {
            k: metrics[k] if k in metrics else arrays.absent(number)
            for k, number in self._numbers[c.name].items()
        }
        return self._routes[f"metrics of {c.name}"](mine)

    def shown(self, data: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Kept arrays with rows in every process. Every process must call.

        Each process's own rows where all have some of every array, otherwise all rows in all.
        """
        count = jax.process_count()
        if all(len(_processes(v.sharding)) == count for v in data.values()):
            return dict(data)
        if "shown" not in self._routes:
            target = dict.fromkeys(data, replicated(_everywhere()))
            self._routes["shown"] = Route(dict(data), target)
        return self._routes["shown"](dict(data))

    def plan_table(self) -> dict[str, dict[str, Any]]:
        """The plan as plain data: call -> placement, kind, and bytes it receives of its model."""
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
        """Bytes of parameters that all devices of a call receive from home."""
        return {
            c.name: int(self._realloc(c).report().received) for c in self.calls if c.of is not None
        }

    def _run_on_host(
        self, c: Call, args: dict[str, jax.Array], words: np.ndarray
    ) -> dict[str, jax.Array]:
        out = c.fn({k: arrays.local_rows(v) for k, v in args.items()}, words)
        made = self._made[c.name]
        self._check_outputs(c, out)
        return {k: arrays.from_parts(made[k], v) for k, v in out.items()}


@dataclasses.dataclass
class _Running:
    """One step under way.

    Attributes:
        data: slot -> array, as long as somebody will read it.
        borrowed: layout -> parameters that were reallocated to it.
        keys: placement -> the step's key there.
        reselect: the models that choose anew what is trained.
    """

    models: dict[str, Model]
    data: dict[str, jax.Array]
    borrowed: dict[Any, Any]
    metrics: dict[str, jax.Array]
    timing: StepTimes
    words: np.ndarray
    keys: dict[Placement, jax.Array]
    reselect: tuple[str, ...]


_KEY = jax.ShapeDtypeStruct((2,), jnp.uint32)
_SLOWEST = ("train", "generate", "infer", "local")  # to compile


class _Traced(NamedTuple):
    """A call's jaxpr, so that shapes are checked and the program is made from one trace."""

    jaxpr: jax.extend.core.ClosedJaxpr
    operands: tuple
    out: Any

    def function(self, name: str) -> Callable:
        """The call as a function again. Running a jaxpr is far quicker than tracing the model."""
        flat, structure = jax.extend.core.jaxpr_as_fun(self.jaxpr), jax.tree.structure(self.out)

        def run(*operands):
            return jax.tree.unflatten(structure, flat(*jax.tree.leaves(operands)))

        run.__name__ = name
        return run


def _words(key: Any) -> np.ndarray:
    """The two words of a key. A typed key is fetched; pass words to stay off the device."""
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    words = np.asarray(key, np.uint32)
    if words.shape != (2,):
        raise ValueError(f"a key has two uint32 words, got an array of shape {words.shape}.")
    return words


def _whole_batches(place: Placement) -> bool:
    """Whether every process must bring all rows of what is read here, not just its own."""
    if jax.process_count() == 1:
        return False
    in_order = place.devices == tuple(range(jax.device_count()))
    return not in_order or place.row_shards % jax.process_count() != 0


def _everywhere() -> Placement:
    return Placement(tuple(range(jax.device_count())))


def _processes(*shardings: jax.sharding.Sharding) -> tuple[int, ...]:
    return tuple(sorted({d.process_index for s in shardings for d in s.device_set}))


def _placed(like: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=sharding)


def _in_host(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return _placed(x, in_host(x.sharding))


@jax.jit
def _copied(tree_: Any) -> Any:
    """The same numbers in memory of their own, which no donation can take."""
    return jax.tree.map(jnp.copy, tree_)


class _Placed:
    """While tracing: the call's mesh, and flax's logical axis rules for it."""

    def __init__(self, r: Rules):
        self._mesh = jax.set_mesh(mesh(r.placement))
        self._rules = nn.logical_axis_rules(list(r.table))

    def __enter__(self):
        self._mesh.__enter__()
        self._rules.__enter__()

    def __exit__(self, *error):
        self._rules.__exit__(*error)
        self._mesh.__exit__(*error)

"""RLHF as a dataflow graph of model function calls, and the step that runs it.

The terms are ReaL's (Mei et al. 2024, arXiv:2406.14088). A *graph* is a short list of named
*calls*; each applies one model to named arrays in one of three ways: generate, infer, train. A
*plan* gives every call a *placement*: devices, mesh, microbatches. `compile(graph, plan, specs)`
makes the step; between two calls of one model with different placements its parameters are
*reallocated*.

The law: a plan changes where and how fast, never what, beyond the rounding of reordered sums.

Left to the runtime: dispatch is asynchronous, so calls on disjoint devices overlap once their
inputs are there. Left out: pipelining, and plans whose calls split the processes of a job.
"""

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxrl_eff import edges, host, programs, tree
from jaxrl_eff.graph import (
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
from jaxrl_eff.parallel import Placement, Route, Rules, mesh, rows, rules
from jaxrl_eff.parallel.sharding import replicated
from jaxrl_eff.timeline import Timeline

__all__ = [
    "Call", "Graph", "Model", "Placement", "Plan", "Spec", "Step",
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
        self._routes: dict[tuple[str, str], Route] = {}  # of data, by array and reader
        self._reallocs: dict[str, Route] = {}  # of parameters, by call
        self._programs: dict[str, Any] = {}
        self._signature: Any = None
        self._last_reader = {k: c.name for c in self.calls for k in c.reads}
        self._opt_shapes = {
            name: jax.eval_shape(spec.tx.init, spec.shapes) if self._trained(name) else ()
            for name, spec in specs.items()
            if name in graph.models
        }

    @property
    def built(self) -> bool:
        """Whether the calls are compiled."""
        return bool(self._programs)

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
        c = next(c for c in self.calls if c.name == call)
        return self._rules[call].tree(self.specs[c.of].axes)

    def home(self, model: str) -> Model:
        """Shapes and shardings of a model at home: a tree of `jax.ShapeDtypeStruct`.

        Optimizer state has the layout of the parameter that it belongs to, found by its path.
        """
        call = self.graph.home(model).name
        shardings = self.params_sharding(call)
        spec = self.specs[model]
        place = dict(
            zip(
                tree.names(spec.shapes),
                zip(jax.tree.leaves(shardings), jax.tree.leaves(spec.shapes), strict=True),
                strict=True,
            )
        )
        whole = replicated(self.plan[call])

        def of_state(name: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            parts = name.split("/")
            for i in range(len(parts)):
                sharding, param = place.get("/".join(parts[i:]), (None, None))
                if param is not None and param.shape == leaf.shape:
                    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)

        params = jax.tree.map(
            lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), spec.shapes, shardings
        )
        return Model(params, tree.map_with_name(of_state, self._opt_shapes[model]))

    def init(self, model: str, params: Any) -> Model:
        """A model at home from parameters already there: adds a fresh optimizer state.

        Args:
            params: arrays with the shardings of `home(model).params`.
        """
        abstract = self.home(model)
        if not self._trained(model):
            return Model(params, ())
        shardings = jax.tree.map(lambda x: x.sharding, abstract.opt)
        return Model(params, jax.jit(self.specs[model].tx.init, out_shardings=shardings)(params))

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
        self._args, self._where, self._traced = {}, {}, {}
        for c in self.calls:
            edges.check(c.name, {k: shapes[k] for k in c.reads})
            args = self._args[c.name] = self._abstract_batch(c, shapes)
            out = self._outputs(c, args)
            self._check_outputs(c, out)
            shapes |= out
            for k, v in out.items():
                self._where[k] = rows(self.plan[c.name], v.shape, lengths=c.kind != "generate")
        for k in self.graph.inputs.split():
            reader = next((c for c in self.calls if k in c.reads), None)
            if reader is not None:
                _check_own_rows(reader.name, self.plan[reader.name])
                self._where[k] = self._args[reader.name][k].sharding
        self._signature = {k: (tuple(v.shape), str(v.dtype)) for k, v in batch.items()}
        return self

    def build(self, batch: Mapping[str, Any]) -> "Step":
        """Checks, traces and compiles every call for batches of these shapes, in parallel.

        Args:
            batch: as for `check`.
        """
        if self._signature != {k: (tuple(v.shape), str(v.dtype)) for k, v in batch.items()}:
            self.check(batch)
        device = [c for c in self.calls if not c.host]
        with ThreadPoolExecutor(max(1, len(device))) as pool:
            # The largest programs first; each compiles while the next is traced.
            started = {
                c.name: pool.submit(self._lower(c).compile, self._options(c))
                for c in sorted(device, key=lambda c: _SLOWEST.index(c.kind))
            }
            self._programs = {c.name: started[c.name].result() for c in device}
        return self

    def _options(self, c: Call) -> dict[str, Any]:
        first = mesh(self.plan[c.name]).devices.flat[0]
        return host.COMPILER_OPTIONS if first.platform == "cpu" else {}

    def _check_inputs(self, batch: Mapping[str, Any]) -> None:
        wanted = set(self.graph.inputs.split())
        if wanted - set(batch):
            raise ValueError(f"the batch lacks {sorted(wanted - set(batch))}; it has {[*batch]}.")

    def _abstract_batch(self, c: Call, shapes: Mapping[str, Any]) -> dict[str, Any]:
        place = self.plan[c.name]
        parts = place.row_shards * place.microbatches * c.minibatches
        out = {}
        for k in c.reads:
            shape = shapes[k].shape
            if c.of is not None and shape[0] % parts:
                raise ValueError(
                    f"{c.name} reads '{k}' with {shape[0]} rows, which do not divide by "
                    f"{parts} = {place.row_shards} (data x fsdp) x {place.microbatches} "
                    f"(microbatches) x {c.minibatches} (minibatches)."
                )
            sharding = rows(place, shape, lengths=c.kind != "generate")
            out[k] = jax.ShapeDtypeStruct(shape, shapes[k].dtype, sharding=sharding)
        return out

    def _outputs(self, c: Call, args: dict[str, Any]) -> dict[str, Any]:
        """Shapes of what a call writes."""
        if c.kind == "train":
            return {}
        if c.host:
            return edges.shapes(c.writes, args)
        self._traced[c.name] = self._trace(c, args)
        return self._traced[c.name].out[0]

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
            operands = (self.home(c.of), args, key)
            tx = self.specs[c.of].tx
            program = functools.partial(programs.train_program, c, tx, place.microbatches)
        else:
            params = None
            if c.of is not None:
                params = jax.tree.map(
                    lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p),
                    self.specs[c.of].shapes,
                    self.params_sharding(c.name),
                )
            operands = (params, args, key)
            program = functools.partial(programs.apply_program, c, place.microbatches)

        def counted(*operands):
            self.traces[c.name] += 1
            return program(*operands)

        with self._context(c):
            jaxpr, out = jax.make_jaxpr(counted, return_shape=True)(*operands)
        return _Traced(jaxpr, operands, out)

    def _lower(self, c: Call) -> Any:
        """The traced call with the layouts of its results, ready to be compiled."""
        place = self.plan[c.name]
        whole = replicated(place)
        traced = self._traced.pop(c.name, None) or self._trace(c, self._args[c.name])
        if c.kind == "train":
            where = jax.tree.map(lambda x: x.sharding, traced.operands[0])
        else:
            lengths = c.kind != "generate"
            where = {k: rows(place, v.shape, lengths=lengths) for k, v in traced.out[0].items()}
        run = traced.function(c.name)
        donated = (0,) if c.kind == "train" else ()
        jitted = jax.jit(run, out_shardings=(where, whole), donate_argnums=donated)
        with self._context(c):
            return jitted.lower(*traced.operands)

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

    # Running

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows of a batch, as global arrays where their first reader wants them."""
        return {
            k: _joined(self._where[k], np.asarray(batch[k]))
            for k in self.graph.inputs.split()
            if k in self._where
        }

    def __call__(
        self, models: Mapping[str, Model], batch: Mapping[str, np.ndarray], key: Any
    ) -> tuple[dict[str, Model], dict[str, jax.Array], dict[str, jax.Array]]:
        """Runs the graph once.

        Args:
            models: every model, at home. Trained ones are donated: use the returned ones.
            batch: this process's rows of the graph's inputs, as numpy arrays.
            key: a jax random key, or its two uint32 words.

        Returns:
            models after the step; the arrays named by `keep`; metrics `call/name`, scalars on the
            device. Nothing is waited for, except where a host call needs numbers.
        """
        if not self._programs:
            self._check_single_process()
            self.build(batch)
        words = _words(key)
        data, models, metrics = self.put(batch), dict(models), {}
        copies: dict[Any, Any] = {}
        keys = {p: self._key(p, words) for p in dict.fromkeys(self.plan.values())}
        timing = self.timeline.begin()
        for c in self.calls:
            dispatched = timing.now()
            args = {k: self._move(data[k], k, c) for k in c.reads}
            for k in c.reads:
                if self._last_reader[k] == c.name and k not in self.keep:
                    data.pop(k, None)
            if c.host:
                out, m = self._run_on_host(c, args, words), {}
            elif c.kind == "train":
                model, m = self._programs[c.name](models.pop(c.of), args, keys[self.plan[c.name]])
                models[c.of], out = model, {}
                copies = {k: v for k, v in copies.items() if k[0] != c.of}
            else:
                params = self._borrow(models, c, copies)
                out, m = self._programs[c.name](params, args, keys[self.plan[c.name]])
            del args
            token = next(iter([*m.values(), *out.values()]), None)
            timing.add(c.name, self.plan[c.name].devices, c.reads, c.writes, dispatched, token)
            for k, v in out.items():
                if k in self._last_reader or k in self.keep:
                    data[k] = v
            metrics |= {f"{c.name}/{k}": v for k, v in m.items()}
        return models, {k: data[k] for k in self.keep}, metrics

    def _check_single_process(self) -> None:
        if jax.process_count() > 1:
            raise ValueError("with several processes call build(...) with global shapes first.")

    def _key(self, place: Placement, words: np.ndarray) -> jax.Array:
        return _joined(replicated(place), words)

    def _move(self, array: jax.Array, name: str, c: Call) -> jax.Array:
        if (name, c.name) not in self._routes:
            self._routes[name, c.name] = Route(self._where[name], self._args[c.name][name].sharding)
        return self._routes[name, c.name](array)

    def _borrow(self, models: Mapping[str, Model], c: Call, copies: dict[Any, Any]) -> Any:
        """The call's model where the call runs: reallocated unless it is there already."""
        if c.of is None:
            return None
        where = (c.of, self.plan[c.name], self._rules[c.name].table)
        if where not in copies:
            if c.name not in self._reallocs:
                home = self.graph.home(c.of).name
                self._reallocs[c.name] = Route(
                    self.params_sharding(home), self.params_sharding(c.name)
                )
            copies[where] = self._reallocs[c.name](models[c.of].params)
        return copies[where]

    def reallocated(self) -> dict[str, int]:
        """Bytes of parameters that each call receives from home; 0 where it shares them."""
        out = {}
        for c in self.calls:
            if c.of is not None:
                route = Route(
                    self.params_sharding(self.graph.home(c.of).name), self.params_sharding(c.name)
                )
                out[c.name] = 0 if route.alias else tree.nbytes(self.specs[c.of].shapes)
        return out

    def _run_on_host(
        self, c: Call, args: dict[str, jax.Array], words: np.ndarray
    ) -> dict[str, jax.Array]:
        out = c.fn({k: local_rows(v) for k, v in args.items()}, words)
        self._check_outputs(c, out)
        return {k: _joined(self._where[k], v) for k, v in out.items()}


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


def _check_own_rows(call: str, place: Placement) -> None:
    if place.row_shards % jax.process_count():
        raise ValueError(
            f"{call} reads the batch in {place.row_shards} = data x fsdp parts, which are not a "
            f"multiple of the {jax.process_count()} processes that bring the rows."
        )


def local_rows(array: jax.Array) -> np.ndarray:
    """This process's rows of an array, in order, each once."""
    if array.is_fully_addressable:
        return np.asarray(jax.device_get(array))
    starts = {}
    for shard in array.addressable_shards:
        starts.setdefault(shard.index[0].start or 0, shard.data)
    return np.concatenate([np.asarray(jax.device_get(starts[s])) for s in sorted(starts)])


def _joined(sharding: jax.sharding.Sharding, local: np.ndarray) -> jax.Array:
    """The array of which every process has its part. Meant, so no guard of accidents sees it."""
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_process_local_data(sharding, local)


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

"""A step over short and long sequences at once: each micro-batch has rows of both kinds.

Skrull (arXiv:2505.19609) keeps a short sequence on one device and shards a long one over the
devices of a sequence axis. Here a *micro-batch* has, for G groups of P devices,

    local     rows [G P, Tl]    packed sequences, one row per device
    shared    rows [G, P Td]    packed sequences, one row per group

and a global batch is a list of micro-batches. The functions of calls see ordinary rows: every
sequence is within one row, so a loss is the sum of the losses of local and shared rows. Only the
model's forward pass takes both together (`sequence.joined`), so that attention over local rows can
overlap with the communication of keys of shared rows.

Gradients of all micro-batches are summed and divided once by their weight, so the schedule can
change only the rounding of sums. Every micro-batch shape is one program per call, compiled ahead of
time; the update is one more.

Not supported: graphs that generate (see `packed`), calls on different placements, minibatches.
"""

import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from jaxrl_eff.core import glossary, lowering, meters, program_order, programs
from jaxrl_eff.core.graph import TOKENS, Call, Graph, Model, Spec, check_plan
from jaxrl_eff.core.shardings import placed
from jaxrl_eff.core.step import Step, key_words
from jaxrl_eff.core.summed import Summed, read_one
from jaxrl_eff.parallel import Placement, global_arrays, rows
from jaxrl_eff.parallel.attention import sequence
from jaxrl_eff.parallel.sharding import mixed_rows

MicroBatch = Mapping[str, Mapping[str, Any]]  # "local", "shared" -> arrays by name


def compile(graph: Graph, plan: Mapping[str, Placement], specs: Mapping[str, Spec]) -> "Mixed":
    """Compiles a step over lists of micro-batches; otherwise like `core.compile`.

    Raises:
        ValueError: calls have different placements, or one generates, runs on the host, offloads,
            has epochs, minibatches or microbatches of its own, or reselects its trained part.
    """
    full = check_plan(graph, plan)
    for c in graph.calls:
        if c.kind in ("generate", "local") or c.host:
            raise ValueError(f"{c.name} is a {c.kind} call; mixed rows are for infer and train.")
        if c.epochs * c.minibatches * full[c.name].microbatches > 1:
            raise ValueError(f"{c.name} has epochs or parts; mixed rows come in micro-batches.")
        if full[c.name].offload:
            raise ValueError(
                f"{c.name} offloads {full[c.name].offload!r}, which mixed rows cannot."
            )
        if c.kind == "train":
            check_trained(c, specs[c.of])
            if getattr(specs[c.of].tx, "due", None) is not None:
                raise ValueError(
                    f"{c.name} would choose anew what it trains by a gradient of rows of one kind."
                )
    if len({*full.values()}) > 1:
        raise ValueError(f"mixed rows need one placement for all calls, got {full}.")
    return Mixed(graph, full, specs, ())


class Mixed(Step):
    """A compiled graph. Call it as `models, {}, metrics = step(models, micro_batches, key)`."""

    _mixed = True

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.share = (0, 1)  # schedules cover whole batches
        self._place = next(iter(self.plan.values()))
        self._trained = [c for c in self.calls if c.kind == "train"]
        self._known: dict[tuple[int, int], dict[str, Any]] = {}  # shape -> call -> its inputs
        self._zeros: dict[str, Any] = {}

    # Compilation

    def check(self, batch: Sequence[MicroBatch]) -> "Mixed":
        """Walks the graph with shapes alone.

        Args:
            batch: one micro-batch of every possible shape; its leaves need only `shape` and
                `dtype`.
        """
        self._known, self._traced = {}, {}
        for micro in batch:
            shape, sides = shape_of(micro), {side: dict(there) for side, there in micro.items()}
            args = self._known[shape] = {}
            for c in self.calls:
                args[c.name] = {
                    side: self._placed(side, {k: there[k] for k in c.reads})
                    for side, there in sides.items()
                }
                for there in args[c.name].values():
                    glossary.check(c.name, there)
                if c.kind == "infer":
                    found = self._traced[_of(c, shape)] = self._traced_infer(c, shape)
                    sides = {side: sides[side] | found.out[side] for side in sides}
        everyone = tuple(range(jax.process_count()))
        self.operations = tuple(
            program_order.Operation("call", c.name, c.name, everyone) for c in self.calls
        )
        program_order.agree(self.operations)
        return self

    def build(self, batch: Sequence[MicroBatch]) -> "Mixed":
        """Compiles every call for all micro-batch shapes, and the updates."""
        if [*self._known] != [shape_of(micro) for micro in batch]:
            self.check(batch)
        with ThreadPoolExecutor(4) as pool:
            summed = {c.name: self._summed(c) for c in self._trained}
            started: dict[str, Any] = {}
            for shape in self._known:
                for c in self.calls:
                    self.traces[c.name] += 1
                    lowered = (
                        summed[c.name].sums(self._known[shape][c.name], shape[0])
                        if c.kind == "train"
                        else self._lower_infer(c, shape)
                    )
                    started[_of(c, shape)] = pool.submit(lowered.compile)
            for c in self._trained:
                started[c.name] = pool.submit(summed[c.name].update(read_one).compile)
                self._zeros[c.name] = summed[c.name].zero().compile()
            self._programs = {key: one.result() for key, one in started.items()}
        self.built = True
        program_order.meet("compiled")
        return self

    def _placed(self, side: str, shapes: Mapping[str, Any]) -> dict[str, Any]:
        of = mixed_rows if side == "local" else rows
        return {k: placed(v, of(self._place, v.shape)) for k, v in shapes.items()}

    def _traced_infer(self, c: Call, shape: tuple[int, int]) -> lowering.Traced:
        run = functools.partial(_infer, c, self._place.seq)
        params, args = self._layouts.borrowed(c), self._known[shape][c.name]
        return lowering.traced(self._layouts, c, run, params, args, shape[0])

    def _lower_infer(self, c: Call, shape: tuple[int, int]) -> lowering.Lowered:
        found = self._traced.pop(_of(c, shape), None) or self._traced_infer(c, shape)
        made = {side: self._placed(side, out) for side, out in found.out.items()}
        where = jax.tree.map(lambda x: x.sharding, made)
        return lowering.lowered(self._layouts, c, found, where)

    def _summed(self, c: Call) -> Summed:
        shape, args = next(iter(self._known.items()))
        run = functools.partial(loss, c, self._place.seq)
        return Summed(self._layouts, c, run, args[c.name], shape[0])

    # Running

    def __call__(
        self,
        models: Mapping[str, Model],
        batch: Sequence[MicroBatch],
        key: Any,
        *,
        reselect: tuple[str, ...] = (),
    ) -> tuple[dict[str, Model], dict[str, jax.Array], dict[str, jax.Array]]:
        """Runs the graph once.

        Args:
            models, key: see `Step`.
            batch: micro-batches of compiled shapes; every process passes all of them in full.

        Raises:
            ValueError: a micro-batch has another shape.
        """
        del reselect  # `compile` rejects models that reselect
        timing, models, metrics = self.timeline.begin(), dict(models), {}
        there = global_arrays.from_whole(self._layouts.whole(self.calls[0]), key_words(key))
        sums = {c.name: self._zeros[c.name]() for c in self._trained}
        for number, micro in enumerate(batch):
            shape = shape_of(micro)
            if shape not in self._known:
                raise ValueError(
                    f"a micro-batch has {shape} tokens a row, own and shared, but these are "
                    f"compiled: {sorted(self._known)}."
                )
            data = self.put(micro)
            for c in self.calls:
                dispatched = timing.now()
                args = {side: {k: x[k] for k in c.reads} for side, x in data.items()}
                if c.kind == "train":
                    given = models[c.of]._replace(past=()), args
                    sums[c.name] = self._programs[_of(c, shape)](sums[c.name], given, there)
                    continue
                out = self._programs[_of(c, shape)](models[c.of].params, args, there)
                data = {side: x | out[side] for side, x in data.items()}
                token, name = jax.tree.leaves(out)[0], f"{c.name} {number}"
                timing.add(name, self._place.devices, c.reads, c.writes, dispatched, token)
        for c in self._trained:
            dispatched = timing.now()
            bare = models.pop(c.of)._replace(past=())
            models[c.of], seen = self._programs[c.name](bare, sums.pop(c.name), there)
            metrics |= {f"{c.name}/{k}": v for k, v in seen.items()}
            token = next(iter(seen.values()))
            timing.add(c.name, self._place.devices, c.reads, (), dispatched, token)
        return models, {}, metrics

    def put(self, batch: MicroBatch) -> dict[str, dict[str, jax.Array]]:
        """Turns a micro-batch into global arrays."""
        inputs = self.graph.inputs.split()
        there = {side: self._placed(side, {k: x[k] for k in inputs}) for side, x in batch.items()}
        return {
            side: {
                k: global_arrays.from_whole(v.sharding, np.asarray(batch[side][k]))
                for k, v in x.items()
            }
            for side, x in there.items()
        }


def _of(c: Call, shape: tuple[int, int]) -> str:
    """Returns the name of a call's program for a micro-batch shape."""
    return f"{c.name} {shape[0]}+{shape[1]}"


def shape_of(micro: MicroBatch) -> tuple[int, int]:
    """Returns (Tl, Td): tokens of a device's own row and of its stripe of the shared row."""
    local, shared = (next(iter(micro[side].values())) for side in ("local", "shared"))
    ways = local.shape[0] // shared.shape[0]
    return local.shape[1], shared.shape[1] // ways


def together(args: MicroBatch, parts: int, names: Sequence[str]) -> dict[str, jax.Array]:
    """Joins both kinds of rows for the forward pass, `[G P, Tl + Td]`."""
    both = {k: sequence.joined(args["local"][k], args["shared"][k], parts) for k in names}
    return {k: nn.with_logical_constraint(v, ("batch", "length")) for k, v in both.items()}


def apart(found: Any, local: int, parts: int) -> dict[str, Any]:
    """Splits per-token numbers, a tree of `[G P, Tl + Td]`, into the two kinds of rows.

    Args:
        local: Tl.
        parts: P.
    """
    leaves, structure = jax.tree.flatten(found)
    halves = [sequence.divided(x, local, parts) for x in leaves]
    return {
        side: structure.unflatten([h[i] for h in halves])
        for i, side in enumerate(("local", "shared"))
    }


def _infer(c: Call, parts: int, params: Any, args: MicroBatch, words: jax.Array) -> Any:
    both = together(args, parts, c.reads)
    out, _ = programs.outputs_and_metrics(c, params, both, words)
    return apart(out, args["local"]["tokens"].shape[1], parts)


def check_trained(c: Call, spec: Spec) -> None:
    """Checks that a train call can run over micro-batches of a schedule.

    Raises:
        ValueError: it has no forward pass, or its model's `Spec` sets `sends`.
    """
    if c.forward is None:
        raise ValueError(
            f"the train call {c.name} has no `forward`, which scheduled rows need: one "
            "forward pass serves rows of both kinds."
        )
    if spec.sends is not None:
        raise ValueError(
            f"{c.name} sends {spec.sends.rung.name!r} between nodes, which scheduled rows cannot."
        )


def loss(
    c: Call, parts: int, params: Any, args: MicroBatch, key: jax.Array, *, prefix: str = ""
) -> Any:
    """Computes a train call's loss of both kinds of rows, after one forward pass.

    Args:
        parts: P.
        prefix: prefix of the names of the arrays it reads.
    """
    names = [prefix + k for k in TOKENS]
    both = together(args, parts, names)
    numbers = c.forward(params, *(both[k] for k in names))
    found = apart(numbers, args["local"][names[0]].shape[1], parts)
    done = [
        c.loss(found[side], there, key) for side, there in args.items() if there[names[0]].shape[1]
    ]
    total, weight, seen = done[0]
    for more, heavier, saw in done[1:]:
        total, weight = total + more, weight + heavier
        seen = {k: meters.add(seen[k], saw[k]) for k in seen}
    return total, weight, seen

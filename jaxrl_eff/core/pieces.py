"""Components of packed calls: schedules of sampled rows, and programs for their micro-batches.

See `packed`. A program takes the whole padded arrays `[B, T]`, and maps that give, for every token
of the micro-batch, its index in them (`balanced_loader.maps`).
"""

import functools
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_eff.core import lowering, mixed, programs
from jaxrl_eff.core.graph import Call
from jaxrl_eff.core.shardings import Shardings, placed
from jaxrl_eff.core.summed import Summed, read_one
from jaxrl_eff.data.balance import balanced_loader, skrull
from jaxrl_eff.data.balance.assignment import Assignment, Shape, quality
from jaxrl_eff.data.balance.cost import Cost
from jaxrl_eff.parallel import Placement, global_arrays, rows
from jaxrl_eff.parallel.sharding import mixed_rows, replicated

SIDES = ("local", "shared")
_TRIED = Shape(8, 8)  # shape for tracing the outputs


class Packing(NamedTuple):
    """Arguments of `skrull.plan` for the schedules on a mesh."""

    shapes: tuple[Shape, ...]
    room: int
    cost: Cost


class Schedules:
    """Schedules of one step, shared by all calls on the same rows and mesh.

    Args:
        packings: by mesh, see `Placement.bare`.

    Attributes:
        given: (call, schedule) for every request.
    """

    def __init__(self, packings: Mapping[Placement, Packing]):
        self.packings = dict(packings)
        self.begin()

    def begin(self) -> None:
        """Discards the last step's schedules."""
        self.given: list[tuple[str, Assignment]] = []
        self._lengths: dict[str, np.ndarray] = {}
        self._plans: dict[Any, Assignment] = {}
        self._made: dict[Any, list[tuple[Shape, Any]]] = {}
        self._seconds = 0.0

    def learn(self, rows: str, lengths: jax.Array) -> None:
        """Fetches the number of tokens of each row, int32 [B]."""
        self._lengths[rows] = global_arrays.fetch_replicated(lengths)

    def __call__(
        self,
        call: str,
        place: Placement,
        rows: str,
        width: int,
        picked: np.ndarray | None = None,
    ) -> list[tuple[Shape, Any]]:
        """Returns shapes and maps of the micro-batches; the maps are on the devices.

        Args:
            call: name of the requesting call.
            place: its mesh, see `Placement.bare`.
            rows: name prefix of the rows it reads, whose lengths were fetched by `learn`.
            width: T of the padded rows.
            picked: indices of the rows to schedule; None: all.
        """
        began = time.perf_counter()
        lengths = self._lengths[rows]
        picked = np.arange(len(lengths)) if picked is None else picked
        picked = picked[lengths[picked] > 0]
        if not len(picked):
            return []
        # Meshes of the same shape can share a schedule; its maps go to the devices of each.
        name = rows, picked.tobytes()
        form = place.row_shards, place.seq, self.packings[place]
        if (name, form) not in self._plans:
            self._plans[name, form] = self.plan(lengths[picked], place)
        schedule = self._plans[name, form]
        if (name, place) not in self._made:
            self._made[name, place] = _on_devices(schedule, place, picked, width)
        self.given.append((call, schedule))
        self._seconds += time.perf_counter() - began
        return self._made[name, place]

    def plan(self, lengths: np.ndarray, place: Placement) -> Assignment:
        """Returns the schedule of sequences of these lengths on a mesh."""
        shapes, room, cost = self.packings[place]
        return skrull.plan(
            lengths,
            groups=place.row_shards,
            parts=place.seq,
            capacity=room,
            cost=cost,
            shapes=shapes,
        )

    def numbers(self, trained: set[str]) -> dict[str, np.float32]:
        """Returns statistics of the step's schedules, see `Packed`, and discards the schedules.

        Args:
            trained: names of the train calls.
        """
        found = [s for _, s in self.given]
        each = {id(s): quality(s) for s in found}
        columns = sum(s.groups * s.parts * shape.columns for s in found for shape in s.shapes)
        tokens = sum(int(s.lengths.sum()) for s in found)
        over = sum(int(s.lengths[s.rank < 0].sum()) for s in found if s.parts > 1)
        seconds = sum(s.seconds for s in found)
        level = sum(s.seconds * each[id(s)].time_balance for s in found)
        out = {
            "padding": 1 - tokens / max(columns, 1),
            "distributed": over / max(tokens, 1),
            "balance": level / max(seconds, 1e-12),
            "micro_steps": sum(len(s.shapes) for s in found),
            "planned_seconds": sum(s.seconds for call, s in self.given if call in trained),
            "planning_seconds": self._seconds,
        }
        self.begin()
        return {k: np.float32(v) for k, v in out.items()}


def _on_devices(
    schedule: Assignment, place: Placement, picked: np.ndarray, width: int
) -> list[tuple[Shape, Any]]:
    """Returns shapes of micro-batches, and their maps on the devices of a mesh."""
    out = []
    for shape, maps in zip(
        schedule.shapes, balanced_loader.maps(schedule, picked, width=width), strict=True
    ):
        like = maps_of(place, shape)
        there = jax.tree.map(lambda x, y: global_arrays.from_whole(x.sharding, y), like, maps)
        out.append((Shape(*shape), there))
    return out


class Lowered(NamedTuple):
    """The programs of a packed call, to be compiled together."""

    call: "PackedCall"
    pieces: dict[str, lowering.Lowered]

    def compile(self) -> "PackedCall":
        with ThreadPoolExecutor(4) as pool:
            started = {k: pool.submit(one.compile) for k, one in self.pieces.items()}
            self.call.programs = {k: one.result() for k, one in started.items()}
        return self.call


class PackedCall:
    """A compiled packed call: `(parameters, arrays, key) -> (arrays, {})`; for a train call
    `(model, arrays, key) -> (model, metrics)`.

    Args:
        place: its mesh, see `Placement.bare`.
        prefix: prefix of the names of the arrays it reads.
    """

    def __init__(self, schedules: Schedules | None, c: Call, place: Placement, prefix: str):
        self._schedules, self._call, self._place, self._prefix = schedules, c, place, prefix
        self.programs: dict[str, Any] = {}
        self._rows: jax.Array | None = None

    def analysis(self) -> dict[str, dict[str, float]]:
        return {k: lowering.analysis(p) for k, p in self.programs.items()}

    def begin(self, key: jax.Array) -> None:
        """Starts a step: dispatches the computation of the rows of each update."""
        if "rows" in self.programs:
            self._rows = self.programs["rows"](key)

    def __call__(self, model: Any, args: Mapping[str, Any], key: jax.Array) -> tuple[Any, Any]:
        return (self._infer if self._call.kind == "infer" else self._train)(model, args, key)

    def _micro(self, args: Mapping[str, Any], picked: np.ndarray | None = None) -> Any:
        width = args[f"{self._prefix}segment"].shape[1]
        return self._schedules(self._call.name, self._place, self._prefix, width, picked)

    def _learn(self, args: Mapping[str, Any]) -> None:
        """Fetches row lengths from the devices, unless an earlier call did, see `Packed`."""
        if "lengths" in self.programs:
            found = self.programs["lengths"](args[f"{self._prefix}segment"])
            self._schedules.learn(self._prefix, found)

    def _infer(self, params: Any, args: Mapping[str, Any], key: jax.Array) -> tuple[Any, Any]:
        self._learn(args)
        found = self.programs["zero"]()
        for shape, maps in self._micro(args):
            found = self.programs[named(shape)](found, (params, args, maps), key)
        return self.programs["finish"](found, args, key) if "finish" in self.programs else found, {}

    def _train(self, model: Any, args: Mapping[str, Any], key: jax.Array) -> tuple[Any, Any]:
        self._learn(args)
        seen = []
        picks = [None] if self._rows is None else global_arrays.fetch_replicated(self._rows)
        for picked in picks:
            sums = self.programs["zero"]()
            for shape, maps in self._micro(args, picked):
                sums = self.programs[named(shape)](sums, (model, (args, maps)), key)
            model, one = self.programs["update"](model, sums, key)
            seen.append(one)
        return model, self.programs["read"](seen) if "read" in self.programs else seen[0]


def named(shape: Shape) -> str:
    """Returns the name of a call's program for a micro-batch shape."""
    return f"{shape.local}+{shape.distributed}"


# Programs


def maps_of(place: Placement, shape: Shape) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Returns shapes and shardings of `balanced_loader.maps` of one micro-batch."""
    sizes = {
        "local": (place.row_shards * place.seq, shape.local),
        "shared": (place.row_shards, shape.distributed * place.seq),
    }
    ways = {"local": mixed_rows, "shared": rows}
    like = {side: jax.ShapeDtypeStruct(size, jnp.int32) for side, size in sizes.items()}
    return {
        side: dict.fromkeys(("source", "segment"), placed(x, ways[side](place, x.shape)))
        for side, x in like.items()
    }


def gathered(place: Placement, prefix: str, args: Mapping[str, Any], maps: Any) -> dict[str, dict]:
    """Gathers both kinds of rows from padded ones; per-row numbers are repeated for each token."""
    whole, width = replicated(place), args[f"{prefix}segment"].shape[1]
    flat = {k: jax.lax.with_sharding_constraint(x.reshape(-1), whole) for k, x in args.items()}
    out = {}
    for side, like in maps_of(place, _shape_of(place, maps)).items():
        source, where = maps[side]["source"], like["source"].sharding

        def taken(k: str, source: jax.Array = source, where: Any = where) -> jax.Array:
            at = source if args[k].ndim == 2 else source // width
            found = flat[k].at[at].get(mode="fill", fill_value=0)
            return jax.lax.with_sharding_constraint(found, where)

        out[side] = {k: taken(k) for k in args} | {f"{prefix}segment": maps[side]["segment"]}
    return out


def scattered(place: Placement, carry: Mapping[str, Any], found: Any, maps: Any) -> dict[str, Any]:
    """Scatters per-token numbers of both kinds of rows back to the padded arrays."""
    at = [maps[side]["source"].reshape(-1) for side in SIDES]

    def put(k: str, x: jax.Array) -> jax.Array:
        flat = x.reshape(-1)
        for side, source in zip(SIDES, at, strict=True):
            flat = flat.at[source].set(found[side][k].reshape(-1), mode="drop")
        return flat.reshape(x.shape)

    return {k: put(k, x) for k, x in carry.items()}


def _shape_of(place: Placement, maps: Any) -> Shape:
    local, shared = (maps[side]["source"].shape[1] for side in SIDES)
    return Shape(local, shared // place.seq)


def of_train(
    layouts: Shardings, c: Call, prefix: str, args: Mapping[str, Any], shapes: Sequence[Shape]
) -> dict[str, lowering.Lowered]:
    """Lowers the programs of a train call: one per micro-batch shape, and auxiliary ones.

    Args:
        layouts: with `mixed=True`.
        prefix: prefix of the names of the arrays it reads.
        args: these arrays, with shardings.
    """
    place = layouts.plan[c.name]
    each = {shape: (args, maps_of(place, shape)) for shape in shapes}
    run = functools.partial(_loss, place, c, prefix)
    summed = Summed(layouts, c, run, each[shapes[0]], shapes[0].local)
    once = c.epochs * c.minibatches == 1
    update = summed.update(read_one if once else lambda seen: seen)
    out = {named(shape): summed.sums(each[shape], shape.local) for shape in shapes}
    out |= {"zero": summed.zero(), "update": update}
    if not once:
        count = args[f"{prefix}tokens"].shape[0]
        out |= {"rows": _shuffled(layouts, c, count)}
        out |= {"read": _read(layouts, c, update.lowered.out_info[1])}
    return out


def _loss(place: Placement, c: Call, prefix: str, params: Any, args: tuple, key: jax.Array) -> Any:
    padded, maps = args
    there = gathered(place, prefix, padded, maps)
    return mixed.loss(c, place.seq, params, there, key, prefix=prefix)


class Infer:
    """Programs of an infer call.

    Attributes:
        out: shapes and dtypes of the arrays it writes.
        rowwise: True if it writes one number per row.

    Args:
        layouts: with `mixed=True`.
        prefix: prefix of the names of the arrays it reads.
        args: these arrays, with shardings.

    Raises:
        ValueError: `fn` returns anything but one number per token, or metrics.
    """

    def __init__(self, layouts: Shardings, c: Call, prefix: str, args: Mapping[str, Any]):
        self._layouts, self._call, self._prefix, self._args = layouts, c, prefix, dict(args)
        self._place = layouts.plan[c.name]
        self._params = layouts.borrowed(c)
        self._in_host = layouts.specs[c.of].axes if self._place.offload == "params" else None
        self.rowwise = c.finish is not None
        with layouts.context(c, _TRIED.local):
            maps = maps_of(self._place, _TRIED)
            key = jax.ShapeDtypeStruct((2,), jnp.uint32)
            there = jax.eval_shape(self._of, self._params, self._args, maps, key)
        size = self._args[f"{prefix}tokens"].shape
        ranks = self._place.row_shards * self._place.seq
        for k, x in there.items():
            if x.shape != (ranks, _TRIED.columns):
                hint = "" if self.rowwise else "; one that writes a number a row needs `finish`"
                raise ValueError(
                    f"{c.name} makes '{k}' of shape {x.shape} from packed rows, where a number a "
                    f"token is {(ranks, _TRIED.columns)}{hint}."
                )
        like = {k: jax.ShapeDtypeStruct(size, x.dtype) for k, x in there.items()}
        self._carry = layouts.rows(c, like)
        self.out = like
        if self.rowwise:
            self.out = jax.eval_shape(self._finished, like, self._args, key)

    def _of(self, params: Any, args: Any, maps: Any, words: jax.Array) -> dict[str, jax.Array]:
        if self._in_host is not None:
            params = programs.fetched(params, self._in_host)
        there = gathered(self._place, self._prefix, args, maps)
        both = mixed.together(there, self._place.seq, self._call.reads)
        out = dict(self._call.fn(params, both, programs.key_of(self._call.name, words)))
        if "metrics" in out:
            raise ValueError(f"{self._call.name} has metrics, which packed rows do not add up.")
        return out

    def _finished(self, found: Any, args: Any, words: jax.Array) -> dict[str, jax.Array]:
        key = programs.key_of(self._call.name, words)
        return dict(self._call.finish({**args, **found}, key))

    def pieces(
        self, shapes: Sequence[Shape], made: Mapping[str, Any]
    ) -> dict[str, lowering.Lowered]:
        """Lowers its programs: one per micro-batch shape, and auxiliary ones.

        Args:
            made: arrays that it writes, with shardings.
        """
        out = {named(shape): self._of_shape(shape) for shape in shapes} | {"zero": self._zero()}
        return out | ({"finish": self._finish(made)} if self.rowwise else {})

    def _of_shape(self, shape: Shape) -> lowering.Lowered:
        """Lowers `(carry, (parameters, arrays, maps), key) -> carry`."""

        def run(carry: Any, given: Any, words: jax.Array) -> Any:
            params, args, maps = given
            out = self._of(params, args, maps, words)
            found = mixed.apart(out, shape.local, self._place.seq)
            return scattered(self._place, carry, found, maps)

        given = self._params, self._args, maps_of(self._place, shape)
        found = lowering.traced(self._layouts, self._call, run, self._carry, given, shape.local)
        where = {k: x.sharding for k, x in self._carry.items()}
        return lowering.lowered(self._layouts, self._call, found, where, donate=(0,))

    def _zero(self) -> lowering.Lowered:
        """Lowers `() -> carry`."""
        where = {k: x.sharding for k, x in self._carry.items()}

        def run() -> dict[str, jax.Array]:
            return {k: jnp.zeros(x.shape, x.dtype) for k, x in self._carry.items()}

        with self._layouts.context(self._call):
            return lowering.Lowered(jax.jit(run, out_shardings=where).lower())

    def _finish(self, made: Mapping[str, Any]) -> lowering.Lowered:
        """Lowers `(carry, arrays, key) -> outputs`, one number per row."""
        run = self._finished
        found = lowering.traced(self._layouts, self._call, run, self._carry, self._args)
        where = {k: v.sharding for k, v in made.items()}
        return lowering.lowered(self._layouts, self._call, found, where)


def lengths_of(layouts: Shardings, c: Call, segment: Any) -> lowering.Lowered:
    """Lowers `segment -> tokens of each row`, replicated."""

    def run(segment: jax.Array) -> jax.Array:
        return (segment > 0).sum(axis=1, dtype=jnp.int32)

    with layouts.context(c):
        return lowering.Lowered(jax.jit(run, out_shardings=layouts.whole(c)).lower(segment))


def _shuffled(layouts: Shardings, c: Call, count: int) -> lowering.Lowered:
    """Lowers `key -> rows of every update`."""

    def run(words: jax.Array) -> jax.Array:
        return programs.shuffled(c, programs.key_of(c.name, words), count)

    whole = layouts.whole(c)
    words = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=whole)
    with layouts.context(c):
        return lowering.Lowered(jax.jit(run, out_shardings=whole).lower(words))


def _read(layouts: Shardings, c: Call, seen: Any) -> lowering.Lowered:
    """Lowers `[meters of every update] -> metrics`."""

    def run(each: list) -> dict[str, jax.Array]:
        return programs.read(jax.tree.map(lambda *x: jnp.stack(x), *each))

    whole = layouts.whole(c)
    like = jax.tree.map(lambda x: placed(x, whole), seen)
    with layouts.context(c):
        jitted = jax.jit(run, out_shardings=whole)
        return lowering.Lowered(jitted.lower([like] * (c.epochs * c.minibatches)))

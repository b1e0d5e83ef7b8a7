"""A step that computes sampled sequences packed, in micro-batches chosen when their lengths are known.

Sampling writes padded rows `[B, T]`. Calls that read rows of tokens to infer or to train need not
compute the padding: between the arrays that they read and write as ever, such a call here is a loop
over the micro-batches of a schedule (`mixed`: short sequences whole on a device, long ones over the
`seq` axis). Its programs take the padded arrays and, for every token of the micro-batch, the place
in them that it comes from; numbers a token go back to the same places, and gradients are summed. An
update is one schedule: epochs and minibatches draw the rows that they would draw unscheduled.

The host learns lengths, one integer a sequence, and the rows of minibatches; nothing else leaves
the devices. Schedules follow from the lengths alone, not from measured times: another order of sums
is another rounding, and sampling would turn it into other tokens, so that no run could be repeated.

Left out: several processes, calls with several placements, microbatches, choosing anew what is
trained.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_eff import arrays, dataflow, lowering, mixed, programs, tree
from jaxrl_eff.data import scheduled, skrull
from jaxrl_eff.data.schedules import Schedule, Shape, quality
from jaxrl_eff.data.skrull_cost import Cost
from jaxrl_eff.edges import Rowwise
from jaxrl_eff.graph import Call, Graph, Model, Plan, Spec
from jaxrl_eff.layouts import Layouts, placed
from jaxrl_eff.parallel import Changes, Placement, rows
from jaxrl_eff.parallel.sharding import mixed_rows, replicated
from jaxrl_eff.summed import Summed, read_one

SIDES = ("local", "shared")
MOST = 2**30  # tokens of an array, padding included: their places are int32
_TRIED = Shape(8, 8)  # with which outputs are looked at


class Packing(NamedTuple):
    """What schedules are made for: `skrull.plan`'s arguments."""

    shapes: tuple[Shape, ...]
    room: int
    cost: Cost


def compile(
    graph: Graph,
    plan: Plan,
    specs: Mapping[str, Spec],
    *,
    keep: str = "",
    sync: Changes | None = None,
) -> "Packed":
    """As `dataflow.compile`; say by `scheduled` what schedules are made for, then `build`.

    Raises:
        ValueError: there are several processes; or the calls that read rows of tokens lie on
            several placements, are split into microbatches, offload something, choose anew what
            they train or are of a form that cannot be packed.
    """
    plain = dataflow.compile(graph, plan, specs, keep=keep, sync=sync)
    if jax.process_count() > 1:
        raise ValueError(
            f"sampled rows are packed in one process, and there are {jax.process_count()}."
        )
    calls = [c for c in plain.calls if prefix_of(c) is not None]
    if not calls:
        raise ValueError(
            f"none of {[c.name for c in plain.calls]} infers or trains on tokens, segment and "
            "position, so there is nothing to be packed."
        )
    places = {c.name: plain.plan[c.name] for c in calls}
    if len({(p.devices, tuple(p.axes.items())) for p in places.values()}) > 1:
        raise ValueError(f"packed rows need one placement for these calls, got {places}.")
    for c in calls:
        if places[c.name].microbatches > 1 or places[c.name].offload:
            raise ValueError(
                f"{c.name} is {places[c.name]}; packed rows come in micro-batches of a schedule, "
                "without offloading."
            )
        if c.kind == "train":
            mixed.forward_of(c)
            if getattr(specs[c.of].tx, "due", None) is not None:
                raise ValueError(
                    f"{c.name} would choose anew what it trains by a gradient of padded rows."
                )
    return Packed(graph, plain.plan, specs, plain.keep, sync)


def prefix_of(c: Call) -> str | None:
    """Of a call that reads rows of tokens to infer or to train: what its names begin with."""
    if c.kind in ("infer", "train"):
        for name in c.reads:
            prefix = name.removesuffix("tokens")
            if prefix != name and {prefix + k for k in mixed.TOKENS} <= {*c.reads}:
                return prefix
    return None


class Packed(dataflow.Step):
    """A compiled graph, called as `Step` is; the metrics have also `schedule/name`.

    - `padding`: share of columns without a token, of all micro-batches.
    - `distributed`: share of tokens in distributed sequences.
    - `balance`: mean over max of the devices' estimated seconds.
    - `micro_steps`: programs that ran, of all packed calls.
    - `planned_seconds`: estimated for the train calls.
    - `planning_seconds`: that the host took to make schedules and maps.

    Attributes:
        place: of the packed calls.
        packing: as given to `scheduled`.
    """

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._prefix = {c.name: p for c in self.calls if (p := prefix_of(c)) is not None}
        self.place: Placement = self.plan[next(iter(self._prefix))]
        self._over = Layouts(self.graph, self.plan, self.specs, mixed=True)
        self._infers: dict[str, _Infer] = {}
        self.packing: Packing | None = None
        self._schedules: Schedules | None = None

    @property
    def packed(self) -> tuple[Call, ...]:
        """The calls that run packed, in order."""
        return tuple(c for c in self.calls if c.name in self._prefix)

    def scheduled(self, packing: Packing) -> "Packed":
        """Sets what schedules are made for.

        Raises:
            ValueError: the longest row does not fit, or there is no shape in which it does.
        """
        longest = max(length for _, length in self.sizes().values())
        if packing.room * self.place.seq < longest:
            raise ValueError(
                f"rows have {longest} tokens, but {self.place.seq} devices of a seq axis with room "
                f"for {packing.room} tokens each hold {packing.room * self.place.seq}."
            )
        self.packing, self._schedules = packing, Schedules(packing, self.place)
        self._schedules.plan(np.array([longest]))
        return self

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Of every packed call, once checked: sequences of an update or pass, tokens of a row."""
        out = {}
        for c in self.packed:
            count, length = self._args[c.name][self._prefix[c.name] + "tokens"].shape
            out[c.name] = count // c.minibatches, length
        return out

    def told(self) -> dict[str, Any]:
        """What schedules are made for, as `Scheduled.told`; lengths are not known ahead."""
        return {
            "groups": self.place.row_shards,
            "parts": self.place.seq,
            "room": self.packing.room,
            "shapes": [list(shape) for shape in self.packing.shapes],
            "lengths": [],
        }

    # Compilation

    def _check_rows(self, c: Call, shapes: Mapping[str, Any]) -> None:
        if c.name not in self._prefix:
            return super()._check_rows(c, shapes)
        size = shapes[self._prefix[c.name] + "tokens"].shape
        for k in c.reads:
            if shapes[k].shape not in (size, size[:1]):
                raise ValueError(
                    f"{c.name} reads '{k}' of shape {shapes[k].shape}; packed rows need a number a "
                    f"token, {size}, or a row, {size[:1]}."
                )
        if size[0] % c.minibatches:
            raise ValueError(
                f"{c.name} reads {size[0]} rows, which do not divide by {c.minibatches} "
                "(minibatches)."
            )
        if size[0] * size[1] >= MOST:
            raise ValueError(f"{c.name} reads {size} tokens, but at most {MOST} can be packed.")

    def _outputs(self, c: Call, args: dict[str, Any]) -> dict[str, Any]:
        if c.name not in self._prefix or c.kind == "train":
            return super()._outputs(c, args)
        found = _Infer(self._over, c, self._prefix[c.name], args)
        self._infers[c.name] = found
        return found.out

    def _lower(self, c: Call) -> Any:
        if c.name not in self._prefix:
            return super()._lower(c)
        if self._schedules is None:
            raise ValueError("say what schedules are made for, by scheduled(..), before build.")
        self._traced.pop(c.name, None)
        call = _Packed(self._schedules, c, self._prefix[c.name])
        return _Lowered(call, self._pieces(c, self.packing.shapes))

    def _pieces(self, c: Call, shapes: Sequence[Shape]) -> dict[Any, lowering.Lowered]:
        """The programs of a packed call: by shape what it does with a micro-batch, and others."""
        self.traces[c.name] += len(shapes)
        prefix, args = self._prefix[c.name], self._args[c.name]
        out = {"lengths": _lengths(self._over, c, args[f"{prefix}segment"])}
        if c.kind == "infer":
            call = self._infers[c.name]
            out |= {shape: call.numbers(shape) for shape in shapes} | {"zero": call.zero()}
            return out | ({"finish": call.finish(self._made[c.name])} if call.rowwise else {})
        run = functools.partial(_loss, self.place, c, prefix)
        each = {shape: (args, maps_of(self.place, shape)) for shape in shapes}
        summed = Summed(self._over, c, run, each[shapes[0]], shapes[0].local)
        out |= {shape: summed.sums(each[shape], shape.local) for shape in shapes}
        once = c.epochs * c.minibatches == 1
        update = summed.update(read_one if once else lambda seen: seen)
        out |= {"zero": summed.zero(), "update": update}
        if not once:
            count = args[f"{prefix}tokens"].shape[0]
            read = _read(self._over, c, update.lowered.out_info[1])
            out |= {"rows": _shuffled(self._over, c, count), "read": read}
        return out

    def needs(self, shapes: Sequence[Shape]) -> float:
        """Bytes that a device needs for the packed call that needs most, with these shapes."""
        most = 0.0
        for c in self.packed:
            found = _Lowered(_Packed(None, c, ""), self._pieces(c, shapes)).compile()
            beside = [self.home(m) if m != c.of else () for m in self.graph.models]
            beside += [self.home(c.of).opt] if c.kind == "infer" else []
            share = tree.nbytes(beside) / (self.place.fsdp * self.place.tensor)
            most = max(most, share + max(v["bytes"] for v in found.analysis().values()))
        return most

    def analysis(self) -> dict[str, dict[str, float]]:
        """As of `Step`; of a packed call every program by itself."""
        out = {}
        for name, program in self._programs.items():
            if name in self._prefix:
                out |= {f"{name} {k}": v for k, v in program.analysis().items()}
            else:
                out[name] = lowering.analysis(program)
        return out

    # Running

    def __call__(
        self,
        models: Mapping[str, Model],
        batch: Mapping[str, np.ndarray],
        key: Any,
        *,
        reselect: tuple[str, ...] = (),
    ) -> tuple[dict[str, Model], dict[str, jax.Array], dict[str, jax.Array]]:
        """As of `Step`."""
        models, data, metrics = super().__call__(models, batch, key, reselect=reselect)
        found = self._schedules.numbers({c.name for c in self.packed if c.kind == "train"})
        return models, data, metrics | {f"schedule/{k}": v for k, v in found.items()}


class Schedules:
    """The schedules of one step under way: of the same rows, one for all calls that read them.

    Attributes:
        given: (call, schedule) for every time that one was asked for.
    """

    def __init__(self, packing: Packing, place: Placement):
        self._packing, self._place = packing, place
        self.given: list[tuple[str, Schedule]] = []
        self._known: dict[str, _Sampled] = {}
        self._seconds = 0.0

    def __call__(
        self,
        call: str,
        prefix: str,
        lengths: Callable[[jax.Array], jax.Array],
        segment: jax.Array,
        picked: np.ndarray | None = None,
    ) -> list[tuple[Shape, Any]]:
        """Shapes and maps of the micro-batches; the maps are on the devices.

        Args:
            call: that asks.
            prefix: of its rows' names.
            lengths: segment -> tokens of each row, int32 [B].
            segment: int32 [B, T].
            picked: the rows that count; None: all.
        """
        here = self._known.get(prefix)
        if here is None or here.segment is not segment:
            found = np.asarray(jax.device_get(lengths(segment)))
            here = self._known[prefix] = _Sampled(segment, found, {})
        began = time.perf_counter()
        picked = np.arange(len(here.lengths)) if picked is None else picked
        picked = picked[here.lengths[picked] > 0]
        name = picked.tobytes()
        if name not in here.made:
            here.made[name] = self._made(here.lengths[picked], picked, segment.shape[1])
        schedule, micro = here.made[name]
        if schedule is not None:
            self.given.append((call, schedule))
        self._seconds += time.perf_counter() - began
        return micro

    def _made(self, lengths: np.ndarray, picked: np.ndarray, width: int) -> Any:
        if not len(lengths):
            return None, []
        place, schedule, micro = self._place, self.plan(lengths), []
        for shape, maps in zip(
            schedule.shapes, scheduled.maps(schedule, picked, width=width), strict=True
        ):
            like = maps_of(place, shape)
            there = jax.tree.map(lambda x, y: arrays.from_whole(x.sharding, y), like, maps)
            micro.append((Shape(*shape), there))
        return schedule, micro

    def plan(self, lengths: np.ndarray) -> Schedule:
        """The schedule of sequences of these lengths."""
        place, (shapes, room, cost) = self._place, self._packing
        return skrull.plan(
            lengths, groups=place.row_shards, parts=place.seq, room=room, cost=cost, shapes=shapes
        )

    def numbers(self, trained: set[str]) -> dict[str, np.float32]:
        """The step's schedules in numbers, see `Packed`; forgets them.

        Args:
            trained: the train calls.
        """
        each = {id(s): quality(s) for _, s in self.given}
        tokens = sum(int(s.lengths.sum()) for _, s in self.given)
        ranks = self._place.row_shards * self._place.seq
        columns = ranks * sum(shape.columns for _, s in self.given for shape in s.shapes)
        seconds = sum(s.seconds for _, s in self.given)
        out = {
            "padding": 1 - tokens / max(columns, 1),
            "distributed": sum(
                float(s.lengths[s.rank < 0].sum()) for _, s in self.given
            ) / max(tokens, 1),
            "balance": sum(s.seconds * each[id(s)].time_balance for _, s in self.given)
            / max(seconds, 1e-12),
            "micro_steps": sum(len(s.shapes) for _, s in self.given),
            "planned_seconds": sum(s.seconds for call, s in self.given if call in trained),
            "planning_seconds": self._seconds,
        }  # fmt: skip
        self.given, self._known, self._seconds = [], {}, 0.0
        return {k: np.float32(v) for k, v in out.items()}


class _Sampled(NamedTuple):
    """Rows of a step: their lengths, and what was made for those that were picked."""

    segment: jax.Array
    lengths: np.ndarray
    made: dict[bytes, tuple[Schedule | None, list]]


class _Lowered(NamedTuple):
    """The programs of a packed call, to be compiled together."""

    call: "_Packed"
    pieces: dict[Any, lowering.Lowered]

    def compile(self) -> "_Packed":
        with ThreadPoolExecutor(4) as pool:
            started = {k: pool.submit(one.compile) for k, one in self.pieces.items()}
            self.call.programs = {k: one.result() for k, one in started.items()}
        return self.call


class _Packed:
    """A compiled packed call: `(parameters, arrays, key) -> (arrays, {})`, or of a train call
    `(model, arrays, key) -> (model, metrics)`.
    """

    def __init__(self, schedules: Schedules | None, c: Call, prefix: str):
        self._schedules, self._call, self._prefix = schedules, c, prefix
        self.programs: dict[Any, Any] = {}

    def analysis(self) -> dict[str, dict[str, float]]:
        return {_shown(k): lowering.analysis(p) for k, p in self.programs.items()}

    def __call__(self, model: Any, args: Mapping[str, Any], key: jax.Array) -> tuple[Any, Any]:
        return (self._infer if self._call.kind == "infer" else self._train)(model, args, key)

    def _micro(self, args: Mapping[str, Any], picked: np.ndarray | None = None) -> Any:
        segment = args[f"{self._prefix}segment"]
        lengths = self.programs["lengths"]
        return self._schedules(self._call.name, self._prefix, lengths, segment, picked)

    def _infer(self, params: Any, args: Mapping[str, Any], key: jax.Array) -> tuple[Any, Any]:
        found = self.programs["zero"]()
        for shape, maps in self._micro(args):
            found = self.programs[shape](found, (params, args, maps), key)
        return self.programs["finish"](found, args, key) if "finish" in self.programs else found, {}

    def _train(self, model: Any, args: Mapping[str, Any], key: jax.Array) -> tuple[Any, Any]:
        picks, seen = [None], []
        if "rows" in self.programs:
            picks = np.asarray(jax.device_get(self.programs["rows"](key)))
        for picked in picks:
            sums = self.programs["zero"]()
            for shape, maps in self._micro(args, picked):
                sums = self.programs[shape](sums, (model, (args, maps)), key)
            model, one = self.programs["update"](model, sums, key)
            seen.append(one)
        return model, self.programs["read"](seen) if "read" in self.programs else seen[0]


def _shown(key: Any) -> str:
    return f"{key.local}+{key.distributed}" if isinstance(key, Shape) else key


# Programs


def maps_of(place: Placement, shape: Shape) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Shapes and layouts of `scheduled.maps` of one micro-batch."""
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
    """Rows of both kinds from padded ones: every number a token, and those a row at its tokens."""
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
    """Numbers a token of both kinds of rows, put where their tokens came from."""
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


def _loss(
    place: Placement, c: Call, prefix: str, params: Any, args: tuple, key: jax.Array
) -> Any:
    padded, maps = args
    there = gathered(place, prefix, padded, maps)
    return mixed.loss(c, place.seq, params, there, key, prefix=prefix)


class _Infer:
    """The programs of an infer call.

    Attributes:
        out: shapes and dtypes of what it writes.
        rowwise: it writes a number a row.

    Raises:
        ValueError: it writes something else than a number a token.
    """

    def __init__(self, layouts: Layouts, c: Call, prefix: str, args: Mapping[str, Any]):
        self._layouts, self._call, self._prefix, self._args = layouts, c, prefix, dict(args)
        self._place = layouts.plan[c.name]
        self._params = layouts.borrowed(c)
        self.rowwise = isinstance(c.fn, Rowwise)
        self._numbers = c.fn.tokens if self.rowwise else c.fn
        with layouts.context(c, _TRIED.local):
            maps = maps_of(self._place, _TRIED)
            key = jax.ShapeDtypeStruct((2,), jnp.uint32)
            there = jax.eval_shape(self._of, self._params, self._args, maps, key)
        size = self._args[f"{prefix}tokens"].shape
        ranks = self._place.row_shards * self._place.seq
        for k, x in there.items():
            if x.shape != (ranks, _TRIED.columns):
                hint = "" if self.rowwise else "; one that writes a number a row must be a Rowwise"
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
        there = gathered(self._place, self._prefix, args, maps)
        both = mixed.together(there, self._place.seq, self._call.reads)
        return dict(self._numbers(params, both, programs.key_of(self._call.name, words)))

    def _finished(self, found: Any, args: Any, words: jax.Array) -> dict[str, jax.Array]:
        key = programs.key_of(self._call.name, words)
        return dict(self._call.fn.rows({**args, **found}, key))

    def numbers(self, shape: Shape) -> lowering.Lowered:
        """`(carry, (parameters, arrays, maps), key) -> carry`."""

        def run(carry: Any, given: Any, words: jax.Array) -> Any:
            params, args, maps = given
            out = self._of(params, args, maps, words)
            found = mixed.apart(out, shape.local, self._place.seq)
            return scattered(self._place, carry, found, maps)

        given = self._params, self._args, maps_of(self._place, shape)
        found = lowering.traced(self._layouts, self._call, run, self._carry, given, shape.local)
        where = {k: x.sharding for k, x in self._carry.items()}
        return lowering.lowered(self._layouts, self._call, found, where, donate=(0,))

    def zero(self) -> lowering.Lowered:
        """`() -> carry`."""
        where = {k: x.sharding for k, x in self._carry.items()}

        def run() -> dict[str, jax.Array]:
            return {k: jnp.zeros(x.shape, x.dtype) for k, x in self._carry.items()}

        with self._layouts.context(self._call):
            return lowering.Lowered(jax.jit(run, out_shardings=where).lower())

    def finish(self, made: Mapping[str, Any]) -> lowering.Lowered:
        """`(carry, arrays, key) -> ` what the call writes, a number a row."""
        run = self._finished
        found = lowering.traced(self._layouts, self._call, run, self._carry, self._args)
        where = {k: v.sharding for k, v in made.items()}
        return lowering.lowered(self._layouts, self._call, found, where)


def _lengths(layouts: Layouts, c: Call, segment: Any) -> lowering.Lowered:
    """`segment -> ` tokens of each row."""

    def run(segment: jax.Array) -> jax.Array:
        return (segment > 0).sum(axis=1, dtype=jnp.int32)

    with layouts.context(c):
        return lowering.Lowered(jax.jit(run, out_shardings=layouts.whole(c)).lower(segment))


def _shuffled(layouts: Layouts, c: Call, count: int) -> lowering.Lowered:
    """`key -> ` the rows of every update."""

    def run(words: jax.Array) -> jax.Array:
        return programs.shuffled(c, programs.key_of(c.name, words), count)

    whole = layouts.whole(c)
    words = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=whole)
    with layouts.context(c):
        return lowering.Lowered(jax.jit(run, out_shardings=whole).lower(words))


def _read(layouts: Layouts, c: Call, seen: Any) -> lowering.Lowered:
    """`[meters of every update] -> metrics`."""

    def run(each: list) -> dict[str, jax.Array]:
        return programs.read(jax.tree.map(lambda *x: jnp.stack(x), *each))

    whole = layouts.whole(c)
    like = jax.tree.map(lambda x: placed(x, whole), seen)
    with layouts.context(c):
        jitted = jax.jit(run, out_shardings=whole)
        return lowering.Lowered(jitted.lower([like] * (c.epochs * c.minibatches)))

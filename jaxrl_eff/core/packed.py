"""Runners of calls whose rows are packed, in micro-batches chosen by length.

The data source and sampling write padded rows `[B, T]`. Calls that read rows of tokens to infer or
to train need not compute the padding: between the padded arrays that it reads and writes, such a
call is a loop over the micro-batches of a schedule (see `rows`). Its programs take the padded
arrays and, for every token of the micro-batch, its source index in them; per-token outputs are
scattered back to the same indices, and gradients are summed and divided once by the weight of all.
So a schedule can change only the rounding of sums. Each update has its own schedule: epochs and
minibatches draw the same rows as in an unscheduled step.

Packed calls can run on several meshes, each with its own schedules for the same rows; arrays and
parameters move between meshes as in any step. Offloaded state stays in host memory, and each
micro-batch or update fetches it again. The plan's `microbatches` of a packed call is ignored: the
schedule sets their number by the tokens that fit on a device. Every shape of a micro-batch is one
program per call, compiled ahead of time.

Lengths of rows from the data source are known to the host. Those of sampled rows are fetched, one
integer per row, as are the rows of minibatches; everything else stays on the devices.

A model that reselects its trained part does so by a gradient of padded rows, the same few rows as
in an unscheduled step.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_eff.core import lowering, programs
from jaxrl_eff.core import rows as rows_of
from jaxrl_eff.core.graph import Call, row_prefix
from jaxrl_eff.core.lowering import Lowered
from jaxrl_eff.core.runners import reselection
from jaxrl_eff.core.schedules import Schedules
from jaxrl_eff.core.shardings import Shardings, placed
from jaxrl_eff.core.specs import Model
from jaxrl_eff.core.summed import Summed, read_one
from jaxrl_eff.core.zero_bytes import Traffic
from jaxrl_eff.data.balance.assignment import Shape
from jaxrl_eff.parallel import global_arrays

MOST = 2**30  # tokens of an array, padding included: their indices are int32
_TRIED = Shape(8, 8)  # shape for tracing the outputs


def prefix_of(c: Call) -> str | None:
    """Returns the name prefix of the rows that a call infers or trains on; None without rows."""
    return row_prefix(c.reads) if c.kind in ("infer", "train") else None


def check_trained(c: Call) -> None:
    """Checks that a train call can run over micro-batches of a schedule.

    Raises:
        ValueError: it has no forward pass.
    """
    if c.forward is None:
        raise ValueError(
            f"the train call {c.name} has no `forward`, which scheduled rows need: one "
            "forward pass serves rows of both kinds."
        )


class PackedRows:
    """The padded rows of a call and its schedules, which packed runners share.

    Args:
        shardings: of the graph.
        c: the call.
        args: padded arrays that it reads, with shapes and shardings.
        segments: maximum number of segments in a padded row.
        asks: True if the call fetches the lengths of its rows.
        seen: called whenever the call's function is traced for a shape.
        schedules: of the step; they can be set later, before the call is lowered.

    Raises:
        ValueError: an array has neither a number per token nor one per row, the rows do not divide
            into minibatches, or there are more tokens than int32 counts.
    """

    def __init__(
        self,
        shardings: Shardings,
        c: Call,
        args: Mapping[str, Any],
        *,
        segments: int,
        asks: bool,
        seen: Callable[[], None],
        schedules: Schedules | None = None,
    ):
        self.schedules = schedules
        self.programs: dict[str, Any] = {}
        self._shardings, self._call, self._args = shardings, c, dict(args)
        self._prefix, self._segments, self._asks, self._seen = prefix_of(c), segments, asks, seen
        self._place = shardings.plan[c.name].bare
        self._check()

    @property
    def size(self) -> tuple[int, int]:
        """(rows per update or pass, tokens per row)."""
        count, length = self._args[f"{self._prefix}tokens"].shape
        return count // self._call.minibatches, length

    def _check(self) -> None:
        c, size = self._call, self._args[f"{self._prefix}tokens"].shape
        for k, x in self._args.items():
            if x.shape not in (size, size[:1]):
                raise ValueError(
                    f"{c.name} reads '{k}' of shape {x.shape}; packed rows need a number a token, "
                    f"{size}, or a row, {size[:1]}."
                )
        if size[0] % c.minibatches:
            raise ValueError(
                f"{c.name} reads {size[0]} rows, which do not divide by {c.minibatches} "
                "(minibatches)."
            )
        if size[0] * size[1] >= MOST:
            raise ValueError(f"{c.name} reads {size} tokens, but at most {MOST} can be packed.")

    def lower(self, made: Mapping[str, Any]) -> dict[str, Lowered]:
        if self.schedules is None:
            raise ValueError("say what schedules are made for, by scheduled(..), before build.")
        return self.lower_shapes(self.schedules.packings[self._place].shapes, made)

    def lower_shapes(self, shapes: Sequence[Shape], made: Mapping[str, Any]) -> dict[str, Lowered]:
        """Lowers the programs for micro-batches of these shapes, and auxiliary ones."""
        for _ in shapes:
            self._seen()
        out = self._pieces(shapes, made)
        return out | ({"lengths": self._lengths()} if self._asks else {})

    def _pieces(self, shapes: Sequence[Shape], made: Mapping[str, Any]) -> dict[str, Lowered]:
        raise NotImplementedError

    def _gathered(self, args: Mapping[str, Any], maps: Any) -> dict[str, dict]:
        return rows_of.gathered(self._place, self._prefix, args, maps, segments=self._segments)

    def _lengths(self) -> Lowered:
        """Lowers `segment -> tokens of each row`, replicated."""

        def run(segment: jax.Array) -> jax.Array:
            return (segment > 0).sum(axis=1, dtype=jnp.int32)

        with self._shardings.context(self._call):
            jitted = jax.jit(run, out_shardings=self._shardings.whole(self._call))
            return Lowered(jitted.lower(self._args[f"{self._prefix}segment"]))

    def begin(self, key: jax.Array) -> None:
        """Starts a step, ahead of the call's turn."""

    def _micro(self, args: Mapping[str, Any], picked: np.ndarray | None = None) -> Any:
        segment = args[f"{self._prefix}segment"]
        if not self.schedules.knows(self._prefix):
            self.schedules.learn(self._prefix, self.programs["lengths"](segment))
        return self.schedules(self._call.name, self._place, self._prefix, segment.shape[1], picked)


class PackedInfer(PackedRows):
    """A packed infer call: a program per shape of a micro-batch that adds to padded arrays.

    Attributes:
        out: shapes and dtypes of the arrays it writes.

    Raises:
        ValueError: as `PackedRows`; or `fn` returns anything but one number per token, or metrics.
    """

    metrics: tuple[str, ...] = ()

    def __init__(self, shardings: Shardings, c: Call, args: Mapping[str, Any], **options: Any):
        super().__init__(shardings, c, args, **options)
        self._params = shardings.borrowed(c)
        offloaded = shardings.plan[c.name].offload == "params"
        self._in_host = shardings.specs[c.of].axes if offloaded else None
        key = jax.ShapeDtypeStruct((2,), jnp.uint32)
        like = self._tried(key)
        self._carry = shardings.rows(c, like)
        self.out = like
        if c.finish is not None:
            self.out = jax.eval_shape(self._finished, like, self._args, key)

    def _tried(self, key: jax.ShapeDtypeStruct) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes of what `fn` writes, padded."""
        c, place = self._call, self._place
        maps = rows_of.maps_of(place, _TRIED)
        with self._shardings.context(c, _TRIED.local):
            there = jax.eval_shape(self._of, self._params, self._args, maps, key)
        ranks = place.row_shards * place.seq
        for k, x in there.items():
            if x.shape != (ranks, _TRIED.columns):
                hint = "; one that writes a number a row needs `finish`" if not c.finish else ""
                raise ValueError(
                    f"{c.name} makes '{k}' of shape {x.shape} from packed rows, where a number a "
                    f"token is {(ranks, _TRIED.columns)}{hint}."
                )
        size = self._args[f"{self._prefix}tokens"].shape
        return {k: jax.ShapeDtypeStruct(size, x.dtype) for k, x in there.items()}

    def _of(self, params: Any, args: Any, maps: Any, words: jax.Array) -> dict[str, jax.Array]:
        if self._in_host is not None:
            params = programs.fetched(params, self._in_host)
        both = rows_of.together(self._gathered(args, maps), self._place.seq, self._call.reads)
        out = dict(self._call.fn(params, both, programs.key_of(self._call.name, words)))
        if "metrics" in out:
            raise ValueError(f"{self._call.name} has metrics, which packed rows do not add up.")
        return out

    def _finished(self, found: Any, args: Any, words: jax.Array) -> dict[str, jax.Array]:
        key = programs.key_of(self._call.name, words)
        return dict(self._call.finish({**args, **found}, key))

    def _pieces(self, shapes: Sequence[Shape], made: Mapping[str, Any]) -> dict[str, Lowered]:
        out = {named(shape): self._of_shape(shape) for shape in shapes} | {"zero": self._zero()}
        return out | ({"finish": self._finish(made)} if self._call.finish is not None else {})

    def _of_shape(self, shape: Shape) -> Lowered:
        """Lowers `(carry, (parameters, arrays, maps), key) -> carry`."""

        def run(carry: Any, given: Any, words: jax.Array) -> Any:
            params, args, maps = given
            out = self._of(params, args, maps, words)
            found = rows_of.apart(out, shape.local, self._place.seq)
            return rows_of.scattered(self._place, carry, found, maps)

        given = self._params, self._args, rows_of.maps_of(self._place, shape)
        c, where = self._call, {k: x.sharding for k, x in self._carry.items()}
        found = lowering.traced(self._shardings, c, run, self._carry, given, shape.local)
        return lowering.lowered(self._shardings, c, found, where, donate=(0,))

    def _zero(self) -> Lowered:
        """Lowers `() -> carry`."""
        where = {k: x.sharding for k, x in self._carry.items()}

        def run() -> dict[str, jax.Array]:
            return {k: jnp.zeros(x.shape, x.dtype) for k, x in self._carry.items()}

        with self._shardings.context(self._call):
            return Lowered(jax.jit(run, out_shardings=where).lower())

    def _finish(self, made: Mapping[str, Any]) -> Lowered:
        """Lowers `(carry, arrays, key) -> outputs`, one number per row."""
        run, c = self._finished, self._call
        found = lowering.traced(self._shardings, c, run, self._carry, self._args)
        return lowering.lowered(self._shardings, c, found, {k: v.sharding for k, v in made.items()})

    def __call__(self, model: Any, args: Mapping[str, Any], key: Any) -> tuple[Any, dict, dict]:
        found = self.programs["zero"]()
        for shape, maps in self._micro(args):
            found = self.programs[named(shape)](found, (model, args, maps), key)
        if "finish" in self.programs:
            found = self.programs["finish"](found, args, key)
        return None, found, {}


class PackedTrain(PackedRows):
    """A packed train call: zeros, sums of every shape of a micro-batch, one update from the sums.

    Attributes:
        out: nothing.
        traffic: as of `runners.Train`, with one micro-batch an update; between nodes, any number of
            them sends as much.
    """

    out: Mapping[str, Any] = {}
    traffic: Traffic | None = None

    def __init__(self, shardings: Shardings, c: Call, args: Mapping[str, Any], **options: Any):
        super().__init__(shardings, c, args, **options)
        self._once = c.epochs * c.minibatches == 1
        self._rows: jax.Array | None = None

    def _loss(self, params: Any, rows: rows_of.MicroBatch, key: jax.Array) -> Any:
        return rows_of.loss(self._call, self._place.seq, params, rows, key, prefix=self._prefix)

    def _summed(self, args: Any, local: int) -> Summed:
        return Summed(
            self._shardings, self._call, lambda args: self._gathered(*args), self._loss, args, local
        )

    def _pieces(self, shapes: Sequence[Shape], made: Mapping[str, Any]) -> dict[str, Lowered]:
        del made
        c, each = self._call, {s: (self._args, rows_of.maps_of(self._place, s)) for s in shapes}
        first = shapes[0]
        summed = self._summed(each[first], first.local)
        update = summed.update(read_one if self._once else lambda seen: seen)
        out = {named(shape): summed.sums(each[shape], shape.local) for shape in shapes}
        out |= {"zero": summed.zero(), "update": update} | summed.open()
        self.traffic = summed.traffic()
        if not self._once:
            out |= {"rows": self._shuffled(), "read": self._read(update.lowered.out_info[1])}
        return out | reselection(self._shardings, c, self._args)

    @functools.cached_property
    def _update(self) -> lowering.Traced:
        """The traced update, whatever the shapes of micro-batches."""
        maps = rows_of.maps_of(self._place, _TRIED)
        return self._summed((self._args, maps), _TRIED.local).traced(read_one)

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(self._update.out[1])

    @property
    def still(self) -> Model:
        """The model with True for leaves that no step changes, and False for others."""
        return self._update.still

    def _shuffled(self) -> Lowered:
        """Lowers `key -> rows of every update`."""
        c, count = self._call, self._args[f"{self._prefix}tokens"].shape[0]

        def run(words: jax.Array) -> jax.Array:
            return programs.shuffled(c, programs.key_of(c.name, words), count)

        whole = self._shardings.whole(c)
        words = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=whole)
        with self._shardings.context(c):
            return Lowered(jax.jit(run, out_shardings=whole).lower(words))

    def _read(self, seen: Any) -> Lowered:
        """Lowers `[meters of every update] -> metrics`."""

        def run(each: list) -> dict[str, jax.Array]:
            return programs.read(jax.tree.map(lambda *x: jnp.stack(x), *each))

        c, whole = self._call, self._shardings.whole(self._call)
        like = jax.tree.map(lambda x: placed(x, whole), seen)
        with self._shardings.context(c):
            jitted = jax.jit(run, out_shardings=whole)
            return Lowered(jitted.lower([like] * (c.epochs * c.minibatches)))

    def begin(self, key: jax.Array) -> None:
        """Dispatches the computation of the rows of each update."""
        if not self._once:
            self._rows = self.programs["rows"](key)

    def __call__(self, model: Any, args: Mapping[str, Any], key: Any) -> tuple[Any, dict, dict]:
        seen = []
        picks = [None] if self._once else global_arrays.fetch_replicated(self._rows)
        for picked in picks:
            sums, opened = self.programs["zero"](), None
            if "open" in self.programs:
                opened = self.programs["open"](model, {}, key)
            for shape, maps in self._micro(args, picked):
                sums = self.programs[named(shape)](sums, (model, opened, (args, maps)), key)
            model, one = self.programs["update"](model, (sums, opened), key)
            seen.append(one)
        return model, {}, seen[0] if self._once else self.programs["read"](seen)


def named(shape: Shape) -> str:
    """Returns the name of a call's program for a micro-batch shape."""
    return f"{shape.local}+{shape.distributed}"

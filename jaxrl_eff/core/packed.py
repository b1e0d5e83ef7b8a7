"""A step that computes sampled sequences packed, in micro-batches chosen by their lengths.

Sampling writes padded rows `[B, T]`. Calls that read rows of tokens to infer or to train need not
compute the padding: between the arrays that they read and write as ever, such a call here is a loop
over the micro-batches of a schedule (`mixed`: short sequences whole on a device, long ones over the
`seq` axis). Its programs take the padded arrays and, for every token of the micro-batch, the place
in them that it comes from; numbers a token go back to the same places, and gradients are summed. An
update is one schedule: epochs and minibatches draw the rows that they would draw unscheduled.

Packed calls may lie on several meshes, each with schedules of its own for the same rows; arrays and
parameters travel between them as in any step. What a plan puts into host memory waits there, and
each micro-batch or update fetches it anew. How many microbatches a plan wants of a packed call is
ignored: that is what a schedule says, by the room that a device has.

The host learns lengths, one integer a sequence, and the rows of minibatches; nothing else leaves
the devices. Schedules follow from the lengths alone, not from measured times: another order of sums
is another rounding, and sampling would turn it into other tokens, so that no run could be repeated.
Of several processes each learns the lengths of all rows that its devices compute, and plans for
itself; so what schedules are made for must be the same on all.

A model that chooses anew what is trained does so by a gradient of padded rows, the same few that it
would take unscheduled.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxrl_eff.core import lowering, mixed, pieces, step
from jaxrl_eff.core.graph import Call, Graph, Model, Plan, Spec, row_prefix
from jaxrl_eff.core.pieces import Packing
from jaxrl_eff.core.shardings import Shardings, held
from jaxrl_eff.data.balance.assignment import Shape
from jaxrl_eff.parallel import Placement, SyncConfig, global_arrays
from jaxrl_eff.parallel.mesh import mesh

MOST = 2**30  # tokens of an array, padding included: their places are int32


def compile(
    graph: Graph,
    plan: Plan,
    specs: Mapping[str, Spec],
    *,
    keep: str = "",
    sync: SyncConfig | None = None,
) -> "Packed":
    """As `dataflow.compile`; say by `scheduled` what schedules are made for, then `build`.

    Raises:
        ValueError: no call reads rows of tokens, or one of them is of a form that cannot be packed.
    """
    plain = step.compile(graph, plan, specs, keep=keep, sync=sync)
    calls = [c for c in plain.calls if prefix_of(c) is not None]
    if not calls:
        raise ValueError(
            f"none of {[c.name for c in plain.calls]} infers or trains on tokens, segment and "
            "position, so there is nothing to be packed."
        )
    for c in calls:
        if c.kind == "train":
            mixed.check_trained(c, specs[c.of])
    parts = {c.name: dataclasses.replace(plain.plan[c.name], microbatches=1) for c in calls}
    return Packed(graph, plain.plan | parts, specs, plain.keep, sync)


def prefix_of(c: Call) -> str | None:
    """Of a call that reads rows of tokens to infer or to train: what its names begin with."""
    return row_prefix(c.reads) if c.kind in ("infer", "train") else None


class Packed(step.Step):
    """A compiled graph, called as `Step` is; the metrics have also `schedule/name`.

    These are of the packed calls with devices of this process; without one it has none of them.

    - `padding`: share of columns without a token, of all micro-batches.
    - `distributed`: share of tokens in distributed sequences; 0 without a `seq` axis.
    - `balance`: mean over max of the estimated seconds of the devices of a call.
    - `micro_steps`: programs that ran, of all packed calls.
    - `planned_seconds`: estimated for the train calls.
    - `planning_seconds`: that the host took to make schedules and maps.

    Attributes:
        places: the meshes of the packed calls, each once, in order; see `Placement.bare`.
        packings: mesh -> what its schedules are made for.
    """

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._prefix = {c.name: p for c in self.calls if (p := prefix_of(c)) is not None}
        self.places = tuple(dict.fromkeys(self.plan[name].bare for name in self._prefix))
        self._over = Shardings(self.graph, self.plan, self.specs, mixed=True)
        self._infers: dict[str, pieces.Infer] = {}
        self._chosen: dict[str, dict[str, float]] = {}
        self.packings: dict[Placement, Packing] = {}
        self._schedules: pieces.Schedules | None = None

    @property
    def packed(self) -> tuple[Call, ...]:
        """The calls that run packed, in order."""
        return tuple(c for c in self.calls if c.name in self._prefix)

    def on(self, place: Placement) -> tuple[Call, ...]:
        """The packed calls on one of the meshes."""
        return tuple(c for c in self.packed if self.plan[c.name].bare == place)

    def scheduled(self, packings: Packing | Mapping[Placement, Packing]) -> "Packed":
        """Sets what schedules are made for.

        Args:
            packings: on every mesh, see `places`; or one for all of them.

        Raises:
            ValueError: a mesh has none; the longest row does not fit, or there is no shape in
                which it does.
        """
        if isinstance(packings, Packing):
            packings = dict.fromkeys(self.places, packings)
        if missing := [str(p) for p in self.places if p not in packings]:
            raise ValueError(f"nothing says what schedules are made for on {missing}.")
        schedules = pieces.Schedules(packings)
        for place in self.places:
            longest = max(length for _, length in self.sizes(place).values())
            room = packings[place].room
            if room * place.seq < longest:
                raise ValueError(
                    f"rows have {longest} tokens, but {place.seq} devices of a seq axis with room "
                    f"for {room} tokens each hold {room * place.seq}."
                )
            schedules.plan(np.array([longest]), place)
        self.packings, self._schedules = schedules.packings, schedules
        return self

    def sizes(self, place: Placement) -> dict[str, tuple[int, int]]:
        """Sequences of an update or pass and tokens of a row, of the packed calls on a mesh."""
        out = {}
        for c in self.on(place):
            count, length = self._args[c.name][self._prefix[c.name] + "tokens"].shape
            out[c.name] = count // c.minibatches, length
        return out

    def told(self) -> dict[str, Any]:
        """What schedules are made for on every mesh; lengths are not known ahead.

        Each of "places" is as `BalancedLoader.told`, with the names of its calls.
        """
        places = [
            {
                "calls": [c.name for c in self.on(place)],
                "groups": place.row_shards,
                "parts": place.seq,
                "room": packing.room,
                "shapes": [list(shape) for shape in packing.shapes],
            }
            for place, packing in self.packings.items()
        ]
        return {"places": places, "lengths": []}

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
        found = pieces.Infer(self._over, c, self._prefix[c.name], args)
        self._infers[c.name], self._numbers[c.name] = found, {}
        return found.out

    def _lower(self, c: Call) -> Any:
        if c.name not in self._prefix:
            return super()._lower(c)
        if self._schedules is None:
            raise ValueError("say what schedules are made for, by scheduled(..), before build.")
        self._traced.pop(c.name, None)
        return self._pieces(c, self.packings[self.plan[c.name].bare].shapes)

    def _pieces(self, c: Call, shapes: Sequence[Shape]) -> pieces.Lowered:
        self.traces[c.name] += len(shapes)
        args, prefix = self._args[c.name], self._prefix[c.name]
        if c.kind == "infer":
            found = self._infers[c.name].pieces(shapes, self._made[c.name])
        else:
            found = pieces.of_train(self._over, c, prefix, args, shapes)
        if self._asks(c):
            found["lengths"] = pieces.lengths_of(self._over, c, args[f"{prefix}segment"])
        call = pieces.PackedCall(self._schedules, c, self.plan[c.name].bare, prefix)
        return pieces.Lowered(call, found)

    def _asks(self, c: Call) -> bool:
        """Whether a call is the first on one of its processes to need the lengths of its rows."""
        prefix, mine = self._prefix[c.name], self._processes(c)
        before = self.packed[: self.packed.index(c)]
        return not any(
            self._prefix[b.name] == prefix and mine <= self._processes(b) for b in before
        )

    def _processes(self, c: Call) -> set[int]:
        return {d.process_index for d in mesh(self.plan[c.name]).devices.flat}

    def needs(self, place: Placement, shapes: Sequence[Shape]) -> float:
        """Bytes that a device of a mesh needs for the packed call that needs most.

        Args:
            shapes: of micro-batches.
        """
        most = 0.0
        for c in self.on(place):
            found = self._pieces(c, shapes).compile()
            beside = held(self._beside(c))
            fullest = max(beside.get(d, 0) for d in mesh(place).devices.flat)
            programs = [*found.analysis().values()]
            if lowering.reselects(self._layouts, c):
                programs.append(self._choosing(c))
            most = max(most, fullest + max(v["bytes"] for v in programs))
        return most

    def _choosing(self, c: Call) -> dict[str, float]:
        """What XLA says of the program that chooses anew what a call trains."""
        if c.name not in self._chosen:
            found = lowering.lower_reselection(self._layouts, c, self._args[c.name])
            self._chosen[c.name] = lowering.analysis(found.compile())
        return self._chosen[c.name]

    def _beside(self, c: Call) -> list[Any]:
        """What is on devices while a packed call runs and is not given to it."""
        out: dict[Any, Any] = {}  # parameters borrowed by calls before it
        for other in self.calls:
            if other is c:
                break
            if other.kind == "train":
                out = {key: x for key, x in out.items() if key[0] != other.of}
            elif other.of is not None and not other.staleness and not self._way(other).alias:
                out[self._layouts.key(other)] = self._layouts.borrowed(other)
        out.pop(self._layouts.key(c), None)
        for model in self.graph.models:
            home = self.home(model)
            if model == c.of and c.kind == "train":
                home = home._replace(params=(), opt=(), left=())
            elif model == c.of and self._way(c).alias:
                home = home._replace(params=())
            out[model] = home
        return [*out.values()]

    def analysis(self) -> dict[str, dict[str, float]]:
        """As of `Step`; of a packed call every program by itself."""
        out = {}
        for name, program in self._programs.items():
            if name in self._prefix:
                out |= {f"{name} {k}": v for k, v in program.analysis().items()}
            else:
                out[name] = lowering.analysis(program)
        return out

    def program(self, call: str) -> Any:
        """A compiled call; "call piece" of a packed one, as `analysis` names them."""
        name, _, piece = call.partition(" ")
        found = super().program(name)
        return found.programs[piece] if piece else found

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
        if not self.built:
            self._check_single_process()
            self.build(batch)
        self._schedules.begin()
        words = step.key_words(key)
        here = [c for c in self.packed if self._over.here(c)]
        for c in here:  # now, so that nothing is waited for when they are needed
            self._programs[c.name].begin(global_arrays.from_whole(self._over.whole(c), words))
        models, data, metrics = super().__call__(models, batch, key, reselect=reselect)
        if not here:
            return models, data, metrics
        found = self._schedules.numbers({c.name for c in here if c.kind == "train"})
        return models, data, metrics | {f"schedule/{k}": v for k, v in found.items()}

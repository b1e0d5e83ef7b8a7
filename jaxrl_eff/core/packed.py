"""A step that computes sampled sequences packed, in micro-batches chosen by sequence length.

Sampling writes padded rows `[B, T]`. Calls that read rows of tokens to infer or to train need not
compute the padding: between the padded arrays that it reads and writes, such a call is a loop over
the micro-batches of a schedule (`mixed`: short sequences whole on one device, long ones sharded
over the `seq` axis). Its programs take the padded arrays and, for every token of the micro-batch,
its source index in them; per-token outputs are scattered back to the same indices, and gradients
are summed. Each update has its own schedule: epochs and minibatches draw the same rows as in an
unscheduled step.

Packed calls can run on several meshes, each with its own schedules for the same rows; arrays and
parameters move between meshes as in any step. Offloaded state stays in host memory, and each
micro-batch or update fetches it again. The plan's `microbatches` of a packed call is ignored: the
schedule sets their number by the tokens that fit on a device.

The host fetches lengths, one integer per sequence, and the rows of minibatches; everything else
stays on the devices. Schedules depend on the lengths alone, not on measured times: another order of
sums rounds differently, and sampling would turn that into different tokens, so no run would be
reproducible. With several processes, each fetches the lengths of all rows that its devices compute
and plans independently, so the arguments of schedules must be the same on all processes.

A model that reselects its trained part does so by a gradient of padded rows, the same few rows as
in an unscheduled step.
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

MOST = 2**30  # tokens of an array, padding included: their indices are int32


def compile(
    graph: Graph,
    plan: Plan,
    specs: Mapping[str, Spec],
    *,
    keep: str = "",
    sync: SyncConfig | None = None,
) -> "Packed":
    """Like `core.compile`; call `scheduled` with the packings, then `build`.

    Raises:
        ValueError: no call reads rows of tokens, or one of them cannot be packed.
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
    """Returns the name prefix of the rows that a call infers or trains on; None without rows."""
    return row_prefix(c.reads) if c.kind in ("infer", "train") else None


class Packed(step.Step):
    """A compiled graph, called like `Step`; its metrics also have `schedule/name`.

    They cover the packed calls on devices of this process, and are absent if it has none.

    - `padding`: fraction of columns without a token, over all micro-batches.
    - `distributed`: fraction of tokens in distributed sequences; 0 without a `seq` axis.
    - `balance`: mean over max of the estimated seconds of the devices of a call.
    - `micro_steps`: number of programs run, over all packed calls.
    - `planned_seconds`: estimated seconds of the train calls.
    - `planning_seconds`: seconds that the host took to make schedules and maps.

    Attributes:
        places: the distinct meshes of the packed calls, in order; see `Placement.bare`.
        packings: mesh -> arguments of its schedules.
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
        """Returns the packed calls, in order."""
        return tuple(c for c in self.calls if c.name in self._prefix)

    def on(self, place: Placement) -> tuple[Call, ...]:
        """Returns the packed calls on one of the meshes."""
        return tuple(c for c in self.packed if self.plan[c.name].bare == place)

    def scheduled(self, packings: Packing | Mapping[Placement, Packing]) -> "Packed":
        """Sets the arguments of the schedules.

        Args:
            packings: one per mesh, see `places`; or one for all of them.

        Raises:
            ValueError: a mesh has none, or the longest row does not fit on it or in any of its
                shapes.
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
        """Returns (sequences per update or pass, tokens per row) of each packed call on a mesh."""
        out = {}
        for c in self.on(place):
            count, length = self._args[c.name][self._prefix[c.name] + "tokens"].shape
            out[c.name] = count // c.minibatches, length
        return out

    def describe(self) -> dict[str, Any]:
        """Returns the schedules' arguments on every mesh; lengths are not known in advance.

        Each entry of "places" is like `BalancedLoader.describe`, plus the names of its calls.
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
        """Returns True if no earlier call on all of its processes fetched the rows' lengths."""
        prefix, mine = self._prefix[c.name], self._processes(c)
        before = self.packed[: self.packed.index(c)]
        return not any(
            self._prefix[b.name] == prefix and mine <= self._processes(b) for b in before
        )

    def _processes(self, c: Call) -> set[int]:
        return {d.process_index for d in mesh(self.plan[c.name]).devices.flat}

    def needs(self, place: Placement, shapes: Sequence[Shape]) -> float:
        """Returns the bytes per device of the packed call on a mesh that needs most.

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
        """Returns XLA's analysis of the program that reselects a call's trained part."""
        if c.name not in self._chosen:
            found = lowering.lower_reselection(self._layouts, c, self._args[c.name])
            self._chosen[c.name] = lowering.analysis(found.compile())
        return self._chosen[c.name]

    def _beside(self, c: Call) -> list[Any]:
        """Returns arrays that are on devices while a packed call runs but are not its operands."""
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
        """Like `Step.analysis`; each program of a packed call has its own entry."""
        out = {}
        for name, program in self._programs.items():
            if name in self._prefix:
                out |= {f"{name} {k}": v for k, v in program.analysis().items()}
            else:
                out[name] = lowering.analysis(program)
        return out

    def program(self, call: str) -> Any:
        """Returns a compiled call; "call piece" for a packed one, as named by `analysis`."""
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
        """See `Step`."""
        if not self.built:
            self._check_single_process()
            self.build(batch)
        self._schedules.begin()
        words = step.key_words(key)
        here = [c for c in self.packed if self._over.here(c)]
        for c in here:  # early, so that the rows are ready when they are needed
            self._programs[c.name].begin(global_arrays.from_whole(self._over.whole(c), words))
        models, data, metrics = super().__call__(models, batch, key, reselect=reselect)
        if not here:
            return models, data, metrics
        found = self._schedules.numbers({c.name for c in here if c.kind == "train"})
        return models, data, metrics | {f"schedule/{k}": v for k, v in found.items()}

"""The packed calls of a step: on which meshes, by which schedules, who fetches lengths."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxrl_eff.core import packed
from jaxrl_eff.core.graph import Call
from jaxrl_eff.core.runners import Runner
from jaxrl_eff.core.schedules import Packing, Schedules
from jaxrl_eff.core.shardings import Shardings
from jaxrl_eff.parallel import Placement


class PackedCalls:
    """The packed calls of a graph.

    Args:
        shardings: of the graph.
        segments: maximum number of segments in a padded row; 0: no call is packed.

    Attributes:
        calls: the packed calls, in order.
        places: their distinct meshes, in order; see `Placement.bare`.
        packings: mesh -> arguments of its schedules; empty before `schedule`.
        known: prefixes of rows from the data source, whose lengths the host knows.
    """

    def __init__(self, shardings: Shardings, segments: int):
        self._shardings, self._segments = shardings, segments
        names = [(c, packed.prefix_of(c)) for c in shardings.calls] if segments else []
        self._prefix = {c.name: prefix for c, prefix in names if prefix is not None}
        self.calls = tuple(c for c in shardings.calls if c.name in self._prefix)
        self.places = tuple(dict.fromkeys(shardings.plan[c.name].bare for c in self.calls))
        inputs = shardings.graph.inputs.split()
        self.known = {p for p in self._prefix.values() if f"{p}segment" in inputs}
        self.packings: dict[Placement, Packing] = {}
        self._schedules: Schedules | None = None
        self._runners: dict[str, Any] = {}

    def __contains__(self, call: str) -> bool:
        return call in self._prefix

    def runner(self, c: Call, args: Mapping[str, Any], seen: Any) -> Runner:
        """Returns the runner of a packed call; arguments are those of `packed.PackedRows`."""
        kind = packed.PackedTrain if c.kind == "train" else packed.PackedInfer
        self._runners[c.name] = kind(
            self._shardings, c, args, segments=self._segments, asks=self.asks(c), seen=seen,
            schedules=self._schedules,
        )  # fmt: skip
        return self._runners[c.name]

    def asks(self, c: Call) -> bool:
        """Returns True if neither the host nor an earlier call knows the lengths of its rows."""
        prefix, mine = self._prefix[c.name], self._processes(c)
        before = self.calls[: self.calls.index(c)]
        return prefix not in self.known and not any(
            self._prefix[b.name] == prefix and mine <= self._processes(b) for b in before
        )

    def _processes(self, c: Call) -> set[int]:
        return {d.process_index for d in self._shardings.whole(c).device_set}

    def sizes(self, place: Placement) -> dict[str, tuple[int, int]]:
        """Returns (rows per update or pass, tokens per row) of each call on a mesh."""
        here = [c.name for c in self.calls if self._shardings.plan[c.name].bare == place]
        return {name: self._runners[name].size for name in here}

    def schedule(self, packings: Packing | Mapping[Placement, Packing]) -> None:
        """Sets the arguments of the schedules, for the step's shapes.

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
        schedules = Schedules(packings)
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
        for runner in self._runners.values():
            runner.schedules = schedules

    def _here(self) -> list[Call]:
        return [c for c in self.calls if self._shardings.here(c)]

    def begin(self, batch: Mapping[str, np.ndarray], key: Any) -> None:
        """Starts a step: notes the lengths that the host knows, and starts what can be early.

        Args:
            key: call -> the step's key on its devices.
        """
        if self._schedules is None:
            return
        self._schedules.begin()
        for prefix in self.known:
            segment = np.asarray(batch[f"{prefix}segment"])
            self._schedules.learn(prefix, (segment > 0).sum(axis=1, dtype=np.int32))
        for c in self._here():
            self._runners[c.name].begin(key(c))

    def statistics(self) -> dict[str, np.float32]:
        """Returns the metrics of the step's schedules, of calls on this process's devices."""
        here = self._here()
        if not here:
            return {}
        found = self._schedules.numbers({c.name for c in here if c.kind == "train"})
        return {f"schedule/{k}": v for k, v in found.items()}

    def whole_batches(self) -> bool:
        """Returns True if every process must pass all rows, so that each can plan."""
        return bool(self.known) and jax.process_count() > 1

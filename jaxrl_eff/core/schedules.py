"""Schedules of the rows that packed calls read, made on the host in every step.

A schedule depends on the lengths of the rows alone, not on measured times: another order of sums
rounds differently, and sampling would turn that into different tokens, so no run would be
reproducible. Processes plan independently of each other, so the arguments of schedules must be the
same on all of them.
"""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrl_eff.core.rows import maps, maps_of
from jaxrl_eff.data.balance import skrull
from jaxrl_eff.data.balance.assignment import Assignment, Shape, quality
from jaxrl_eff.data.balance.cost import Cost
from jaxrl_eff.parallel import Placement, global_arrays


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

    def learn(self, rows: str, lengths: np.ndarray | jax.Array) -> None:
        """Notes the number of tokens of each row, int32 [B], fetched if it is on devices."""
        if rows not in self._lengths:
            on_devices = isinstance(lengths, jax.Array)
            found = global_arrays.fetch_replicated(lengths) if on_devices else lengths
            self._lengths[rows] = found

    def knows(self, rows: str) -> bool:
        """Returns True if the lengths of these rows have been noted in this step."""
        return rows in self._lengths

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
            rows: name prefix of the rows it reads, whose lengths were noted by `learn`.
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
        """Returns the schedule of rows of these lengths on a mesh."""
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
        """Returns statistics of the step's schedules, and discards the schedules.

        Args:
            trained: names of the train calls.

        Returns:
            `padding`: fraction of columns without a token, over all micro-batches;
            `distributed`: fraction of tokens in distributed rows, 0 without a `seq` axis;
            `balance`: mean over max of the estimated seconds of the devices of a call;
            `micro_steps`: number of micro-batches, over all packed calls;
            `planned_seconds`: estimated seconds of the train calls;
            `planning_seconds`: seconds that the host took to make schedules and maps.
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
    for shape, found in zip(schedule.shapes, maps(schedule, picked, width=width), strict=True):
        like = maps_of(place, shape)
        there = jax.tree.map(lambda x, y: global_arrays.from_whole(x.sharding, y), like, found)
        out.append((Shape(*shape), there))
    return out

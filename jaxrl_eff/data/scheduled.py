"""Global batches as lists of micro-batches, planned and laid out ahead in a thread.

A *unit* is what must lie in one row: a sequence, or both sides of a preference pair. `arrange`
makes rows of a schedule; every unit is in one row of a device or in one row of a group, packed side
by side with others like anywhere else, and what cuts a group's row over its devices is not seen
here.
"""

import dataclasses
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxrl_eff.data import packing, skrull
from jaxrl_eff.data.loader import Loader
from jaxrl_eff.data.schedules import Schedule, Shape, quality
from jaxrl_eff.data.skrull_cost import Cost, refit

Unit = tuple[packing.Segment, ...]
MicroBatch = dict[str, dict[str, np.ndarray]]

KEPT = 64  # measured steps, for the next fit


def arrange(schedule: Schedule, units: Sequence[Unit], *, pad: int = 0) -> list[MicroBatch]:
    """The rows of every micro-step, for G groups of P ranks.

    Args:
        schedule: of the units' lengths.
        units: K of them.
        pad: token id at padding.

    Returns:
        For each micro-step of shape (Tl, Td) the arrays of `packing.pack`: "local", rank r of group
        g in row g P + r of [G P, Tl], and "shared", [G, P Td].
    """
    steps, groups, parts = len(schedule.shapes), schedule.groups, schedule.parts
    local, shared = _rows(steps, groups * parts), _rows(steps, groups)
    places = zip(schedule.step, schedule.group, schedule.rank, units, strict=True)
    for step, group, rank, unit in places:
        row = shared[step][group] if rank < 0 else local[step][group * parts + rank]
        row.extend(unit)
    return [
        {
            "local": packing.lay_out(local[i], length=shape.local, pad=pad),
            "shared": packing.lay_out(shared[i], length=shape.distributed * parts, pad=pad),
        }
        for i, shape in enumerate(schedule.shapes)
    ]


def _rows(steps: int, rows: int) -> list[list[list[packing.Segment]]]:
    return [[[] for _ in range(rows)] for _ in range(steps)]


class Scheduled:
    """An iterator over scheduled global batches; `state` and `restore` resume as a `Loader`'s.

    Args:
        loader: one example a row; as many as a global batch has.
        groups, parts, room: as of `skrull.plan`.
        cost: by which schedules are judged, at first.
        shapes: that micro-steps may have.
        lengths: of some units, to be told.
        pad: token id at padding.
        ahead: batches planned ahead.

    Attributes:
        schedule: of the batch that was given last.
    """

    def __init__(
        self,
        loader: Loader,
        *,
        groups: int,
        parts: int,
        room: int,
        cost: Cost,
        shapes: Sequence[Shape],
        lengths: Sequence[int] = (),
        pad: int = 0,
        ahead: int = 2,
    ):
        self._lengths = np.asarray(lengths, np.int64)
        self._loader, self._cost, self._shapes, self._pad = loader, cost, tuple(shapes), pad
        self._mesh = {"groups": groups, "parts": parts, "room": room}
        self._ahead = ahead
        self._state: dict[str, Any] | None = None
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=ahead)
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._seen: list[tuple[np.ndarray, float]] = []
        self.schedule: Schedule | None = None

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        if self._thread is None:
            self._start()
        given = self._queue.get()
        if isinstance(given, BaseException):
            self.close()
            raise given
        self.schedule, batch, self._state = given
        return batch

    def prepare(self) -> None:
        """Starts planning."""
        if self._thread is None:
            self._start()

    def share(self, process: tuple[int, int]) -> None:
        """Every process has whole batches, so there is nothing to be chosen."""

    def state(self) -> dict[str, Any]:
        """As `Loader.state`, after the batches that were given; and the cost."""
        if self._state is None:
            self._state = self._loader.state()
        return {**self._state, "cost": dataclasses.asdict(self._cost)}

    def restore(self, state: dict[str, Any]) -> None:
        """As `Loader.restore`."""
        self.close()
        self._loader.restore(state)
        self._state, self._cost = state, Cost(**state["cost"])

    def told(self) -> dict[str, Any]:
        """What schedules are made for, as plain data: room, shapes, a histogram of lengths.

        Returns:
            `lengths` is a list of (most tokens, share of units), bins that double.
        """
        edges = 2 ** np.arange(1, max(2, int(self._lengths.max(initial=2)).bit_length() + 1))
        bins = np.searchsorted(edges, self._lengths)
        share = np.bincount(bins, minlength=len(edges))[: len(edges)] / max(1, len(self._lengths))
        return {
            **self._mesh,
            "shapes": [list(shape) for shape in self._shapes],
            "lengths": [[int(e), round(float(s), 6)] for e, s in zip(edges, share, strict=True)],
        }

    def stats(self) -> dict[str, float]:
        """As `Loader.stats`, of batches drawn; padding is that of the batch given last."""
        padding = quality(self.schedule).padding if self.schedule is not None else 0.0
        return {**self._loader.stats(), "padding": padding}

    def measured(self, schedule: Schedule, seconds: float) -> None:
        """Tells how long a batch took.

        Schedules made from then on are judged by a cost that explains the last steps better.
        """
        if seconds > 0:
            self._seen = [*self._seen, (schedule.terms(), seconds)][-KEPT:]
            self._cost = refit(self._cost, self._seen)

    def close(self) -> None:
        """Ends the thread; batches planned ahead are forgotten, and drawn again."""
        if self._thread is None:
            self._loader.close()
            return
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue
        self._thread.join()
        self._thread = None
        self._queue = queue.Queue(maxsize=self._ahead)
        self._loader.restore(self._state)
        self._loader.close()

    def _start(self) -> None:
        self.state()
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name="schedule", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                units = [tuple(item.segments) for item in self._loader.items()]
                lengths = [sum(len(ids) for ids, _ in unit) for unit in units]
                found = skrull.plan(lengths, **self._mesh, cost=self._cost, shapes=self._shapes)
                batch = arrange(found, units, pad=self._pad)
                self._put((found, batch, self._loader.state()))
        except BaseException as error:
            self._put(error)

    def _put(self, given: Any) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(given, timeout=0.1)
                return
            except queue.Full:
                continue

"""Global batches as lists of micro-batches, scheduled and laid out ahead in a thread.

A *unit* must be in one row: a sequence, or both sides of a preference pair. `arrange` makes rows
from a schedule; every unit is in one row of a device or in one row of a group, packed with others
as usual. How a group's row is sharded over its devices is decided elsewhere.
"""

import dataclasses
import hashlib
import itertools
import json
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxrl_eff.data import packing
from jaxrl_eff.data.balance import skrull
from jaxrl_eff.data.balance.assignment import Assignment, Shape, quality
from jaxrl_eff.data.balance.cost import Cost, refit
from jaxrl_eff.data.loader import Loader

Unit = tuple[packing.Segment, ...]
MicroBatch = dict[str, dict[str, np.ndarray]]

KEPT = 64  # measured steps that the next fit uses
NOWHERE = 2**31 - 1  # out of bounds of any array
# Fields of `Cost` in states that were saved by earlier versions.
RENAMED = {"wire": "bytes_per_token", "laps": "ring_rounds"}


def arrange(schedule: Assignment, units: Sequence[Unit], *, pad: int = 0) -> list[MicroBatch]:
    """Makes the rows of every micro-step, for G groups of P ranks.

    Args:
        schedule: of the units' lengths.
        units: K of them.
        pad: token id at padding.

    Returns:
        For each micro-step of shape (Tl, Td) the arrays of `packing.pack`: "local", rank r of group
        g in row g P + r of [G P, Tl], and "shared", [G, P Td].
    """
    lengths = _lengths(schedule)
    return [
        {
            side: packing.lay_out(
                [[s for k in row for s in units[k]] for row in rows], length=length[side], pad=pad
            )
            for side, rows in micro.items()
        }
        for micro, length in zip(_rows(schedule), lengths, strict=True)
    ]


def maps(schedule: Assignment, rows: Sequence[int] | np.ndarray, *, width: int) -> list[MicroBatch]:
    """Maps each position of every micro-step to its token in an array of one sequence per row.

    Args:
        schedule: of the lengths of K sequences.
        rows: int [K], the row of each sequence in an array [B, T], at whose start it is.
        width: T.

    Returns:
        For each micro-step "local" and "shared", with rows as in `arrange`: "source" int32, row *
        width + column in the array, or `NOWHERE` at padding; "segment" int32, 1, 2, .. within the
        row, 0 at padding.
    """
    out = []
    for micro, length in zip(_rows(schedule), _lengths(schedule), strict=True):
        both = {}
        for side, there in micro.items():
            source = np.full((len(there), length[side]), NOWHERE, np.int32)
            segment = np.zeros(source.shape, np.int32)
            for b, row in enumerate(there):
                start = 0
                for s, k in enumerate(row, start=1):
                    n, first = int(schedule.lengths[k]), int(rows[k]) * width
                    here = slice(start, start + n)
                    source[b, here], segment[b, here] = np.arange(first, first + n), s
                    start += n
            both[side] = {"source": source, "segment": segment}
        out.append(both)
    return out


def _rows(schedule: Assignment) -> list[dict[str, list[list[int]]]]:
    """Indices of the sequences in each row of each micro-step, in order."""
    groups, parts = schedule.groups, schedule.parts
    sizes = {"local": groups * parts, "shared": groups}
    out = [{side: [[] for _ in range(n)] for side, n in sizes.items()} for _ in schedule.shapes]
    places = zip(schedule.step, schedule.group, schedule.rank, strict=True)
    for k, (step, group, rank) in enumerate(places):
        side, row = ("shared", group) if rank < 0 else ("local", group * parts + rank)
        out[step][side][row].append(k)
    return out


def _lengths(schedule: Assignment) -> list[dict[str, int]]:
    """Tokens of a row of either kind in each micro-step."""
    return [
        {"local": shape.local, "shared": shape.distributed * schedule.parts}
        for shape in schedule.shapes
    ]


_made = itertools.count()


def as_text(schedule: Assignment) -> str:
    """Serializes a schedule as text; `from_text` restores it given the same lengths."""
    return json.dumps(
        {
            "lengths": _digest(schedule.lengths),
            "shapes": schedule.shapes,
            **{name: getattr(schedule, name).tolist() for name in ("step", "group", "rank")},
            **{name: getattr(schedule, name) for name in ("seconds", "rule", "candidates")},
        }
    )


def from_text(
    text: str, lengths: Sequence[int], *, groups: int, parts: int, capacity: int, cost: Cost
) -> Assignment:
    """Restores a schedule of another process, see `as_text`.

    Raises:
        ValueError: it was made for other lengths.
    """
    there, mine = json.loads(text), np.asarray(lengths, np.int64)
    if there.pop("lengths") != _digest(mine):
        raise ValueError(
            "the first process has planned a batch of other lengths: do all processes read the "
            "same data?"
        )
    shapes = tuple(Shape(*shape) for shape in there.pop("shapes"))
    places = {name: np.asarray(there.pop(name), np.int32) for name in ("step", "group", "rank")}
    return Assignment(
        lengths=mine, groups=groups, parts=parts, capacity=capacity, cost=cost, shapes=shapes,
        **places, **there,
    )  # fmt: skip


def _digest(lengths: np.ndarray) -> str:
    return hashlib.sha256(np.asarray(lengths, np.int64).tobytes()).hexdigest()[:16]


class BalancedLoader:
    """An iterator over scheduled global batches; `state` and `restore` resume as a `Loader`'s.

    With several processes, the first one plans, using its measurements, and sends its schedules to
    the others; every process lays them out. All must make their iterators in the same order.

    Args:
        loader: one example per row; as many rows as a global batch has examples.
        groups, parts, capacity: as in `skrull.plan`.
        cost: initial cost model of schedules.
        shapes: allowed shapes of micro-steps.
        lengths: of some units, for `describe`.
        pad: token id at padding.
        ahead: batches planned ahead.
        measure: True corrects the cost by measured batches.
        group: `parallel.processes.Group` of the run's processes, for sending schedules; None: this
            process is alone.

    Attributes:
        schedule: of the last batch returned.
    """

    def __init__(
        self,
        loader: Loader,
        *,
        groups: int,
        parts: int,
        capacity: int,
        cost: Cost,
        shapes: Sequence[Shape],
        lengths: Sequence[int] = (),
        pad: int = 0,
        ahead: int = 2,
        measure: bool = True,
        group: Any = None,
    ):
        self._measure = measure
        self._lengths = np.asarray(lengths, np.int64)
        self._loader, self._cost, self._shapes, self._pad = loader, cost, tuple(shapes), pad
        self._mesh = {"groups": groups, "parts": parts, "capacity": capacity}
        self._ahead = ahead
        self._state: dict[str, Any] | None = None
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=ahead)
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._seen: list[tuple[np.ndarray, float]] = []
        self._number, self._round = next(_made), 0
        self._peers = group
        self.schedule: Assignment | None = None

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
        """Does nothing: every process has whole batches."""

    def state(self) -> dict[str, Any]:
        """`Loader.state` after the batches returned, with the cost added."""
        if self._state is None:
            self._state = self._loader.state()
        return {**self._state, "cost": dataclasses.asdict(self._cost)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues after the batch that `state` followed, as `Loader.restore`."""
        self.close()
        self._loader.restore(state)
        self._state = state
        self._cost = Cost(**{RENAMED.get(name, name): v for name, v in state["cost"].items()})

    def describe(self) -> dict[str, Any]:
        """Describes what schedules are made for: capacity, shapes, a histogram of lengths.

        Returns:
            Plain data; `lengths` is a list of (most tokens, share of units), in bins that double.
        """
        edges = 2 ** np.arange(1, max(2, int(self._lengths.max(initial=2)).bit_length() + 1))
        bins = np.searchsorted(edges, self._lengths)
        share = np.bincount(bins, minlength=len(edges))[: len(edges)] / max(1, len(self._lengths))
        return {
            **{"room" if k == "capacity" else k: v for k, v in self._mesh.items()},
            "shapes": [list(shape) for shape in self._shapes],
            "lengths": [[int(e), round(float(s), 6)] for e, s in zip(edges, share, strict=True)],
        }

    def stats(self) -> dict[str, float]:
        """`Loader.stats` of the batches returned; padding is of the last one."""
        padding = quality(self.schedule).padding if self.schedule is not None else 0.0
        return {**self._loader.stats(self.state()), "padding": padding}

    def measured(self, schedule: Assignment, seconds: float) -> None:
        """Records the measured seconds of a batch.

        If `measure` is set, later schedules use a cost refitted to the last steps.
        """
        plans = self._peers is None or self._peers.process == 0
        if self._measure and plans and seconds > 0:
            self._seen = [*self._seen, (schedule.terms(), seconds)][-KEPT:]
            self._cost = refit(self._cost, self._seen)

    def close(self) -> None:
        """Ends the thread; batches planned ahead are discarded, and drawn again later."""
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
        self._round += 1
        self._thread = threading.Thread(target=self._run, name="schedule", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for batch in itertools.count():
                units = [tuple(item.segments) for item in self._loader.items()]
                lengths = [sum(len(ids) for ids, _ in unit) for unit in units]
                found = self._planned(lengths, f"{self._number} {self._round} {batch}")
                if found is None or self._stop.is_set():
                    return
                arrays = arrange(found, units, pad=self._pad)
                self._put((found, arrays, self._loader.state()))
        except BaseException as error:
            self._put(error)

    def _planned(self, lengths: Sequence[int], which: str) -> Assignment | None:
        """The schedule of a batch, equal on all processes; None when asked to stop."""
        key = f"schedule {which}"
        if self._peers is not None and self._peers.process:
            heard = self._peers.hear(key, self._stop.is_set)
            if heard is None:
                return None
            return from_text(heard[0], lengths, cost=self._cost, **self._mesh)
        found = skrull.plan(lengths, **self._mesh, cost=self._cost, shapes=self._shapes)
        if self._peers is not None:
            self._peers.tell(key, as_text(found))
        return found

    def _put(self, given: Any) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(given, timeout=0.1)
                return
            except queue.Full:
                continue

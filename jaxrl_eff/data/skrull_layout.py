"""Arrays of a schedule, for every micro-step one row a rank, and back.

Columns [0, T_loc) of a row are the rank's local sequences, one after another. Columns [T_loc, T)
are its stripe of what its group distributes: each sequence is padded to a multiple of the ranks P,
and its token i stands on rank i mod P, in column start + i // P. So all ranks of a group have the
same segments in the same columns there, a hop of the ring needs no other metadata, and every hop is
the same work for every rank.

A striped row cannot be shifted by one on the device, since the next token stands on the next rank.
Hence `target` and `weight`: what the hidden state at a column predicts, and how much that counts.
The package's convention, index t describes the choice of token t, is that of `mask`, and of what
`gather_back(..., predicted=True)` returns.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrl_eff.data.packing import Segment
from jaxrl_eff.data.schedules import Schedule

Arrays = dict[str, np.ndarray]


def lay_out(schedule: Schedule, examples: Sequence[Segment], *, pad: int = 0) -> list[Arrays]:
    """The arrays of every micro-step.

    Args:
        schedule: of these examples, K.
        examples: (ids [n], mask [n]); n as scheduled.
        pad: token id at padding.

    Returns:
        For each micro-step arrays [groups * parts, T_loc + T_dist], rank r of group g in row
        g * parts + r:
        tokens int32; segment int32, in a group's order of indices, distributed ones from 1 and
        local ones after them, 0 where no sequence is; position int32 within the sequence; mask
        float32, of the token at the column; target int32, the token after it, and weight float32,
        the mask of that one, 0 at a sequence's last; example int32, its index in `examples`, -1
        where no token is.
        The last stripe of a distributed sequence may be padding that belongs to its segment: its
        position goes on, its mask and weight are 0, and its example is -1.

    Raises:
        ValueError: examples of other lengths than scheduled.
    """
    lengths = schedule.lengths.tolist()
    _agree(lengths, [len(ids) for ids, _ in examples], "ids")
    _agree(lengths, [len(mask) for _, mask in examples], "mask")
    slots = _slots(schedule)
    ids = [np.asarray(ids, np.int32) for ids, _ in examples]
    masks = [np.asarray(mask, np.float32) for _, mask in examples]
    columns = {
        "tokens": (ids, pad),
        "segment": ([np.full(s.whole, s.segment, np.int32) for s in slots], 0),
        "position": ([np.arange(s.whole, dtype=np.int32) for s in slots], 0),
        "mask": (masks, 0),
        "target": ([_following(e, pad) for e in ids], pad),
        "weight": ([_following(m, 0) for m in masks], 0),
        "example": ([np.full(n, k, np.int32) for k, n in enumerate(lengths)], -1),
    }
    out: list[Arrays] = [{} for _ in schedule.shapes]
    for name, (values, fill) in columns.items():
        for arrays, placed in zip(out, _placed(schedule, slots, values, fill), strict=True):
            arrays[name] = placed
    return out


def place(
    schedule: Schedule, values: Sequence[np.ndarray], *, fill: float | int = 0
) -> list[np.ndarray]:
    """One value a token, laid out as `lay_out` lays out tokens.

    Args:
        values: for each example [n, ...], all of one dtype and of the same axes behind the first.
        fill: where no token is.

    Returns:
        For each micro-step [groups * parts, T_loc + T_dist, ...].
    """
    _agree(schedule.lengths.tolist(), [len(v) for v in values], "values")
    return _placed(schedule, _slots(schedule), values, fill)


def gather_back(
    schedule: Schedule, arrays: Sequence[np.ndarray], *, predicted: bool = False
) -> list[np.ndarray]:
    """What stands at each example's tokens: the inverse of `place`.

    Args:
        arrays: for each micro-step [groups * parts, T_loc + T_dist, ...].
        predicted: the values are of what a column predicts, so each belongs to the token after
            it: they are shifted by one, and a sequence's first token gets 0.

    Returns:
        For each example [n, ...].

    Raises:
        ValueError: arrays of other shapes than scheduled.
    """
    rows = schedule.groups * schedule.parts
    wanted = [(rows, shape.columns) for shape in schedule.shapes]
    found = [np.asarray(a) for a in arrays]
    if [a.shape[:2] for a in found] != wanted:
        raise ValueError(f"arrays are {[a.shape for a in found]}, but scheduled are {wanted}.")
    out = []
    for slot, n in zip(_slots(schedule), schedule.lengths.tolist(), strict=True):
        values = found[slot.step][slot.at(n, schedule.parts)]
        if predicted:
            values = np.concatenate([np.zeros_like(values[:1]), values[:-1]])
        out.append(values)
    return out


class _Slot(NamedTuple):
    """Where a sequence begins, and how many columns of its segment there are, padding included."""

    step: int
    row: int
    column: int
    segment: int
    whole: int
    striped: bool

    def at(self, n: int, parts: int) -> tuple[Any, Any]:
        """The index of its first n tokens in its micro-step's arrays."""
        if not self.striped:
            return self.row, slice(self.column, self.column + n)
        i = np.arange(n)
        return self.row + i % parts, self.column + i // parts


def _slots(schedule: Schedule) -> list[_Slot]:
    """Every sequence behind those of lower index; segments count distributed ones first."""
    parts, stripes = schedule.parts, schedule.stripes().tolist()
    ends: dict[tuple[int, int, int], int] = {}  # step, group, rank -> columns in use
    segments: dict[tuple[int, int], int] = {}
    where = list(
        zip(*(a.tolist() for a in (schedule.step, schedule.group, schedule.rank)), strict=True)
    )
    slots: dict[int, _Slot] = {}
    for k in sorted(range(len(where)), key=lambda k: (where[k][2] >= 0, k)):
        step, group, rank = where[k]
        n, striped = int(schedule.lengths[k]), rank < 0
        start = ends.get(where[k], 0)
        ends[where[k]] = start + (stripes[k] if striped else n)
        segment = segments[step, group] = segments.get((step, group), 0) + 1
        slots[k] = _Slot(
            step=step,
            row=group * parts + max(rank, 0),
            column=start + (schedule.shapes[step].local if striped else 0),
            segment=segment,
            whole=stripes[k] * parts if striped else n,
            striped=striped,
        )
    return [slots[k] for k in range(len(where))]


def _placed(
    schedule: Schedule, slots: list[_Slot], values: Sequence[np.ndarray], fill: float | int
) -> list[np.ndarray]:
    rows = schedule.groups * schedule.parts
    like = np.asarray(values[0])
    out = [
        np.full((rows, shape.columns, *like.shape[1:]), fill, like.dtype)
        for shape in schedule.shapes
    ]
    for slot, value in zip(slots, values, strict=True):
        out[slot.step][slot.at(len(value), schedule.parts)] = value
    return out


def _following(values: np.ndarray, last: int) -> np.ndarray:
    return np.append(values[1:], values.dtype.type(last))


def _agree(scheduled: list[int], found: list[int], what: str) -> None:
    if len(scheduled) != len(found):
        raise ValueError(f"{len(found)} examples, but {len(scheduled)} are scheduled.")
    for k, (n, m) in enumerate(zip(scheduled, found, strict=True)):
        if n != m:
            raise ValueError(f"example {k} has {m} {what}, but {n} tokens are scheduled.")

"""Packing of several short sequences into one row of static length, to reduce padding.

Rows are filled by best fit decreasing: longest first, each into the fullest row that still has
space for it. That takes at most 11/9 of the fewest possible rows, plus four (Johnson 1974). It is
deterministic and places every sequence once. Segments and positions keep the sequences of a row
apart. Left out: cutting a sequence in two to fill a row, which would lose attention across the cut.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np

Segment = tuple[np.ndarray, np.ndarray]  # ids int32 [n], mask float32 [n]
Pair = tuple[Segment, Segment]  # chosen, rejected


def fit(
    lengths: Sequence[int], *, length: int, rows: int | None = None, first: int = 0
) -> tuple[list[list[int]], list[int]]:
    """Assigns sequences to rows.

    Args:
        lengths: tokens of each sequence, 1..length.
        length: tokens of a row.
        rows: number of rows; as many as needed by default.
        first: number of leading sequences that are placed before all others, in their order. A
            caller puts leftovers there, so that each is placed eventually.

    Returns:
        For each row the indices of its sequences, ascending, and the indices left over, which
        is empty without a limit on rows.
    """
    order = sorted(range(len(lengths)), key=lambda i: (i >= first, -lengths[i] * (i >= first), i))
    filled: list[list[int]] = []
    free: dict[int, list[int]] = {}  # free tokens -> heap of the rows with that many
    sizes: list[int] = []  # the keys of `free`, sorted
    left = []
    for i in order:
        n = lengths[i]
        if not 1 <= n <= length:
            raise ValueError(f"sequence {i} has {n} tokens, but a row holds 1 to {length}.")
        at = bisect_left(sizes, n)
        if at < len(sizes):
            room = sizes[at]
            row = heapq.heappop(free[room])
            if not free[room]:
                del free[room], sizes[at]
        elif rows is None or len(filled) < rows:
            room, row = length, len(filled)
            filled.append([])
        else:
            left.append(i)
            continue
        filled[row].append(i)
        if room - n not in free:
            insort(sizes, room - n)
        heapq.heappush(free.setdefault(room - n, []), row)
    filled += [[] for _ in range((rows or 0) - len(filled))]
    return [sorted(row) for row in filled], sorted(left)


def shorten(segments: Sequence[Segment], *, length: int) -> tuple[Segment, ...]:
    """Cuts the end of one segment, or the ends of a pair, until their tokens total `length`.

    In a pair the longer one is cut until both are equally long.
    """
    if len(segments) == 1:
        keep: tuple[int, ...] = (length,)
    else:
        n, m = (len(ids) for ids, _ in segments)
        half = length // 2
        keep = (max(half, length - m), max(length - half, length - n))
    return tuple((ids[:k], mask[:k]) for (ids, mask), k in zip(segments, keep, strict=True))


def pack(
    examples: Sequence[Segment], *, length: int, rows: int | None = None, pad: int = 0
) -> dict[str, np.ndarray]:
    """Packs sequences into rows.

    Args:
        examples: (ids [n], mask [n]) with 1 <= n <= length; see `shorten` for longer ones.
        length: T, tokens of a row.
        rows: B; as few as best fit finds by default. Rows that stay empty are all padding.
        pad: token id at padding.

    Returns:
        tokens [B, T] int32; segment [B, T] int32, 1, 2, .. within the row in the order of
        `examples`, 0 for padding; position [B, T] int32 within the segment; mask [B, T] float32.

    Raises:
        ValueError: a sequence is empty, longer than a row, or does not fit into `rows`.
    """
    plan = _fit_all([len(ids) for ids, _ in examples], length=length, rows=rows)
    return lay_out([[examples[i] for i in row] for row in plan], length=length, pad=pad)


def pack_pairs(
    pairs: Sequence[Pair], *, length: int, rows: int | None = None, pad: int = 0
) -> dict[str, np.ndarray]:
    """Packs preference pairs, each whole into one row.

    As `pack`, where pair k of a row, from 0, is segments 2k + 1 (chosen) and 2k + 2 (rejected).
    """
    plan = _fit_all([pair_length(pair) for pair in pairs], length=length, rows=rows)
    return lay_out([[s for i in row for s in pairs[i]] for row in plan], length=length, pad=pad)


def pair_length(pair: Pair) -> int:
    """Tokens of both sides; raises ValueError if one is empty."""
    (chosen, _), (rejected, _) = pair
    if not len(chosen) or not len(rejected):
        raise ValueError(f"a pair has {len(chosen)} chosen and {len(rejected)} rejected tokens.")
    return len(chosen) + len(rejected)


def lay_out(
    rows: Sequence[Sequence[Segment]], *, length: int, pad: int = 0
) -> dict[str, np.ndarray]:
    """Arrays of rows whose sequences have been chosen, with the contents that `pack` describes."""
    shape = (len(rows), length)
    tokens = np.full(shape, pad, np.int32)
    segment, position = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    mask = np.zeros(shape, np.float32)
    for b, sequences in enumerate(rows):
        start = 0
        for s, (ids, learned) in enumerate(sequences, start=1):
            if len(ids) != len(learned):
                raise ValueError(f"a sequence has {len(ids)} ids, but {len(learned)} in its mask.")
            here = slice(start, start + len(ids))
            tokens[b, here], mask[b, here] = ids, learned
            segment[b, here], position[b, here] = s, np.arange(len(ids))
            start = here.stop
    return {"tokens": tokens, "segment": segment, "position": position, "mask": mask}


def unpack(arrays: dict[str, Any]) -> list[Segment]:
    """The (ids, mask) of every segment, row by row: the inverse of `pack` up to order."""
    tokens, segment, mask = (np.asarray(arrays[k]) for k in ("tokens", "segment", "mask"))
    return [
        (tokens[b, segment[b] == s], mask[b, segment[b] == s])
        for b in range(tokens.shape[0])
        for s in range(1, segment[b].max(initial=0) + 1)
    ]


def unpack_pairs(arrays: dict[str, Any]) -> list[Pair]:
    """The (chosen, rejected) of every pair, row by row: the inverse of `pack_pairs`."""
    sides = unpack(arrays)
    return list(zip(sides[::2], sides[1::2], strict=True))


def _fit_all(lengths: list[int], *, length: int, rows: int | None) -> list[list[int]]:
    plan, left = fit(lengths, length=length, rows=rows)
    if left:
        raise ValueError(
            f"{len(left)} of {len(lengths)} sequences, {sum(lengths[i] for i in left)} tokens, "
            f"do not fit into {rows} rows of {length}."
        )
    return plan

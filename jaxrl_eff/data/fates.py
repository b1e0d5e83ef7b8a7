"""The fate of an example (used, cut to a row's length, or dropped), and of a whole source.

Whatever is not used as it came is counted: by the loader while it draws, and by a survey before
anything is trained.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrl_eff.data import packing

SURVEYED = 1024  # examples that a survey looks at
_RUN = 16  # neighbours among those
_SECONDS = 2.0  # after which a survey looks at no other


@dataclass(frozen=True)
class Item:
    """An example drawn and encoded."""

    index: int  # in the source
    segments: tuple[packing.Segment, ...]  # one, or chosen and rejected
    tokens: int  # of all segments
    fate: str  # "kept", "truncated", "overlong" or "empty"; the last two are dropped
    full: int = 0  # tokens before it was truncated
    at: int = -1  # how many examples were drawn before it


@dataclass(frozen=True)
class Survey:
    """Counts of the examples of a source by their fate. Made by `survey`."""

    size: int  # of the source
    seen: int  # examples that were looked at
    fates: dict[str, int]  # fate of an `Item` -> how many of those
    longest: int  # tokens of the longest of those
    length: int  # that a row holds

    def notes(self, field: str, kind: str) -> list[str]:
        """The dropped and the cut, in words; nothing if everything is used as it came.

        Args:
            field: name of the setting that says the length.
            kind: of batch, see `loader.batches`.
        """
        of = f"of {self.seen:,} examples"
        if self.seen < self.size:
            of += f" looked at (there are {self.size:,})"
        longer = f"longer than {field}={self.length} (up to {self.longest:,} tokens)"
        nothing = "without a token" if kind == "prompts" else "without anything to learn"
        said = {
            "overlong": f"dropped: {longer}",
            "truncated": f"truncated: {longer}",
            "empty": f"dropped: {nothing}",
        }
        return [f"{self.fates[k]:,} {of} are {text}" for k, text in said.items() if self.fates[k]]


def item(index: int, encoded: Any, layout: dict[str, Any], length: int) -> Item:
    """Checks what `encode` gave for an example, and decides on its fate.

    Args:
        index: of the example.
        encoded: as `loader.batches` has it for the kind.
        layout: `kind` and `overlong` of the loader.
        length: tokens of a row.

    Raises:
        ValueError: not a pair where one is needed, a first token that is learned, or too many
            tokens while `overlong` is "error".
    """
    kind, overlong = layout["kind"], layout["overlong"]
    if kind == "prompts":
        encoded = (encoded, np.zeros(len(encoded), np.float32))
    segments = tuple(encoded) if kind == "preference" else (encoded,)
    if kind == "preference" and len(segments) != 2:
        raise ValueError(f"a preference is 2 responses, but encode gave {len(segments)}.")
    if any(len(mask) and mask[0] for _, mask in segments):
        raise ValueError("its mask starts with 1, but nothing precedes a first token.")
    full = tokens = sum(len(ids) for ids, _ in segments)
    fate = "kept"
    if tokens > length and overlong == "error":
        raise ValueError(f"it has {tokens} tokens, but at most {length} fit.")
    if tokens > length and overlong == "drop":
        return Item(index, segments, tokens, "overlong", full)
    if tokens > length:
        segments, fate = packing.shorten(segments, length=length), "truncated"
        tokens = length
    worth = [len(ids) if kind == "prompts" else mask.any() for ids, mask in segments]
    return Item(index, segments, tokens, fate if all(worth) else "empty", full)


def survey(read: Callable[[int], Item], size: int, *, length: int, count: int = SURVEYED) -> Survey:
    """Looks at some examples, spread over the whole source, for at most two seconds.

    Args:
        read: the example of an index, encoded.
        size: how many there are.
        length: tokens of a row.
        count: how many to look at; all of a source that has no more. If none of them is usable,
            others follow until one is.

    Raises:
        ValueError: `read` fails, or none of the whole source is usable.
    """
    fates, longest, until = Counter[str](), 0, time.monotonic() + _SECONDS
    for index in _spread(size, count):
        found = read(index)
        fates[found.fate] += 1
        longest = max(longest, found.full)
        if time.monotonic() > until:
            break
    if not fates["kept"] + fates["truncated"]:
        _find_usable(read, size, length)
    return Survey(size, fates.total(), fates, longest, length)


def _find_usable(read: Callable[[int], Item], size: int, length: int) -> None:
    """Raises unless some example is usable."""
    fates: Counter[str] = Counter()
    for index in range(size):
        fates[read(index).fate] += 1
        if fates["kept"] + fates["truncated"]:
            return
    raise ValueError(
        f"none of {size:,} examples can be used: {fates['overlong']:,} have more than {length} "
        f"tokens, {fates['empty']:,} nothing to learn."
    )


def _spread(size: int, count: int) -> list[int]:
    """Indices of about `count` examples in a fixed random order: all, or runs from everywhere.

    Runs of neighbours, because a parquet file gives these together.
    """
    order = np.random.default_rng(0)
    if size <= count:
        return order.permutation(size).tolist()
    run = min(_RUN, count)
    begins = np.linspace(0, size - run, count // run).astype(int)
    return [int(b) + i for b in order.permutation(begins) for i in range(run)]

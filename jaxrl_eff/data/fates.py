"""The fate of an example (used, truncated, or dropped), and statistics of a whole source.

All that is not used unchanged is counted: by the loader while it draws, and by a survey before
training.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrl_eff.data import packing

SURVEYED = 1024  # examples that a survey reads
_RUN = 16  # consecutive examples per run
_SECONDS = 2.0  # time limit of a survey


@dataclass(frozen=True)
class Item:
    """An example that was drawn and encoded."""

    index: int  # in the source
    segments: tuple[packing.Segment, ...]  # one, or chosen and rejected
    tokens: int  # of all segments
    fate: str  # "kept", "truncated", "overlong" or "empty"; the last two are dropped
    full: int = 0  # tokens before it was truncated
    at: int = -1  # number of examples drawn before it


@dataclass(frozen=True)
class Survey:
    """Counts of a source's examples by fate. Made by `survey`."""

    size: int  # of the source
    seen: int  # examples read
    fates: dict[str, int]  # fate of an `Item` -> number of examples
    longest: int  # tokens of the longest of them
    length: int  # tokens that a row holds

    def notes(self, field: str, kind: str) -> list[str]:
        """Describes dropped and truncated examples; empty if all are used unchanged.

        Args:
            field: name of the setting for the length.
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
    """Checks the output of `encode` for an example, and decides its fate.

    Args:
        index: of the example.
        encoded: the output, as `loader.batches` specifies it for the kind.
        layout: `kind` and `overlong` of the loader.
        length: tokens of a row.

    Raises:
        ValueError: a preference is not a pair, a first token is learned, or there are too many
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
    """Reads some examples, spread over the whole source, for at most two seconds.

    Args:
        read: returns the encoded example of an index.
        size: number of examples in the source.
        length: tokens of a row.
        count: how many to read; all of a source that has no more. If none of them is usable,
            others follow until one is.

    Raises:
        ValueError: `read` fails, or no example of the source is usable.
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
    """Raises ValueError unless some example is usable."""
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
    """Indices of about `count` examples in a fixed random order: all, or evenly spaced runs.

    Runs of consecutive examples, because a parquet file reads these together.
    """
    order = np.random.default_rng(0)
    if size <= count:
        return order.permutation(size).tolist()
    run = min(_RUN, count)
    begins = np.linspace(0, size - run, count // run).astype(int)
    return [int(b) + i for b in order.permutation(begins) for i in range(run)]

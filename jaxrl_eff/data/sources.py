"""Sequences of examples: a source has a length, and `source[i]` is a dict.

Everything here is one frozen pair, how many and how to read the i-th, so sources nest: a split, a
field check or a mapping is again a source. Files are read lazily, by index, which is what makes
the loader's order exactly resumable. A plain list of dicts is a source too. Left out: streams
without random access, and files on remote storage, which belong on a mounted path.
"""

import functools
import json
import operator
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np

Example = dict[str, Any]


@runtime_checkable
class Source(Protocol):
    """What the loader asks of its data. Not a base class: any sized, indexable object will do."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex, /) -> Example: ...


@dataclass(frozen=True)
class Examples:
    """`size` examples; `read(i)` returns the i-th, 0 <= i < size. `name` is for messages."""

    size: int
    read: Callable[[int], Example]
    name: str

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: SupportsIndex, /) -> Example:
        index = operator.index(index)
        # A negative index is refused: it would turn a filler's -1 into the last example.
        if not 0 <= index < self.size:
            raise IndexError(f"{self.name} has {self.size} examples, so there is no {index}.")
        return self.read(index)


def python_source(examples: Sequence[Example] | Callable[[], Iterable[Example]]) -> Examples:
    """A source over examples in memory.

    Args:
        examples: a sequence of dicts, or a function without arguments that returns an iterable
            of them; the function runs once, now.
    """
    rows = list(examples()) if callable(examples) else examples
    return Examples(len(rows), rows.__getitem__, "the Python source")


def jsonl(path: str | os.PathLike) -> Examples:
    """A source over a file with one JSON object a line; empty lines are skipped.

    The file is scanned once for the byte offsets of its lines (16 bytes of memory a line); lines
    are parsed when they are read.

    Raises:
        OSError: the file cannot be opened; names it.
        ValueError: on reading, a line is not a JSON object; names file and line, from 1.
    """
    offsets, lines = [], []
    with _open(path) as file:
        offset = 0
        for number, line in enumerate(file, start=1):
            if line.strip():
                offsets.append(offset)
                lines.append(number)
            offset += len(line)
    starts, numbers = np.array(offsets, np.int64), np.array(lines, np.int64)

    def read(index: int) -> Example:
        # Opening the file for each read costs some 20 microseconds, and is safe in any thread.
        with _open(path) as file:
            file.seek(starts[index])
            text = file.readline()
        where = f"{os.fspath(path)}, line {numbers[index]}"
        try:
            example = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON: {error}.") from error
        if not isinstance(example, dict):
            raise ValueError(f"{where}: {type(example).__name__} instead of a JSON object.")
        return example

    return Examples(len(starts), read, os.fspath(path))


def parquet(
    path: str | os.PathLike, *, columns: Sequence[str] | None = None, groups_in_memory: int = 8
) -> Examples:
    """A source over the rows of a parquet file.

    Args:
        path: the file.
        columns: which to read; all of them by default.
        groups_in_memory: row groups kept after use. Reading one row reads its whole group, so
            shuffled reads of a file with many more groups than this are slow.

    Raises:
        ImportError: pyarrow is missing.
        OSError: the file cannot be opened; names it.
        ValueError: the file is not parquet, or has no such column; names both.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        message = "parquet files need pyarrow: pip install 'jaxrl_eff[parquet]'"
        raise ImportError(message) from error
    _open(path).close()
    try:
        file = pyarrow.parquet.ParquetFile(os.fspath(path))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{os.fspath(path)}: not a parquet file: {error}") from error
    there = file.schema_arrow.names
    for column in columns or ():
        if column not in there:
            raise ValueError(f"{os.fspath(path)} has no column {column!r}; it has {there}.")
    sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    starts = [0, *np.cumsum(sizes).tolist()]
    lock = threading.Lock()  # neither the file nor a half-read group may be shared by threads

    @functools.lru_cache(maxsize=groups_in_memory)
    def group(g: int):
        return file.read_row_group(g, columns=list(columns) if columns else None)

    def read(index: int) -> Example:
        g = bisect_right(starts, index) - 1
        with lock:
            table = group(g)
        return table.slice(index - starts[g], 1).to_pylist()[0]

    return Examples(starts[-1], read, os.fspath(path))


def require(source: Source, fields: str | Sequence[str]) -> Examples:
    """The same examples, each checked for its fields when it is read; the first one now.

    Args:
        source: any source.
        fields: names, as a sequence or separated by spaces.

    Raises:
        ValueError: an example lacks a field, or is no dict; names the index and what is there.
    """
    names = fields.split() if isinstance(fields, str) else tuple(fields)

    def read(index: int) -> Example:
        example = source[index]
        if not isinstance(example, dict):
            raise ValueError(f"example {index} is a {type(example).__name__}, not a dict.")
        for name in names:
            if name not in example:
                raise ValueError(
                    f"example {index} has no field {name!r}; it has {sorted(map(str, example))}."
                )
        return example

    checked = Examples(len(source), read, _name(source))
    if checked.size:
        read(0)
    return checked


def mapped(source: Source, fn: Callable[[Example], Example]) -> Examples:
    """`fn` of every example, computed when it is read: to rename or join fields."""
    return Examples(len(source), lambda index: fn(source[index]), _name(source))


def subset(source: Source, indices: Sequence[int] | np.ndarray) -> Examples:
    """The examples at `indices`, in that order."""
    chosen = np.asarray(indices, np.int64)
    if chosen.size and (chosen.min() < 0 or chosen.max() >= len(source)):
        raise ValueError(
            f"a subset of {len(source)} examples cannot hold {chosen.min()}..{chosen.max()}."
        )
    return Examples(chosen.size, lambda index: source[int(chosen[index])], _name(source))


def holdout(source: Source, n: int, *, seed: int) -> tuple[Examples, Examples]:
    """Splits off n examples chosen at random by the seed.

    Returns:
        The rest and the held-out n: disjoint, together everything, each in the source's order.
    """
    if not 0 <= n <= len(source):
        raise ValueError(f"cannot hold out {n} of {len(source)} examples.")
    held = np.zeros(len(source), bool)
    held[np.random.default_rng(seed).permutation(len(source))[:n]] = True
    return subset(source, np.flatnonzero(~held)), subset(source, np.flatnonzero(held))


def _name(source: Source) -> str:
    return source.name if isinstance(source, Examples) else "the source"


def _open(path: str | os.PathLike):
    """Opens for reading bytes; the error says what was meant by the path."""
    try:
        return open(path, "rb")
    except OSError as error:
        reason = error.strerror or str(error)
        raise type(error)(f"cannot read the data file {os.fspath(path)!r}: {reason}") from error

"""Sources over parquet and JSON files.

They are read lazily, by index, which makes the loader's order exactly resumable. Left out: streams
without random access, and files on remote storage, which belong on a mounted path.
"""

import codecs
import errno
import functools
import json
import os
import stat
import threading
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

from jaxrl_eff.data.sources import Example, Examples


def jsonl(path: str | os.PathLike) -> Examples:
    """Makes a source over a file with one JSON object per line, or with one JSON array of objects.

    Empty lines are skipped. The file is scanned once for the byte offsets of its lines (16 bytes of
    memory per line), which are parsed on access; an array is read whole.

    Raises:
        OSError: the file cannot be opened, or is a directory, a pipe or the like; the message names
            it.
        ValueError: the file is compressed, a parquet file or not in UTF-8; or, on access, a line is
            not a JSON object (as in RFC 8259: no NaN) or holds a lone surrogate; the message names
            file and line, from 1.

    Example:
        >>> from pathlib import Path
        >>> from jaxrl_eff import jsonl
        >>> _ = Path("train.jsonl").write_text('{"prompt": "12>"}\\n{"prompt": "34>"}\\n')
        >>> source = jsonl("train.jsonl")
        >>> len(source), source[1]
        (2, {'prompt': '34>'})
    """
    name = os.fspath(path)
    offsets, lines = [], []
    with _open(path) as file:
        offset = _begin(file, name)
        file.seek(offset)
        for number, line in enumerate(file, start=1):
            if line.strip():
                offsets.append(offset)
                lines.append(number)
            offset += len(line)
        if offsets and (rows := _array(file, offsets[0], name)) is not None:
            item = f"{name}, item {{}}".format
            return Examples(len(rows), lambda i: _object(rows[i], item(i)), name, item)
    starts, numbers = np.array(offsets, np.int64), np.array(lines, np.int64)

    def line(index: int) -> str:
        return f"{name}, line {numbers[index]}"

    def read(index: int) -> Example:
        # Opening the file for each read costs about 20 microseconds, and is thread-safe.
        with _open(path) as file:
            file.seek(starts[index])
            text = file.readline()
        return _object(_parsed(text, line(index)), line(index))

    return Examples(len(starts), read, name, line)


def _begin(file: BinaryIO, name: str) -> int:
    """Byte offset at which text begins, after a UTF-8 byte order mark.

    Raises:
        ValueError: the file is of another kind.
    """
    head = file.read(4)
    for sign, kind in (
        (b"\x1f\x8b", "compressed by gzip; decompress it, since rows are read by their place"),
        (b"\x28\xb5\x2f\xfd", "compressed by zstd; decompress it, since rows are read by place"),
        (b"PAR1", "a parquet file, not JSON lines"),
        (b"\xff\xfe", "in UTF-16; JSON lines are in UTF-8"),
        (b"\xfe\xff", "in UTF-16; JSON lines are in UTF-8"),
    ):
        if head.startswith(sign):
            raise ValueError(f"{name} is {kind}.")
    return 3 if head.startswith(codecs.BOM_UTF8) else 0


def _array(file: BinaryIO, start: int, name: str) -> list[Any] | None:
    """The items of a file that is one JSON array; None if it holds lines.

    Raises:
        ValueError: it begins like an array but is neither.
    """
    file.seek(start)
    first = file.readline()
    if not first.lstrip().startswith(b"["):
        return None
    try:
        return _parsed(first + file.read(), name)
    except ValueError as whole:
        try:
            _parsed(first, name)
        except ValueError:
            raise whole from None
        return None


def _parsed(text: bytes, where: str) -> Any:
    """Parses JSON; raises ValueError if a string cannot be written as UTF-8."""
    try:
        value = json.loads(text.decode(), parse_constant=_refuse)
        if b"\\ud" in text.lower():  # possibly a lone surrogate, which no tokenizer accepts
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"{where}: half of a surrogate pair alone, {half!a}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8: {error}.") from error
    except RecursionError as error:
        raise ValueError(f"{where}: nested too deeply.") from error
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}.") from error
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON value")


def _object(value: Any, where: str) -> Example:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {type(value).__name__} instead of a JSON object.")
    return value


def parquet(
    path: str | os.PathLike, *, columns: Sequence[str] | None = None, groups_in_memory: int = 8
) -> Examples:
    """Makes a source over the rows of a parquet file. Maps become dicts.

    Args:
        path: the file.
        columns: which to read; all of them by default.
        groups_in_memory: row groups kept after use. Reading one row reads its whole group, so
            shuffled reads of a file with many more groups than this are slow.

    Raises:
        ImportError: pyarrow is missing.
        OSError: the file cannot be opened, or is a directory, a pipe or the like; the message names
            it.
        ValueError: the file is not parquet, or lacks a column; the message names both. Or, on
            access, a row group cannot be read.

    Example:
        >>> import pyarrow, pyarrow.parquet
        >>> from jaxrl_eff import parquet
        >>> pyarrow.parquet.write_table(pyarrow.table({"prompt": ["12>", "34>"]}), "train.parquet")
        >>> parquet("train.parquet")[1]
        {'prompt': '34>'}
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        message = "parquet files need pyarrow: pip install 'jaxrl_eff[parquet]'"
        raise ImportError(message) from error
    _open(path).close()
    name = os.fspath(path)
    try:
        file = pyarrow.parquet.ParquetFile(name)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{name}: not a parquet file: {error}") from error
    schema = file.schema_arrow
    if twice := sorted({n for n in schema.names if schema.names.count(n) > 1}):
        raise ValueError(f"{name} has more than one column of the names {twice}.")
    for column in columns or ():
        if column not in schema.names:
            raise ValueError(f"{name}: unknown column {column!r}; expected one of {schema.names}.")
    sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    starts, maps = [0, *np.cumsum(sizes).tolist()], "map<" in str(schema)
    lock = threading.Lock()  # threads cannot share the file or a half-read group

    @functools.lru_cache(maxsize=groups_in_memory)
    def group(g: int):
        try:
            return file.read_row_group(g, columns=list(columns) if columns else None)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{name}: row group {g} cannot be read: {error}") from error

    def read(index: int) -> Example:
        g = bisect_right(starts, index) - 1
        with lock:
            table = group(g)
        row = table.slice(index - starts[g], 1).to_pylist()[0]
        if not maps:
            return row
        return {k: _with_dicts(v, schema.field(k).type) for k, v in row.items()}

    return Examples(starts[-1], read, name, lambda index: f"{name}, row {index}")


def _with_dicts(value: Any, kind: Any) -> Any:
    """A value from an Arrow array, with dicts in place of a map's pairs."""
    import pyarrow.types as of

    if value is None or not of.is_nested(kind):
        return value
    if of.is_map(kind):
        return {k: _with_dicts(v, kind.item_type) for k, v in value}
    if of.is_struct(kind):
        types = {field.name: field.type for field in kind}
        return {k: _with_dicts(v, types[k]) for k, v in value.items()}
    if of.is_list(kind) or of.is_large_list(kind) or of.is_fixed_size_list(kind):
        return [_with_dicts(v, kind.value_type) for v in value]
    return value


def file(path: str | os.PathLike) -> Examples:
    """Makes a source over a parquet or JSON file, as its suffix says (.parquet, .pq; .jsonl, .json,
    .ndjson), or its first bytes if it has another suffix.

    Raises:
        OSError, ValueError, ImportError: as `parquet` and `jsonl`.

    Example:
        >>> from pathlib import Path
        >>> from jaxrl_eff.data import file
        >>> _ = Path("data.json").write_text('[{"n": 1}, {"n": 2}]')
        >>> file("data.json")[1]
        {'n': 2}
    """
    suffix = os.path.splitext(os.fspath(path))[1].lower()
    if suffix in (".parquet", ".pq"):
        return parquet(path)
    if suffix not in (".jsonl", ".json", ".ndjson"):
        with _open(path) as opened:
            if opened.read(4) == b"PAR1":
                return parquet(path)
    return jsonl(path)


def _open(path: str | os.PathLike) -> BinaryIO:
    """Opens a file for reading bytes; the error message names the path as a data file."""
    try:
        # Opening a pipe would block until another program writes to it.
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise OSError(errno.EINVAL, "it is a pipe or a device, not a regular file")
        return open(path, "rb")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        message = f"cannot read the data file {os.fspath(path)!r}: {reason}"
        raise (type(error) if isinstance(error, OSError) else ValueError)(message) from error

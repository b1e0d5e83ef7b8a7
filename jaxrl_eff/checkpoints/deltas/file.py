"""Delta files: safetensors with coded indices and a JSON header.

For every tensor `name` there are up to three arrays: `name/indices` (uint8, see `coding`),
`name/values`, and `name/originals` if the delta is reversible. The metadata's "delta" is the
header: version, base hash, semantics, method, granularity, density, shape, dtype and count of each
tensor, and the SHA-256 of everything. At 1 % density in bfloat16 an entry takes 3.0 bytes, 5.0 with
its original.

Not supported: storing a seed instead of a random mask's indices. It would save one of three bytes,
but tie every file to one random generator permanently.
"""

import hashlib
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_eff import files
from jaxrl_eff.checkpoints.deltas import coding
from jaxrl_eff.checkpoints.deltas.delta import Delta, Entries
from jaxrl_eff.checkpoints.deltas.header import expected, header_tensors
from jaxrl_eff.checkpoints.deltas.tensors import fits, read_file

VERSION = 1
_KEY = "delta"


def save(delta: Delta, path: str | PathLike[str], *, originals: bool = True) -> int:
    """Writes the file atomically.

    Args:
        delta: the delta; tensors without entries are omitted.
        path: of the file; an existing one is replaced.
        originals: False omits the originals: smaller, but not reversible by itself.

    Returns:
        Bytes written.

    Example:
        >>> from jaxrl_eff import deltas
        >>> base, tuned = {"w": np.zeros(4, np.float32)}, {"w": np.array([0, 0, 5, 0], np.float32)}
        >>> _ = deltas.save(deltas.diff(base, tuned), "task.safetensors")
        >>> deltas.apply(base, deltas.load("task.safetensors"))["w"].tolist()
        [0.0, 0.0, 5.0, 0.0]
    """
    from safetensors.numpy import save_file

    path = Path(path)
    arrays: dict[str, np.ndarray] = {}
    told = {}
    for name, entries in sorted(delta.tensors.items()):
        if not len(entries):
            continue
        told[name] = {"shape": entries.shape, "dtype": entries.dtype, "count": len(entries)}
        arrays[f"{name}/indices"] = coding.encode(entries.indices, entries.size)
        arrays[f"{name}/values"] = np.ascontiguousarray(entries.values)
        if originals and entries.originals is not None:
            arrays[f"{name}/originals"] = np.ascontiguousarray(entries.originals)
    header = {
        "version": VERSION,
        "base": delta.base,
        "semantics": delta.semantics,
        "method": delta.method,
        "granularity": delta.granularity,
        "density": delta.density,
        "tensors": told,
    }
    header["checksum"] = _checksum(header, arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as partial:
        save_file(arrays, partial, metadata={_KEY: json.dumps(header)})
    return path.stat().st_size


def load(path: str | PathLike[str], *, base: Mapping[str, Any] | None = None) -> Delta:
    """Reads a file and verifies all of it.

    Nothing is expanded before its declared sizes are checked: counts against the lengths of the
    arrays, and these against the codes. So memory is proportional to the file, whatever it
    declares.

    Args:
        path: of the file.
        base: arrays by name of the model that it is for; tensors that do not match are rejected
            before their indices are read. None: any.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, damaged, not a delta file, of another version, or not for
            `base`.
    """
    header, arrays = _open(path)
    tensors = {}
    for name, told in header["tensors"].items():
        if base is not None:
            fits(base, name, told.shape, told.dtype)
        try:
            tensors[name] = Entries(
                told.shape,
                told.dtype,
                coding.decode(arrays[f"{name}/indices"], told.size, told.count),
                np.array(arrays[f"{name}/values"]),
                np.array(old) if (old := arrays.get(f"{name}/originals")) is not None else None,
            )
        except ValueError as error:
            raise ValueError(f"{path}: {name!r} cannot be read: {error}") from error
    fields = (header[k] for k in ("base", "semantics", "method", "granularity"))
    return Delta(tensors, *fields)


def index_bytes(path: str | PathLike[str]) -> dict[str, int]:
    """Returns the bytes of each tensor's indices in a file."""
    header, arrays = _open(path)
    return {name: arrays[f"{name}/indices"].nbytes for name in header["tensors"]}


def _open(path: str | PathLike[str]) -> tuple[dict[str, Any], Mapping[str, np.ndarray]]:
    """Returns the header, with its tensors as `Told`, and the arrays, checked for consistency."""
    metadata, arrays = read_file(path)
    if _KEY not in metadata:
        raise ValueError(f"{path} is a safetensors file, but no delta: its header names none.")
    try:
        header = json.loads(metadata[_KEY])
        version = header["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: its header cannot be read.") from error
    if version != VERSION or isinstance(version, bool):
        raise ValueError(f"{path} has version {version!r} of the format; known is {VERSION}.")
    checksum = header.pop("checksum", None)
    try:
        tensors = header_tensors(header)
    except ValueError as error:
        raise ValueError(f"{path}: its header cannot be read: {error}") from error
    if checksum != _checksum(header, arrays):
        raise ValueError(f"{path} is damaged: its contents do not match its checksum.")
    try:
        expected(tensors, arrays, header["semantics"])
    except ValueError as error:
        raise ValueError(f"{path} contradicts itself: {error}") from error
    return {**header, "tensors": tensors}, arrays


def _checksum(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """Computes the SHA-256 of the header, and of every array's name and bytes."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(json.dumps([name, arrays[name].nbytes]).encode())
        digest.update(np.ascontiguousarray(arrays[name]).view(np.uint8))
    return digest.hexdigest()

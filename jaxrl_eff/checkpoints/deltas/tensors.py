"""Named tensors of a tree or of safetensors files, and their content hash.

Files are memory-mapped: a tensor uses memory only while it is accessed.
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrl_eff.checkpoints.hf_load import weight_files
from jaxrl_eff.checkpoints.hf_names import CODES
from jaxrl_eff.tree import flat

# Names of dtypes in safetensors files: those of weights, and of other tensors.
DTYPES = CODES | {
    "F64": "float64", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "BOOL": "bool",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


def content_hash(tree: Any) -> str:
    """Computes a hash of the tensors, 71 characters: `"sha256:..."`.

    It depends on every name, dtype, shape and bit, and on nothing else: not on shardings, files or
    order, nor on whether the leaves are JAX's or numpy's.

    Raises:
        ValueError: a leaf is partly on other processes.
    """
    table = flat(tree)
    with ThreadPoolExecutor(4) as pool:  # hashing releases the GIL
        digests = pool.map(lambda name: _digest(name, table[name]), sorted(table))
        total = hashlib.sha256(b"".join(digests))
    return f"sha256:{total.hexdigest()}"


def _digest(name: str, x: Any) -> bytes:
    x = host(name, x)
    told = json.dumps([name, str(x.dtype), list(x.shape)])
    digest = hashlib.sha256(told.encode() + b"\n")
    digest.update(np.ascontiguousarray(x).reshape(-1).view(np.uint8))
    return digest.digest()


def host(name: str, x: Any) -> np.ndarray:
    """Returns the whole leaf on this host."""
    if not getattr(x, "is_fully_addressable", True):
        raise ValueError(f"{name!r} is partly on other processes; gather it first.")
    return np.asarray(x)


def fits(table: Mapping[str, Any], name: str, shape: tuple[int, ...], dtype: str) -> None:
    """Checks that a model has the tensor that a delta changes.

    Args:
        table: arrays of the model by name.
        name, shape, dtype: of the tensor that a delta changes.

    Raises:
        ValueError: the tensor is missing, or has another shape or dtype.
    """
    if name not in table:
        some = ", ".join(sorted(table)[:3])
        raise ValueError(f"the delta changes {name!r}, which is not there; there is {some}...")
    found, kind = tuple(table[name].shape), str(table[name].dtype)
    if found != shape or kind != dtype:
        raise ValueError(
            f"{name!r} is {kind}{list(found)}, but the delta is for {dtype}{list(shape)}."
        )


def bits(x: np.ndarray) -> np.ndarray:
    """Returns the array's bits as unsigned integers, so that -0.0 and NaNs are compared exactly."""
    return x.view(f"u{x.dtype.itemsize}")


def read_directory(directory: str | PathLike[str]) -> dict[str, np.ndarray]:
    """Maps the tensors of a Hugging Face directory by their names in the files, read-only.

    Raises:
        FileNotFoundError: there are no safetensors files, or a file in the index is missing.
        ValueError: a file is damaged; a tensor is in two files.
    """
    table: dict[str, np.ndarray] = {}
    for path in weight_files(Path(directory)):
        found = read_file(path)[1]
        if twice := sorted(table.keys() & found.keys()):
            raise ValueError(f"{path} holds {twice[0]!r}, which another file holds as well.")
        table |= found
    return table


def read_file(
    path: str | PathLike[str], *, write: bool = False
) -> tuple[Mapping[str, str], dict[str, np.ndarray]]:
    """Maps the metadata and the tensors of a safetensors file.

    Args:
        path: of the file.
        write: True if assignments to the tensors change the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a safetensors file, is truncated, or has an unknown dtype.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        with safe_open(str(path), framework="np"):
            pass  # compares the header with the length of the file
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", None) or {}
    mode = "r+" if write else "r"
    empty = path.stat().st_size == 8 + length  # nothing to map
    data = np.zeros(0, np.uint8) if empty else np.memmap(path, np.uint8, mode, 8 + length)
    table = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            known = [*DTYPES]
            raise ValueError(
                f"{path}: {name!r}: unknown dtype {entry['dtype']}; expected one of {known}."
            )
        start, end = entry["data_offsets"]
        dtype, shape = jnp.dtype(DTYPES[entry["dtype"]]), entry["shape"]
        if end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name!r} in {path} has {end - start} bytes, which is not {shape}.")
        table[name] = data[start:end].view(dtype).reshape(shape)
    return metadata, table

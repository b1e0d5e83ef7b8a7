"""The header of a delta file, checked field by field, and against the file's arrays.

A checksum does not prove that the header is true, since any program can compute one.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxrl_eff.checkpoints.deltas import coding
from jaxrl_eff.checkpoints.deltas.delta import SEMANTICS
from jaxrl_eff.checkpoints.deltas.tensors import DTYPES

_FIELDS = ("version", "base", "semantics", "method", "granularity", "density", "tensors")
_AXES = 32  # maximum number of axes in every numpy version


class Told(NamedTuple):
    """A tensor as described by a header.

    Attributes:
        shape, dtype: of the tensor.
        count: changed entries.
    """

    shape: tuple[int, ...]
    dtype: str
    count: int

    @property
    def size(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)


def header_tensors(header: Mapping[str, Any]) -> dict[str, Told]:
    """Returns the tensors of a header without its checksum, by name.

    Raises:
        ValueError: a field is missing, unknown or invalid.
    """
    if odd := sorted(set(header) ^ set(_FIELDS)):
        what = "missing" if odd[0] in _FIELDS else "not known"
        raise ValueError(f"the field {odd[0]!r} is {what}.")
    for name in ("base", "semantics", "method", "granularity"):
        if not isinstance(header[name], str):
            raise ValueError(f"{name} is {_short(header[name])}, not text.")
    if header["semantics"] not in SEMANTICS:
        raise ValueError(
            f"unknown semantics {_short(header['semantics'])}; expected one of {[*SEMANTICS]}."
        )
    density = header["density"]
    if type(density) not in (int, float) or not 0 <= density <= 1:
        raise ValueError(f"density is {_short(density)}, not a number from 0 to 1.")
    if not isinstance(header["tensors"], dict):
        raise ValueError(f"tensors is {_short(header['tensors'])}, not a table by name.")
    return {name: _told(name, told) for name, told in header["tensors"].items()}


def _told(name: str, told: Any) -> Told:
    if not isinstance(told, dict) or set(told) != {"shape", "dtype", "count"}:
        raise ValueError(f"of {name!r} it says {_short(told)}, not shape, dtype and count.")
    shape, dtype, count = told["shape"], told["dtype"], told["count"]
    sides = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
    if not sides or len(shape) > _AXES or math.prod(shape) > coding.MOST:
        raise ValueError(f"the shape of {name!r} is {_short(shape)}, which no tensor has.")
    if not isinstance(dtype, str) or dtype not in DTYPES.values():
        known = [*DTYPES.values()]
        raise ValueError(f"{name!r}: unknown dtype {_short(dtype)}; expected one of {known}.")
    size = math.prod(shape)
    if type(count) is not int or not 0 < count <= size:
        raise ValueError(f"the count of {name!r} is {_short(count)}, not from 1 to {size}.")
    return Told(tuple(shape), dtype, count)


def expected(tensors: Mapping[str, Told], arrays: Mapping[str, np.ndarray], semantics: str) -> None:
    """Compares the arrays of a file with its header's description of the tensors.

    Raises:
        ValueError: an array is missing, belongs to no tensor, or has another shape or dtype.
    """
    left = set(arrays)
    for name, told in tensors.items():
        wanted = {
            "indices": ("uint8", None),
            "values": (told.dtype if semantics == "set" else "float32", (told.count,)),
            "originals": (told.dtype, (told.count,)),
        }
        for part, (dtype, shape) in wanted.items():
            x = arrays.get(f"{name}/{part}")
            left.discard(f"{name}/{part}")
            if x is None:
                if part != "originals":
                    raise ValueError(f"{name!r} has no {part}.")
            elif str(x.dtype) != dtype or x.ndim != 1 or (shape and x.shape != shape):
                size = "[bytes]" if shape is None else list(shape)
                raise ValueError(
                    f"the {part} of {name!r} are {x.dtype}{list(x.shape)}, not {dtype}{size}."
                )
    if left:
        raise ValueError(f"the array {min(left)!r} belongs to no tensor.")


def _short(value: Any) -> str:
    """Formats a value for an error, truncated, whatever its length or depth."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of too many digits; deeply nested lists
        text = f"a {type(value).__name__} that is too long to show"
    return text if len(text) <= 80 else f"{text[:77]}..."

"""Conversion of deltas between parameters and the tensors of a Hugging Face directory.

Parameters are stacked over layers and mostly stored transposed, so indices change; values do not.
Both directions use the table of checkpoint tensors, `hf_names`.
"""

import dataclasses
import math

import numpy as np

from jaxrl_eff.checkpoints.deltas.delta import Delta, Entries
from jaxrl_eff.checkpoints.hf_names import Tensor, tensors
from jaxrl_eff.models import LMConfig, abstract
from jaxrl_eff.tree import flat as by_name


def to_hf(delta: Delta, cfg: LMConfig, *, base: str = "", prefix: str = "model.") -> Delta:
    """Converts a delta of the parameters of `cfg` to one of the files.

    Args:
        delta: names and shapes of `models.abstract(cfg)`.
        base: content hash of the directory: `content_hash(read_directory(directory))`.
        prefix: prefix of the decoder's names in the files.

    Raises:
        ValueError: the model lacks a name or a shape.
    """
    table, shapes = {t.path: t for t in tensors(cfg)}, by_name(abstract(cfg))
    out: dict[str, Entries] = {}
    for path, entries in delta.tensors.items():
        if path not in table or tuple(shapes[path].shape) != entries.shape:
            have = list(shapes[path].shape) if path in table else "missing"
            raise ValueError(f"{path!r} {list(entries.shape)} is {have} in the model.")
        tensor = table[path]
        layer, flat = _stored(tensor, entries)
        inner = entries.shape[1:] if tensor.stacked else entries.shape
        for i in np.unique(layer).tolist():
            start, end = np.searchsorted(layer, [i, i + 1])  # C order: layers follow each other
            here = start + np.argsort(flat[start:end])
            columns = [None if x is None else x[here] for x in (entries.values, entries.originals)]
            out[tensor.full_name(i, prefix)] = Entries(
                tensor.shape(inner), entries.dtype, flat[here], *columns
            )
    return dataclasses.replace(delta, tensors=out, base=base)


def from_hf(delta: Delta, cfg: LMConfig, *, base: str = "", prefix: str = "model.") -> Delta:
    """Converts a delta of the files to one of the parameters of `cfg`.

    Args:
        delta: names and shapes of the files.
        base: content hash of the parameters.
        prefix: prefix of the decoder's names in the files.

    Raises:
        ValueError: the model lacks a name or a shape.
    """
    shapes, left = by_name(abstract(cfg)), dict(delta.tensors)
    out: dict[str, Entries] = {}
    for tensor in tensors(cfg):
        shape = tuple(shapes[tensor.path].shape)
        inner = shape[1:] if tensor.stacked else shape
        parts, places = [], []
        for i in range(shape[0] if tensor.stacked else 1):
            name = tensor.full_name(i, prefix)
            if (entries := left.pop(name, None)) is None:
                continue
            if entries.shape != tensor.shape(inner):
                wanted = list(tensor.shape(inner))
                raise ValueError(f"{name!r} is {list(entries.shape)}; the model has {wanted}.")
            parts.append(entries)
            places.append(_param(tensor, entries.indices, inner) + i * math.prod(inner))
        if parts:
            out[tensor.path] = _joined(shape, parts, np.concatenate(places))
    if left:
        raise ValueError(f"the model has no tensor {sorted(left)[0]!r} ({len(left)} such).")
    return dataclasses.replace(delta, tensors=out, base=base)


def _stored(tensor: Tensor, entries: Entries) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each entry the layer (0 without layers) and the flat index in the file."""
    where = np.unravel_index(entries.indices, entries.shape)
    layer, inner = (where[0], where[1:]) if tensor.stacked else (np.zeros(len(entries), int), where)
    shape = entries.shape[1:] if tensor.stacked else entries.shape
    order = tensor.order
    return layer, np.ravel_multi_index([inner[a] for a in order], [shape[a] for a in order])


def _param(tensor: Tensor, indices: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Converts flat indices in the file's tensor to those in one layer's parameter."""
    order = tensor.order
    where = np.unravel_index(indices, [shape[a] for a in order])
    return np.ravel_multi_index([where[order.index(a)] for a in range(len(shape))], shape)


def _joined(shape: tuple[int, ...], parts: list[Entries], flat: np.ndarray) -> Entries:
    dtypes = {part.dtype for part in parts}
    if len(dtypes) > 1:
        raise ValueError(f"layers of one parameter are {' and '.join(sorted(dtypes))}.")
    order = np.argsort(flat)
    columns = [
        None
        if any(getattr(p, field) is None for p in parts)
        else np.concatenate([getattr(p, field) for p in parts])[order]
        for field in ("values", "originals")
    ]
    return Entries(shape, dtypes.pop(), flat[order], *columns)

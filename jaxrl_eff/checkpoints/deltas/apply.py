"""Conversion between models and deltas: diff, apply and remove, bit for bit.

Trees can be nested or flat, with numpy or JAX leaves; the output has the same kind and placement.
Entries are written as bits, so -0.0 and the payload of a NaN survive.
"""

import functools
from typing import Any

import jax
import numpy as np

from jaxrl_eff.checkpoints.deltas.delta import Delta, Entries
from jaxrl_eff.checkpoints.deltas.tensors import bits, content_hash, fits, host
from jaxrl_eff.tree import flat, map_with_name


def diff(
    base: Any, tuned: Any, *, originals: bool = True, method: str = "", granularity: str = "element"
) -> Delta:
    """Computes the entries whose bits differ, to be set; holds one tensor at a time on the host.

    Args:
        base, tuned: trees with the same names, shapes and dtypes.
        originals: True to keep the base's values of these entries.
        method, granularity: for the record.

    Raises:
        ValueError: the trees do not match; the message names the tensor.
    """
    old, new = flat(base), flat(tuned)
    if odd := sorted(set(old) ^ set(new)):
        where = "base" if odd[0] in old else "tuned model"
        raise ValueError(f"the tensor {odd[0]!r} is only in the {where} ({len(odd)} such).")
    for name in old:
        a, b = ((str(x.dtype), tuple(x.shape)) for x in (old[name], new[name]))
        if a != b:
            told = [f"{dtype}{list(shape)}" for dtype, shape in (a, b)]
            raise ValueError(f"{name!r} is {told[0]} in the base, but {told[1]} in the tuned one.")
    tensors = {}
    for name in old:
        a, b = (np.ascontiguousarray(host(name, t[name])).reshape(-1) for t in (old, new))
        at = np.flatnonzero(bits(a) != bits(b))
        if len(at):
            kept = np.array(a[at]) if originals else None
            tensors[name] = Entries(old[name].shape, str(a.dtype), at, np.array(b[at]), kept)
    return Delta(tensors, content_hash(base), "set", method, granularity)


def check(params: Any, delta: Delta, *, content: bool = True) -> None:
    """Checks that the delta was made for this model.

    Args:
        params: the base.
        delta: to be applied to it.
        content: True to hash the base as well, which reads all of it.

    Raises:
        ValueError: a tensor is missing, or has another shape or dtype; the base has another hash.
    """
    table = flat(params)
    for name, entries in delta.tensors.items():
        fits(table, name, entries.shape, entries.dtype)
    if content and delta.base and (there := content_hash(params)) != delta.base:
        raise ValueError(
            f"the delta was made for the base {delta.base}, but this is {there}: another model, "
            "or one with a delta applied already."
        )


def apply(params: Any, delta: Delta, *, content: bool = True) -> Any:
    """Applies the delta; `params` is unchanged, and leaves without entries are shared.

    Args:
        params: the base, a tree of arrays.
        delta: to set, or to add: round(float32(W) + v) in the tensor's dtype.
        content: True to compare the base's hash.

    Raises:
        ValueError: see `check`.
    """
    check(params, delta, content=content)
    new = resolved(params, delta, content=False).tensors
    return map_with_name(lambda name, x: _put(x, new[name]) if name in new else x, params)


def remove(params: Any, delta: Delta, *, content: bool = True) -> Any:
    """Restores the base, bit for bit, from a model with the delta: originals overwrite.

    Args:
        params: the output of `apply`.
        delta: with originals.
        content: True to verify by the hash that the result is the base.

    Raises:
        ValueError: the delta has no originals; tensors do not match; the result is not the base.
    """
    if not delta.reversible:
        raise ValueError("the delta holds no originals, so it cannot be taken back.")
    check(params, delta, content=False)
    old = delta.tensors
    params = map_with_name(
        lambda name, x: _put(x, old[name], originals=True) if name in old else x, params
    )
    if content and delta.base and (there := content_hash(params)) != delta.base:
        raise ValueError(
            f"without the delta this is {there}, not the base {delta.base}: the model was not the "
            "base with this delta alone."
        )
    return params


def resolved(params: Any, delta: Delta, *, content: bool = True) -> Delta:
    """Converts a delta to one to be set on this base, with originals: exact and reversible.

    Args:
        params: the base.
        delta: of either semantics.
        content: True to compare the base's hash, or to compute it if the delta lacks it.

    Raises:
        ValueError: see `check`; or originals differ from the base.
    """
    check(params, delta, content=content)
    table = flat(params)
    tensors = {}
    for name, entries in delta.tensors.items():
        old = _at(table[name], entries)
        stored = entries.originals
        if stored is not None and not np.array_equal(bits(stored), bits(old)):
            raise ValueError(f"the base's {name!r} is not what the delta was made for.")
        new = entries.values
        if delta.semantics == "add":
            wide = np.promote_types(old.dtype, np.float32)
            with np.errstate(invalid="ignore", over="ignore"):  # NaNs and infinities stay
                new = (old.astype(wide) + new.astype(wide)).astype(old.dtype)
        tensors[name] = Entries(entries.shape, entries.dtype, entries.indices, new, old)
    base = delta.base or (content_hash(params) if content else "")
    return Delta(tensors, base, "set", delta.method, delta.granularity)


def _at(x: Any, entries: Entries) -> np.ndarray:
    """Reads a leaf at the entries; for a device array, only these are copied to the host."""
    if isinstance(x, jax.Array):
        if not x.shape:
            return np.array(x).reshape(1)
        return np.asarray(_gather(x, _coordinates(entries))).view(x.dtype)
    if x.flags.c_contiguous:
        return np.array(x.reshape(-1)[entries.indices])
    return x[np.unravel_index(entries.indices, x.shape)]


def _put(x: Any, entries: Entries, *, originals: bool = False) -> Any:
    """Copies the leaf and writes the entries' bits into the copy."""
    if isinstance(x, jax.Array):
        new = entries.originals if originals else entries.values
        if not entries.shape:
            return jax.device_put(new.reshape(()), x.sharding)
        return _scatter(x.sharding)(x, _coordinates(entries), bits(new))
    x = np.array(x, order="C")
    put_into(x, entries, originals=originals)
    return x


def _coordinates(entries: Entries) -> tuple[np.ndarray, ...]:
    """Returns indices per axis: flattening a sharded array would gather it, and overflow int32."""
    return tuple(i.astype(np.int32) for i in np.unravel_index(entries.indices, entries.shape))


# As integers both ways, since a device can change the payload of a NaN when it copies a float.
@jax.jit
def _gather(x: jax.Array, where: tuple[jax.Array, ...]) -> jax.Array:
    return x.view(f"u{x.dtype.itemsize}")[where]


@functools.cache
def _scatter(sharding: jax.sharding.Sharding) -> Any:
    def put(x, where, new):
        unsigned = x.view(f"u{x.dtype.itemsize}")
        return (
            unsigned.at[where].set(new, indices_are_sorted=True, unique_indices=True).view(x.dtype)
        )

    return jax.jit(put, out_shardings=sharding)


def put_into(x: np.ndarray, entries: Entries, *, originals: bool = False) -> None:
    """Writes the entries into an existing array, such as one mapped from a file."""
    new = entries.originals if originals else entries.values
    bits(x).reshape(-1)[entries.indices] = bits(new)

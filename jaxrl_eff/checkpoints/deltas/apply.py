"""Model and model -> delta; model and delta -> model; and back, bit for bit.

Trees may be nested or flat, with leaves of numpy or JAX; what comes out is of the same kind and in
the same place. Entries are written as bits, so -0.0 and the payload of a NaN survive.
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
    """The entries whose bits differ, to be set; one tensor at a time is on the host.

    Args:
        base, tuned: trees of the same names, shapes and dtypes.
        originals: whether to keep what the base has there.
        method, granularity: for the record.

    Raises:
        ValueError: the trees do not fit; named.
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
    """Whether the delta was made for this model.

    Args:
        params: the base.
        delta: to be applied to it.
        content: whether to hash the base as well, which reads all of it.

    Raises:
        ValueError: a tensor is missing, or of another shape or dtype; the base has another hash.
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
    """The model with the delta; `params` is untouched, and leaves without entries are shared.

    Args:
        params: the base, a tree of arrays.
        delta: to set, or to add: round(float32(W) + v) in the tensor's dtype.
        content: whether to compare the base's hash.

    Raises:
        ValueError: as `check`.
    """
    check(params, delta, content=content)
    new = resolved(params, delta, content=False).tensors
    return map_with_name(lambda name, x: _put(x, new[name]) if name in new else x, params)


def remove(params: Any, delta: Delta, *, content: bool = True) -> Any:
    """The base again, bit for bit, from a model with the delta: originals overwrite.

    Args:
        params: what `apply` gave.
        delta: with originals.
        content: whether to prove by the hash that the result is the base.

    Raises:
        ValueError: the delta holds no originals; tensors do not fit; the result is not the base.
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
    """The same change of this base as a delta to be set, with originals: exact and reversible.

    Args:
        params: the base.
        delta: of either semantics.
        content: whether to compare the base's hash, or to find it out if the delta does not know.

    Raises:
        ValueError: as `check`; originals are not what the base holds.
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
    """What a leaf holds at the entries; of one on devices only that comes to the host."""
    if isinstance(x, jax.Array):
        if not x.shape:
            return np.array(x).reshape(1)
        return np.asarray(_gather(x, _coordinates(entries))).view(x.dtype)
    if x.flags.c_contiguous:
        return np.array(x.reshape(-1)[entries.indices])
    return x[np.unravel_index(entries.indices, x.shape)]


def _put(x: Any, entries: Entries, *, originals: bool = False) -> Any:
    """A copy of the leaf with the entries' bits written into it."""
    if isinstance(x, jax.Array):
        new = entries.originals if originals else entries.values
        if not entries.shape:
            return jax.device_put(new.reshape(()), x.sharding)
        return _scatter(x.sharding)(x, _coordinates(entries), bits(new))
    x = np.array(x, order="C")
    put_into(x, entries, originals=originals)
    return x


def _coordinates(entries: Entries) -> tuple[np.ndarray, ...]:
    """Not flat: flattening a sharded array would gather it, and int32 would overflow."""
    return tuple(i.astype(np.int32) for i in np.unravel_index(entries.indices, entries.shape))


# As integers both ways, since a device may change the payload of a NaN when it copies a float.
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
    """Writes the entries into an array that is there, such as one mapped from a file."""
    new = entries.originals if originals else entries.values
    bits(x).reshape(-1)[entries.indices] = bits(new)

"""Global arrays from rows on hosts, and rows on hosts from global arrays.

With several processes an array may lie on devices of which a process owns all, some or none. A
process without any part still names the array, by shape, dtype and sharding, so that all processes
run the same program text.
"""

from typing import Any

import jax
import numpy as np


def placeholder(like: Any) -> jax.Array:
    """An array of which this process holds no part.

    Args:
        like: anything with shape, dtype and a sharding without a device of this process.
    """
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, [], dtype=like.dtype)


def here(sharding: jax.sharding.Sharding) -> bool:
    """Whether this process has one of the devices."""
    return bool(sharding.addressable_devices)


def local_rows(array: jax.Array) -> np.ndarray:
    """This process's rows of an array, in order, each once."""
    if array.is_fully_addressable:
        return np.asarray(jax.device_get(array))
    parts = {_start(s.index): s.data for s in array.addressable_shards}
    if not parts:
        return np.zeros((0, *array.shape[1:]), array.dtype)
    return np.concatenate([np.asarray(jax.device_get(parts[s])) for s in sorted(parts)])


def fetch_replicated(array: jax.Array) -> np.ndarray:
    """An array that is whole on each of its devices, of which this process has one."""
    return np.asarray(jax.device_get(array.addressable_data(0)))


def from_local(sharding: jax.sharding.Sharding, rows: np.ndarray) -> jax.Array:
    """The array of which every process brings an equal number of rows, its own.

    Meant, so that no guard against accidental transfers sees it.
    """
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_process_local_data(sharding, rows)


def from_whole(sharding: jax.sharding.Sharding, whole: np.ndarray) -> jax.Array:
    """The array that every process brings whole, and of which it keeps its part."""
    with jax.transfer_guard_host_to_device("allow"):
        if sharding.is_fully_addressable:
            return jax.device_put(whole, sharding)
        return jax.make_array_from_callback(
            whole.shape, sharding, lambda index: whole[index], dtype=whole.dtype
        )


def from_parts(like: Any, rows: np.ndarray) -> jax.Array:
    """The array whose rows are spread as `like`'s, from those that `local_rows` would give.

    Args:
        like: shape, dtype and sharding of the whole.
    """
    if like.sharding.is_fully_addressable:
        return from_whole(like.sharding, rows)
    indices = like.sharding.addressable_devices_indices_map(like.shape).values()
    first, at = {}, 0
    for start, stop in sorted({(_start(i), _stop(i, like.shape)) for i in indices}):
        first[start] = at
        at += stop - start
    if at != len(rows):
        raise ValueError(f"got {len(rows)} rows, but this process holds {at} of {like.shape[0]}.")

    def part(index: tuple[slice, ...]) -> np.ndarray:
        start = first[_start(index)]
        size = _stop(index, like.shape) - _start(index)
        return rows[(slice(start, start + size), *index[1:])]

    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_callback(like.shape, like.sharding, part, dtype=like.dtype)


def _start(index: tuple[slice, ...]) -> int:
    return (index[0].start or 0) if index else 0


def _stop(index: tuple[slice, ...], shape: tuple[int, ...]) -> int:
    return shape[0] if index[0].stop is None else index[0].stop

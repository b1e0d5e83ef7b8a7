"""Conversion between global arrays and the rows that each process holds on its host.

With several processes, all, some or none of an array's devices belong to a given process. A process
without a shard still refers to the array by shape, dtype and sharding, so that all processes run
the same program.
"""

from typing import Any

import jax
import numpy as np


def placeholder(like: Any) -> jax.Array:
    """Global array with no shard on this process.

    Args:
        like: anything with a shape, a dtype and a sharding over devices of other processes.
    """
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, [], dtype=like.dtype)


def here(sharding: jax.sharding.Sharding) -> bool:
    """True if the sharding includes a device of this process."""
    return bool(sharding.addressable_devices)


def local_rows(array: jax.Array) -> np.ndarray:
    """This process's rows of an array, in order, without duplicates."""
    if array.is_fully_addressable:
        return np.asarray(jax.device_get(array))
    parts = {_start(s.index): s.data for s in array.addressable_shards}
    if not parts:
        return np.zeros((0, *array.shape[1:]), array.dtype)
    return np.concatenate([np.asarray(jax.device_get(parts[s])) for s in sorted(parts)])


def fetch_replicated(array: jax.Array) -> np.ndarray:
    """Fetches a replicated array from the first of its devices on this process."""
    return np.asarray(jax.device_get(array.addressable_data(0)))


def from_local(sharding: jax.sharding.Sharding, rows: np.ndarray) -> jax.Array:
    """Global array from an equal number of rows of each process.

    The transfer is intended, so the host-to-device transfer guard is lifted for it.
    """
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_process_local_data(sharding, rows)


def from_whole(sharding: jax.sharding.Sharding, whole: np.ndarray) -> jax.Array:
    """Global array from a host array that every process has whole; each keeps its shards."""
    with jax.transfer_guard_host_to_device("allow"):
        if sharding.is_fully_addressable:
            return jax.device_put(whole, sharding)
        return jax.make_array_from_callback(
            whole.shape, sharding, lambda index: whole[index], dtype=whole.dtype
        )


def from_parts(like: Any, rows: np.ndarray) -> jax.Array:
    """Global array from this process's rows, as `local_rows` returns them.

    Args:
        like: shape, dtype and sharding of the global array.

    Raises:
        ValueError: the number of rows is not that of this process's shards.
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

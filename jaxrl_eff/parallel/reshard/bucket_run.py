"""Running the buckets of a plan.

Shards are passed between phases as single-device arrays, and viewed as one global array only for
each program. Devices that a program needs but that hold no shard yet contribute zeros.
"""

import collections
from typing import Any

import jax
import numpy as np

from jaxrl_eff.parallel.reshard import programs
from jaxrl_eff.parallel.reshard.buckets import Bucket, BucketPhase, Move, Shape, cut_shape, shard
from jaxrl_eff.parallel.reshard.layout import DeviceLayout, index_of

Held = dict[int, jax.Array]  # device of this process -> its shard


class UnderWay:
    """Limit on the number of buckets in flight."""

    def __init__(self, most: int):
        self._most = most
        self._arrays: collections.deque[Any] = collections.deque()

    def wait(self) -> None:
        """Blocks until another bucket can be sent."""
        if len(self._arrays) == self._most:
            jax.block_until_ready(self._arrays.popleft())

    def add(self, arrays: Any) -> None:
        self._arrays.append(arrays)


def held(array: Any) -> Held:
    """Shards of an array on this process's devices."""
    return {index_of(s.device): s.data for s in array.addressable_shards}


def assembled(m: Move, parts: Held, layout: DeviceLayout, sharding: Any) -> Any:
    """Global array of a tensor in its result's dtype, from its shards on a layout's devices."""
    mine = [parts[d] for d in programs.local_devices(layout.devices)]
    return jax.make_array_from_single_device_arrays(m.shape, sharding, mine, dtype=m.out)


def wrapped(array: Any, m: Move) -> Any:
    """Wraps a tensor that does not move in the target's sharding."""
    same = array.sharding == m.sharding
    return array if same else assembled(m, held(array), m.target, m.sharding)


def start(array: Any, m: Move) -> Held:
    """This process's shards of the source, in the devices' default memory."""
    if not programs.local_devices(m.source.devices):
        return {}
    return held(array if m.fetched is None else jax.device_put(array, m.fetched))


def finish(m: Move, parts: Held) -> Any:
    """Assembles the result in the target's sharding and memory."""
    array = assembled(m, parts, m.target, m.sharding)
    return array if m.stored is None else jax.device_put(array, m.stored)


def empty(m: Move) -> Any:
    """Result of a tensor without elements."""
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_callback(
            m.shape, m.stored or m.sharding, lambda _: np.zeros(m.shape, m.out), dtype=m.out
        )


def run(bucket: Bucket, parts: dict[int, Held]) -> dict[int, Held]:
    """Moves the tensors of a bucket from the source's devices to the target's."""
    parts = dict(parts)
    for phase in bucket.phases:
        if phase.items:
            _run_program(phase, parts)
        else:
            _run_copies(phase, parts)
    return parts


def compile_all(bucket: Bucket) -> list[Any]:
    """Compiled programs that move a bucket; also compiles those for zeros."""
    for phase in bucket.phases:
        for devices, leaves in _zeros(phase):
            programs.zeros(devices, leaves)
    return [
        programs.program(phase.devices, phase.items)
        for phase in bucket.phases
        if phase.items and programs.local_devices(phase.devices)
    ]


def _run_program(phase: BucketPhase, parts: dict[int, Held]) -> None:
    mine = programs.local_devices(phase.devices)
    if not mine:
        return
    _fill(phase, parts)
    leaves = [leaf for item in phase.items for leaf in item.leaves]
    views = [
        programs.view(phase.devices, leaf.shape, leaf.dtype, [parts[i][d] for d in mine])
        for i, leaf in zip(phase.members, leaves, strict=True)
    ]
    out = programs.program(phase.devices, phase.items)(*views)
    for i, array in zip(phase.members, out, strict=True):
        parts[i] = held(array)


def _zeros(phase: BucketPhase) -> list[tuple[tuple[int, ...], tuple[tuple[Shape, Any], ...]]]:
    """(this process's devices, shards that they lack) of each program that makes zeros."""
    wanted: dict[tuple[int, ...], list[tuple[Shape, Any]]] = {}
    for devices, _, leaf in phase.stand_ins:
        wanted.setdefault(programs.local_devices(devices), []).append(leaf)
    return [(devices, tuple(leaves)) for devices, leaves in wanted.items() if devices]


def _fill(phase: BucketPhase, parts: dict[int, Held]) -> None:
    """Adds zeros for devices that hold no shard of a tensor yet; equal shapes share one array."""
    made = {
        (devices, leaf): held(array)
        for devices, leaves in _zeros(phase)
        for leaf, array in zip(leaves, programs.zeros(devices, leaves)(), strict=True)
    }
    for devices, members, leaf in phase.stand_ins:
        for i in members:
            parts[i] = parts[i] | made.get((programs.local_devices(devices), leaf), {})


def _run_copies(phase: BucketPhase, parts: dict[int, Held]) -> None:
    """Copies all shards of all tensors in a single `jax.device_put`."""
    every = jax.devices()
    wanted = [
        (i, a, b)
        for i, pairs in zip(phase.members, phase.pairs, strict=True)
        for b, a in pairs.items()
    ]
    moved = [(i, a, b) for i, a, b in wanted if a != b]
    arrays = jax.device_put([parts[i][a] for i, a, _ in moved], [every[b] for *_, b in moved])
    arrived = iter(arrays)
    new: dict[int, Held] = {i: {} for i in phase.members}
    for i, a, b in wanted:
        new[i][b] = parts[i][a] if a == b else next(arrived)
    parts.update(new)


def run_in_parts(bucket: Bucket, m: Move, whole: Held, flow: UnderWay) -> Held:
    """`run` for a tensor larger than a bucket: cuts, moves and pastes each part."""
    (i,), dim, parts = bucket.members, bucket.dim, bucket.parts
    sources, targets = tuple(sorted(m.source.devices)), tuple(sorted(m.target.devices))
    here, there = programs.local_devices(sources), programs.local_devices(targets)
    a, b = shard(m.shape, m.source), shard(m.shape, m.target)
    size = cut_shape(b, dim, parts)
    if here:
        array = programs.view(sources, a, m.dtype, [whole[d] for d in here])
        cut = programs.cut_part(sources, a, m.dtype, dim, parts)
    if there:
        (made,) = programs.zeros(targets, ((b, m.out),))()
        paste = programs.paste_part(targets, b, m.out, dim, parts)
    for k in range(parts):
        flow.wait()
        part: Held = {}
        if here:
            (piece,) = cut(array, programs.number(sources, k))
            part = held(piece)
        part = run(bucket, {i: part})[i]
        if there:
            piece = programs.view(targets, size, m.out, [part[d] for d in there])
            (made,) = paste(made, piece, programs.number(targets, k))
        flow.add(list(part.values()))
    return held(made) if there else {}

"""Buckets of tensors, and the programs and copies that move each bucket.

Shards are passed between phases as single-device arrays, and viewed as one global array only for
each program. Devices that a program needs but that hold no shard yet contribute zeros.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_eff.parallel.reshard import choose, spmd
from jaxrl_eff.parallel.reshard.collectives import (
    AllToAll,
    Collective,
    Copies,
    Exchange,
    Gather,
    Phase,
    RoutePlan,
    Slice,
)
from jaxrl_eff.parallel.reshard.layout import DeviceLayout, Network, index_of

Shape = tuple[int, ...]
Held = dict[int, jax.Array]  # device of this process -> its shard


@dataclasses.dataclass(frozen=True)
class Move:
    """Transfer of one tensor.

    Attributes:
        shape, dtype: of the source.
        out: dtype of the result.
        source, target: layouts.
        fetched: sharding in the default memory that a source in another memory is first copied to;
            None if not needed.
        sharding: of the result in the default memory.
        stored: final sharding if it is in another memory; None if not.
        fresh: the result must not share memory with the source.
    """

    shape: Shape
    dtype: Any
    out: Any
    source: DeviceLayout
    target: DeviceLayout
    fetched: Any
    sharding: Any
    stored: Any
    fresh: bool = False

    @classmethod
    def of(
        cls, shape: Shape, dtype: Any, source: Any, target: Any, cast: Any, fresh: bool = False
    ) -> "Move":
        """Transfer between two shardings, with floats cast to `cast` unless it is None.

        Raises:
            ValueError: the shape is not divisible by a sharding.
        """
        dtype = jnp.dtype(dtype)
        out = cast if cast is not None and jnp.issubdtype(dtype, jnp.floating) else dtype
        a, b = DeviceLayout.of(source, len(shape)), DeviceLayout.of(target, len(shape))
        for layout, sharding in ((a, source), (b, target)):
            if any(n % c for n, c in zip(shape, layout.counts, strict=True)):
                raise ValueError(f"shape {list(shape)} does not divide by {sharding}.")
        fetched = stored = None
        if memory(source) != memory(target) or not a.same(b) or out != dtype or fresh:
            fetched = None if own(source) else _in_own(source)
            stored = None if own(target) else target
        at = _in_own(target) if stored is not None else target
        return cls(tuple(shape), dtype, out, a, b, fetched, at, stored, fresh)

    @property
    def wire(self) -> Any:
        """Dtype on the wire: the narrower of the two."""
        return self.out if self.out.itemsize < self.dtype.itemsize else self.dtype

    @property
    def kept(self) -> bool:
        """True if the result is the source itself."""
        same = self.dtype == self.out and self.source.same(self.target)
        return same and self.fetched is None and self.stored is None and not self.fresh

    @property
    def nbytes(self) -> int:
        """Bytes on the wire, with each element once."""
        return math.prod(self.shape) * self.wire.itemsize

    def bytes_at(self, layout: DeviceLayout) -> int:
        """Bytes per device of the source's or the target's layout, in its dtype."""
        dtype = self.dtype if layout is self.source else self.out
        return math.prod(shard(self.shape, layout)) * dtype.itemsize


def shard(shape: Shape, layout: DeviceLayout) -> Shape:
    return tuple(n // c for n, c in zip(shape, layout.counts, strict=True))


def memory(sharding: Any) -> str:
    """Memory kind of a sharding, with the default resolved."""
    kind = sharding.memory_kind
    return kind if kind is not None else _own_kind(next(iter(sharding.device_set)).platform)


def own(sharding: Any) -> bool:
    """True if a sharding is in the devices' default memory."""
    return memory(sharding) == _own_kind(next(iter(sharding.device_set)).platform)


def _in_own(sharding: Any) -> Any:
    return sharding.with_memory_kind(_own_kind(next(iter(sharding.device_set)).platform))


@functools.cache
def _own_kind(platform: str) -> str:
    return jax.local_devices(backend=platform)[0].default_memory().kind


@dataclasses.dataclass(frozen=True)
class BucketPhase:
    """One program, or copies of entire shards, for some tensors of a bucket.

    Attributes:
        devices: of the program; empty for copies.
        members: indices of the tensors, in the order of the items' leaves.
        items: of the program; empty for copies.
        pairs: for each of `members`, if copied: receiver -> sender.
        stand_ins: (devices, members, (shape, dtype)) of the zeros that devices without a shard
            contribute.
    """

    devices: tuple[int, ...]
    members: tuple[int, ...]
    items: tuple[spmd.Item, ...] = ()
    pairs: tuple[dict[int, int], ...] = ()
    stand_ins: tuple[tuple[tuple[int, ...], tuple[int, ...], tuple[Shape, Any]], ...] = ()


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Tensors that move together, or a single one in `parts` along `dim`."""

    members: tuple[int, ...]
    phases: tuple[BucketPhase, ...]
    dim: int = 0
    parts: int = 1


@dataclasses.dataclass
class Plan:
    """Transfers with their resharding plans, in buckets.

    Attributes:
        moves: the transfers.
        ways: tensor index -> plan, for tensors that are neither kept nor empty.
        classes: groups of tensors that share a plan.
        buckets: in the order in which they are sent.
    """

    moves: Sequence[Move]
    ways: dict[int, RoutePlan]
    classes: list[list[int]]
    buckets: list[Bucket]

    def shares(self, i: int) -> bool:
        """True if the result of a tensor shares memory with its source."""
        m = self.moves[i]
        return m.kept or (i in self.ways and _shares(m, _stages(m, self.ways[i])))

    @classmethod
    def of(cls, moves: Sequence[Move], bucket_bytes: int, network: Network) -> "Plan":
        classes: dict[Any, list[int]] = {}
        cuts: dict[int, tuple[int, int]] = {}
        for i, m in enumerate(moves):
            if m.kept or not math.prod(m.shape):
                continue
            room = choose.room(m.shape, m.source, m.target)
            if max(m.bytes_at(m.source), m.bytes_at(m.target)) > bucket_bytes:
                cuts[i] = _cut(m, bucket_bytes)
                dim, parts = cuts[i]
                if parts > 1:  # its plan must not reshard this dimension
                    room = (*room[:dim], m.source.counts[dim], *room[dim + 1 :])
            classes.setdefault((m.source, m.target, room), []).append(i)
        ways = {}
        for (source, target, room), members in classes.items():
            nbytes = sum(moves[i].nbytes for i in members)
            way = choose.way(source, target, room, nbytes, network)
            ways |= dict.fromkeys(members, way)
        plan = cls(moves, ways, list(classes.values()), [])
        now: list[int] = []
        size = 0
        for i in (i for members in classes.values() for i in members):
            m = moves[i]
            nbytes = max(m.bytes_at(m.source), m.bytes_at(m.target))
            if nbytes > bucket_bytes:
                dim, parts = cuts[i]
                if _touches(ways[i], dim):
                    dim, parts = 0, 1
                plan.buckets.append(_bucket(moves, ways, [i], dim, parts))
                continue
            if now and size + nbytes > bucket_bytes:
                plan.buckets.append(_bucket(moves, ways, now))
                now, size = [], 0
            now.append(i)
            size += nbytes
        if now:
            plan.buckets.append(_bucket(moves, ways, now))
        return plan

    @property
    def peak_bytes(self) -> int:
        """Peak bytes on one device if the source is kept: both trees and buckets in flight."""
        held: dict[int, int] = collections.Counter()
        for m in self.moves:
            for d in m.source.devices:
                held[d] += m.bytes_at(m.source)
            if not m.kept:
                for d in m.target.devices:
                    held[d] += m.bytes_at(m.target)
        return max(held.values(), default=0) + 2 * max(
            map(self._under_way, self.buckets), default=0
        )

    def _under_way(self, bucket: Bucket) -> int:
        """Bytes of messages and stand-ins, in addition to source and target."""
        sizes = (max(m.bytes_at(m.source), m.bytes_at(m.target)) for m in self._of(bucket))
        return sum(sizes) // bucket.parts * (2 if bucket.parts > 1 else 1)

    def _of(self, bucket: Bucket) -> list[Move]:
        return [self.moves[i] for i in bucket.members]


def _cut(m: Move, bucket_bytes: int) -> tuple[int, int]:
    """(dimension, parts) to cut a tensor, along a dimension sharded alike in source and target."""
    wanted = math.ceil(max(m.bytes_at(m.source), m.bytes_at(m.target)) / bucket_bytes)
    best = (0, 1)
    for dim, n in enumerate(shard(m.shape, m.source)):
        if m.source.counts[dim] == m.target.counts[dim]:
            parts = next((p for p in range(wanted, n + 1) if n % p == 0), n)
            if parts >= wanted:
                return dim, parts
            best = max(best, (dim, parts), key=lambda b: b[1])
    return best


def _touches(way: RoutePlan, dim: int) -> bool:
    for stage in way.stages:
        for step in stage.steps:
            if isinstance(step, Slice | Gather) and step.dim == dim:
                return True
            if isinstance(step, AllToAll) and dim in (step.split, step.join):
                return True
    return False


def _bucket(
    moves: Sequence[Move],
    ways: dict[int, RoutePlan],
    members: list[int],
    dim: int = 0,
    parts: int = 1,
) -> Bucket:
    shapes, dtypes, todo = {}, {}, {}
    held_by = {i: set(moves[i].source.devices) for i in members}
    for i in members:
        m = moves[i]
        local = shard(m.shape, m.source)
        if parts > 1:
            local = (*local[:dim], local[dim] // parts, *local[dim + 1 :])
        shapes[i], dtypes[i], todo[i] = local, m.dtype, _stages(m, ways[i])
    phases = []
    for k in range(max(len(stages) for stages in todo.values())):
        now: dict[Any, list[int]] = {}
        for i, stages in todo.items():
            if k < len(stages):
                copied = any(isinstance(s, Copies) for s in stages[k].steps)
                now.setdefault((copied, "" if copied else stages[k].devices), []).append(i)
        for (copied, devices), mine in now.items():
            if copied:
                pairs = tuple({b: a for a, b in todo[i][k].steps[0].pairs} for i in mine)
                held_by |= {i: set(p) for i, p in zip(mine, pairs, strict=True)}
                phases.append(BucketPhase((), tuple(mine), pairs=pairs))
                continue
            groups: dict[tuple[Collective, ...], list[int]] = {}
            for i in mine:
                groups.setdefault(todo[i][k].steps, []).append(i)
            items, lacking = [], {}
            for i in mine:
                without = tuple(d for d in devices if d not in held_by[i])
                if without:
                    lacking.setdefault((without, (shapes[i], dtypes[i])), []).append(i)
            held_by |= {i: set(devices) for i in mine}
            for steps, same in groups.items():
                leaves = []
                for i in same:
                    out = moves[i].out if k == len(todo[i]) - 1 else moves[i].wire
                    leaves.append(spmd.Leaf(shapes[i], dtypes[i], moves[i].wire, out))
                    dtypes[i] = out
                    shapes[i] = functools.reduce(_after, steps, shapes[i])
                items.append(spmd.Item(steps, tuple(leaves)))
            order = tuple(i for same in groups.values() for i in same)
            stand_ins = tuple((d, tuple(some), shape) for (d, shape), some in lacking.items())
            phases.append(BucketPhase(devices, order, tuple(items), stand_ins=stand_ins))
    return Bucket(tuple(members), tuple(phases), dim, parts)


def _stages(m: Move, way: RoutePlan) -> tuple[Phase, ...]:
    """The plan's stages, plus cast or copy programs where plain copies are first or last."""
    stages = way.stages
    before, after = (Phase(tuple(sorted(x.devices)), ()) for x in (m.source, m.target))
    if m.dtype != m.wire and (not stages or isinstance(stages[0].steps[0], Copies)):
        stages = (before, *stages)
    if m.out != m.wire and (not stages or isinstance(stages[-1].steps[0], Copies)):
        stages = (*stages, after)
    if m.fresh and _shares(m, stages):
        stages = (*stages, after)
    return stages


def _shares(m: Move, stages: tuple[Phase, ...]) -> bool:
    """True if some shard of the result is a shard of the source."""
    if m.fetched is not None or m.stored is not None:
        return False
    steps = [step for stage in stages for step in stage.steps]
    if any(not stage.steps for stage in stages) or not all(isinstance(s, Copies) for s in steps):
        return False
    return all(any(a == b for a, b in s.pairs) for s in steps)


def _after(shape: Shape, step: Collective) -> Shape:
    """Shape of a shard after a step."""
    out = list(shape)
    if isinstance(step, Slice):
        out[step.dim] //= len(step.groups[0])
    elif isinstance(step, Gather):
        out[step.dim] *= len(step.groups[0])
    elif isinstance(step, AllToAll):
        out[step.split] //= len(step.groups[0])
        out[step.join] *= len(step.groups[0])
    elif isinstance(step, Exchange):
        ends = zip(shape, step.units, step.out_units, strict=True)
        out = [n // a * b for n, a, b in ends]
    return tuple(out)


# Execution


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


def wrapped(array: Any, m: Move) -> Any:
    """Wraps a tensor that does not move in the target's sharding."""
    if array.sharding == m.sharding:
        return array
    return _assembled(m, held(array))


def held(array: Any) -> Held:
    """Shards of an array on this process's devices."""
    return {index_of(s.device): s.data for s in array.addressable_shards}


def _in_order(m: Move, parts: Held) -> list[jax.Array]:
    return [parts[d] for d in spmd.local_devices(m.target.devices)]


def _assembled(m: Move, parts: Held) -> Any:
    return jax.make_array_from_single_device_arrays(
        m.shape, m.sharding, _in_order(m, parts), dtype=m.out
    )


def start(array: Any, m: Move) -> Held:
    """This process's shards of the source, in the devices' default memory."""
    if not spmd.local_devices(m.source.devices):
        return {}
    return held(array if m.fetched is None else jax.device_put(array, m.fetched))


def finish(m: Move, parts: Held) -> Any:
    """Assembles the result in the target's sharding and memory."""
    array = _assembled(m, parts)
    return array if m.stored is None else jax.device_put(array, m.stored)


def wrap(stacked: jax.Array, m: Move, layout: DeviceLayout, sharding: Any) -> Any:
    """Assembles a program's result on the devices of a layout to a tensor of dtype `m.out`."""
    parts = held(stacked)
    mine = [parts[d] for d in spmd.local_devices(layout.devices)]
    return jax.make_array_from_single_device_arrays(m.shape, sharding, mine, dtype=m.out)


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
            spmd.zeros(devices, leaves)
    return [
        spmd.program(phase.devices, phase.items)
        for phase in bucket.phases
        if phase.items and spmd.local_devices(phase.devices)
    ]


def _run_program(phase: BucketPhase, parts: dict[int, Held]) -> None:
    mine = spmd.local_devices(phase.devices)
    if not mine:
        return
    _fill(phase, parts)
    leaves = [leaf for item in phase.items for leaf in item.leaves]
    views = [
        spmd.view(phase.devices, leaf.shape, leaf.dtype, [parts[i][d] for d in mine])
        for i, leaf in zip(phase.members, leaves, strict=True)
    ]
    out = spmd.program(phase.devices, phase.items)(*views)
    for i, array in zip(phase.members, out, strict=True):
        parts[i] = held(array)


def _zeros(phase: BucketPhase) -> list[tuple[tuple[int, ...], tuple[tuple[Shape, Any], ...]]]:
    """(this process's devices, shards that they lack) of each program that makes zeros."""
    wanted: dict[tuple[int, ...], list[tuple[Shape, Any]]] = {}
    for devices, _, leaf in phase.stand_ins:
        wanted.setdefault(spmd.local_devices(devices), []).append(leaf)
    return [(devices, tuple(leaves)) for devices, leaves in wanted.items() if devices]


def _fill(phase: BucketPhase, parts: dict[int, Held]) -> None:
    """Adds zeros for devices that hold no shard of a tensor yet; equal shapes share one array."""
    made = {
        (devices, leaf): held(array)
        for devices, leaves in _zeros(phase)
        for leaf, array in zip(leaves, spmd.zeros(devices, leaves)(), strict=True)
    }
    for devices, members, leaf in phase.stand_ins:
        for i in members:
            parts[i] = parts[i] | made.get((spmd.local_devices(devices), leaf), {})


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
    new: dict[int, Held] = {i: {} for i in phase.members}
    for i, a, b in wanted:
        if a == b:
            new[i][b] = parts[i][a]
    for (i, _, b), array in zip(moved, arrays, strict=True):
        new[i][b] = array
    parts.update(new)


def run_in_parts(bucket: Bucket, m: Move, whole: Held, flow: UnderWay) -> Held:
    """`run` for a tensor larger than a bucket: cuts, moves and pastes each part."""
    (i,), dim, parts = bucket.members, bucket.dim, bucket.parts
    sources, targets = tuple(sorted(m.source.devices)), tuple(sorted(m.target.devices))
    here, there = spmd.local_devices(sources), spmd.local_devices(targets)
    a, b = shard(m.shape, m.source), shard(m.shape, m.target)
    size = (*b[:dim], b[dim] // parts, *b[dim + 1 :])
    if here:
        array = spmd.view(sources, a, m.dtype, [whole[d] for d in here])
        cut = spmd.cut_part(sources, a, m.dtype, dim, parts)
    if there:
        (made,) = spmd.zeros(targets, ((b, m.out),))()
        paste = spmd.paste_part(targets, b, m.out, dim, parts)
    for k in range(parts):
        flow.wait()
        part: Held = {}
        if here:
            (piece,) = cut(array, spmd.number(sources, k))
            part = held(piece)
        part = run(bucket, {i: part})[i]
        if there:
            piece = spmd.view(targets, size, m.out, [part[d] for d in there])
            (made,) = paste(made, piece, spmd.number(targets, k))
        flow.add(list(part.values()))
    return held(made) if there else {}

"""Buckets of tensors, and the programs and copies that move each bucket, as plain data."""

import collections
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_eff.parallel.reshard import choose
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
from jaxrl_eff.parallel.reshard.layout import DeviceLayout, Network
from jaxrl_eff.parallel.reshard.programs import Item, Leaf

Shape = tuple[int, ...]


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

    @property
    def largest(self) -> int:
        """Bytes of the larger of the source's and the target's shard."""
        return max(self.bytes_at(self.source), self.bytes_at(self.target))


def shard(shape: Shape, layout: DeviceLayout) -> Shape:
    return tuple(n // c for n, c in zip(shape, layout.counts, strict=True))


def cut_shape(shape: Shape, dim: int, parts: int) -> Shape:
    return (*shape[:dim], shape[dim] // parts, *shape[dim + 1 :]) if parts > 1 else shape


def memory(sharding: Any) -> str:
    """Memory kind of a sharding, with the default resolved."""
    return sharding.memory_kind or _own_kind(next(iter(sharding.device_set)).platform)


def own(sharding: Any) -> bool:
    """True if a sharding is in the devices' default memory."""
    return memory(sharding) == _in_own(sharding).memory_kind


def _in_own(sharding: Any) -> Any:
    """The sharding in the devices' default memory."""
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
    items: tuple[Item, ...] = ()
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
            if m.largest > bucket_bytes:
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
        for i in (i for members in classes.values() for i in members):
            if i in cuts:
                cut = (0, 1) if _touches(ways[i], cuts[i][0]) else cuts[i]
                plan.buckets.append(_bucket(moves, ways, [i], *cut))
                continue
            if now and sum(moves[j].largest for j in (*now, i)) > bucket_bytes:
                plan.buckets.append(_bucket(moves, ways, now))
                now = []
            now.append(i)
        if now:
            plan.buckets.append(_bucket(moves, ways, now))
        return plan

    @property
    def peak_bytes(self) -> int:
        """Peak bytes on one device if the source is kept: both trees and buckets in flight."""
        held: dict[int, int] = collections.Counter()
        for m in self.moves:
            for layout in (m.source,) if m.kept else (m.source, m.target):
                for d in layout.devices:
                    held[d] += m.bytes_at(layout)
        in_flight = (
            sum(self.moves[i].largest for i in b.members) // b.parts * min(b.parts, 2)
            for b in self.buckets
        )  # messages and stand-ins; both parts' if a tensor is cut
        return max(held.values(), default=0) + 2 * max(in_flight, default=0)


def _cut(m: Move, bucket_bytes: int) -> tuple[int, int]:
    """(dimension, parts) to cut a tensor, along a dimension sharded alike in source and target."""
    wanted = math.ceil(m.largest / bucket_bytes)
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
    tensors = []
    for i in members:
        m = moves[i]
        shape = cut_shape(shard(m.shape, m.source), dim, parts)
        tensors.append(_Tensor(i, m, list(_stages(m, ways[i])), shape, m.dtype, m.source.devices))
    phases = []
    while tensors := [t for t in tensors if t.stages]:
        now: dict[Any, list[_Tensor]] = {}
        for t in tensors:
            stage = t.stages[0]
            copied = any(isinstance(s, Copies) for s in stage.steps)
            now.setdefault(None if copied else stage.devices, []).append(t)
        for devices, some in now.items():
            phases.append(_copies(some) if devices is None else _program(devices, some))
    return Bucket(tuple(members), tuple(phases), dim, parts)


@dataclasses.dataclass
class _Tensor:
    """Tensor of a bucket after the phases planned so far.

    Attributes:
        i, move: the tensor.
        stages: still to come.
        shape, dtype: of its shards.
        holders: devices that hold a shard.
    """

    i: int
    move: Move
    stages: list[Phase]
    shape: Shape
    dtype: Any
    holders: Sequence[int]


def _copies(tensors: list[_Tensor]) -> BucketPhase:
    pairs = []
    for t in tensors:
        pairs.append({b: a for a, b in t.stages.pop(0).steps[0].pairs})
        t.holders = tuple(pairs[-1])
    return BucketPhase((), tuple(t.i for t in tensors), pairs=tuple(pairs))


def _program(devices: tuple[int, ...], tensors: list[_Tensor]) -> BucketPhase:
    lacking: dict[Any, list[int]] = {}
    groups: dict[tuple[Collective, ...], list[_Tensor]] = {}
    for t in tensors:
        without = tuple(d for d in devices if d not in t.holders)
        if without:
            lacking.setdefault((without, (t.shape, t.dtype)), []).append(t.i)
        groups.setdefault(t.stages.pop(0).steps, []).append(t)
    items = []
    for steps, same in groups.items():
        leaves = []
        for t in same:
            out = t.move.wire if t.stages else t.move.out
            leaves.append(Leaf(t.shape, t.dtype, t.move.wire, out))
            t.dtype, t.holders = out, devices
            t.shape = functools.reduce(_after, steps, t.shape)
        items.append(Item(steps, tuple(leaves)))
    order = tuple(t.i for same in groups.values() for t in same)
    stand_ins = tuple((d, tuple(some), shape) for (d, shape), some in lacking.items())
    return BucketPhase(devices, order, tuple(items), stand_ins=stand_ins)


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

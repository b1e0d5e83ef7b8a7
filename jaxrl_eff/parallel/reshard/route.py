"""Parameter reallocation: moving a tree of arrays from one placement's layout to another's.

A `Route` is a compiler. It looks at which part of every tensor each device holds and must hold,
chooses collectives or point-to-point messages that receive little more than what is missing
(`choose`), writes them out as a few programs (`spmd`), and replays these. Nothing goes through the
host, unlike with `jax.device_put`, and no byte moves where the layouts are the same.

Any two sets of devices will do: the same, reordered, one inside the other, overlapping, disjoint,
of one process or of many. A process takes part if it owns one of the devices; all processes call
the same routes in the same order.

Memory: tensors move in buckets, and the one but last must have arrived before the next leaves.
Tensors larger than a bucket are cut along a dimension that the move leaves alone, if they have one.

Sources: ReaL (Mei et al. 2024, arXiv:2406.14088, parameter reallocation).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxrl_eff.parallel import hlo_bytes
from jaxrl_eff.parallel.reshard import buckets
from jaxrl_eff.parallel.reshard.collectives import AllToAll, Exchange, Gather, Permute
from jaxrl_eff.parallel.reshard.layout import Bound, DeviceLayout, Network

BUCKET_BYTES = 256 << 20
IN_FLIGHT = 2  # buckets


@dataclasses.dataclass(frozen=True)
class Report:
    """What a route moves.

    Attributes:
        received: bytes that all devices receive together, as planned.
        minimum: bytes that they lack, which any way must move.
        seconds: estimated; `bound`: on this network no schedule is faster.
        steps: how many collectives of each kind, and copies of shards, move it.
        buckets: how many follow each other.
        peak_bytes: most bytes on one device: source, target, and what is under way.
        compiled: `received` counted on the compiled programs; None if not asked for.
    """

    received: float
    minimum: float
    seconds: float
    bound: float
    steps: dict[str, int]
    buckets: int
    peak_bytes: int
    compiled: float | None = None

    @property
    def nu(self) -> float:
        """Bytes received over the minimum; 1 if there is nothing to move."""
        received = self.received if self.compiled is None else self.compiled
        return received / self.minimum if self.minimum else 1.0 + received

    def __str__(self) -> str:
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.steps.items()) or "nothing"
        return (
            f"{self.received / 1e6:,.1f} MB received, {self.nu:.2f} x the minimum, by {kinds} in "
            f"{self.buckets} buckets; about {self.seconds * 1e3:.2f} ms, at least "
            f"{self.bound * 1e3:.2f} ms; at most {self.peak_bytes / 1e6:,.1f} MB a device"
        )


class Route:
    """A tree's way from one set of shardings to another, compiled on first use and replayed.

    Args:
        source, target: trees of shardings (`NamedSharding`, or of a single device), or of anything
            that has one. If the source's leaves have `shape` and `dtype` too, as arrays and
            `jax.ShapeDtypeStruct`s do, then `report` and `compile` need no more.
        dtype: what floating-point arrays become; they travel in the narrower of the two dtypes.
        donate: whether the source arrays may be consumed: each is deleted once its bucket is under
            way, unless the result shares its memory.
        fresh: whether the result must not share memory with the source, so that either may be
            donated later. Otherwise it does wherever a device keeps what it has.
        bucket_bytes: how much may be under way on one device at once, twice.
        network: rates for choosing among ways; those typical of this platform if None.
    """

    def __init__(
        self,
        source: Any,
        target: Any,
        *,
        dtype: Any = None,
        donate: bool = False,
        fresh: bool = False,
        bucket_bytes: int = BUCKET_BYTES,
        network: Network | None = None,
    ):
        leaves, self._treedef = jax.tree.flatten(source)
        self._source = [getattr(x, "sharding", x) for x in leaves]
        self._target = [getattr(x, "sharding", x) for x in self._treedef.flatten_up_to(target)]
        self.source = self._treedef.unflatten(self._source)
        self.target = self._treedef.unflatten(self._target)
        self._dtype = None if dtype is None else jnp.dtype(dtype)
        self._donate, self._fresh, self._bucket_bytes = donate, fresh, bucket_bytes
        self._network = network or Network.local()
        self._plan: buckets.Plan | None = None
        if all(hasattr(x, "shape") and hasattr(x, "dtype") for x in leaves):
            self._planned(leaves)

    @property
    def alias(self) -> bool:
        """Whether the result is the source itself: the same parts in the same memory."""
        if self._plan is not None:
            return all(m.kept for m in self._plan.moves)
        pairs = zip(self._source, self._target, strict=True)
        return self._dtype is None and not self._fresh and all(_alike(s, t) for s, t in pairs)

    def compile(self, tree: Any = None) -> "Route":
        """Compiles what the first call would.

        Args:
            tree: arrays or `jax.ShapeDtypeStruct`s; not needed if the source's shapes are known.
        """
        self.programs(tree)
        return self

    def programs(self, tree: Any = None) -> list[Any]:
        """The compiled programs that this process runs, in order and as often as it does."""
        plan = self._planned(self._leaves(tree))
        return [p for b in plan.buckets for p in b.parts * buckets.compile_all(b)]

    def report(self, tree: Any = None, *, compiled: bool = False) -> Report:
        """What is moved.

        Args:
            tree: as for `compile`.
            compiled: also count the bytes on the compiled programs. Those of one process only: it
                must own a device of each.
        """
        plan = self._planned(self._leaves(tree))
        bound = Bound(self._network)
        for m in plan.moves:
            bound.add(m.source, m.target, m.nbytes)
        steps, counted = _steps(plan)
        if compiled:
            programs = self.programs(tree)
            counted += math.fsum(map(hlo_bytes.received, programs))
            copies = {k: n for k, n in steps.items() if k == "copy"}
            steps = hlo_bytes.count(programs) | copies
        return Report(
            received=math.fsum(way.total * plan.moves[i].nbytes for i, way in plan.ways.items()),
            minimum=bound.minimum,
            seconds=math.fsum(plan.ways[members[0]].seconds for members in plan.classes),
            bound=bound.seconds,
            steps=steps,
            buckets=sum(b.parts for b in plan.buckets),
            peak_bytes=plan.peak_bytes,
            compiled=counted if compiled else None,
        )

    def __call__(self, tree: Any) -> Any:
        """Moves the tree. Returns at once if it fits two buckets; the rest is in the background.

        Args:
            tree: arrays of the source's shardings. In processes without a device of the source:
                arrays without shards, or anything with `shape` and `dtype`.

        Raises:
            ValueError: shapes or dtypes are not those that the route was made for.
        """
        leaves = self._treedef.flatten_up_to(tree)
        plan = self._planned(leaves)
        out = [
            buckets.wrapped(x, m) if m.kept else None
            for x, m in zip(leaves, plan.moves, strict=True)
        ]
        flow = buckets.UnderWay(IN_FLIGHT)
        for bucket in plan.buckets:
            moves = {i: plan.moves[i] for i in bucket.members}
            parts = {i: buckets.start(leaves[i], m) for i, m in moves.items()}
            if bucket.parts == 1:
                flow.wait()
                parts = buckets.run(bucket, parts)
                flow.add([list(held.values()) for held in parts.values()])
            else:
                (i,) = bucket.members
                parts = {i: buckets.run_in_parts(bucket, moves[i], parts[i], flow)}
            for i, m in moves.items():
                out[i] = buckets.finish(m, parts[i])
                if self._donate and isinstance(leaves[i], jax.Array) and not plan.shares(i):
                    leaves[i].delete()
        for i, m in enumerate(plan.moves):
            if out[i] is None:
                out[i] = buckets.empty(m)
        return self._treedef.unflatten(out)

    def _leaves(self, tree: Any) -> list[Any] | None:
        return None if tree is None else self._treedef.flatten_up_to(tree)

    def _planned(self, leaves: list[Any] | None) -> buckets.Plan:
        if self._plan is None:
            if leaves is None:
                raise ValueError("the route's shapes are not known yet: pass the tree.")
            ends = zip(leaves, self._source, self._target, strict=True)
            moves = [
                buckets.Move.of(x.shape, x.dtype, s, t, self._dtype, self._fresh)
                for x, s, t in ends
            ]
            self._plan = buckets.Plan.of(moves, self._bucket_bytes, self._network)
        for x, m in zip(leaves or (), self._plan.moves, strict=leaves is not None):
            if x.shape != m.shape or x.dtype != m.dtype:
                raise ValueError(
                    f"the route is for {m.dtype}{list(m.shape)}, not {x.dtype}{list(x.shape)}."
                )
        return self._plan


def _alike(a: Any, b: Any) -> bool:
    """Whether two shardings are one layout in one memory, whatever their axes are called."""
    if a == b:
        return True
    ranks = [len(s.spec) for s in (a, b) if isinstance(s, NamedSharding)]
    ndim = max(ranks, default=0)
    same = DeviceLayout.of(a, ndim).same(DeviceLayout.of(b, ndim))
    return same and buckets.memory(a) == buckets.memory(b)


def _steps(plan: buckets.Plan) -> tuple[dict[str, int], float]:
    """Planned collectives by kind, if every message is small; bytes of plain copies."""
    count: dict[str, int] = {}
    copied = 0.0
    for bucket in plan.buckets:
        for phase in bucket.phases:
            for i, pairs in zip(phase.members, phase.pairs, strict=False):
                moved = sum(a != b for b, a in pairs.items())
                count["copy"] = count.get("copy", 0) + moved * bucket.parts
                copied += plan.moves[i].nbytes / math.prod(plan.moves[i].target.counts) * moved
            for step in (step for item in phase.items for step in item.steps):
                kind = _KINDS.get(type(step))
                n = len(step.rounds) if isinstance(step, Exchange) else 1
                if kind is not None and n:
                    count[kind] = count.get(kind, 0) + n * bucket.parts
    return count, copied


_KINDS = {
    Gather: "all-gather",
    AllToAll: "all-to-all",
    Permute: "collective-permute",
    Exchange: "collective-permute",
}

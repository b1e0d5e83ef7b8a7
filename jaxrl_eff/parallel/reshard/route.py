"""Parameter reallocation: resharding a tree of arrays from one placement to another.

A `Route` compares the parts of every tensor that each device holds and needs, chooses collectives
or point-to-point messages that receive little more than what is missing (`choose`), compiles them
into a few programs, and replays these. Unlike with `jax.device_put`, nothing goes through the host,
and no bytes move where the layouts are equal.

The two sets of devices can be equal, reordered, nested, overlapping or disjoint, in one process or
many. A process participates if it owns one of the devices; all processes must call the same routes
in the same order.

Memory: tensors move in buckets, at most two of them in flight. Tensors larger than a bucket are cut
along a dimension that is sharded alike in source and target, if they have one.

Source: ReaL (Mei et al. 2024, arXiv:2406.14088, parameter reallocation).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxrl_eff.parallel.reshard import bucket_run, buckets
from jaxrl_eff.parallel.reshard.collectives import AllToAll, Exchange, Gather, Permute
from jaxrl_eff.parallel.reshard.layout import DeviceLayout, Network, missing

BUCKET_BYTES = 256 << 20
IN_FLIGHT = 2  # buckets


@dataclasses.dataclass(frozen=True)
class Report:
    """Traffic, time and memory of a route.

    Attributes:
        received: bytes that all devices together receive, as planned.
        minimum: bytes that the devices lack, a lower bound for any plan.
        seconds: estimated time.
        steps: number of collectives of each kind, assuming that messages fuse, and of shard copies.
        buckets: number of buckets.
        peak_bytes: peak bytes on one device: source, target and buckets in flight.
    """

    received: float
    minimum: float
    seconds: float
    steps: dict[str, int]
    buckets: int
    peak_bytes: int

    @property
    def nu(self) -> float:
        """Ratio of received bytes to the minimum; 1 if there is nothing to move."""
        return self.received / self.minimum if self.minimum else 1.0 + self.received

    def __str__(self) -> str:
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.steps.items()) or "nothing"
        return (
            f"{self.received / 1e6:,.1f} MB received, {self.nu:.2f} x the minimum, by {kinds} in "
            f"{self.buckets} buckets; about {self.seconds * 1e3:.2f} ms; at most "
            f"{self.peak_bytes / 1e6:,.1f} MB a device"
        )


class Route:
    """Transfer of a tree between two sets of shardings, compiled on first use and replayed.

    Args:
        source, target: trees of shardings (`NamedSharding` or `SingleDeviceSharding`), or of
            anything with a `sharding`. If the source's leaves also have `shape` and `dtype`, like
            arrays and `jax.ShapeDtypeStruct`s, `report` and `compile` need no tree.
        dtype: that floating-point arrays are cast to; they are sent in the narrower of the two
            dtypes. None: no cast.
        donate: delete each source array once its bucket is in flight, unless the result shares its
            memory.
        fresh: the result must not share memory with the source, so that either can be donated
            later. Otherwise it does where a device keeps a shard as it is.
        bucket_bytes: maximum bytes per device of a bucket; two buckets can be in flight.
        network: bandwidths and latencies for choosing a plan; None: those typical of this platform.

    Example:
        >>> from jaxrl_eff import Route
        >>> from jax.sharding import SingleDeviceSharding
        >>> tree = {"w": jnp.ones(2)}
        >>> device = SingleDeviceSharding(jax.devices()[0])
        >>> route = Route(tree, {"w": device}, dtype=jnp.bfloat16)
        >>> route(tree)["w"].dtype
        dtype(bfloat16)
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
        """True if the result is the source itself: the same shards in the same memory."""
        if self._plan is not None:
            return all(m.kept for m in self._plan.moves)
        pairs = zip(self._source, self._target, strict=True)
        return self._dtype is None and not self._fresh and all(_alike(s, t) for s, t in pairs)

    def compile(self, tree: Any = None) -> "Route":
        """Compiles the programs of a call in advance.

        Args:
            tree: arrays or `jax.ShapeDtypeStruct`s; not needed if the source's shapes are known.
        """
        self.programs(tree)
        return self

    def programs(self, tree: Any = None) -> list[Any]:
        """Compiled programs that this process runs, in order and with repetitions."""
        plan = self._planned(self._leaves(tree))
        return [p for b in plan.buckets for p in b.parts * bucket_run.compile_all(b)]

    def report(self, tree: Any = None) -> Report:
        """Report on the route's traffic, time and memory; `tree` as for `compile`."""
        plan = self._planned(self._leaves(tree))
        lacking = (s * m.nbytes for m in plan.moves for s in missing(m.source, m.target).values())
        return Report(
            received=math.fsum(way.total * plan.moves[i].nbytes for i, way in plan.ways.items()),
            minimum=math.fsum(lacking),
            seconds=math.fsum(plan.ways[members[0]].seconds for members in plan.classes),
            steps=_steps(plan),
            buckets=sum(b.parts for b in plan.buckets),
            peak_bytes=plan.peak_bytes,
        )

    def __call__(self, tree: Any) -> Any:
        """Moves the tree. Returns without blocking if it fits in two buckets.

        Args:
            tree: arrays with the source's shardings. In processes without a device of the source:
                arrays without shards, or anything with `shape` and `dtype`.

        Returns:
            the tree with the target's shardings.

        Raises:
            ValueError: shapes or dtypes differ from those that the route was made for.
        """
        leaves = self._treedef.flatten_up_to(tree)
        plan = self._planned(leaves)
        out = [
            bucket_run.wrapped(x, m) if m.kept else None
            for x, m in zip(leaves, plan.moves, strict=True)
        ]
        flow = bucket_run.UnderWay(IN_FLIGHT)
        for bucket in plan.buckets:
            moves = {i: plan.moves[i] for i in bucket.members}
            parts = {i: bucket_run.start(leaves[i], m) for i, m in moves.items()}
            if bucket.parts == 1:
                flow.wait()
                parts = bucket_run.run(bucket, parts)
                flow.add([list(held.values()) for held in parts.values()])
            else:
                (i,) = bucket.members
                parts = {i: bucket_run.run_in_parts(bucket, moves[i], parts[i], flow)}
            for i, m in moves.items():
                out[i] = bucket_run.finish(m, parts[i])
                if self._donate and isinstance(leaves[i], jax.Array) and not plan.shares(i):
                    leaves[i].delete()
        for i, m in enumerate(plan.moves):
            if out[i] is None:
                out[i] = bucket_run.empty(m)
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
    """True if two shardings have the same layout and memory kind, whatever their axis names."""
    if a == b:
        return True
    ranks = [len(s.spec) for s in (a, b) if isinstance(s, NamedSharding)]
    ndim = max(ranks, default=0)
    same = DeviceLayout.of(a, ndim).same(DeviceLayout.of(b, ndim))
    return same and buckets.memory(a) == buckets.memory(b)


def _steps(plan: buckets.Plan) -> dict[str, int]:
    count: dict[str, int] = {}
    for bucket in plan.buckets:
        for phase in bucket.phases:
            steps = [step for item in phase.items for step in item.steps]
            found = [("copy", sum(a != b for b, a in pairs.items())) for pairs in phase.pairs]
            for step in steps:
                n = len(step.rounds) if isinstance(step, Exchange) else 1
                found.append((_KINDS.get(type(step), ""), n))
            for kind, n in found:
                count[kind] = count.get(kind, 0) + n * bucket.parts
    return {kind: n for kind, n in count.items() if kind and n}


_KINDS = {
    Gather: "all-gather",
    AllToAll: "all-to-all",
    Permute: "collective-permute",
    Exchange: "collective-permute",
}

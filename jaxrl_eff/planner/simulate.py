"""The schedule of a plan: when each call, reallocation and transfer runs, step after step.

List scheduling over unrolled iterations, as in ReaL's simulator (Mei et al. 2024,
arXiv:2406.14088): the node that was ready first begins as soon as its devices are free. Extensions:

- a reallocation takes the devices of both placements, and is priced for that pair;
- a transfer delays its reader, and one over the network takes the network cards of both sides, so
  that transfers through one card wait for each other;
- a call of staleness s can use the weights of s updates ago: the version edge begins at iteration
  i - 1 - s, and s = 0 is synchronous training;
- the time of a step is the slope of the ends of iterations, not an end divided by their number;
- simulated devices that share cores slow each other down (`Cluster.shared_compute`).

`Simulator` caches prices, so that a search can evaluate many plans.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from jaxrl_eff.parallel.mesh import Placement
from jaxrl_eff.planner import list_schedule
from jaxrl_eff.planner.clusters import Cluster
from jaxrl_eff.planner.corrections import NONE, Corrections
from jaxrl_eff.planner.cost import Cost
from jaxrl_eff.planner.list_schedule import Edge, Node
from jaxrl_eff.planner.prices import Prices, Site, move_name, realloc_name
from jaxrl_eff.planner.problem import Plan, Problem
from jaxrl_eff.planner.transfer import realloc_bytes

WARMUP = 2
# Schedules can settle into a pattern of 2 iterations, with stale weights of up to 4.
ITERATIONS, STALE_ITERATIONS = 6, 12


@dataclasses.dataclass(frozen=True)
class Span:
    """One node of the schedule; times in seconds.

    Attributes:
        name: a call, "model->call" (reallocation) or "call->call" (transfer).
        kind: that of the call, or "realloc" or "move".
    """

    name: str
    iteration: int
    devices: tuple[int, ...]
    start: float | int
    end: float | int
    kind: str


class Group(NamedTuple):
    """Devices that hold and run the same, with the bytes of one of them."""

    devices: tuple[int, ...]
    static_bytes: float
    active_bytes: float
    busiest: str

    @property
    def bytes(self) -> float:
        return self.static_bytes + self.active_bytes


class Score(NamedTuple):
    """The values that a search compares.

    Attributes:
        seconds: of a step in the steady state.
        over_bytes: by how much the fullest device exceeds its memory; 0 if all fits.
    """

    seconds: float | int
    over_bytes: float | int


@dataclasses.dataclass(frozen=True)
class Simulation:
    """A plan's simulated run.

    Attributes:
        seconds, over_bytes: see `Score`.
        spans: of all simulated iterations, by start.
        groups: memory, by groups of devices with equal contents.
        costs: call -> its price.
        edges: reallocation or transfer -> seconds, for those that take any.
    """

    seconds: float | int
    over_bytes: float | int
    spans: tuple[Span, ...]
    groups: tuple[Group, ...]
    costs: Mapping[str, Cost]
    edges: Mapping[str, float | int]


class Simulator:
    """Prices and schedules plans of one problem on one cluster.

    Args:
        iterations: number over which the slope is taken, after warm-up; 0: 6, or 12 if a call can
            use stale weights.
    """

    def __init__(
        self,
        problem: Problem,
        cluster: Cluster,
        corrections: Corrections = NONE,
        *,
        iterations: int = 0,
    ):
        self.problem, self.cluster = problem, cluster
        self._prices = Prices(problem, cluster, corrections)
        works = problem.works
        self._names = [w.name for w in works]
        at = {name: i for i, name in enumerate(self._names)}
        writer = {k: i for i, w in enumerate(works) for k in w.writes}
        self._reads: list[list[tuple[int, float]]] = []
        for w in works:
            carried: dict[int, float] = {}
            for k in w.reads:
                if k in writer:
                    carried[writer[k]] = carried.get(writer[k], 0.0) + problem.edge_bytes.get(k, 0)
            self._reads.append(list(carried.items()))
        models = dict.fromkeys(w.model for w in works if w.model)
        self._home = {m: at[problem.home(m).name] for m in models}
        self._trains = {
            m: [i for i, w in enumerate(works) if w.model == m and w.kind == "train"]
            for m in models
        }
        anchor = next((i for i, w in enumerate(works) if w.kind == "train"), 0)
        self._anchor = next((i for i in (anchor, *range(len(works))) if works[i].model), anchor)
        stale = max((w.staleness for w in works), default=0)
        self._warm, self._stale = WARMUP + stale, stale
        # With staleness s the order of calls can repeat only every s + 1 iterations.
        steps = iterations or (STALE_ITERATIONS if stale else ITERATIONS)
        self._slope = -(-steps // (stale + 1)) * (stale + 1)
        # More than are measured, so that later iterations compete with the last for devices.
        self._count = self._warm + self._slope + 1 + stale
        self._host_bit = 1 << (cluster.devices + cluster.devices // cluster.domain)
        self._overlapping: dict[tuple[int, ...], list[list[int]]] = {}

    def cost(self, call: str, placement: Placement) -> Cost:
        """The call's price on a placement; see `cost.call_cost`."""
        return self._prices.call(self._names.index(call), self._prices.site(placement))

    # The graph of one iteration

    def _placed(self, plan: Plan) -> list[Site]:
        default, out = None, []
        for w in self.problem.works:
            p = plan.get(w.name)
            if p is None:
                if w.kind != "local":
                    raise ValueError(f"the plan has no placement for {w.name}; it has {[*plan]}.")
                default = default or plan[self._names[self._anchor]]
                p = default
            out.append(self._prices.site(p))
        return out

    def _graph(self, sites: list[Site]) -> tuple[list[Node], list[Edge]]:
        """Nodes and edges of one iteration: calls first, in the problem's order."""
        nodes, edges = [], []
        for i, (w, site) in enumerate(zip(self.problem.works, sites, strict=True)):
            mask = self._host_bit if w.host else site.mask
            seconds = self._prices.call(i, site).seconds
            nodes.append(Node(w.name, w.kind, seconds, mask, site.placement.devices))
        brought: dict[tuple[str, str, int, int], int] = {}
        for i, w in enumerate(self.problem.works):
            for j, bytes_ in self._reads[i]:
                self._add_transfer(nodes, edges, sites, j, i, bytes_)
            if w.model and self._trains[w.model]:
                self._add_weights(nodes, edges, sites, i, brought)
        return nodes, edges

    def _add_transfer(
        self,
        nodes: list[Node],
        edges: list[Edge],
        sites: list[Site],
        j: int,
        i: int,
        bytes_: float | int,
    ) -> None:
        """Call i waits for what call j writes; over the network its transfer is a node."""
        source, target = sites[j], sites[i]
        if source is target:
            edges.append(Edge(j, i, 0, 0.0))
            return
        seconds, crosses = self._prices.move(j, i, bytes_, source, target)
        if not crosses:
            edges.append(Edge(j, i, 0, seconds))
            return
        devices = (*source.placement.devices, *target.placement.devices)
        name = move_name(self._names[j], self._names[i])
        nodes.append(Node(name, "move", seconds, source.nics | target.nics, devices))
        edges += [Edge(j, len(nodes) - 1, 0, 0.0), Edge(len(nodes) - 1, i, 0, 0.0)]

    def _add_weights(
        self,
        nodes: list[Node],
        edges: list[Edge],
        sites: list[Site],
        i: int,
        brought: dict[tuple[str, str, int, int], int],
    ) -> None:
        """Call i waits for its model's update, and for weights in another layout to be brought.

        Args:
            brought: model, precision, layout and lag -> the reallocation that is there already.
        """
        w, site = self.problem.works[i], sites[i]
        trains = self._trains[w.model]
        if w.kind == "train":
            k = trains.index(i)
            edges.append(Edge(trains[k - 1], i, 0 if k else 1, 0.0))
            return
        edges.append(Edge(i, trains[0], 0, 0.0))  # the update can donate the weights
        source, lag = sites[self._home[w.model]], 1 + w.staleness
        if source.layout == site.layout:
            edges.append(Edge(trains[-1], i, lag, 0.0))
            return
        node = brought.get((w.model, w.weights, site.layout, lag))
        if node is None:
            seconds = self._prices.realloc(i, source, site)
            mask = source.mask | site.mask
            if source.nics != site.nics:
                mask |= source.nics | site.nics
            devices = tuple(dict.fromkeys((*source.placement.devices, *site.placement.devices)))
            node = brought[w.model, w.weights, site.layout, lag] = len(nodes)
            name = realloc_name(w.model, w.name)
            nodes.append(Node(name, "realloc", seconds, mask, devices))
            edges.append(Edge(trains[-1], node, lag, 0.0))
        edges.append(Edge(node, i, 0, 0.0))

    # Schedules

    def _overlaps(self, masks: tuple[int, ...]) -> list[list[int]]:
        found = self._overlapping.get(masks)
        if found is None:
            found = [[j for j, b in enumerate(masks) if a & b] for a in masks]
            if len(self._overlapping) > 100_000:
                self._overlapping.clear()
            self._overlapping[masks] = found
        return found

    def _times(self, nodes: list[Node], edges: list[Edge]) -> tuple[list[float], list[float]]:
        """Starts and ends: node k of iteration i at i * len(nodes) + k."""
        if self.cluster.shared_compute:
            return list_schedule.sharing(nodes, edges, self._count, self.cluster)
        return list_schedule.exclusive(nodes, edges, self._count, self._overlaps)

    def _cycle(self, end: list[float], nodes: list[Node]) -> float:
        last, size = self._warm + self._slope, len(nodes)
        a, b = (max(end[i * size : (i + 1) * size]) for i in (self._warm - 1, last - 1))
        slope = (b - a) / self._slope
        if not self._stale:
            return slope
        # An asynchronous schedule's period can exceed the window, so the slope is bounded below by
        # the load of the busiest device.
        parts: list[tuple[int, float]] = [(-1, 0.0)]
        for n in nodes:
            cut = [(p & n.mask, load + n.seconds) for p, load in parts if p & n.mask]
            parts = cut + [(p & ~n.mask, load) for p, load in parts if p & ~n.mask]
        return max(slope, *(load for _, load in parts))

    def _memory(self, sites: list[Site]) -> list[tuple[int, float, float, str]]:
        """(mask, static, active, busiest call) of every group of devices with equal contents."""
        held: dict[tuple, tuple[int, float]] = {}
        active: list[tuple[int, float, str]] = []
        for i, w in enumerate(self.problem.works):
            if w.model is None:
                continue
            site, price = sites[i], self._prices.call(i, sites[i])
            stored = {w.weights} | ({""} if self._home[w.model] == i else set())
            for key in ((w.model, precision, site.layout) for precision in sorted(stored)):
                if key not in held or held[key][1] < price.static_bytes:
                    held[key] = (site.mask, price.static_bytes)
            active.append((site.mask, price.active_bytes, w.name))
            source = sites[self._home[w.model]]
            if (w.weights or source.layout != site.layout) and self._trains[w.model]:
                extra = realloc_bytes(
                    self.problem, w.model, source.placement, site.placement, weights=w.weights
                )
                active.append((site.mask, extra, realloc_name(w.model, w.name)))
        groups = [(1 << self.cluster.devices) - 1]
        for mask in dict.fromkeys(m for m, *_ in active):
            groups = [part for g in groups for part in (g & mask, g & ~mask) if part]
        out = []
        for g in groups:
            most, name = 0.0, ""
            for mask, bytes_, call in active:
                if mask & g and bytes_ >= most:
                    most, name = bytes_, call
            static = sum(bytes_ for mask, bytes_ in held.values() if mask & g)
            if name:
                out.append((g, static, most, name))
        return out

    def _best(self, nodes: list[Node], edges: list[Edge]):
        """Seconds of a step, starts and ends.

        A call that can use stale weights can also use newer ones, and more freedom can make a list
        schedule worse, so every staleness up to the limit is tried.
        """
        found = []
        for stale in range(self._stale, -1, -1):
            now = edges
            if stale < self._stale:
                now = [e if e.lag <= 1 + stale else e._replace(lag=1 + stale) for e in edges]
            start, end = self._times(nodes, now)
            found.append((self._cycle(end, nodes), start, end))
        return min(found, key=lambda x: x[0]) if len(found) > 1 else found[0]

    def score(self, plan: Plan) -> Score:
        """Computes only the plan's time and memory, for a search."""
        sites = self._placed(plan)
        seconds, _, _ = self._best(*self._graph(sites))
        peak = max(static + active for _, static, active, _ in self._memory(sites))
        return Score(seconds, max(0.0, peak - self.cluster.memory_bytes))

    def run(self, plan: Plan) -> Simulation:
        """Computes the plan's schedule.

        Raises:
            ValueError: a call has no placement, or a device does not exist.
        """
        sites = self._placed(plan)
        nodes, edges = self._graph(sites)
        seconds, start, end = self._best(nodes, edges)
        spans = [
            Span(n.name, i, n.devices, start[i * len(nodes) + k], end[i * len(nodes) + k], n.kind)
            for i in range(self._count)
            for k, n in enumerate(nodes)
        ]
        groups = tuple(
            Group(_devices(mask), static, active, name)
            for mask, static, active, name in self._memory(sites)
        )
        peak = max(g.bytes for g in groups)
        priced = {n.name: n.seconds for n in nodes if n.kind in ("realloc", "move")}
        for e in edges:
            if e.delay:
                priced[move_name(nodes[e.writer].name, nodes[e.reader].name)] = e.delay
        return Simulation(
            seconds=seconds,
            over_bytes=max(0.0, peak - self.cluster.memory_bytes),
            spans=tuple(sorted(spans, key=lambda s: (s.start, s.end, s.iteration))),
            groups=groups,
            costs={n: self._prices.call(i, sites[i]) for i, n in enumerate(self._names)},
            edges=priced,
        )


def simulate(
    problem: Problem,
    plan: Plan,
    cluster: Cluster,
    corrections: Corrections = NONE,
    *,
    iterations: int = 0,
) -> Simulation:
    """Simulates one plan's schedule; `Simulator` is faster for many.

    Raises:
        ValueError: a call has no placement, or a device does not exist.

    Example:
        >>> from jaxrl_eff import Graph, LMConfig, Placement, clusters, core, logprobs, simulate
        >>> from jaxrl_eff.planner import works
        >>> sizes = dict(layers=16, width=2048, heads=16, kv_heads=4, head_dim=128, ffn=8192)
        >>> lm = LMConfig(vocab=32000, **sizes)
        >>> reads = "tokens position segment"
        >>> call = core.infer("ref_inf", of="ref", fn=logprobs(lm), reads=reads, writes="logp")
        >>> shape = jax.ShapeDtypeStruct((64, 1024), jnp.int32)
        >>> problem = works(Graph(reads, (call,)), {"ref": lm}, dict.fromkeys(reads.split(), shape))
        >>> cluster = clusters.parse("h100:8")
        >>> one, all_ = (Placement(tuple(range(n)), microbatches=8) for n in (1, 8))
        >>> slow, fast = (simulate(problem, {"ref_inf": p}, cluster) for p in (one, all_))
        >>> 4 < slow.seconds / fast.seconds < 8
        True
    """
    return Simulator(problem, cluster, corrections, iterations=iterations).run(plan)


def _devices(mask: int) -> tuple[int, ...]:
    return tuple(d for d in range(mask.bit_length()) if mask >> d & 1)

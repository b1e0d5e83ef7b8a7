"""The space of plans: legal meshes, strategies on a mesh, and pruning of both.

A *mesh* is a run of consecutive devices: whole hosts, or 2^k devices of one host that start at a
multiple of their number. A *strategy* says how a call is parallelized on a mesh: ReaL's (data,
tensor, stage), or (data, fsdp, tensor) for plans that this package executes. Meshes of one size are
alike, so a strategy is priced once per size (`candidates`), not once per mesh.

Mei et al. 2024, arXiv:2406.14088, Sec. 4. Left out: meshes of a torus that are not runs of devices.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxrl_eff.models import LMConfig
from jaxrl_eff.parallel.mesh import Placement
from jaxrl_eff.planner import packed_rows
from jaxrl_eff.planner.clusters import Cluster
from jaxrl_eff.planner.problem import Nodes, Problem, Work

TENSOR = (1, 2, 4, 8)


class Slice(NamedTuple):
    """The devices `start` to `start + count - 1`."""

    start: int
    count: int

    @property
    def stop(self) -> int:
        return self.start + self.count

    @property
    def devices(self) -> tuple[int, ...]:
        return tuple(range(self.start, self.stop))

    def overlaps(self, other: "Slice") -> bool:
        return self.start < other.stop and other.start < self.stop

    def __str__(self) -> str:
        return f"{self.start}-{self.stop - 1}" if self.count > 1 else str(self.start)


class Strategy(NamedTuple):
    """Sizes of the mesh axes."""

    stage: int
    data: int
    fsdp: int
    tensor: int
    seq: int = 1
    dcn: int = 1

    @property
    def without_nodes(self) -> "Strategy":
        """The strategy with the axis between nodes as a part of fsdp."""
        return self._replace(dcn=1, fsdp=self.dcn * self.fsdp)


LONG = 2048  # fewest tokens of a row that can be sharded over a sequence axis


def meshes(cluster: Cluster, smallest: int = 1) -> tuple[Slice, ...]:
    """Every legal mesh with at least `smallest` devices, small ones first."""
    out, size = [], 1
    while size < cluster.per_host:
        if size >= smallest:
            for host in range(0, cluster.devices, cluster.per_host):
                for start in range(host, host + cluster.per_host - size + 1, size):
                    out.append(Slice(start, size))
        size *= 2
    hosts = cluster.devices // cluster.per_host
    for n in range(1, hosts + 1):
        if n * cluster.per_host >= smallest:
            for first in range(hosts - n + 1):
                out.append(Slice(first * cluster.per_host, n * cluster.per_host))
    return tuple(out)


def divisors(n: int) -> list[int]:
    """Divisors of n, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def pipelined(count: int, per_host: int = 8) -> Iterator[Strategy]:
    """Yields ReaL's legal strategies of `count` devices: data, tensor and pipeline parallelism.

    A pipeline stage is a power of two of devices in one host, or whole hosts.
    """
    for tensor in TENSOR:
        if tensor > per_host or count % tensor:
            continue
        for stage in divisors(count // tensor):
            members = count // stage
            if members % per_host == 0 or (members < per_host and members & (members - 1) == 0):
                yield Strategy(stage, count // (tensor * stage), 1, tensor)


def sharded(count: int, per_host: int = 8) -> Iterator[Strategy]:
    """Yields executable strategies: data, fsdp and tensor parallelism, tensor within one host."""
    for tensor in TENSOR:
        if tensor <= per_host and count % tensor == 0:
            for fsdp in divisors(count // tensor):
                yield Strategy(1, count // (tensor * fsdp), fsdp, tensor)


def spread(found: Iterable[Strategy], length: int) -> Iterator[Strategy]:
    """Yields strategies in which some data-parallel devices become a sequence axis instead.

    Args:
        length: row length that `seq` must divide; 0: every size is allowed.
    """
    for s in found:
        for seq in divisors(s.data)[1:]:
            if length % seq == 0:
                yield s._replace(data=s.data // seq, seq=seq)


def strategies(
    count: int,
    *,
    executable: bool = True,
    per_host: int = 8,
    lm: LMConfig | None = None,
    length: int = 0,
    packed: bool = False,
    nodes: Nodes | None = None,
) -> tuple[Strategy, ...]:
    """Lists ways to parallelize a call on `count` devices.

    Args:
        count: devices of the mesh.
        executable: only what this package runs; otherwise ReaL's strategies too.
        per_host: devices of a host; tensor parallelism stays inside one.
        lm: leaves out what does not divide this model's heads, widths or layers.
        length: of rows whose tokens can be sharded over devices; 0: none can.
        packed: a schedule packs these rows, in parts of any length, and they are not pipelined.
        nodes: how the call sends its model between nodes, if it does; it is not pipelined then.
    """
    if nodes is not None:
        if count % nodes.count:
            return ()
        options = {"per_host": per_host, "length": length, "packed": packed}
        inside = strategies(count // nodes.count, **options)
        found = (s._replace(dcn=nodes.count) for s in inside if nodes.tensor or s.tensor == 1)
        return tuple(s for s in found if lm is None or _divides(lm, s))
    found: Iterable[Strategy] = sharded(count, per_host)
    if length >= LONG:
        found = itertools.chain(found, spread(sharded(count, per_host), 0 if packed else length))
    if not executable and not packed:
        found = itertools.chain(found, pipelined(count, per_host))
    found = dict.fromkeys(found)
    return tuple(s for s in found if lm is None or _divides(lm, s))


def _divides(lm: LMConfig, s: Strategy) -> bool:
    return (
        lm.heads % s.tensor == 0
        and lm.ffn % s.tensor == 0
        and lm.width % (s.dcn * s.fsdp) == 0
        and s.stage <= lm.layers
    )


def microbatches(work: Work, s: Strategy, most: int = 12) -> tuple[int, ...]:
    """Microbatch counts that the call's rows allow; empty if the rows do not divide at all.

    A generate call splits the prompts that it reads. Of many divisors, powers of two are kept. For
    a packed call the count sets the capacity, see `packed_rows`; rows need not divide by devices.
    """
    if work.packed is not None:
        if work.rows % work.minibatches or not packed_rows.fits(work, s.seq):
            return ()
        return (1,) if work.packed.capacity else tuple(2**i for i in range(most))
    rows = work.prompts if work.kind == "generate" and work.prompts else work.rows
    parts = s.dcn * s.data * s.fsdp * (work.minibatches if work.kind == "train" else 1)
    if rows % parts:
        return ()
    found = divisors(rows // parts)
    if len(found) > most:
        found = [d for d in found if d & (d - 1) == 0] + found[-1:]
    return tuple(dict.fromkeys(found))


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A priced strategy of one call on any mesh of `count` devices.

    Attributes:
        count, strategy, microbatches, offload: what makes a mesh a placement.
        seconds: of the call.
        static_bytes: per device, held all the time; `active_bytes`: while the call runs.
    """

    count: int
    strategy: Strategy
    microbatches: int
    offload: str
    seconds: float
    static_bytes: float
    active_bytes: float

    @property
    def bytes(self) -> float:
        """Memory of a device while the call runs."""
        return self.static_bytes + self.active_bytes

    @property
    def layout(self) -> tuple:
        """Key of where the model's parameters are stored on the mesh."""
        return (self.count, *self.strategy, self.offload)

    def at(self, start: int) -> Placement:
        """The placement on the mesh that begins at device `start`."""
        return _placement(self, start)


@functools.lru_cache(maxsize=1 << 18)
def _placement(c: Candidate, start: int) -> Placement:
    return placement(Slice(start, c.count), c.strategy, c.microbatches, c.offload)


def placement(where: Slice, s: Strategy, microbatches: int = 1, offload: str = "") -> Placement:
    """Builds a placement from its parts."""
    return Placement(
        where.devices,
        stage=s.stage,
        dcn=s.dcn,
        data=s.data,
        fsdp=s.fsdp,
        tensor=s.tensor,
        seq=s.seq,
        microbatches=microbatches,
        offload=offload,
    )


def candidates(
    problem: Problem,
    work: Work,
    cluster: Cluster,
    price: Callable[[Work, Placement], Any],
    *,
    smallest: int = 1,
    executable: bool = True,
    offloads: Sequence[str] = ("",),
) -> dict[int, tuple[Candidate, ...]]:
    """Prices every strategy of a call: mesh size -> candidates, nothing pruned.

    Larger microbatch counts are tried only while they save memory.

    Args:
        problem, work, cluster: the step, the call and the devices.
        price: the `cost.Cost` of a call on a placement.
        smallest: devices of the smallest mesh.
        executable: only what this package runs.
        offloads: what can stay in the host's memory: "", "params" (frozen roles), "opt" (trained).
    """
    role = problem.roles[work.model]
    out: dict[int, tuple[Candidate, ...]] = {}
    for count in dict.fromkeys(m.count for m in meshes(cluster, smallest)):
        found = []
        options = {"executable": executable, "per_host": cluster.per_host, "lm": role.lm}
        if work.kind == "train":
            options["nodes"] = role.nodes
        if work.kind in ("infer", "train"):
            options |= {"length": work.length, "packed": work.packed is not None}
        for s in strategies(count, **options):
            for offload in _offloads(problem, work, offloads):
                before = float("inf")
                for parts in microbatches(work, s):
                    where = placement(Slice(0, count), s, parts, offload)
                    cost = price(work, where)
                    held = cost.static_bytes + cost.active_bytes
                    if held >= before:
                        break
                    before = held
                    priced = cost.seconds, cost.static_bytes, cost.active_bytes
                    found.append(Candidate(count, s, parts, offload, *priced))
        out[count] = tuple(found)
    return out


def _offloads(problem: Problem, work: Work, allowed: Sequence[str]) -> tuple[str, ...]:
    """Offloads that apply to a call's model: frozen weights, or optimizer states."""
    trained = any(w.kind == "train" and w.model == work.model for w in problem.works)
    fit = {""} | ({"opt"} if work.kind == "train" else set() if trained else {"params"})
    return tuple(o for o in allowed if o in fit)


def pareto(found: Iterable[Candidate], *, moved: float | int = 0.0) -> tuple[Candidate, ...]:
    """Keeps candidates that no other of the same mesh size beats in both seconds and memory.

    Args:
        found: of one call and one mesh size.
        moved: most seconds that another layout of the model can cost other calls, through
            reallocation. A candidate of another layout must win by that much; infinity keeps the
            best of every layout.
    """
    kept: list[Candidate] = []
    for c in sorted(found, key=lambda c: (c.seconds, c.bytes, c.static_bytes)):
        beaten = any(
            k.bytes <= c.bytes
            and k.static_bytes <= c.static_bytes
            and k.seconds + (moved if k.layout != c.layout else 0.0) <= c.seconds
            for k in kept
        )
        if not beaten:
            kept.append(c)
    return tuple(kept)


def fitting(
    found: Mapping[int, Sequence[Candidate]], memory_bytes: float | int
) -> dict[int, tuple[Candidate, ...]]:
    """Candidates that fit into a device's memory by themselves; sizes without any are left out."""
    out = {n: tuple(c for c in cs if c.bytes <= memory_bytes) for n, cs in found.items()}
    return {n: cs for n, cs in out.items() if cs}

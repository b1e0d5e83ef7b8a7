"""A found plan for people: its table, its timeline and what it was compared with, as a page.

The page holds everything it shows and looks like a run's report. Its timeline has two steps of the
steady state, a row for every group of devices that do the same.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxrl_eff.cli.pages import page as frame
from jaxrl_eff.cli.pages import svg
from jaxrl_eff.cli.pages.devices import HOST, by_device, device_range
from jaxrl_eff.cli.pages.svg import GRAY, Bar, Row
from jaxrl_eff.parallel import Placement
from jaxrl_eff.planner import packed_rows
from jaxrl_eff.planner.clusters import GIB, Cluster
from jaxrl_eff.planner.problem import Problem
from jaxrl_eff.planner.search import Found
from jaxrl_eff.planner.simulate import WARMUP, Simulation, Span
from jaxrl_eff.train.console import number

# What seconds of a call are spent on, and its color.
PARTS = {
    "compute": ("products", 0),
    "memory": ("reading memory", 1),
    "tensor": ("tensor-parallel sums", 2),
    "data": ("gradients and gathered weights", 3),
    "seq": ("sequence exchange", 4),
    "offload": ("host memory", 4),
    "optimizer": ("optimizer", 5),
    "bubble": ("pipeline", 6),
    "pipeline": ("pipeline", 6),
    "overhead": ("starting", 7),
    "correction": ("measured correction", 7),
}
COLUMNS = ("call", "kind", "model", "devices", "mesh", "microbatches", "seconds", "memory")
_SMALL = 0.005  # of a step: transfers below this share are told together


class Planned(NamedTuple):
    """One stage's plan."""

    stage: str
    problem: Problem
    cluster: Cluster
    found: Found


# What the page and the command tell ------------------------------------------------------------


def table(plan: Mapping[str, Placement]) -> dict[str, dict[str, Any]]:
    """The plan as `config.plan` takes it: call -> fields of `Placement`, those that matter."""
    out = {}
    for call, p in plan.items():
        row: dict[str, Any] = {"devices": list(p.devices), "data": p.data}
        for field in ("stage", "dcn", "fsdp", "seq", "tensor", "microbatches"):
            if getattr(p, field) != 1:
                row[field] = getattr(p, field)
        if p.offload:
            row["offload"] = p.offload
        out[call] = row
    return out


def calls(planned: Planned) -> list[tuple[Any, ...]]:
    """A row of `COLUMNS` for every call of a model."""
    rows = []
    for w in planned.problem.works:
        if w.model is not None:
            p, cost = planned.found.plan[w.name], planned.found.schedule.costs[w.name]
            held = gib(cost.static_bytes + cost.active_bytes)
            where = (device_range(p.devices), _mesh(p), p.microbatches)
            model = f"{w.model}, {w.weights}" if w.weights else w.model
            rows.append((w.name, w.kind, model, *where, number(cost.seconds), held))
    return rows


def _mesh(p: Placement) -> str:
    """`data 8 × tensor 4`."""
    axes = " × ".join(f"{axis} {size}" for axis, size in p.axes.items() if size > 1)
    return (axes or "one device") + (f", {p.offload} in host memory" if p.offload else "")


def time_parts(schedule: Simulation, call: str) -> list[tuple[str, float]]:
    """(what for, share) of a call's seconds, largest first."""
    cost = schedule.costs[call]
    total = cost.seconds or 1.0
    shares: dict[str, float] = {}
    for k, v in cost.parts.items():
        name = PARTS[k][0]
        shares[name] = shares.get(name, 0.0) + v / total
    return sorted(shares.items(), key=lambda kv: -abs(kv[1]))


def moved(schedule: Simulation) -> list[tuple[str, float]]:
    """(name, seconds) of reallocations and transfers, small ones as one."""
    small = {k: v for k, v in schedule.edges.items() if v < _SMALL * schedule.seconds}
    out = [(k, v) for k, v in schedule.edges.items() if k not in small]
    if len(small) == 1:
        out += small.items()
    elif small:
        out.append((f"{len(small)} transfers", sum(small.values())))
    return out


def packed(planned: Planned) -> dict[str, str]:
    """Describes the calls whose rows a schedule packs; empty if there are none."""
    told = [packed_rows.describe(w) for w in planned.problem.works if w.packed is not None]
    if not told:
        return {}
    how = (
        "responses are guessed, from short ones to cut-off ones; schedules cut rows by length "
        "where the room ends, whatever the plan's microbatches"
    )
    return {"packed": f"{'; '.join(told)}; {how}"}


def gib(value: svg.Number) -> str:
    """Bytes as text."""
    for unit, name in ((GIB, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB")):
        if value >= 0.1 * unit:
            return f"{value / unit:.1f} {name}"
    return f"{value:.0f} B"


# Drawings -------------------------------------------------------------------------------------


def places(planned: Planned, spans: Sequence[Span]) -> list[Sequence[Any]]:
    """Devices of every span; calls that run on the host have a row of their own."""
    hosted = {w.name for w in planned.problem.works if w.host}
    return [[HOST] if s.name in hosted else s.devices for s in spans]


def two_steps(planned: Planned) -> list[Row]:
    """Two steps of the steady state, a row for every group of devices that do the same."""
    schedule, colors = planned.found.schedule, _colors(planned)
    begin = min(s.start for s in schedule.spans if s.iteration == WARMUP)
    end = begin + 2 * schedule.seconds
    shown = [s for s in schedule.spans if s.end > begin and s.start < end and s.end > s.start]

    def bar(s: Span) -> Bar:
        within = max(s.start, begin) - begin, min(s.end, end) - begin
        title = f"{s.name}, step {s.iteration}: {number(s.end - s.start)} s"
        if s.kind in ("realloc", "move"):
            return Bar(*within, s.kind, title, thin=s.kind == "move")
        faint = 0.72 if s.iteration % 2 != WARMUP % 2 else 1.0
        return Bar(*within, colors.get(s.name, GRAY), title, s.name, faint)

    groups = by_device(places(planned, shown))
    return [Row(label, [bar(shown[i]) for i in which]) for label, which in groups]


def _colors(planned: Planned) -> dict[str, int]:
    return {w.name: i for i, w in enumerate(planned.problem.works)}


def _timeline(planned: Planned) -> str:
    step = planned.found.schedule.seconds
    drawn = svg.bars(two_steps(planned), end=2 * step, seconds=True, lines=[step], pitch=40)
    keys = "<div class=keys>striped: weights reallocated; thin: arrays between hosts</div>"
    return frame.wide(drawn) + frame.legend(_colors(planned)) + keys


def _spent(planned: Planned) -> str:
    schedule, rows, seen = planned.found.schedule, [], {}
    order = list(PARTS)
    for w in planned.problem.works:
        cost, parts = schedule.costs[w.name], []
        for k, seconds in sorted(cost.parts.items(), key=lambda kv: order.index(kv[0])):
            name, color = PARTS[k]
            if seconds > 0:
                parts.append((color, seconds, f"{name}: {number(seconds)} s"))
                if seconds > _SMALL * schedule.seconds:
                    seen[name] = color
        rows.append(svg.stacked(w.name, parts, f"{number(cost.seconds)} s"))
    for name, seconds in moved(schedule):
        told = f"{number(seconds)} s"
        rows.append(svg.stacked(name, [(GRAY, seconds, told)], told))
    return frame.wide(svg.bars(rows, high=18, pitch=26)) + frame.legend(seen)


def _rules(planned: Planned) -> str:
    found = planned.found
    others = [
        (name, said.seconds if isinstance(said, Simulation) else said)
        for name, said in found.heuristics.items()
    ]
    own = ("this plan", found.schedule.seconds)
    return frame.compared(own, others, ("bound", found.bound.seconds))


def _memory(planned: Planned) -> str:
    capacity, rows = planned.cluster.memory_bytes, []
    for g in planned.found.schedule.groups:
        held = [(0, g.static_bytes, f"always: {gib(g.static_bytes)}"),
                (1, g.active_bytes, f"{g.busiest}: {gib(g.active_bytes)}")]  # fmt: skip
        after = f"{gib(g.bytes)}, {g.bytes / capacity:.0%} of a device; most in {g.busiest}"
        rows.append(svg.stacked(device_range(g.devices), held, after))
    keys = frame.legend({"models and optimizers, always": 0, "while the largest call runs": 1})
    return frame.wide(svg.bars(rows, high=18, pitch=26)) + keys


def _search(found: Found) -> str:
    """The best plan's seconds, from the first plan on that is within three times the last."""
    seconds = found.schedule.seconds
    trace = [(n, best) for n, best in found.trace if best < 3 * seconds]
    trace.append((found.evaluated, seconds))
    return frame.charts([frame.figure("seconds of the best plan, by plans tried", {"": trace})])


# The page -------------------------------------------------------------------------------------


def page(title: str, plans: Sequence[Planned]) -> str:
    """A page with a section for every stage."""
    cluster = plans[0].cluster
    lead = (
        f"{cluster.name}: {cluster.devices} devices, {cluster.per_host} a host, "
        f"{gib(cluster.memory_bytes)} each. Predicted by a cost model; nothing was run."
    )
    return frame.whole(title, frame.head(title, lead), *map(_stage, plans))


def _stage(planned: Planned) -> str:
    colors = _colors(planned)
    rows = [(frame.named(name, colors[name]), *row) for name, *row in calls(planned)]
    return frame.section(
        planned.stage,
        _facts(planned.found),
        "<h3>Plan</h3>",
        frame.table(COLUMNS, rows, right=3),
        *(frame.note(f"{said}.") for said in packed(planned).values()),
        "<h3>Two steps, by device</h3>",
        _timeline(planned),
        "<h3>Where the time goes</h3>",
        _spent(planned),
        "<h3>Against plans made by rule</h3>",
        _rules(planned),
        "<h3>Memory of a device</h3>",
        _memory(planned),
        "<h3>Search</h3>",
        _search(planned.found),
    )


def _facts(found: Found) -> str:
    schedule = found.schedule
    fullest = max(schedule.groups, key=lambda g: g.bytes)
    rules = [s.seconds for s in found.heuristics.values() if isinstance(s, Simulation)]
    said = "proven: no plan is faster" if found.proven else f"{found.gap:.1%} above the bound"
    where = f"of the fullest devices, {device_range(fullest.devices)}"
    rows = [
        ("step", f"{number(schedule.seconds)} s", "predicted"),
        ("memory", gib(fullest.bytes), where),
        ("certificate", said, found.bound.reason),
        ("search", f"{found.evaluated:,} plans", f"in {found.seconds:.1f} s"),
    ]
    if rules:
        rows.insert(1, ("gain", f"{min(rules) / schedule.seconds:.2f}×", "over the best rule"))
    return frame.facts(rows)

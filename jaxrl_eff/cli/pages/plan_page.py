"""A found plan for people: its table and its timeline, as a page.

The page holds everything it shows and looks like a run's report. Its timeline has two steps of the
steady state, a row for every group of devices that do the same.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxrl_eff.cli.pages import svg
from jaxrl_eff.cli.pages.page import figure, legend, swatch, whole
from jaxrl_eff.cli.pages.svg import escaped
from jaxrl_eff.parallel import Placement
from jaxrl_eff.planner import packed_rows
from jaxrl_eff.planner.clusters import GIB, Cluster
from jaxrl_eff.planner.problem import Problem
from jaxrl_eff.planner.search import Found
from jaxrl_eff.planner.simulate import WARMUP, Simulation, Span
from jaxrl_eff.train.console import number

WIDTH, ROW, BAR, LANE = 1000, 40, 26, 5  # of the timeline, in its own units
_CHARACTER = 6.4

# What seconds of a call are spent on, and the palette's colour for it.
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
_SMALL = 0.005  # of a step: transfers below this share are told together


class Planned(NamedTuple):
    """One stage's plan."""

    stage: str
    problem: Problem
    cluster: Cluster
    found: Found


def table(plan: Mapping[str, Placement]) -> dict[str, dict[str, Any]]:
    """The plan as `config.plan` takes it: call -> fields of `Placement`, those that matter."""
    out = {}
    for call, p in plan.items():
        row: dict[str, Any] = {"devices": list(p.devices), "data": p.data}
        for field in ("stage", "dcn", "fsdp", "seq", "tensor", "microbatches"):
            if getattr(p, field) != 1:
                row[field] = getattr(p, field)
        if getattr(p, "offload", ""):
            row["offload"] = p.offload
        out[call] = row
    return out


def mesh(p: Placement) -> str:
    """`data 8 × tensor 4`."""
    axes = " × ".join(f"{axis} {size}" for axis, size in p.axes.items() if size > 1)
    waits = getattr(p, "offload", "")
    return (axes or "one device") + (f", {waits} in host memory" if waits else "")


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


# The timeline ---------------------------------------------------------------------------------


_STRIPES = """<defs><pattern id="stripes" width="6" height="6" patternUnits="userSpaceOnUse"
 patternTransform="rotate(45)"><path class="stripe" d="M0 0V6"/></pattern></defs>"""


class Bar(NamedTuple):
    """A span as it is drawn: in which row and lane, from when to when."""

    row: int
    lane: str  # "call" or "move"
    span: Span
    start: float
    end: float


def bars(schedule: Simulation, hosted: Sequence[str] = ()) -> tuple[list[str], list[Bar]]:
    """Row labels, and what happens in two steps of the steady state.

    Args:
        hosted: calls that run on the host; they have a row of their own.
    """
    begin = min(s.start for s in schedule.spans if s.iteration == WARMUP)
    end = begin + 2 * schedule.seconds
    shown = [s for s in schedule.spans if s.end > begin and s.start < end and s.end > s.start]
    labels, where = device_rows(shown, hosted)
    out = []
    for i, s in enumerate(shown):
        lane = "move" if s.kind == "move" else "call"
        for row in where[i]:
            out.append(Bar(row, lane, s, max(s.start, begin) - begin, min(s.end, end) - begin))
    return labels, out


def device_rows(spans: Sequence[Span], hosted: Sequence[str]) -> tuple[list[str], list[list[int]]]:
    """Labels of the rows, and the rows of every span; devices with equal spans share one."""
    devices = sorted({d for s in spans for d in s.devices})
    does: dict[int, list[int]] = {d: [] for d in devices}
    host: list[int] = []
    for i, s in enumerate(spans):
        if s.name in hosted:
            host.append(i)
            continue
        for d in s.devices:
            does[d].append(i)
    groups: dict[tuple[int, ...], list[int]] = {}
    for d in devices:
        groups.setdefault(tuple(does[d]), []).append(d)
    labels, where = [], [[] for _ in spans]
    for which, members in [*groups.items(), *([(tuple(host), ["host"])] if host else [])]:
        for i in which:
            where[i].append(len(labels))
        labels.append(svg.device_range(members))
    return labels, where


def timeline(planned: Planned) -> str:
    """The SVG of two steps."""
    schedule, works = planned.found.schedule, planned.problem.works
    colors = {w.name: i for i, w in enumerate(works)}
    labels, drawn = bars(schedule, [w.name for w in works if w.host])
    total = 2 * schedule.seconds
    left = max(len(label) for label in labels) * _CHARACTER + 14
    scale = (WIDTH - left - 16) / total
    bottom = 12 + ROW * len(labels)
    parts = [_STRIPES]
    marks = svg.ticks(0.0, total, 8)
    step = marks[1] - marks[0] if len(marks) > 1 else total
    for tick in marks:
        x, last = left + tick * scale, tick == marks[-1]
        parts.append(f'<path class="grid" d="M{x:.1f} 4V{bottom}"/>')
        anchor = "end" if x > WIDTH - 30 else "middle"
        text = _seconds(tick, step) + (" s" if last else "")
        parts.append(svg.label(x, bottom + 15, text, anchor))
    x = left + schedule.seconds * scale
    parts.append(f'<path class="next" d="M{x:.1f} 4V{bottom}"/>')
    for i, label in enumerate(labels):
        parts.append(svg.label(left - 8, 8 + ROW * i + 17, label, "end"))
    for bar in drawn:
        parts.append(_bar(bar, colors, left, scale))
    return svg.svg_of("timeline", bottom + 22, parts, width=WIDTH)


def _bar(bar: Bar, colors: Mapping[str, int], left: float, scale: float) -> str:
    s = bar.span
    x, wide = left + bar.start * scale, max((bar.end - bar.start) * scale, 0.6)
    wide = min(wide, WIDTH - 4 - x)
    y = 8 + ROW * bar.row + (BAR + 2 if bar.lane == "move" else 0)
    high = LANE if bar.lane == "move" else BAR
    told = f"{s.name}, step {s.iteration}: {number(s.end - s.start)} s"
    style = f"fill:{svg.color(colors.get(s.name, 7))}"
    rect = f'<rect x="{x:.2f}" y="{y}" width="{wide:.2f}" height="{high}" rx="2"'
    if s.kind == "realloc":
        shape = f'{rect} class="realloc"/>'
    elif s.kind == "move":
        shape = f'{rect} class="move"/>'
    else:
        faint = ' opacity="0.72"' if s.iteration % 2 != WARMUP % 2 else ""
        shape = f'{rect} style="{style}"{faint}/>'
    text = ""
    if s.kind not in ("realloc", "move") and len(s.name) * _CHARACTER + 10 <= wide:
        text = svg.label(x + wide / 2, y + 17, s.name, "middle", "on")
    return f"<g><title>{escaped(told)}</title>{shape}{text}</g>"


def _seconds(value: svg.Number, step: svg.Number) -> str:
    return f"{value:.0f}" if step >= 1 else f"{value:.{max(1, -_exponent(step))}f}"


def _exponent(value: svg.Number) -> int:
    return int(f"{value:e}".partition("e")[2])


# Bars of shares -------------------------------------------------------------------------------


def stacked(rows: Sequence[tuple[str, Sequence[tuple[int, float, str]], str]]) -> str:
    """An SVG of one bar a row: (label, segments of (colour, length, told), what stands behind)."""
    left = max(len(label) for label, _, _ in rows) * _CHARACTER + 14
    right = max(len(after) for _, _, after in rows) * _CHARACTER + 16
    longest = max((sum(n for _, n, _ in parts) for _, parts, _ in rows), default=0.0) or 1.0
    scale = (WIDTH - left - right) / longest
    out = []
    for i, (label, parts, after) in enumerate(rows):
        y, x = 4 + 26 * i, left
        out.append(svg.label(left - 8, y + 13, label, "end"))
        for color, length, told in parts:
            wide = length * scale
            if wide > 0:
                out.append(
                    f"<g><title>{escaped(told)}</title>"
                    f'<rect x="{x:.2f}" y="{y}" width="{wide:.2f}" height="18" '
                    f'style="fill:{svg.color(color)}"/></g>'
                )
            x += wide
        out.append(svg.label(x + 8, y + 13, after, "start"))
    return svg.svg_of("timeline", 8 + 26 * len(rows), out, width=WIDTH)


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
        rows.append((w.name, parts, f"{number(cost.seconds)} s"))
    for name, seconds in moved(schedule):
        rows.append((name, [(7, seconds, f"{number(seconds)} s")], f"{number(seconds)} s"))
    return f"<div class=wide>{stacked(rows)}</div>{legend(seen)}"


def _rules(planned: Planned) -> str:
    found = planned.found
    best = found.schedule.seconds
    rows = [("this plan", [(2, best, "")], f"{number(best)} s")]
    for name, said in found.heuristics.items():
        if isinstance(said, Simulation):
            after = f"{number(said.seconds)} s, {said.seconds / best:.2f}×"
            rows.append((name, [(7, min(said.seconds, 6 * best), "")], after))
        else:
            rows.append((name, [], said))
    rows.append(("bound", [(0, found.bound.seconds, "")], f"{number(found.bound.seconds)} s"))
    note = "<p class=dim>Bars end at six times the plan.</p>" if _longer(found) else ""
    return f"<div class=wide>{stacked(rows)}</div>{note}"


def _longer(found: Found) -> bool:
    said = [s for s in found.heuristics.values() if isinstance(s, Simulation)]
    return any(s.seconds > 6 * found.schedule.seconds for s in said)


def _memory(planned: Planned) -> str:
    room = planned.cluster.memory_bytes
    rows = []
    for g in planned.found.schedule.groups:
        held = [(0, g.static_bytes, f"always: {_gib(g.static_bytes)}"),
                (1, g.active_bytes, f"{g.busiest}: {_gib(g.active_bytes)}")]  # fmt: skip
        after = f"{_gib(g.bytes)}, {g.bytes / room:.0%} of a device; most in {g.busiest}"
        rows.append((svg.device_range(g.devices), held, after))
    keys = legend({"models and optimizers, always": 0, "while the largest call runs": 1})
    return f"<div class=wide>{stacked(rows)}</div>{keys}"


# The page -------------------------------------------------------------------------------------


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


def page(title: str, plans: Sequence[Planned]) -> str:
    """A page with a section for every stage."""
    cluster = plans[0].cluster
    lead = (
        f"{cluster.name}: {cluster.devices} devices, {cluster.per_host} a host, "
        f"{_gib(cluster.memory_bytes)} each. Predicted by a cost model; nothing was run."
    )
    head = f"<header><h1>{escaped(title)}</h1><p class=lead>{escaped(lead)}</p></header>"
    body = "\n".join([head, *(_stage(p) for p in plans)])
    return whole(title, body, style=_STYLE)


def _stage(planned: Planned) -> str:
    found, schedule = planned.found, planned.found.schedule
    fullest = max(schedule.groups, key=lambda g: g.bytes)
    rules = [s.seconds for s in found.heuristics.values() if isinstance(s, Simulation)]
    said = "proven: no plan is faster" if found.proven else f"{found.gap:.1%} above the bound"
    facts = [
        ("step", f"{number(schedule.seconds)} s", "predicted"),
        (
            "memory",
            _gib(fullest.bytes),
            f"of the fullest devices, {svg.device_range(fullest.devices)}",
        ),
        ("certificate", said, found.bound.reason),
        ("search", f"{found.evaluated:,} plans", f"in {found.seconds:.1f} s"),
    ]
    if rules:
        facts.insert(1, ("gain", f"{min(rules) / schedule.seconds:.2f}×", "over the best rule"))
    cells = "".join(
        f"<div><dt>{escaped(a)}</dt><dd>{escaped(b)}</dd><p>{escaped(c)}</p></div>"
        for a, b, c in facts
    )
    works = [w for w in planned.problem.works if w.model is not None]
    colors = {w.name: i for i, w in enumerate(planned.problem.works)}
    rows = []
    for w in works:
        p, cost = found.plan[w.name], schedule.costs[w.name]
        words = (w.kind, w.model, svg.device_range(p.devices), mesh(p))
        figures = (
            p.microbatches,
            number(cost.seconds),
            _gib(cost.static_bytes + cost.active_bytes),
        )
        rows.append(
            f"<tr><td>{swatch(colors[w.name])}{escaped(w.name)}</td>"
            + "".join(f"<td>{escaped(x)}</td>" for x in words)
            + "".join(f"<td class=n>{escaped(x)}</td>" for x in figures)
            + "</tr>"
        )
    names = ("call", "kind", "model", "devices", "mesh")
    heads = "".join(f"<th>{h}</th>" for h in names)
    heads += "".join(f"<th class=n>{h}</th>" for h in ("microbatches", "seconds", "memory"))
    keys = legend({w.name: i for i, w in enumerate(planned.problem.works)})
    keys += "<div class=keys>striped: weights reallocated; thin: arrays between hosts</div>"
    note = "".join(f"<p class=dim>{escaped(said)}.</p>" for said in packed(planned).values())
    # From the first plan that fits on; before it the search has little to show.
    trace = [(n, seconds) for n, seconds in found.trace if seconds < 3 * schedule.seconds]
    trace.append((found.evaluated, schedule.seconds))
    curve = figure("seconds of the best plan, by plans tried", {"": trace})
    return f"""<section><h2>{escaped(planned.stage)}</h2><dl class=facts>{cells}</dl>
<h3>Plan</h3><div class=wide><table><tr>{heads}</tr>{"".join(rows)}</table></div>{note}
<h3>Two steps, by device</h3><div class=wide>{timeline(planned)}</div>{keys}
<h3>Where the time goes</h3>{_spent(planned)}
<h3>Against plans made by rule</h3>{_rules(planned)}
<h3>Memory of a device</h3>{_memory(planned)}
<h3>Search</h3><div class=charts>{curve}</div></section>"""


# For Perfetto and chrome://tracing ------------------------------------------------------------


def _gib(value: svg.Number) -> str:
    """Bytes as text."""
    for unit, name in ((GIB, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB")):
        if value >= 0.1 * unit:
            return f"{value / unit:.1f} {name}"
    return f"{value:.0f} B"


_STYLE = """
.next { stroke: var(--dim); stroke-dasharray: 4 4; fill: none; }
.stripe { stroke: var(--fg); stroke-width: 4; opacity: .55; }
.realloc { fill: url(#stripes); } .move { fill: var(--dim); }
.facts > div { max-width: 260px; }
"""

"""The page of a run: result, curves, plan, the calls of a step over time, samples, config.

It reads what a run writes (metrics.jsonl, samples.jsonl, and result, plan, timeline and config as
.json), and says what is absent, so a run that was cut short has a page as well.
"""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrl_eff import secret
from jaxrl_eff.cli.pages import curves, page
from jaxrl_eff.cli.pages.devices import HOST, by_device, device_range
from jaxrl_eff.cli.pages.page import Colors
from jaxrl_eff.cli.pages.samples import answers
from jaxrl_eff.cli.pages.svg import GRAY, Bar, Html, Row, bars, escaped
from jaxrl_eff.train import writer
from jaxrl_eff.train.console import clock, is_number, number

FILES = (
    "metrics.jsonl", "samples.jsonl", "result.json", "plan.json", "timeline.json", "config.json",
)  # fmt: skip


def draw(workdir: Path) -> str:
    """The page of a run's directory, as HTML.

    Raises:
        FileNotFoundError: no such directory.
        ValueError: the directory holds nothing that a run writes.
    """
    if not workdir.is_dir():
        raise FileNotFoundError(f"{workdir} is not a directory; give the --workdir of a run.")
    if not any((workdir / name).is_file() for name in FILES):
        raise ValueError(f"{workdir} holds no run: none of {', '.join(FILES)} is in it.")
    notes: list[str] = []
    steps = [r for r in writer.read(workdir / "metrics.jsonl") if _is_step(r)]
    samples = [r for r in writer.read(workdir / "samples.jsonl") if isinstance(r.get("step"), int)]
    plan = _document(workdir, "plan.json", notes)
    timeline = _document(workdir, "timeline.json", notes)
    result = _document(workdir, "result.json", notes)
    config = _document(workdir, "config.json", notes)
    if not steps:
        notes.append("metrics.jsonl holds no step yet: no curves")
    if not samples:
        notes.append("samples.jsonl holds no sample: none is shown")
    colors = _part("colors", notes, _colors, plan, timeline, steps) or {}
    body = [
        _part("head", notes, _head, workdir, result, steps),
        _part("result.json", notes, _summary, result),
        _part("curves", notes, curves.curves, steps, colors),
        _part("plan.json", notes, _plan, plan, colors),
        _part("timeline.json", notes, _timeline, timeline, colors),
        _part("calibration.json", notes, _calibration, workdir, notes),
        _part("schedule.json", notes, _schedule, workdir, notes, steps),
        _part("samples.jsonl", notes, answers, samples),
        _config(config),
    ]
    body.append(page.section("Not here", _items(notes)))
    return page.whole(workdir.resolve().name, *body)


# Reading --------------------------------------------------------------------------------------


def _document(workdir: Path, name: str, notes: list[str]) -> dict[str, Any]:
    path = workdir / name
    if not path.is_file():
        notes.append(f"{name} is absent")
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        notes.append(f"{name} cannot be read ({error})")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{name} holds a {type(value).__name__} where an object is expected")
        return {}
    return value


def _is_step(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("step"), int) and isinstance(row.get("values"), dict)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _calls(plan: Mapping[str, Any]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """stage -> call -> placement; other values are left out."""
    return {
        stage: {call: p for call, p in _mapping(calls).items() if isinstance(p, Mapping)}
        for stage, calls in plan.items()
    }


def _spans(timeline: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """stage -> spans; other values are left out, and stages without a span."""
    needed, found = {"call", "start", "end"}, {}
    for stage, spans in timeline.items():
        if isinstance(spans, list):
            found[stage] = [s for s in spans if isinstance(s, Mapping) and needed <= set(s)]
    return {stage: spans for stage, spans in found.items() if spans}


def _colors(plan: Any, timeline: Any, steps: Sequence[Mapping[str, Any]]) -> dict[str, Colors]:
    """stage -> call -> index of its color: a call looks the same in every part of the page."""
    found: dict[str, dict[str, int]] = {}

    def add(stage: str, calls: Iterable[str]) -> None:
        own = found.setdefault(stage, {})
        for call in calls:
            own.setdefault(call, len(own))

    for stage, calls in _calls(plan).items():
        add(stage, calls)
    for stage, spans in _spans(timeline).items():
        add(stage, (str(s["call"]) for s in spans))
    for row in steps:
        add(str(row.get("stage", "")), row.get("seconds") or ())
    return found


def _part(name: str, notes: list[str], draw: Callable[..., Any], *given: Any) -> Any:
    """Calls `draw` on files that may hold anything; adds a note in its place where that fails."""
    try:
        return draw(*given)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        notes.append(f"{name} cannot be drawn ({type(error).__name__}: {error})")
        return ""


# Parts of the page ----------------------------------------------------------------------------


def _head(workdir: Path, result: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> str:
    badge, passed = "", result.get("passed")
    if isinstance(passed, bool):
        word = "PASS" if passed else "FAIL"
        badge = f' <span class="{word.lower()}">{word}</span>'
    title = Html(escaped(workdir.resolve().name) + badge)
    return page.head(title, _expected(result), page.note(workdir.resolve()), _facts(steps))


def _expected(result: Mapping[str, Any]) -> str:
    """Describes the conditions on a metric in a sentence."""
    expected, results = (_mapping(result.get(k)) for k in ("expected", "results"))
    metric = expected.get("metric")
    if not metric:
        return ""
    wanted = []
    if is_number(expected.get("at_least")):
        wanted.append(f"at least {expected['at_least']:g}")
    if expected.get("rises_over"):
        wanted.append(f"a rise of {expected.get('rise', 0):g} over {expected['rises_over']}")
    shown = f" {number(results[metric])}" if is_number(results.get(metric)) else ""
    return f"{metric}{shown}; expected {' and '.join(wanted) or 'nothing of it'}"


def _facts(steps: Sequence[Mapping[str, Any]]) -> str:
    if not steps:
        return ""
    told = []
    for stage, rows in curves.by_stage(steps).items():
        trained = [row for row in rows if row.get("seconds")] or rows  # not mere evaluations
        count = len({row["step"] for row in trained})
        told.append((stage or "steps", f"{count} step{'s' * (count != 1)}", _outcome(rows)))
    times = [r["time"] for r in steps if isinstance(r.get("time"), int | float)]
    if len(times) > 1:
        told.append(("time", clock(times[-1] - times[0]), "from first to last step"))
    mfu = [r["mfu"] for r in steps if isinstance(r.get("mfu"), float)]
    if mfu:
        told.append(("utilization", f"{statistics.median(mfu):.0%}", "of the peak, median"))
    return page.facts(told)


def _outcome(rows: Sequence[Mapping[str, Any]]) -> str:
    """Describes the beginning and end of the stage's first-named curve."""
    names = sorted({name for row in rows for name in row["values"]}, key=curves.rank)
    names = [name for name in names if 0 < curves.rank(name)[0] < len(curves.FIRST)]
    if not names:
        return ""
    rewarded = [n for n in names if n.rsplit("/", 1)[-1] in ("reward", "score")]
    name = rewarded[0] if rewarded else names[0]
    values = [row["values"][name] for row in rows if name in row["values"]]
    tenth = max(1, len(values) // 10)
    first, last = statistics.fmean(values[:tenth]), statistics.fmean(values[-tenth:])
    return f"{name.rsplit('/', 1)[-1]} {number(first)} → {number(last)}"


def _summary(result: Mapping[str, Any]) -> str:
    own = ("passed", "expected", "results", "data", "notes")
    told = list(_mapping(result.get("results")).items())
    told += [(k, v) for k, v in result.items() if k not in own and v is not None]
    return page.section("Result", page.pairs([*told, *_of_data(result)]))


def _of_data(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Describes what became of each stage's examples."""
    out = []
    for name in ("data", "notes"):
        for stage, value in _mapping(result.get(name)).items():
            if isinstance(value, Mapping):
                told = ", ".join(f"{k} {v:g}" for k, v in value.items() if is_number(v))
                out.append((f"{name} of {stage}", told))
            elif isinstance(value, list):
                out += [(f"note on {stage}", str(note)) for note in value]
    return out


def _plan(plan: Mapping[str, Any], colors: Mapping[str, Colors]) -> str:
    rows, stages = [], _calls(plan)
    moves = any(p.get("reallocated_bytes") for calls in stages.values() for p in calls.values())
    for stage, calls in stages.items():
        for i, (call, p) in enumerate(calls.items()):
            dotted = page.named(call, colors.get(stage, {}).get(call, GRAY))
            model = ", ".join(str(p[k]) for k in ("of", "weights") if p.get(k)) or "–"
            words = (p.get("kind") or "", model, *_where(p))
            ends = (p.get("microbatches", ""), _megabytes(p.get("reallocated_bytes")))
            rows.append((_first(stage, i), dotted, *words, *ends[: 1 + moves]))
    columns = ("stage", "call", "kind", "model", "devices", "mesh", "microbatches", "reallocated")
    return page.section("Plan", page.table(columns[: 7 + moves], rows, right=1 + moves))


def _first(stage: str, i: int) -> Html:
    """The stage's name in the first of its rows."""
    return Html(f"<b>{escaped(stage)}</b>" if i == 0 else "")


def _where(placement: Mapping[str, Any]) -> tuple[str, str]:
    """Devices and mesh, as text."""
    devices = placement.get("devices")
    if not isinstance(devices, list) or not devices or placement.get("kind") == "host":
        return HOST, "–"
    sizes = _mapping(placement.get("axes"))
    mesh = " × ".join(f"{name} {size}" for name, size in sizes.items() if size != 1)
    return device_range(devices), mesh or "one device"


def _megabytes(value: Any) -> str:
    """Bytes as text; nothing for none."""
    return f"{value / 1e6:,.1f} MB" if isinstance(value, int | float) and value else ""


def _timeline(timeline: Mapping[str, Any], colors: Mapping[str, Colors]) -> str:
    parts = []
    for stage, spans in _spans(timeline).items():
        own = colors.get(stage, {})
        keys = page.legend({str(s["call"]): own.get(str(s["call"]), GRAY) for s in spans})
        parts.append(f"<h3>{escaped(stage)}</h3>{page.wide(_by_device(spans, own))}{keys}")
    lead = page.note("The calls of one step, by device.") if parts else ""
    return page.section("Timeline", lead, *parts)


def _by_device(spans: Sequence[Mapping[str, Any]], colors: Colors) -> str:
    """An SVG of the calls of one step: a row for every group of devices that did the same."""
    origin = min(float(s["start"]) for s in spans)
    drawn = []
    for s in sorted(spans, key=lambda s: s["start"]):
        call, start, end = str(s["call"]), float(s["start"]) - origin, float(s["end"]) - origin
        title = f"{call}: {end - start:.4g} s, from {start:.4g} s"
        bar = Bar(start, end, colors.get(call, GRAY), title, call)
        drawn.append((s.get("devices") or [HOST], bar))
    groups = by_device([devices for devices, _ in drawn])
    return bars([Row(name, [drawn[i][1] for i in which]) for name, which in groups], seconds=True)


def _calibration(workdir: Path, notes: list[str]) -> str:
    """Table of predicted and measured times of a searched plan; empty for other plans."""
    if not (workdir / "calibration.json").is_file():
        return ""
    rows = []
    for stage, calls in _document(workdir, "calibration.json", notes).items():
        for i, row in enumerate(r for r in calls if isinstance(r, Mapping)):
            predicted, measured = (float(row.get(k) or 0.0) for k in ("predicted", "measured"))
            ratio = f"{measured / predicted:.2f}" if predicted else "–"
            times = (f"{1e3 * x:,.1f}" for x in (predicted, measured))
            rows.append((_first(stage, i), row.get("name", ""), *times, ratio))
    columns = ("stage", "call or reallocation", "predicted, ms", "measured, ms", "ratio")
    return page.section("Predicted and measured", page.table(columns, rows, right=3))


def _schedule(workdir: Path, notes: list[str], steps: Sequence[Mapping[str, Any]]) -> str:
    """Lengths of the sequences that were scheduled; what steps were planned to take, and took."""
    if not (workdir / "schedule.json").is_file():
        return ""
    sections = []
    for stage, told in _document(workdir, "schedule.json", notes).items():
        rows = [r for r in steps if r.get("stage") == stage]
        names = {kind: f"schedule/{kind}_seconds" for kind in ("planned", "measured")}
        times = {
            kind: [(r["step"], r["values"][name]) for r in rows if name in r["values"]]
            for kind, name in names.items()
        }
        figures = [page.figure("seconds a step", times)] if any(times.values()) else []
        lengths = told.get("lengths", ())
        cells = [(f"up to {_count(most)}", _share(share)) for most, share in lengths]
        sections += [_mesh(stage, place) for place in told.get("places", [told])]
        shares = page.table(["tokens", "of the sequences"], cells, right=1)
        sections += [page.charts(figures), shares]
    return page.section("Short and long sequences", *sections)


def _mesh(stage: str, told: Mapping[str, Any]) -> str:
    """Describes what schedules on one mesh were made for."""
    shapes = ", ".join(f"{own}+{shared}" for own, shared in told.get("shapes", ()))
    who = ": ".join([stage, *([", ".join(map(str, told["calls"]))] if told.get("calls") else [])])
    groups, parts, room = (_count(told.get(k, 0)) for k in ("groups", "parts", "room"))
    text = (
        f"{who}: {groups} × {parts} devices (groups × sequence) with {room} tokens each; "
        f"micro-batches of {shapes} tokens a device, its own + its share of long sequences."
    )
    return f"<p>{escaped(text)}</p>"


def _count(value: Any) -> str:
    """A whole number with commas; other values of a file as they are, not escaped."""
    return f"{value:,}" if isinstance(value, int) else str(value)


def _share(value: Any) -> str:
    """A share in percent; other values of a file as they are, not escaped."""
    return f"{value:.1%}" if isinstance(value, int | float) else str(value)


def _config(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    text = json.dumps(secret.redacted(config), indent=2, ensure_ascii=False)
    return page.section("Config", page.folded("the resolved config", f"<pre>{escaped(text)}</pre>"))


def _items(notes: Sequence[str]) -> str:
    lines = "".join(f"<li>{escaped(note)}</li>" for note in notes)
    return f"<ul class=dim>{lines}</ul>" if notes else ""

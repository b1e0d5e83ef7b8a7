"""The page of a run: result, curves, plan, the calls of a step over time, samples, config.

It reads what a run writes (metrics.jsonl, samples.jsonl, and result, plan, timeline and config as
.json), and says what is absent, so a run that was cut short has a page as well.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrl_eff import secret
from jaxrl_eff.cli.pages import curves
from jaxrl_eff.cli.pages import samples as samples_
from jaxrl_eff.cli.pages import svg as charts
from jaxrl_eff.cli.pages.page import Colors, figure, legend, swatch, table, whole
from jaxrl_eff.cli.pages.svg import escaped
from jaxrl_eff.train import writer
from jaxrl_eff.train.console import clock, number

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
        raise FileNotFoundError(f"{workdir} is no directory; a run's --workdir is expected.")
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
    colors = _part("colours", notes, _colors, plan, timeline, steps) or {}
    body = [
        _part("head", notes, _head, workdir, result, steps),
        _part("result.json", notes, _summary, result),
        _part("curves", notes, curves.curves, steps, colors),
        _part("plan.json", notes, _plan, plan, colors),
        _part("timeline.json", notes, _timeline, timeline, colors),
        _part("calibration.json", notes, _calibration, workdir, notes),
        _part("schedule.json", notes, _schedule, workdir, notes, steps),
        _part("samples.jsonl", notes, samples_.samples, samples),
        _config(config),
        _notes(notes),
    ]
    return whole(workdir.resolve().name, "\n".join(filter(None, body)))


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


def _calls(plan: Mapping[str, Any]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """stage -> call -> placement, what isn't one left out."""
    stages = {s: calls for s, calls in plan.items() if isinstance(calls, Mapping)}
    return {
        stage: {call: p for call, p in calls.items() if isinstance(p, Mapping)}
        for stage, calls in stages.items()
    }


def _spans(timeline: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    stages = {s: spans for s, spans in timeline.items() if isinstance(spans, list)}
    found = {
        stage: [s for s in spans if isinstance(s, Mapping) and {"call", "start", "end"} <= set(s)]
        for stage, spans in stages.items()
    }
    return {stage: spans for stage, spans in found.items() if spans}


def _colors(plan: Any, timeline: Any, steps: Sequence[Mapping[str, Any]]) -> dict[str, Colors]:
    """Palette indices, stage -> call -> index: a call looks the same in every part of the page."""
    names: dict[str, list[str]] = {}
    for stage, calls in _calls(plan).items():
        names.setdefault(stage, []).extend(calls)
    for stage, spans in _spans(timeline).items():
        names.setdefault(stage, []).extend(str(s["call"]) for s in spans)
    for stage, rows in curves.by_stage(steps).items():
        names.setdefault(stage, []).extend(call for r in rows for call in r.get("seconds") or {})
    return {
        stage: {name: i for i, name in enumerate(dict.fromkeys(calls))}
        for stage, calls in names.items()
    }


def _part(name: str, notes: list[str], draw: Callable[..., Any], *given: Any) -> Any:
    """Calls `draw` on files that may hold anything; adds a note in its place where that fails."""
    try:
        return draw(*given)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        notes.append(f"{name} cannot be drawn ({type(error).__name__}: {error})")
        return ""


# Parts of the page ----------------------------------------------------------------------------


def _head(workdir: Path, result: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> str:
    title = result.get("title") or workdir.resolve().name
    passed = result.get("passed")
    verdict = ""
    if isinstance(passed, bool):
        word = "PASS" if passed else "FAIL"
        verdict = f'<span class="{word.lower()}">{word}</span>'
    expected = _expected(result)
    lead = f"<p class=lead>{escaped(expected)}</p>" if expected else ""
    where = f"<p class=dim>{escaped(workdir.resolve())}</p>"
    return f"<header><h1>{escaped(title)} {verdict}</h1>{lead}{where}{_facts(steps)}</header>"


def _expected(result: Mapping[str, Any]) -> str:
    """Describes the expectation in a sentence: the given one, or the conditions on a metric."""
    expected = result.get("expected")
    if not isinstance(expected, Mapping):
        return str(expected or "")
    metric, results = expected.get("metric"), result.get("results")
    if not metric:
        return ""
    value = results.get(metric) if isinstance(results, Mapping) else None
    wanted = []
    if isinstance(expected.get("at_least"), int | float):
        wanted.append(f"at least {expected['at_least']:g}")
    if expected.get("rises_over"):
        wanted.append(f"a rise of {expected.get('rise', 0):g} over {expected['rises_over']}")
    shown = f" {number(value)}" if isinstance(value, int | float) else ""
    return f"{metric}{shown}; expected {' and '.join(wanted) or 'nothing of it'}"


def _facts(steps: Sequence[Mapping[str, Any]]) -> str:
    if not steps:
        return ""
    facts = []
    for stage, rows in curves.by_stage(steps).items():
        trained = [row for row in rows if row.get("seconds")] or rows  # not mere evaluations
        count = len({row["step"] for row in trained})
        facts.append((stage or "steps", f"{count} step{'s' * (count != 1)}", _outcome(rows)))
    times = [r["time"] for r in steps if isinstance(r.get("time"), int | float)]
    if len(times) > 1:
        facts.append(("time", clock(times[-1] - times[0]), "from first to last step"))
    mfu = [r["mfu"] for r in steps if isinstance(r.get("mfu"), float)]
    if mfu:
        facts.append(("utilisation", f"{statistics.median(mfu):.0%}", "of the peak, median"))
    cells = "".join(
        f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd><p>{escaped(more)}</p></div>"
        for name, value, more in facts
    )
    return f"<dl class=facts>{cells}</dl>"


def _outcome(rows: Sequence[Mapping[str, Any]]) -> str:
    """Describes the beginning and end of the stage's first-named curve."""
    names = {
        name
        for row in rows
        for name in row["values"]
        if 0 < curves.rank(name)[0] < len(curves.FIRST)
    }
    names = sorted(names, key=curves.rank)
    if not names:
        return ""
    rewarded = [n for n in names if n.rsplit("/", 1)[-1] in ("reward", "score")]
    name = rewarded[0] if rewarded else names[0]
    values = [row["values"][name] for row in rows if name in row["values"]]
    tenth = max(1, len(values) // 10)
    first, last = statistics.fmean(values[:tenth]), statistics.fmean(values[-tenth:])
    return f"{name.rsplit('/', 1)[-1]} {number(first)} → {number(last)}"


def _summary(result: Mapping[str, Any]) -> str:
    rows, columns = result.get("rows") or [], result.get("columns")
    if rows and all(isinstance(row, Mapping) for row in rows):
        columns = list(dict.fromkeys(key for row in rows for key in row))
        rows = [[row.get(key, "") for key in columns] for row in rows]
    rows = [row for row in rows if isinstance(row, list | tuple)]
    drawn = table(columns or [], rows) if rows else ""
    results = result.get("results")
    pairs = list(results.items()) if isinstance(results, Mapping) else []
    named = {"title", "passed", "expected", "rows", "columns", "results", "data", "notes"}
    pairs += [(k, v) for k, v in result.items() if k not in named and v is not None]
    pairs += _of_data(result)
    more = table([], pairs, kind="pairs") if pairs else ""
    return f"<section><h2>Result</h2>{drawn}{more}</section>" if drawn or more else ""


def _of_data(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Describes what became of each stage's examples."""
    out = []
    for name in ("data", "notes"):
        stages = result.get(name)
        for stage, value in stages.items() if isinstance(stages, Mapping) else ():
            if isinstance(value, Mapping):
                told = ", ".join(f"{k} {v:g}" for k, v in value.items() if curves.is_number(v))
                out.append((f"{name} of {stage}", told))
            elif isinstance(value, list):
                out += [(f"note on {stage}", str(note)) for note in value]
    return out


def _plan(plan: Mapping[str, Any], colors: Mapping[str, Colors]) -> str:
    rows, stages = [], _calls(plan)
    moves = any(p.get("reallocated_bytes") for calls in stages.values() for p in calls.values())
    for stage, calls in stages.items():
        for i, (call, p) in enumerate(calls.items()):
            first = f"<td class=stage>{escaped(stage) if i == 0 else ''}</td>"
            dot = swatch(colors.get(stage, {}).get(call, 7))
            words = (p.get("kind") or "", p.get("of") or "–", *_where(p))
            ends = [escaped(p.get("microbatches", ""))]
            if moves:
                ends.append(_megabytes(p.get("reallocated_bytes")))
            cells = "".join(f"<td>{escaped(x)}</td>" for x in words)
            cells += "".join(f"<td class=n>{x}</td>" for x in ends)
            rows.append(f"<tr>{first}<td>{dot}{escaped(call)}</td>{cells}</tr>")
    if not rows:
        return ""
    heads = "".join(f"<th>{h}</th>" for h in ("stage", "call", "kind", "model", "devices", "mesh"))
    heads += "".join(f"<th class=n>{h}</th>" for h in ("microbatches", "reallocated")[: 1 + moves])
    table = f"<table><tr>{heads}</tr>{''.join(rows)}</table>"
    return f"<section><h2>Plan</h2><div class=wide>{table}</div></section>"


def _where(placement: Mapping[str, Any]) -> tuple[str, str]:
    """Devices and mesh, as text."""
    devices = placement.get("devices")
    if not isinstance(devices, list) or not devices or placement.get("kind") == "host":
        return "host", "–"
    axes = placement.get("axes")
    sizes = axes.items() if isinstance(axes, Mapping) else ()
    mesh = " × ".join(f"{name} {size}" for name, size in sizes if size != 1)
    return charts.device_range(devices), mesh or "one device"


def _megabytes(value: Any) -> str:
    """Bytes as text; nothing for none."""
    return f"{value / 1e6:,.1f} MB" if isinstance(value, int | float) and value else ""


def _timeline(timeline: Mapping[str, Any], colors: Mapping[str, Colors]) -> str:
    parts = []
    for stage, spans in _spans(timeline).items():
        own = colors.get(stage, {})
        keys = legend({str(s["call"]): own.get(str(s["call"]), 7) for s in spans})
        svg = charts.timeline(spans, own)
        parts.append(f"<h3>{escaped(stage)}</h3><div class=wide>{svg}</div>{keys}")
    if not parts:
        return ""
    lead = "<p class=dim>The calls of one step, by device.</p>"
    return f"<section><h2>Timeline</h2>{lead}{''.join(parts)}</section>"


def _calibration(workdir: Path, notes: list[str]) -> str:
    """Table of predicted and measured times of a searched plan; empty for other plans."""
    if not (workdir / "calibration.json").is_file():
        return ""
    rows = []
    for stage, calls in _document(workdir, "calibration.json", notes).items():
        for i, row in enumerate(r for r in calls if isinstance(r, Mapping)):
            predicted, measured = (float(row.get(k) or 0.0) for k in ("predicted", "measured"))
            ratio = f"{measured / predicted:.2f}" if predicted else "–"
            cells = [f"{1e3 * x:,.1f}" for x in (predicted, measured)] + [ratio]
            ends = "".join(f"<td class=n>{x}</td>" for x in cells)
            first = f"<td class=stage>{escaped(stage) if i == 0 else ''}</td>"
            rows.append(f"<tr>{first}<td>{escaped(row.get('name', ''))}</td>{ends}</tr>")
    heads = "<th>stage</th><th>call or reallocation</th>" + "".join(
        f"<th class=n>{h}</th>" for h in ("predicted, ms", "measured, ms", "ratio")
    )
    table = f"<table><tr>{heads}</tr>{''.join(rows)}</table>"
    return (
        f"<section><h2>Predicted and measured</h2><div class=wide>{table}</div></section>"
        if rows
        else ""
    )


def _schedule(workdir: Path, notes: list[str], steps: Sequence[Mapping[str, Any]]) -> str:
    """Lengths of the sequences that were scheduled; what steps were planned to take, and took."""
    if not (workdir / "schedule.json").is_file():
        return ""
    sections = []
    for stage, told in _document(workdir, "schedule.json", notes).items():
        rows = [r for r in steps if r.get("stage") == stage]
        times = {
            kind: [
                (r["step"], r["values"][name])
                for r in rows
                if (name := f"schedule/{kind}_seconds") in r["values"]
            ]
            for kind in ("planned", "measured")
        }
        figures = figure("seconds a step", times) if any(times.values()) else ""
        lengths = told.get("lengths", ())
        cells = [(f"up to {_count(most)}", _share(share)) for most, share in lengths]
        sections.append(
            f"{''.join(_mesh(stage, place) for place in told.get('places', [told]))}"
            f"<div class=charts>{figures}</div>"
            f"{table(['tokens', 'of the sequences'], cells) if cells else ''}"
        )
    return f"<section><h2>Short and long sequences</h2>{''.join(sections)}</section>"


def _mesh(stage: str, told: Mapping[str, Any]) -> str:
    """Describes what schedules on one mesh were made for."""
    shapes = ", ".join(f"{own}+{shared}" for own, shared in told.get("shapes", ()))
    who = ": ".join([stage, *([", ".join(map(str, told["calls"]))] if told.get("calls") else [])])
    return (
        f"<p>{escaped(who)}: {escaped(_count(told.get('groups')))} groups of "
        f"{escaped(_count(told.get('parts')))} devices with {escaped(_count(told.get('room', 0)))} "
        f"tokens each; micro-batches of {escaped(shapes)} tokens a device, its own + its share of "
        "long sequences.</p>"
    )


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
    return (
        "<section><h2>Config</h2><details><summary>the resolved config</summary>"
        f"<pre>{escaped(text)}</pre></details></section>"
    )


def _notes(notes: Sequence[str]) -> str:
    lines = "".join(f"<li>{escaped(note)}</li>" for note in notes)
    return f"<section><h2>Not here</h2><ul class=dim>{lines}</ul></section>" if notes else ""

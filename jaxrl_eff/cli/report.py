"""`python -m jaxrl_eff report DIR`: a run directory as one page, DIR/report.html.

The page holds everything it shows: curves, plan, the calls of a step over time, samples, config.
It reads what a run writes (metrics.jsonl, samples.jsonl, and result, plan, timeline and config as
.json), and says what is absent, so a run that was cut short has a report as well.
"""

import html
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrl_eff import files, secret
from jaxrl_eff.cli.pages import svg as charts
from jaxrl_eff.train import config_file, writer
from jaxrl_eff.train.console import clock, number

FILES = (
    "metrics.jsonl", "samples.jsonl", "result.json", "plan.json", "timeline.json", "config.json",
)  # fmt: skip
# The last part of a metric's name decides how early its curve stands; others are folded away.
_FIRST = (
    "eval", "loss", "reward", "score", "accuracy", "correct", "kl", "gap", "entropy", "length",
    "margin", "clip_fraction", "grad_norm", "lr",
)  # fmt: skip
_SUFFIXES = ("before", "mean", "p50", "p95", "p99", "max", "min", "std")  # share a figure
_LONGEST_TEXT = 1200

Colors = Mapping[str, int]


def write(workdir: str | Path) -> Path:
    """Draws the report of a run and returns its path.

    Raises:
        FileNotFoundError: no such directory.
        ValueError: the directory holds nothing that a run writes.
    """
    workdir = Path(workdir)
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
        _part("curves", notes, _curves, steps, colors),
        _part("plan.json", notes, _plan, plan, colors),
        _part("timeline.json", notes, _timeline, timeline, colors),
        _part("calibration.json", notes, _calibration, workdir, notes),
        _part("schedule.json", notes, _schedule, workdir, notes, steps),
        _part("samples.jsonl", notes, _samples, samples),
        _config(config),
        _notes(notes),
    ]
    page = PAGE.format(title=_text(workdir.resolve().name), style=STYLE, script=SCRIPT)
    path = workdir / "report.html"
    files.write(path, page.replace("<!--body-->", "\n".join(filter(None, body))))
    return path


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


def _by_stage(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        stages.setdefault(str(row.get("stage", "")), []).append(row)
    return stages


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
    for stage, rows in _by_stage(steps).items():
        names.setdefault(stage, []).extend(call for r in rows for call in r.get("seconds") or {})
    return {
        stage: {name: i for i, name in enumerate(dict.fromkeys(calls))}
        for stage, calls in names.items()
    }


def _part(name: str, notes: list[str], draw: Callable[..., Any], *given: Any) -> Any:
    """What `draw` makes of files that may hold anything; a note in its place where it cannot."""
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
    lead = f"<p class=lead>{_text(expected)}</p>" if expected else ""
    where = f"<p class=dim>{_text(workdir.resolve())}</p>"
    return f"<header><h1>{_text(title)} {verdict}</h1>{lead}{where}{_facts(steps)}</header>"


def _expected(result: Mapping[str, Any]) -> str:
    """What was expected, as a sentence: given as one, or as the conditions on a metric."""
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
    for stage, rows in _by_stage(steps).items():
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
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd><p>{_text(more)}</p></div>"
        for name, value, more in facts
    )
    return f"<dl class=facts>{cells}</dl>"


def _outcome(rows: Sequence[Mapping[str, Any]]) -> str:
    """How the stage's first-named curve began and ended."""
    names = {name for row in rows for name in row["values"] if 0 < _rank(name)[0] < len(_FIRST)}
    names = sorted(names, key=_rank)
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
    table = _table(columns or [], rows) if rows else ""
    results = result.get("results")
    pairs = list(results.items()) if isinstance(results, Mapping) else []
    named = {"title", "passed", "expected", "rows", "columns", "results", "data", "notes"}
    pairs += [(k, v) for k, v in result.items() if k not in named and v is not None]
    pairs += _of_data(result)
    more = _table([], pairs, kind="pairs") if pairs else ""
    return f"<section><h2>Result</h2>{table}{more}</section>" if table or more else ""


def _of_data(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What became of each stage's examples, in words."""
    out = []
    for name in ("data", "notes"):
        stages = result.get(name)
        for stage, value in stages.items() if isinstance(stages, Mapping) else ():
            if isinstance(value, Mapping):
                told = ", ".join(f"{k} {v:g}" for k, v in value.items() if _is_number(v))
                out.append((f"{name} of {stage}", told))
            elif isinstance(value, list):
                out += [(f"note on {stage}", str(note)) for note in value]
    return out


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _curves(steps: Sequence[Mapping[str, Any]], colors: Mapping[str, Colors]) -> str:
    sections = []
    for stage, rows in _by_stage(steps).items():
        figures = sorted(_figures(rows, colors.get(stage, {})), key=lambda figure: figure[0])
        ahead = [figure for rank, figure in figures if rank[0] < len(_FIRST)]
        behind = [figure for rank, figure in figures if rank[0] >= len(_FIRST)]
        if len(ahead) < 3 or len(behind) < 3:
            ahead, behind = ahead + behind[:6], behind[6:]
        fold = ""
        if behind:
            fold = (
                f"<details><summary>{len(behind)} more curves</summary>"
                f"<div class=charts>{''.join(behind)}</div></details>"
            )
        grid = f"<div class=charts>{''.join(ahead)}</div>"
        sections.append(f"<section><h2>{_text(stage or 'Curves')}</h2>{grid}{fold}</section>")
    return "\n".join(sections)


def _figures(
    rows: Sequence[Mapping[str, Any]], colors: Colors
) -> Iterable[tuple[tuple[int, str], str]]:
    """(rank, figure) of every curve of one stage; `gap_mean`, `gap_max`, ... share a figure."""
    groups: dict[str, dict[str, list[tuple[int, float | int]]]] = {}
    for row in rows:
        for name, value in row["values"].items():
            if isinstance(value, int | float):
                base, label = _split(name)
                groups.setdefault(base, {}).setdefault(label, []).append((row["step"], value))
    for base, series in groups.items():
        order = sorted(series, key=lambda k: _SUFFIXES.index(k) if k in _SUFFIXES else -1)
        yield _rank(base), figure_of(base, {name: series[name] for name in order})
    seconds: dict[str, list[tuple[int, float | int]]] = {}
    for row in rows:
        for call, value in (row.get("seconds") or {}).items():
            if isinstance(value, int | float):
                seconds.setdefault(call, []).append((row["step"], value))
    last = len(_FIRST) - 1
    for name in ("tokens_per_s", "mfu", "flops_per_s"):
        points = [
            (row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)
        ]
        if points:
            rank = (last + (name == "flops_per_s"), f"~{name}")
            yield rank, figure_of(name.replace("_per_s", "/s"), {"": points}, percent=name == "mfu")
    if seconds:
        yield (last, "~~seconds"), figure_of("seconds by call", seconds, colors=colors)


def _split(name: str) -> tuple[str, str]:
    for separator in ("_", "/"):
        base, _, suffix = name.rpartition(separator)
        if base and suffix in _SUFFIXES:
            return base, suffix
    return name, ""


def _rank(name: str) -> tuple[int, str]:
    last = _split(name)[0].rsplit("/", 1)[-1]
    for i, word in enumerate(_FIRST):
        if last == word or last.endswith(f"_{word}") or last.startswith(f"{word}_"):
            return i, name
    return len(_FIRST), name


def figure_of(
    title: str, series: Mapping[str, Any], *, percent: bool = False, colors: Colors | None = None
) -> str:
    svg = charts.curves(series, percent=percent, colors=colors)
    own = title.rsplit("/", 1)[-1]
    palette = {name or own: (colors or {}).get(name, i) for i, name in enumerate(series)}
    names = legend(palette) if palette and (len(series) > 1 or "" not in series) else ""
    final = [points[-1][1] for points in series.values()]
    shown = ""
    if len(final) == 1:
        shown = (
            f"{final[0]:.0%}"
            if percent and math.isfinite(final[0])
            else number(final[0], short=True)
        )
    head = f"<figcaption><b>{_text(title)}</b><output>{_text(shown)}</output></figcaption>"
    return f"<figure>{head}{svg}{names}</figure>"


def legend(colors: Colors) -> str:
    spans = (f"<span class=key>{swatch(i)}{_text(name)}</span>" for name, i in colors.items())
    return f"<div class=keys>{''.join(spans)}</div>"


def swatch(index: int) -> str:
    return f'<i class=dot style="background:{charts.color(index)}"></i>'


def _plan(plan: Mapping[str, Any], colors: Mapping[str, Colors]) -> str:
    rows, stages = [], _calls(plan)
    moves = any(p.get("reallocated_bytes") for calls in stages.values() for p in calls.values())
    for stage, calls in stages.items():
        for i, (call, p) in enumerate(calls.items()):
            first = f"<td class=stage>{_text(stage) if i == 0 else ''}</td>"
            dot = swatch(colors.get(stage, {}).get(call, 7))
            words = (p.get("kind") or "", p.get("of") or "–", *_where(p))
            ends = [_text(p.get("microbatches", ""))]
            if moves:
                ends.append(_megabytes(p.get("reallocated_bytes")))
            cells = "".join(f"<td>{_text(x)}</td>" for x in words)
            cells += "".join(f"<td class=n>{x}</td>" for x in ends)
            rows.append(f"<tr>{first}<td>{dot}{_text(call)}</td>{cells}</tr>")
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
        parts.append(f"<h3>{_text(stage)}</h3><div class=wide>{svg}</div>{keys}")
    if not parts:
        return ""
    lead = "<p class=dim>The calls of one step, by device.</p>"
    return f"<section><h2>Timeline</h2>{lead}{''.join(parts)}</section>"


def _calibration(workdir: Path, notes: list[str]) -> str:
    """What a searched plan was predicted to take, and took; empty for other plans."""
    if not (workdir / "calibration.json").is_file():
        return ""
    rows = []
    for stage, calls in _document(workdir, "calibration.json", notes).items():
        for i, row in enumerate(r for r in calls if isinstance(r, Mapping)):
            predicted, measured = (float(row.get(k) or 0.0) for k in ("predicted", "measured"))
            ratio = f"{measured / predicted:.2f}" if predicted else "–"
            cells = [f"{1e3 * x:,.1f}" for x in (predicted, measured)] + [ratio]
            ends = "".join(f"<td class=n>{x}</td>" for x in cells)
            first = f"<td class=stage>{_text(stage) if i == 0 else ''}</td>"
            rows.append(f"<tr>{first}<td>{_text(row.get('name', ''))}</td>{ends}</tr>")
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
        figures = figure_of("seconds a step", times) if any(times.values()) else ""
        lengths = told.get("lengths", ())
        cells = [(f"up to {_count(most)}", _share(share)) for most, share in lengths]
        sections.append(
            f"{''.join(_mesh(stage, place) for place in told.get('places', [told]))}"
            f"<div class=charts>{figures}</div>"
            f"{_table(['tokens', 'of the sequences'], cells) if cells else ''}"
        )
    return f"<section><h2>Short and long sequences</h2>{''.join(sections)}</section>"


def _mesh(stage: str, told: Mapping[str, Any]) -> str:
    """What schedules on one mesh were made for."""
    shapes = ", ".join(f"{own}+{shared}" for own, shared in told.get("shapes", ()))
    who = ": ".join([stage, *([", ".join(map(str, told["calls"]))] if told.get("calls") else [])])
    return (
        f"<p>{_text(who)}: {_text(_count(told.get('groups')))} groups of "
        f"{_text(_count(told.get('parts')))} devices with {_text(_count(told.get('room', 0)))} "
        f"tokens each; micro-batches of {_text(shapes)} tokens a device, its own + its share of "
        "long sequences.</p>"
    )


def _count(value: Any) -> str:
    """A whole number with commas; other values of a file as they are, not escaped."""
    return f"{value:,}" if isinstance(value, int) else str(value)


def _share(value: Any) -> str:
    """A share in percent; other values of a file as they are, not escaped."""
    return f"{value:.1%}" if isinstance(value, int | float) else str(value)


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    """Held-out answers over the whole run, then what each stage sampled."""
    held = [row for row in samples if row.get("held_out")]
    groups = {"held out": held} if held else {}
    groups |= _by_stage(row for row in samples if not row.get("held_out"))
    parts = [f"<h3>{_text(name)}</h3>{_first_and_last(rows)}" for name, rows in groups.items()]
    return f"<section><h2>Samples</h2>{''.join(parts)}</section>" if parts else ""


def _first_and_last(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same prompts side by side at the first and the last step, or else one after the other."""
    first, last = min(r["step"] for r in rows), max(r["step"] for r in rows)
    early = {str(r.get("prompt", "")): r for r in rows if r["step"] == first}
    late = {str(r.get("prompt", "")): r for r in rows if r["step"] == last}
    both = [prompt for prompt in early if prompt in late]
    if first != last and both:
        heads = ["prompt", _moment(early[both[0]]), "reward", _moment(late[both[0]]), "reward"]
        lines = [[_said(p), *_answer(early[p]), *_answer(late[p])] for p in both[:8]]
        return _sample_table(heads, lines)
    lines = [
        [_text(step), _said(p), *_answer(r)]
        for step, group in {first: early, last: late}.items()
        for p, r in list(group.items())[:6]
    ]
    return _sample_table(["step", "prompt", "completion", "reward"], lines)


def _moment(row: Mapping[str, Any]) -> str:
    return f"{row.get('stage', '')}, step {row['step']}"


def _answer(row: Mapping[str, Any]) -> list[str]:
    reward = row.get("reward")
    shown = number(reward) if isinstance(reward, int | float) else ""
    named = ("step", "stage", "prompt", "completion", "reward", "held_out", "example")
    rest = [f"{key}: {_plain(value)}" for key, value in row.items() if key not in named]
    more = f"<p class=dim>{_text(', '.join(rest))}</p>" if rest else ""
    return [_said(row.get("completion", "")) + more, f"<span class=reward>{_text(shown)}</span>"]


def _said(value: Any) -> str:
    text = str(value)
    if not text.strip():
        return "<div class='said dim'>(empty)</div>"
    cut = text[:_LONGEST_TEXT] + (" […]" if len(text) > _LONGEST_TEXT else "")
    return f"<div class=said>{_text(cut)}</div>"


def _sample_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(h)}</th>" for h in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide><table class=samples><tr>{head}</tr>{body}</table></div>"


def _config(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    text = json.dumps(secret.redacted(config), indent=2, ensure_ascii=False)
    return (
        "<section><h2>Config</h2><details><summary>the resolved config</summary>"
        f"<pre>{_text(text)}</pre></details></section>"
    )


def _notes(notes: Sequence[str]) -> str:
    lines = "".join(f"<li>{_text(note)}</li>" for note in notes)
    return f"<section><h2>Not here</h2><ul class=dim>{lines}</ul></section>" if notes else ""


def _table(columns: Sequence[Any], rows: Sequence[Sequence[Any]], kind: str = "") -> str:
    def cell(x: Any, tag: str = "td") -> str:
        figure = isinstance(x, int | float) and not isinstance(x, bool)
        shown = number(x) if isinstance(x, float) else _plain(x)
        return f"<{tag}{' class=n' if figure else ''}>{_text(shown)}</{tag}>"

    numeric = [
        any(isinstance(row[i], int | float) for row in rows if i < len(row))
        for i in range(len(columns))
    ]
    heads = "".join(
        f"<th{' class=n' if n else ''}>{_text(c)}</th>"
        for c, n in zip(columns, numeric, strict=True)
    )
    head = f"<tr>{heads}</tr>" if columns else ""
    body = "".join("<tr>" + "".join(cell(x) for x in row) + "</tr>" for row in rows)
    return f'<div class=wide><table class="{kind}">{head}{body}</table></div>'


def _plain(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _text(value: Any) -> str:
    return html.escape(str(value))


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><main>
<!--body-->
</main><script>{script}</script></body></html>
"""

STYLE = """
:root { color-scheme: light dark; --bg: #fbfaf8; --fg: #23262b; --dim: #6d727a; --rule: #e4e1dc;
  --card: #ffffff; --good: #2f7d4f; --bad: #b3383f;
  --c0: #3d6fa5; --c1: #c47a3f; --c2: #4c8f63; --c3: #8a66a6; --c4: #b4565f; --c5: #4e8d98;
  --c6: #94802f; --c7: #73777e; }
@media (prefers-color-scheme: dark) { :root { --bg: #17191c; --fg: #e3e4e6; --dim: #979ca5;
  --rule: #2d3136; --card: #1d2024; --good: #64b487; --bad: #e0757b;
  --c0: #7aa7d9; --c1: #dd9f6a; --c2: #7dbd92; --c3: #b695d0; --c4: #dd8890; --c5: #79b8c3;
  --c6: #c3ae5c; --c7: #9a9ea5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--fg);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 44px 28px 72px; }
h1 { font-size: 27px; line-height: 1.25; font-weight: 600; margin: 0 0 6px;
  overflow-wrap: anywhere; }
h2 { font-size: 18px; font-weight: 600; margin: 0 0 14px; }
h3 { font-size: 14px; font-weight: 600; margin: 20px 0 8px; }
section { margin-top: 44px; }
.lead { font-size: 16px; margin: 0 0 4px; }
.dim, .dim li { color: var(--dim); font-size: 13px; margin: 2px 0 8px; overflow-wrap: anywhere; }
.pass, .fail { display: inline-block; font-size: 13px; letter-spacing: .06em; color: var(--bg);
  border-radius: 4px; padding: 2px 9px; margin-left: 6px; vertical-align: 4px; }
.pass { background: var(--good); } .fail { background: var(--bad); }
.facts { display: flex; flex-wrap: wrap; gap: 10px 44px; margin: 22px 0 0; }
.facts dt { color: var(--dim); font-size: 13px; }
.facts dd { margin: 0; font-size: 19px; font-variant-numeric: tabular-nums; }
.facts p { margin: 0; color: var(--dim); font-size: 13px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--dim); font-weight: 500; font-size: 13px; }
th, td { padding: 6px 22px 6px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th.n, td.n { text-align: right; }
.wide + .wide { margin-top: 18px; }
.pairs td:first-child { color: var(--dim); }
.pairs td { overflow-wrap: anywhere; }
.stage { font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr));
  gap: 18px; }
figure { margin: 0; padding: 12px 14px 8px; background: var(--card);
  border: 1px solid var(--rule); border-radius: 8px; min-width: 0; }
figcaption { display: flex; justify-content: space-between; gap: 12px; font-size: 13px; }
figcaption b { font-weight: 600; overflow-wrap: anywhere; }
figcaption output { color: var(--dim); white-space: nowrap; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; }
svg.timeline { min-width: 640px; }
svg text { font-size: 11px; fill: var(--dim); font-variant-numeric: tabular-nums; }
svg text.on { fill: var(--bg); }
.grid { stroke: var(--rule); fill: none; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.raw { fill: none; stroke-width: 1; opacity: .28; }
.band { opacity: .13; }
.alarm { stroke: var(--bad); stroke-width: 2; }
.cursor { stroke: var(--dim); stroke-dasharray: 2 3; }
.keys { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 12px; color: var(--dim); }
.key { white-space: nowrap; }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 2px;
  margin-right: 6px; }
.samples { width: 100%; } .samples td { font-size: 13px; }
.samples td:last-child, .samples th:last-child { padding-right: 0; }
.said { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 12.5px;
  white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; max-height: 21em;
  overflow-y: auto; }
.reward { color: var(--dim); white-space: nowrap; }
details { margin-top: 16px; } summary { cursor: pointer; color: var(--dim); font-size: 13px;
  margin-bottom: 12px; }
pre { font: 12.5px/1.55 ui-monospace, "SF Mono", Menlo, Consolas, monospace; padding: 14px 16px;
  background: var(--card); border: 1px solid var(--rule); border-radius: 8px; overflow-x: auto; }
"""

# Values under the pointer, in the caption of the chart.
SCRIPT = """
for (const svg of document.querySelectorAll("svg.chart")) {
  const series = JSON.parse(svg.dataset.series), left = +svg.dataset.left, right = 310;
  const out = svg.parentNode.querySelector("output"), rest = out.textContent;
  const all = series.flatMap(s => s[1].map(p => p[0]));
  const low = Math.min(...all), high = Math.max(...all);
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "path");
  cursor.setAttribute("class", "cursor"); svg.append(cursor);
  svg.addEventListener("pointermove", e => {
    const x = (e.clientX - svg.getBoundingClientRect().left) * 320 / svg.clientWidth;
    const want = low + (x - left) / (right - left) * (high - low);
    const near = p => p.reduce((a, b) => Math.abs(b[0] - want) < Math.abs(a[0] - want) ? b : a);
    const at = series.filter(s => s[1].length).map(s => [s[0], near(s[1])]);
    const px = left + (at[0][1][0] - low) / ((high - low) || 1) * (right - left);
    cursor.setAttribute("d", `M${px} 8V158`);
    const few = at.slice(0, 3).map(([name, p]) => (name && at.length > 1 ? name + " " : "") + p[1]);
    out.textContent = few.join("  ") + "  at " + at[0][1][0];
  });
  svg.addEventListener("pointerleave", () => {
    out.textContent = rest; cursor.removeAttribute("d");
  });
}
"""


def main(argv: list[str] | None = None) -> int:
    """Writes the report; returns the exit status."""
    parser = config_file.Parser(prog="python -m jaxrl_eff report", description=__doc__)
    parser.add_argument("workdir", help="directory of a run")
    options = parser.parse_args(argv)
    with config_file.explained():
        print(write(options.workdir))
    return 0

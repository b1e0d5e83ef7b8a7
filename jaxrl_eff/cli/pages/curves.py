"""Curves of a run's metrics, a figure for each group of names, the most looked-at first."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxrl_eff.cli.pages.page import Colors, charts, figure, folded, section

# The last part of a metric's name decides how early its curve stands; others are folded away.
FIRST = (
    "eval", "loss", "reward", "score", "accuracy", "correct", "kl", "gap", "entropy", "length",
    "margin", "clip_fraction", "grad_norm", "lr",
)  # fmt: skip
_SUFFIXES = ("before", "mean", "p50", "p95", "p99", "max", "min", "std")  # share a figure


def by_stage(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows grouped by the stage that they name, in order of appearance."""
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        stages.setdefault(str(row.get("stage", "")), []).append(row)
    return stages


def is_number(value: Any) -> bool:
    """True for integers and floats, not for booleans."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def curves(steps: Sequence[Mapping[str, Any]], colors: Mapping[str, Colors]) -> str:
    """A section of figures for each stage; all but the most looked-at are folded away."""
    sections = []
    for stage, rows in by_stage(steps).items():
        figures = sorted(_figures(rows, colors.get(stage, {})), key=lambda figure: figure[0])
        ahead = [figure for where, figure in figures if where[0] < len(FIRST)]
        behind = [figure for where, figure in figures if where[0] >= len(FIRST)]
        if len(ahead) < 3 or len(behind) < 3:
            ahead, behind = ahead + behind[:6], behind[6:]
        fold = folded(f"{len(behind)} more curves", charts(behind)) if behind else ""
        sections.append(section(stage or "Curves", charts(ahead), fold))
    return "\n".join(sections)


def _figures(
    rows: Sequence[Mapping[str, Any]], colors: Colors
) -> Iterable[tuple[tuple[int, str], str]]:
    """(rank, figure) of every curve of one stage; `gap_mean`, `gap_max`, ... share a figure."""
    groups: dict[str, dict[str, list[tuple[int, float | int]]]] = {}
    for row in rows:
        for name, value in row["values"].items():
            if isinstance(value, int | float):
                base, label = split(name)
                groups.setdefault(base, {}).setdefault(label, []).append((row["step"], value))
    for base, series in groups.items():
        order = sorted(series, key=lambda k: _SUFFIXES.index(k) if k in _SUFFIXES else -1)
        yield rank(base), figure(base, {name: series[name] for name in order})
    seconds: dict[str, list[tuple[int, float | int]]] = {}
    for row in rows:
        for call, value in (row.get("seconds") or {}).items():
            if isinstance(value, int | float):
                seconds.setdefault(call, []).append((row["step"], value))
    last = len(FIRST) - 1
    for name in ("tokens_per_s", "mfu", "flops_per_s"):
        points = [
            (row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)
        ]
        if points:
            place = (last + (name == "flops_per_s"), f"~{name}")
            yield (
                place,
                figure(name.replace("_per_s", "/s"), {"": points}, percent=name == "mfu"),
            )
    if seconds:
        yield (last, "~~seconds"), figure("seconds by call", seconds, colors=colors)


def split(name: str) -> tuple[str, str]:
    for separator in ("_", "/"):
        base, _, suffix = name.rpartition(separator)
        if base and suffix in _SUFFIXES:
            return base, suffix
    return name, ""


def rank(name: str) -> tuple[int, str]:
    """Place of a metric's figure among others."""
    last = split(name)[0].rsplit("/", 1)[-1]
    for i, word in enumerate(FIRST):
        if last == word or last.endswith(f"_{word}") or last.startswith(f"{word}_"):
            return i, name
    return len(FIRST), name

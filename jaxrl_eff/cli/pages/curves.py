"""Curves of a run's metrics, a figure for each group of names, the most looked-at first."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxrl_eff.cli.pages.page import Colors, charts, figure, folded, section
from jaxrl_eff.train.console import is_number

Curves = dict[str, list[tuple[int, float | int]]]  # name -> (step, value)

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
    groups: dict[str, Curves] = {}
    rates: Curves = {}
    seconds: Curves = {}
    for row in rows:
        for name, value in row["values"].items():
            base, label = split(name)
            _add(groups.setdefault(base, {}), label, row["step"], value)
        for name in ("tokens_per_s", "mfu", "flops_per_s"):
            _add(rates, name, row["step"], row.get(name))
        for call, value in (row.get("seconds") or {}).items():
            _add(seconds, call, row["step"], value)
    for base, series in groups.items():
        order = sorted(series, key=lambda k: _SUFFIXES.index(k) if k in _SUFFIXES else -1)
        if order:
            yield rank(base), figure(base, {name: series[name] for name in order})
    last = len(FIRST) - 1
    for name, points in rates.items():
        drawn = figure(name.replace("_per_s", "/s"), {"": points}, percent=name == "mfu")
        yield (last + (name == "flops_per_s"), f"~{name}"), drawn
    if seconds:
        yield (last, "~~seconds"), figure("seconds by call", seconds, colors=colors)


def _add(curves: Curves, name: str, step: int, value: Any) -> None:
    if is_number(value):
        curves.setdefault(name, []).append((step, value))


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

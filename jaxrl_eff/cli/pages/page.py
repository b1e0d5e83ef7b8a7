"""The frame of all pages, and what they share: sections, facts, tables, legends, figures.

A page is one file that holds its style and script. Every text is escaped unless it is `Html`.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

from jaxrl_eff.cli.pages import svg
from jaxrl_eff.cli.pages.svg import Html, Number, escaped
from jaxrl_eff.train.console import is_number, number

Colors = Mapping[str, int]
_LONG = 6  # times the result: longer bars of others end there

_FRAME = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><main>
<!--body-->
</main><script>{script}</script></body></html>
"""


def whole(title: str, *parts: str) -> str:
    """A page as HTML; `title` is the document's, `parts` are HTML."""
    files = resources.files("jaxrl_eff.cli.pages")
    sheet, script = (files.joinpath(n).read_text("utf-8") for n in ("style.css", "hover.js"))
    frame = _FRAME.format(title=escaped(title), style=sheet, script=script)
    return frame.replace("<!--body-->", "\n".join(filter(None, parts)))


def head(title: str, lead: str = "", *more: str) -> str:
    """The header of a page: its title and a sentence, then HTML."""
    lead = f"<p class=lead>{escaped(lead)}</p>" if lead else ""
    return f"<header><h1>{escaped(title)}</h1>{lead}{''.join(more)}</header>"


def section(title: str, *parts: str) -> str:
    """A section of HTML; empty if all of its parts are."""
    body = "".join(parts)
    return f"<section><h2>{escaped(title)}</h2>{body}</section>" if body else ""


def note(text: Any) -> str:
    """A paragraph in small, dim letters."""
    return f"<p class=dim>{escaped(text)}</p>"


def facts(rows: Iterable[tuple[str, Any, Any]]) -> str:
    """Numbers side by side: name, value, remark."""
    cells = "".join(
        f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd><p>{escaped(remark)}</p></div>"
        for name, value, remark in rows
    )
    return f"<dl class=facts>{cells}</dl>"


def wide(*parts: str) -> str:
    """HTML that scrolls sideways on narrow screens."""
    return f"<div class=wide>{''.join(parts)}</div>"


def charts(figures: Iterable[str]) -> str:
    """Figures in a grid."""
    return f"<div class=charts>{''.join(figures)}</div>"


def folded(summary: str, body: str) -> str:
    """HTML that a click unfolds."""
    return f"<details><summary>{escaped(summary)}</summary>{body}</details>"


def figure(
    title: str, series: Mapping[str, Any], *, percent: bool = False, colors: Colors | None = None
) -> str:
    """A chart of curves with its caption, its last value and its legend.

    Args:
        series: name -> points (x, y); the name "" is of a figure with one curve.
        percent: values are shares.
        colors: name -> index of its color; None: in order.
    """
    drawn = svg.curves(series, percent=percent, colors=colors)
    own = title.rsplit("/", 1)[-1]
    palette = {name or own: (colors or {}).get(name, i) for i, name in enumerate(series)}
    names = legend(palette) if palette and (len(series) > 1 or "" not in series) else ""
    final = [points[-1][1] for points in series.values()]
    shown = ""
    if len(final) == 1:
        share = percent and math.isfinite(final[0])
        shown = f"{final[0]:.0%}" if share else number(final[0], short=True)
    caption = f"<figcaption><b>{escaped(title)}</b><output>{escaped(shown)}</output></figcaption>"
    return f"<figure>{caption}{drawn}{names}</figure>"


def legend(colors: Colors) -> str:
    """The names of a chart's parts, each with its color."""
    spans = (f"<span class=key>{named(name, i)}</span>" for name, i in colors.items())
    return f"<div class=keys>{''.join(spans)}</div>"


def named(name: Any, color: int) -> Html:
    """A name behind a dot of its color."""
    return Html(f'<i class=dot style="background:{svg.color(color)}"></i>{escaped(name)}')


def compared(
    own: tuple[str, Number], others: Sequence[tuple[str, Number | str]], least: tuple[str, Number]
) -> str:
    """Bars of seconds: a result, the others or why they have none, and a bound below all."""
    best, longest = own[1], _LONG * own[1]
    rows = [svg.stacked(own[0], [(2, best, own[0])], f"{number(best)} s")]
    for name, seconds in others:
        if isinstance(seconds, str):
            rows.append(svg.stacked(name, [], seconds))
        else:
            after = f"{number(seconds)} s, {seconds / best:.2f}×"
            rows.append(svg.stacked(name, [(svg.GRAY, min(seconds, longest), name)], after))
    rows.append(svg.stacked(least[0], [(0, least[1], least[0])], f"{number(least[1])} s"))
    cut = any(not isinstance(seconds, str) and seconds > longest for _, seconds in others)
    remark = note(f"Bars end at {_LONG} times {own[0]}.") if cut else ""
    return wide(svg.bars(rows, high=18, pitch=26)) + remark


def table(
    columns: Sequence[Any], rows: Sequence[Sequence[Any]], kind: str = "", *, right: int = 0
) -> str:
    """A table; columns with a number in them are aligned to the right. Empty without rows.

    Args:
        columns: titles; none for rows of names and values.
        kind: class of the table in the style sheet.
        right: how many of the last columns are aligned to the right whatever is in them.
    """
    if not rows:
        return ""
    first = len(columns) - right if columns else math.inf
    numeric = [
        i >= first or any(i < len(row) and is_number(row[i]) for row in rows)
        for i in range(len(columns))
    ]

    def cell(tag: str, x: Any, n: bool) -> str:
        return f"<{tag}{' class=n' if n else ''}>{escaped(x)}</{tag}>"

    head = "".join(cell("th", c, n) for c, n in zip(columns, numeric, strict=True))
    lines = [f"<tr>{head}</tr>"] if columns else []
    for row in rows:
        shown = (number(x) if isinstance(x, float) else plain(x) for x in row)
        cells = (
            cell("td", text, i >= first or is_number(x))
            for i, (x, text) in enumerate(zip(row, shown, strict=True))
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return wide(f'<table class="{kind}">{"".join(lines)}</table>')


def pairs(rows: Iterable[tuple[str, Any]]) -> str:
    """Names and values, one under the other."""
    return table([], list(rows), "pairs")


def plain(value: Any) -> str:
    """A value as text: text as it is, None as nothing, all else as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

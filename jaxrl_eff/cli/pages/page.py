"""The frame of all pages, and what they share: tables, legends, figures, escaped text.

A page is one file that holds its style and script.
"""

import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from jaxrl_eff.cli.pages import svg as charts
from jaxrl_eff.cli.pages.svg import escaped
from jaxrl_eff.train.console import number

Colors = Mapping[str, int]

_FRAME = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><main>
<!--body-->
</main><script>{script}</script></body></html>
"""


def whole(title: str, body: str, *, style: str = "") -> str:
    """A page as HTML.

    Args:
        title: of the document, not escaped yet.
        body: HTML.
        style: more rules for the style sheet.
    """
    files = resources.files("jaxrl_eff.cli.pages")
    sheet, script = (files.joinpath(n).read_text("utf-8") for n in ("style.css", "hover.js"))
    frame = _FRAME.format(title=escaped(title), style=sheet + style, script=script)
    return frame.replace("<!--body-->", body)


def figure(
    title: str, series: Mapping[str, Any], *, percent: bool = False, colors: Colors | None = None
) -> str:
    """A chart of curves with its caption, its last value and its legend.

    Args:
        series: name -> points (x, y); the name "" is of a figure with one curve.
        percent: values are shares.
        colors: name -> index of its color; None: in order.
    """
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
    head = f"<figcaption><b>{escaped(title)}</b><output>{escaped(shown)}</output></figcaption>"
    return f"<figure>{head}{svg}{names}</figure>"


def legend(colors: Colors) -> str:
    """The names of a chart's curves, each with its color."""
    spans = (f"<span class=key>{swatch(i)}{escaped(name)}</span>" for name, i in colors.items())
    return f"<div class=keys>{''.join(spans)}</div>"


def swatch(index: int) -> str:
    """A dot in one of the colors."""
    return f'<i class=dot style="background:{charts.color(index)}"></i>'


def table(columns: Sequence[Any], rows: Sequence[Sequence[Any]], kind: str = "") -> str:
    """A table; columns with a number in them are aligned to the right.

    Args:
        kind: class of the table in the style sheet.
    """

    def cell(x: Any, tag: str = "td") -> str:
        figure = isinstance(x, int | float) and not isinstance(x, bool)
        shown = number(x) if isinstance(x, float) else plain(x)
        return f"<{tag}{' class=n' if figure else ''}>{escaped(shown)}</{tag}>"

    numeric = [
        any(isinstance(row[i], int | float) for row in rows if i < len(row))
        for i in range(len(columns))
    ]
    heads = "".join(
        f"<th{' class=n' if n else ''}>{escaped(c)}</th>"
        for c, n in zip(columns, numeric, strict=True)
    )
    head = f"<tr>{heads}</tr>" if columns else ""
    body = "".join("<tr>" + "".join(cell(x) for x in row) + "</tr>" for row in rows)
    return f'<div class=wide><table class="{kind}">{head}{body}</table></div>'


def plain(value: Any) -> str:
    """A value as text: text as it is, None as nothing, all else as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

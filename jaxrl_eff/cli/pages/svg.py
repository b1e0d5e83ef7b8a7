"""Small charts as SVG text: curves over steps, and horizontal bars over time or side by side.

No library and no network: a page that is mailed or opened years later still shows them. Colors are
the page's variables `--c0` ... `--c9`, so that one palette serves light and dark.
"""

import html
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Number = float | int
Points = Sequence[tuple[Number, Number]]

_WIDTH, _HEIGHT = 320, 178  # of curves, in their own units
_WIDE = 1000  # of bars
LOW = 5  # height of thin bars
_CHARACTER = 6.4  # width of an 11 px digit, in fonts that run wide
GRAY = 7  # the color of what has none of its own

_STRIPES = """<defs><pattern id="stripes" width="6" height="6" patternUnits="userSpaceOnUse"
 patternTransform="rotate(45)"><path class="stripe" d="M0 0V6"/></pattern></defs>"""


class Html(str):
    """Text that is HTML already."""


def escaped(value: Any) -> Html:
    """Text with the characters of HTML escaped; HTML stays as it is."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def color(index: int) -> str:
    """The CSS value of one of the palette's ten colors."""
    return f"var(--c{index % 10})"


def curves(
    series: Mapping[str, Points], *, percent: bool = False, colors: Mapping[str, int] | None = None
) -> str:
    """An SVG of one or more curves over steps, colored in order unless `colors` says otherwise.

    Many points are averaged in bins, with a band from least to largest; a thin line is what was
    measured and a thick one its local trend. Steps whose value is NaN or infinite are marked
    at the top in the color of alarm.
    """
    finite = {k: [(x, y) for x, y in p if math.isfinite(y)] for k, p in series.items()}
    broken = sorted({x for p in series.values() for x, y in p if not math.isfinite(y)})
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in finite.values() for _, y in points]
    if not xs:
        return ""
    y_ticks, low, high = _axis(ys)
    y_labels = _labels(y_ticks, percent)
    left = max(len(t) + 0.6 * t.endswith(("%", "M", "G")) for t in y_labels) * _CHARACTER + 11
    x_low, x_high = min(xs), max(xs)
    x_ticks = [t for t in ticks(x_low, x_high, 5) if float(t).is_integer()] or [x_low]

    def at_x(x: Number) -> Number:
        return left + (x - x_low) / ((x_high - x_low) or 1) * (_WIDTH - left - 10)

    def at_y(y: Number) -> Number:
        return _HEIGHT - 20 - (y - low) / (high - low) * (_HEIGHT - 32)

    parts = []
    for tick, text in zip(y_ticks, y_labels, strict=True):
        y = at_y(tick)
        parts.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{_WIDTH - 10}"/>')
        parts.append(label(left - 6, y + 3.5, text, "end"))
    for tick, text in zip(x_ticks, _labels(x_ticks), strict=True):
        x = at_x(tick)
        anchor = "end" if x > _WIDTH - len(text) * 3.3 else "middle"
        parts.append(label(x, _HEIGHT - 5, text, anchor))
    for i, (name, points) in enumerate(finite.items()):
        parts += _curve(points, (colors or {}).get(name, i), at_x, at_y)
    for x in broken[:200]:
        parts.append(f'<path class="alarm" d="M{at_x(x):.1f} 4v8"/>')
    return svg_of("chart", _HEIGHT, parts, _hover(series, left))


def _curve(points: Points, index: int, at_x: Any, at_y: Any) -> list[str]:
    def path(pairs: Sequence[tuple[Number, Number]]) -> str:
        return "M" + "L".join(f"{at_x(x):.1f} {at_y(y):.1f}" for x, y in pairs)

    stroke = f'style="stroke:{color(index)}"'
    if len(points) == 1:
        x, y = points[0]
        fill = f'style="fill:{color(index)}"'
        return [f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="3" {fill}/>']
    if not points:
        return []
    bins, parts = _binned(points, 300), []
    if len(bins) < len(points):
        band = [(x, top) for x, _, _, top in bins] + [(x, low) for x, _, low, _ in bins[::-1]]
        parts.append(f'<path class="band" style="fill:{color(index)}" d="{path(band)}Z"/>')
    line = [(x, mean) for x, mean, _, _ in bins]
    if len(line) < 24:
        return [*parts, f'<path class="line" {stroke} d="{path(line)}"/>']
    parts.append(f'<path class="raw" {stroke} d="{path(line)}"/>')
    return [*parts, f'<path class="line" {stroke} d="{path(_smooth(line))}"/>']


def _binned(points: Points, most: int) -> list[tuple[Number, Number, Number, Number]]:
    """(step, mean, least, largest) of at most `most` bins."""
    size = math.ceil(len(points) / most)
    bins = [points[i : i + size] for i in range(0, len(points), size)]
    pairs = [tuple(zip(*b, strict=True)) for b in bins]
    return [(sum(xs) / len(xs), sum(ys) / len(ys), min(ys), max(ys)) for xs, ys in pairs]


def _smooth(line: Sequence[tuple[Number, Number]]) -> list[tuple[Number, Number]]:
    """At every point the straight line through its neighbors, a twelfth of the curve.

    Unlike a moving average it neither lags at the ends of a falling curve nor follows their noise.
    It stays within the values around it.
    """
    half, out = max(2, len(line) // 24), []
    for i, (x, _) in enumerate(line):
        near = line[max(0, i - half) : i + half + 1]
        xs, ys = zip(*near, strict=True)
        mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
        spread = sum((a - mean_x) ** 2 for a in xs) or 1.0
        slope = sum((a - mean_x) * (b - mean_y) for a, b in near) / spread
        out.append((x, min(max(mean_y + slope * (x - mean_x), min(ys)), max(ys))))
    return out


def _hover(series: Mapping[str, Points], left: Number) -> str:
    """Attributes from which the page's script shows values under the pointer."""
    table = [[name, [[x, f"{y:.4g}"] for x, y in _thin(p)]] for name, p in series.items()]
    return f'data-left="{left:.1f}" data-series="{escaped(json.dumps(table))}"'


def _thin(points: Points) -> Points:
    return points[:: math.ceil(len(points) / 300)] if points else points


class Bar(NamedTuple):
    """A rectangle in a row of a timeline or a bar chart.

    Attributes:
        fill: index of a color, or "realloc" (striped) or "move" (gray).
        title: shown under the pointer; neighbors with the same title light up together.
        text: written on the bar if there is room.
        thin: drawn low, below the other bars of its row.
    """

    start: Number
    end: Number
    fill: int | str
    title: str
    text: str = ""
    opacity: float = 1.0
    thin: bool = False


class Row(NamedTuple):
    """Bars with a label in front, and maybe a text behind and more space above."""

    label: str
    bars: Sequence[Bar]
    after: str = ""
    space: int = 0


def stacked(name: str, parts: Sequence[tuple[int, Number, str]], after: str) -> Row:
    """A row of bars end to end: (color, length, title) of each."""
    ends = itertools.accumulate(length for _, length, _ in parts)
    told = zip(parts, ends, strict=True)
    return Row(name, [Bar(x - length, x, fill, title) for (fill, length, title), x in told], after)


def bars(
    rows: Sequence[Row],
    *,
    end: Number | None = None,
    seconds: bool = False,
    lines: Sequence[Number] = (),
    high: int = 26,
    pitch: int = 34,
) -> str:
    """An SVG of horizontal bars: a timeline, or quantities to compare.

    Args:
        end: value at the right end; None is the largest of the bars.
        seconds: True to draw a time axis below.
        lines: values marked by dashed vertical lines.
        high, pitch: height of a bar, and distance from row to row.
    """
    if end is None:
        end = max((bar.end for row in rows for bar in row.bars), default=0.0) or 1.0
    left = max(len(row.label) for row in rows) * _CHARACTER + 14
    right = max((len(row.after) for row in rows if row.bars), default=0) * _CHARACTER + 16
    scale, y, drawn = (_WIDE - left - right) / end, 6, []
    for row in rows:
        y += row.space
        middle = y + high / 2 + 4
        if row.label:
            drawn.append(label(left - 8, middle, row.label, "end"))
        for title, group in itertools.groupby(row.bars, key=lambda bar: bar.title):
            shapes = "".join(_bar(bar, left, y, scale, high) for bar in group)
            drawn.append(f"<g><title>{escaped(title)}</title>{shapes}</g>")
        if row.after:
            last = max((bar.end for bar in row.bars), default=0.0)
            drawn.append(label(left + last * scale + 8, middle, row.after, "start"))
        y += pitch
    back = _time_axis(end, left, scale, y) if seconds else []
    back += [f'<path class="next" d="M{left + x * scale:.1f} 4V{y}"/>' for x in lines]
    if any(bar.fill == "realloc" for row in rows for bar in row.bars):
        back.append(_STRIPES)
    return svg_of("timeline", y + 22 * seconds, back + drawn, width=_WIDE)


def _bar(bar: Bar, left: Number, y: Number, scale: Number, high: int) -> str:
    if bar.end <= bar.start:
        return ""
    x, wide = left + bar.start * scale, max((bar.end - bar.start) * scale, 0.6)
    wide = min(wide, _WIDE - 4 - x)
    at, tall = (y + high + 2, LOW) if bar.thin else (y, high)
    kind = f'class="{bar.fill}"' if isinstance(bar.fill, str) else f'style="fill:{color(bar.fill)}"'
    faint = f' opacity="{bar.opacity}"' if bar.opacity < 1 else ""
    shape = f'<rect x="{x:.2f}" y="{at}" width="{wide:.2f}" height="{tall}" rx="2" {kind}{faint}/>'
    if not bar.text or len(bar.text) * _CHARACTER + 10 > wide:
        return shape
    return shape + label(x + wide / 2, y + high / 2 + 4, bar.text, "middle", "on")


def _time_axis(end: Number, left: Number, scale: Number, bottom: Number) -> list[str]:
    """Grid lines at round times, and their labels below."""
    unit, factor = (" ms", 1e3) if end < 1 else (" s", 1.0)
    marks, parts = ticks(0.0, end * factor, 8), []
    for tick, text in zip(marks, _labels(marks), strict=True):
        x = left + tick / factor * scale
        parts.append(f'<path class="grid" d="M{x:.1f} 4V{bottom}"/>')
        text += unit if tick == marks[-1] else ""
        parts.append(label(x, bottom + 15, text, "end" if x > _WIDE - 30 else "middle"))
    return parts


def ticks(low: Number, high: Number, about: int) -> list[Number]:
    """Round numbers in [low, high], about so many."""
    if high <= low:
        return [low]
    rough = (high - low) / max(about, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * min((1, 2, 5, 10), key=lambda m: abs(math.log(m * power / rough)))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _axis(ys: Sequence[Number]) -> tuple[list[Number], Number, Number]:
    """Ticks and range of the values, with a little air; from 0 where that is near."""
    low, high = (min(ys), max(ys)) if ys else (0.0, 1.0)
    if 0 < low < 0.35 * high:
        low = 0.0
    if high - low <= 1e-9 * max(abs(high), abs(low)):
        low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
    air = 0.06 * (high - low)
    low, high = low if low == 0 else low - air, high + air
    return ticks(low, high, 5), low, high


def _labels(values: Sequence[Number], percent: bool = False) -> list[str]:
    """Short labels of ticks, all with the decimals that their distance needs."""
    factor, unit = (100.0, "%") if percent else (1.0, "")
    largest = max(map(abs, values), default=0.0)
    if not percent:
        for size, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
            if largest >= size:
                factor, unit = (1e-3 if name == "k" else 1 / size), name
                break
    step = (values[1] - values[0]) * factor if len(values) > 1 else abs(largest * factor) or 1.0
    if 0 < largest * factor < 1e-3:
        return [f"{v * factor:.1e}".replace("e-0", "e-") if v else "0" for v in values]
    decimals = max(0, math.ceil(-math.log10(step) - 1e-9)) if step > 0 else 0
    return [f"{v * factor:.{min(decimals, 6)}f}{unit if v else ''}" for v in values]


def svg_of(
    kind: str, height: Number, parts: Sequence[str], more: str = "", width: int = _WIDTH
) -> str:
    """An SVG of a class in the style sheet, from its parts; `more` are attributes."""
    frame = f'<svg class="{kind}" viewBox="0 0 {width} {height:.0f}" role="img" {more}>'
    return frame + "".join(parts) + "</svg>"


def label(x: Number, y: Number, text: str, anchor: str, kind: str = "") -> str:
    """A line of text in a chart.

    Args:
        anchor: "start", "middle" or "end": which part of the text is at `x`.
        kind: class in the style sheet.
    """
    kind = f' class="{kind}"' if kind else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escaped(text)}</text>'

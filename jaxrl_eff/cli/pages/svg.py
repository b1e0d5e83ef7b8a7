"""Small charts as SVG text: curves over steps, and the calls of a step over time.

No library and no network: a page that is mailed or opened years later still shows them. Colours
are the page's variables `--c0` ... `--c7`, so that one palette serves light and dark.
"""

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

Number = float | int
Points = Sequence[tuple[Number, Number]]

_WIDTH, _HEIGHT = 320, 178
_CHARACTER = 6.4  # width of an 11 px digit, in fonts that run wide


def color(index: int) -> str:
    """The CSS value of the palette's colour."""
    return f"var(--c{index % 8})"


def curves(
    series: Mapping[str, Points], *, percent: bool = False, colors: Mapping[str, int] | None = None
) -> str:
    """An SVG of one or more curves over steps, in palette order unless `colors` says otherwise.

    Many points are averaged in bins, with a band from least to largest; a thin line is what was
    measured and a thick one its local trend. Steps whose value is NaN or infinite are marked
    at the top in the colour of alarm.
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
    for tick, label in zip(y_ticks, y_labels, strict=True):
        y = at_y(tick)
        parts.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{_WIDTH - 10}"/>')
        parts.append(f'<text x="{left - 6:.1f}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    for tick, label in zip(x_ticks, _labels(x_ticks), strict=True):
        x = at_x(tick)
        anchor = "end" if x > _WIDTH - len(label) * 3.3 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 5}" text-anchor="{anchor}">{label}</text>')
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
    return [
        (
            sum(x for x, _ in b) / len(b),
            sum(y for _, y in b) / len(b),
            min(y for _, y in b),
            max(y for _, y in b),
        )
        for b in bins
    ]


def _smooth(line: Sequence[tuple[Number, Number]]) -> list[tuple[Number, Number]]:
    """At every point the straight line through its neighbours, a twelfth of the curve.

    Unlike a moving average it neither lags at the ends of a falling curve nor follows their noise.
    """
    half, out = max(2, len(line) // 24), []
    for i, (x, _) in enumerate(line):
        near = line[max(0, i - half) : i + half + 1]
        mean_x = sum(p[0] for p in near) / len(near)
        mean_y = sum(p[1] for p in near) / len(near)
        spread = sum((p[0] - mean_x) ** 2 for p in near) or 1.0
        slope = sum((p[0] - mean_x) * (p[1] - mean_y) for p in near) / spread
        out.append((x, mean_y + slope * (x - mean_x)))
    return out


def _hover(series: Mapping[str, Points], left: Number) -> str:
    """Attributes from which the page's script shows values under the pointer."""
    table = [[name, [[x, f"{y:.4g}"] for x, y in _thin(p)]] for name, p in series.items()]
    return f'data-left="{left:.1f}" data-series="{escaped(json.dumps(table))}"'


def _thin(points: Points) -> Points:
    return points[:: math.ceil(len(points) / 300)] if points else points


def timeline(spans: Sequence[Mapping[str, Any]], colors: Mapping[str, int]) -> str:
    """An SVG of the calls of one step: a row for every group of devices that did the same.

    Args:
        spans: of `call`, `start`, `end` (seconds) and `devices`; drawn from the first start on.
        colors: palette index by call.
    """
    origin = min((float(s["start"]) for s in spans), default=0.0)
    spans = [{**s, "start": s["start"] - origin, "end": s["end"] - origin} for s in spans]
    rows = _rows(spans)
    end = max((float(s["end"]) for s in spans), default=0.0) or 1.0
    width = 1000
    left = max(len(label) for label, _ in rows) * 6.2 + 14
    bottom = 8 + 34 * len(rows)
    scale = (width - left - 14) / end
    marks = ticks(0.0, end, 8)
    parts = []
    for tick, label in zip(marks, _labels(marks), strict=True):
        x = left + tick * scale
        parts.append(f'<path class="grid" d="M{x:.1f} 4V{bottom}"/>')
        unit = " s" if tick == marks[-1] else ""
        anchor = "end" if x > width - 24 else "middle"
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="{anchor}">{label}{unit}</text>'
        )
    for i, (label, calls) in enumerate(rows):
        y = 8 + 34 * i
        parts.append(
            f'<text x="{left - 8:.1f}" y="{y + 18}" text-anchor="end">{escaped(label)}</text>'
        )
        for span in sorted(calls, key=lambda s: s["start"]):
            parts.append(_bar(span, colors, left + span["start"] * scale, y, scale))
    return svg_of("timeline", bottom + 22, parts, width=width)


def _bar(
    span: Mapping[str, Any], colors: Mapping[str, int], x: Number, y: Number, scale: float
) -> str:
    call, start, end = str(span["call"]), float(span["start"]), float(span["end"])
    wide = max((end - start) * scale, 1.0)
    label = ""
    if len(call) * 6.4 + 10 <= wide:
        middle = f'x="{x + wide / 2:.1f}" y="{y + 18}" text-anchor="middle"'
        label = f'<text class="on" {middle}>{escaped(call)}</text>'
    return (
        f"<g><title>{escaped(call)}: {end - start:.4g} s, from {start:.4g} s</title>"
        f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="26" rx="3" '
        f'style="fill:{color(colors.get(call, 7))}"/>{label}</g>'
    )


def _rows(spans: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Spans by device, devices with equal spans together; without devices, as the host's."""
    by_device: dict[Any, list[int]] = {}
    for i, span in enumerate(spans):
        for device in span.get("devices") or ["host"]:
            by_device.setdefault(device, []).append(i)
    groups: dict[tuple[int, ...], list[Any]] = {}
    for device in sorted(by_device, key=lambda d: (isinstance(d, str), d)):
        groups.setdefault(tuple(by_device[device]), []).append(device)
    return [(device_range(d), [spans[i] for i in which]) for which, d in groups.items()]


def device_range(devices: Sequence[Any]) -> str:
    """`0-3, 6` for [0, 1, 2, 3, 6]; an order that isn't ascending is spelled out."""
    if not all(isinstance(d, int) for d in devices):
        return ", ".join(map(str, devices))
    runs: list[list[int]] = []
    for device in devices:
        if runs and device == runs[-1][-1] + 1:
            runs[-1].append(device)
        else:
            runs.append([device])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


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
    return (
        f'<svg class="{kind}" viewBox="0 0 {width} {height:.0f}" role="img" {more}>'
        + "".join(parts)
        + "</svg>"
    )


def label(x: Number, y: Number, text: str, anchor: str, kind: str = "") -> str:
    """A line of text in a chart.

    Args:
        anchor: "start", "middle" or "end": which part of the text is at `x`.
        kind: class in the style sheet.
    """
    kind = f' class="{kind}"' if kind else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escaped(text)}</text>'


def escaped(value: Any) -> str:
    """Text with the characters of HTML escaped."""
    return html.escape(str(value))

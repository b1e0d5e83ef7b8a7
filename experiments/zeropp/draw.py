"""Draws `curves.svg` from what `trained` found: losses, and how far rungs are from no rounding.

python -m experiments.zeropp.draw
"""

import json
import re
from pathlib import Path

import numpy as np

from jaxrl_eff.cli.pages import svg

HERE = Path(__file__).parent
WIDTH, HEIGHT, EVERY = 380, 240, 50
COLORS = ("#222", "#888", "#1f77b4", "#d62728", "#2ca02c", "#9467bd")
STYLE = (
    "text{font:12px sans-serif;fill:#222}.m{text-anchor:middle}.e{text-anchor:end}path{fill:none}"
)


def found(results: dict) -> dict[str, np.ndarray]:
    """Rung -> training losses [3, points], of the seeds that all rungs have."""
    out: dict[str, list] = {}
    for key, one in results.items():
        if match := re.fullmatch(r"trained steps=1000 seed=[012]: (.*)", key):
            out.setdefault(match[1], []).append(one["training"])
    return {k: np.array(v) for k, v in out.items()}


def panel(title: str, lines: dict[str, np.ndarray], first: int) -> str:
    """Curves of [points], without the first few."""
    wide, tall = WIDTH - 80, HEIGHT - 60
    low = min(y[first:].min() for y in lines.values())
    high = max(y[first:].max() for y in lines.values())
    last = len(next(iter(lines.values()))) * EVERY

    def at(x: float, y: float) -> str:
        return f"{x / last * wide:.1f} {(high - y) / (high - low) * tall:.1f}"

    parts = [f'<text y="-10">{title}</text>']
    for tick in svg.ticks(low, high, 5):
        y = (high - tick) / (high - low) * tall
        parts.append(f'<path d="M0 {y:.1f}h{wide}" style="stroke:#e4e4e4"/>')
        parts.append(f'<text x="-5" y="{y + 4:.1f}" class="e">{tick:g}</text>')
    for tick in svg.ticks(0, last, 5):
        parts.append(
            f'<text x="{tick / last * wide:.1f}" y="{tall + 16}" class="m">{tick:g}</text>'
        )
    for color, y in zip(COLORS, lines.values(), strict=False):
        points = [at((i + 0.5) * EVERY, v) for i, v in enumerate(y) if i >= first]
        parts.append(f'<path d="M{"L".join(points)}" style="stroke:{color};stroke-width:1.5"/>')
    return "".join(parts)


def main() -> None:
    runs = found(json.loads((HERE / "results.json").read_text()))
    mean = {k: v.mean(axis=0) for k, v in runs.items()}
    apart = {k: (v - runs["compiler"]).mean(axis=0) for k, v in runs.items()}
    panels = (
        panel("training loss, nats a character", mean, 2),
        panel("the same, less that without rounding", apart, 2),
    )
    body = "".join(
        f'<g transform="translate({60 + i * WIDTH} 30)">{p}</g>' for i, p in enumerate(panels)
    )
    for i, (color, name) in enumerate(zip(COLORS, runs, strict=False)):
        x, y = 2 * WIDTH + 10, 40 + 20 * i
        body += f'<path d="M{x} {y}h22" style="stroke:{color};stroke-width:2"/>'
        body += f'<text x="{x + 28}" y="{y + 4}">{name}</text>'
    (HERE / "curves.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH + 130} {HEIGHT}">'
        f'<rect width="100%" height="100%" fill="#fff"/><style>{STYLE}</style>{body}</svg>\n'
    )


if __name__ == "__main__":
    main()

"""Tables and the figure of `study.py`, from `results.json`.

  python experiments/sparse/frontier.py

Prints a table for every model, share and amount of data: the best held-out loss over learning
rates, and the loss at equal forgetting, by straight lines between neighbouring learning rates.
Means and standard deviations are over seeds. Writes `frontier.svg`.
"""

import html
import itertools
import json
from pathlib import Path

import numpy as np

from jaxrl_eff import charts

HERE = Path(__file__).parent
FORGETTING = (0.1, 0.3)  # nats a token
DRAWN = {  # colour and width; what is not here is a static selector
    "full": ("#111111", 2.2), "lora": ("#d03030", 2.2), "lisa": ("#e0902a", 1.6),
    "spiel_ag": ("#1a8a3a", 2.2), "spiel_ma": ("#6abf4b", 1.6), "periodic": ("#0b5ea8", 2.2),
    "blocks": ("#8a4fbf", 1.6), "random": ("#555555", 1.6),
}  # fmt: skip
STATIC = ("#b4b4b4", 1.0)


def grouped(results: dict) -> dict[tuple[str, str, str], dict[str, dict]]:
    """(model, share, data) -> method -> (rate, seed) -> run; what has no share is in every one."""
    found: dict[tuple[str, str, str], dict[str, dict]] = {}
    every = []
    for key, runs in results.items():
        model, share, _, method = key.split()
        for run in runs:
            at = model, share, run["data"]
            one = {(run["rate"], run["seed"]): run}
            if method in ("full", "lisa"):
                every.append((at, method, one))
            else:
                found.setdefault(at, {}).setdefault(method, {}).update(one)
    for (model, _, data), method, one in every:
        for at in found:
            if (at[0], at[2]) == (model, data):
                found[at].setdefault(method, {}).update(one)
    return found


def curve(runs: dict, seed: int, key: str) -> np.ndarray:
    """A number at the end of every learning rate, ascending, with that of no training first."""
    rates = sorted({rate for rate, _ in runs})
    first = runs[rates[0], seed]["before"][0] if key == "target" else 0.0
    return np.array([first, *(runs[rate, seed][key][-1] for rate in rates)])


def at_forgetting(rise: np.ndarray, target: np.ndarray, limit: float) -> float:
    """The least loss that forgets no more, on the straight lines between learning rates."""
    points = list(zip(rise, target, strict=True))
    best = min(t for r, t in points if r <= limit)
    for (r0, t0), (r1, t1) in itertools.pairwise(points):
        if (r0 - limit) * (r1 - limit) < 0:
            best = min(best, t0 + (t1 - t0) * (limit - r0) / (r1 - r0))
    return best


def row(runs: dict) -> dict:
    rates, seeds = (sorted({k[i] for k in runs}) for i in (0, 1))
    targets = np.stack([curve(runs, s, "target") for s in seeds])
    rises = np.stack([curve(runs, s, "rise") for s in seeds])
    best = int(targets[:, 1:].mean(0).argmin())
    equal = [
        [at_forgetting(r, t, limit) for r, t in zip(rises, targets, strict=True)]
        for limit in FORGETTING
    ]
    return {
        "rate": rates[best], "edge": best in (0, len(rates) - 1),
        "best": targets[:, best + 1], "rise": rises[:, best + 1], "equal": equal,
        "changed": np.mean([runs[rates[best], s]["changed"] for s in seeds]),
        "rises": rises.mean(0), "targets": targets.mean(0),
    }  # fmt: skip


def number(values) -> str:
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"


def table(methods: dict[str, dict]) -> None:
    limits = " | ".join(f"at a rise of {x}" for x in FORGETTING)
    print(f"| method | rate | best loss | its rise | {limits} | entries changed |")
    print("|---" * (5 + len(FORGETTING)) + "|")
    for name, r in sorted(methods.items(), key=lambda item: item[1]["best"].mean()):
        equal = " | ".join(number(x) for x in r["equal"])
        rate = f"{r['rate']:g}" + " (edge)" * r["edge"]
        print(
            f"| {name} | {rate} | {number(r['best'])} | {r['rise'].mean():.3f} | {equal} "
            f"| {100 * r['changed']:.3g} % |"
        )


def figure(panels: dict[str, dict[str, dict]]) -> str:
    """Forgetting against loss, one panel a setting; a curve a method, a point a learning rate."""
    width, height, left = 430, 360, 52
    parts = []
    for i, (title, methods) in enumerate(panels.items()):
        start = np.mean([r["targets"][0] for r in methods.values()])
        low = min(r["targets"].min() for r in methods.values())
        low, high = low - 0.05 * (start - low), start + 0.1 * (start - low)
        x_high = 1.3 * max(r["rise"].mean() for r in methods.values())
        x0, wide, tall = left + i * width, width - 70, height - 70

        def at_x(x, x0=x0, x_high=x_high, wide=wide):
            return x0 + (x + 0.03 * x_high) / (1.03 * x_high) * wide

        def at_y(y, low=low, high=high, tall=tall):
            return 30 + (high - y) / (high - low) * tall

        title = html.escape(f"loss on the new text: {title}")
        parts.append(f'<text class="t" x="{x0}" y="18">{title}</text>')
        for tick in charts.ticks(0, x_high, 5):
            parts.append(f'<path class="g" d="M{at_x(tick):.1f} 30v{tall}"/>')
            label = f"{tick:.2g}"
            parts.append(f'<text x="{at_x(tick):.1f}" y="{tall + 45}" class="m">{label}</text>')
        for tick in charts.ticks(low, high, 6):
            parts.append(f'<path class="g" d="M{x0} {at_y(tick):.1f}h{wide}"/>')
            label = f"{tick:.2f}"
            parts.append(f'<text x="{x0 - 5}" y="{at_y(tick) + 4:.1f}" class="e">{label}</text>')
        parts.append(
            f'<text x="{x0 + wide / 2}" y="{tall + 62}" class="m">rise of the loss on the old text'
            "</text>"
        )
        parts.append(f'<clipPath id="c{i}"><rect x="{x0}" y="30" width="{wide}" height="{tall}"/>')
        parts.append(f'</clipPath><g clip-path="url(#c{i})">')
        for name in sorted(methods, key=lambda n: n in DRAWN):
            color, stroke = DRAWN.get(name, STATIC)
            pairs = zip(methods[name]["rises"], methods[name]["targets"], strict=True)
            points = [(at_x(x), at_y(y)) for x, y in pairs]
            line = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
            parts.append(f'<path d="M{line}" style="stroke:{color};stroke-width:{stroke}"/>')
            for x, y in points[1:]:
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.3" style="fill:{color}"/>')
        parts.append("</g>")
    x = len(panels) * width
    for j, name in enumerate([*DRAWN, "other static"]):
        color, stroke = DRAWN.get(name, STATIC)
        y = 44 + 20 * j
        parts.append(f'<path d="M{x} {y}h22" style="stroke:{color};stroke-width:{stroke}"/>')
        parts.append(f'<text x="{x + 28}" y="{y + 4}">{name}</text>')
    style = (
        "text{font:12px sans-serif;fill:#222}.t{font-weight:bold}.m{text-anchor:middle}"
        ".e{text-anchor:end}path{fill:none}.g{stroke:#e4e4e4}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{x + 120}" height="{height}" '
        f'viewBox="0 0 {x + 120} {height}"><rect width="100%" height="100%" fill="#fff"/>'
        f"<style>{style}</style>{''.join(parts)}</svg>\n"
    )


def main() -> None:
    settings = grouped(json.loads((HERE / "results.json").read_text()))
    panels = {}
    for (model, share, data), methods in settings.items():
        rows = {name: row(runs) for name, runs in methods.items()}
        before = next(iter(next(iter(methods.values())).values()))["before"]
        print(f"\n{model}, {share} %, {data} data; before: {before}\n")
        table(rows)
        panels[f"{model}, {share} %, {data} data"] = rows
    drawn = dict(list(panels.items())[:3])
    (HERE / "frontier.svg").write_text(figure(drawn))


if __name__ == "__main__":
    main()

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

from jaxrl_eff.cli.pages import svg

HERE = Path(__file__).parent
WIDTH, HEIGHT = 430, 340  # of a panel
FORGETTING = (0.1, 0.2, 0.3)  # nats a token
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


def against(r: dict, other: dict) -> str:
    """Difference at the second level of forgetting, seed by seed."""
    return number(np.subtract(r["equal"][1], other["equal"][1]), "+")


def number(values, sign: str = "") -> str:
    return f"{np.mean(values):{sign}.3f} ± {np.std(values, ddof=1):.3f}"


def table(methods: dict[str, dict]) -> None:
    limits = " | ".join(f"at a rise of {x}" for x in FORGETTING)
    paired = f"minus random's at {FORGETTING[1]}"
    print(f"| method | rate | best loss | its rise | {limits} | {paired} | changed |")
    print("|---" * (6 + len(FORGETTING)) + "|")
    for name, r in sorted(methods.items(), key=lambda item: item[1]["best"].mean()):
        equal = " | ".join(number(x) for x in r["equal"])
        rate = f"{r['rate']:g}" + " (edge)" * r["edge"]
        print(
            f"| {name} | {rate} | {number(r['best'])} | {r['rise'].mean():.3f} | {equal} "
            f"| {against(r, methods['random'])} | {100 * r['changed']:.3g} % |"
        )


def figure(panels: dict[str, dict[str, dict]]) -> str:
    """Two panels a line, and the key right of them."""
    parts = []
    for i, (title, methods) in enumerate(panels.items()):
        x, y = 52 + i % 2 * WIDTH, 30 + i // 2 * HEIGHT
        parts.append(f'<g transform="translate({x} {y})">{panel(i, title, methods)}</g>')
    x, bottom = 2 * WIDTH, HEIGHT * -(-len(panels) // 2)
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
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {x + 120} {bottom}">'
        f'<rect width="100%" height="100%" fill="#fff"/><style>{style}</style>'
        f"{''.join(parts)}</svg>\n"
    )


def panel(number: int, title: str, methods: dict[str, dict]) -> str:
    """Forgetting against loss; a curve a method, a point a learning rate."""
    wide, tall = WIDTH - 70, HEIGHT - 70
    start = np.mean([r["targets"][0] for r in methods.values()])
    least = min(r["targets"].min() for r in methods.values())
    low, high = least - 0.05 * (start - least), start + 0.1 * (start - least)
    right = 1.3 * max(r["rise"].mean() for r in methods.values())

    def at(x: float, y: float) -> tuple[float, float]:
        return (x + 0.03 * right) / (1.03 * right) * wide, (high - y) / (high - low) * tall

    title = html.escape(f"loss on the new text: {title}")
    parts = [f'<text class="t" y="-12">{title}</text>']
    for tick in svg.ticks(0, right, 5):
        x, _ = at(tick, low)
        parts.append(f'<path class="g" d="M{x:.1f} 0v{tall}"/>')
        parts.append(f'<text x="{x:.1f}" y="{tall + 15}" class="m">{tick:.2g}</text>')
    for tick in svg.ticks(low, high, 6):
        _, y = at(0, tick)
        parts.append(f'<path class="g" d="M0 {y:.1f}h{wide}"/>')
        parts.append(f'<text x="-5" y="{y + 4:.1f}" class="e">{tick:.2f}</text>')
    under = (
        f'<text x="{wide / 2}" y="{tall + 32}" class="m">rise of the loss on the old text</text>'
    )
    parts.append(f'{under}<clipPath id="c{number}"><rect width="{wide}" height="{tall}"/>')
    parts.append(f'</clipPath><g clip-path="url(#c{number})">')
    for name in sorted(methods, key=lambda n: n in DRAWN):
        color, stroke = DRAWN.get(name, STATIC)
        pairs = zip(methods[name]["rises"], methods[name]["targets"], strict=True)
        points = [at(x, y) for x, y in pairs]
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        parts.append(f'<path d="M{line}" style="stroke:{color};stroke-width:{stroke}"/>')
        for x, y in points[1:]:
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.3" style="fill:{color}"/>')
    return "".join([*parts, "</g>"])


def main() -> None:
    settings = grouped(json.loads((HERE / "results.json").read_text()))
    panels = {}
    for (model, share, data), methods in settings.items():
        rows = {name: row(runs) for name, runs in methods.items()}
        before = next(iter(next(iter(methods.values())).values()))["before"]
        print(f"\n{model}, {share} %, {data} data; before: {before}\n")
        table(rows)
        panels[f"{model}, {share} %, {data} data"] = rows
    (HERE / "frontier.svg").write_text(figure(panels))


if __name__ == "__main__":
    main()

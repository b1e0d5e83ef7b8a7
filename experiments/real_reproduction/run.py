"""ReaL's published table against the simulator, and what the simulator says of H100s.

  python experiments/real_reproduction/run.py [--draws=40]

Pure Python on one core, about 2 minutes; prints the tables of README.md and writes numbers.json.
"""

import argparse
import dataclasses
import json
import random
import statistics
from pathlib import Path

import published as real

from jaxrl_eff.planner import clusters
from jaxrl_eff.planner.simulate import Simulator

HERE = Path(__file__).parent

# H100, compiled decoding: from, to of each constant; a draw takes each uniformly, independently.
RANGES = {
    "train_efficiency": (0.35, 0.55),
    "forward_efficiency": (0.4, 0.6),
    "decode_efficiency": (0.3, 0.6),
    "memory_efficiency": (0.55, 0.85),
    "link_efficiency": (0.6, 0.85),
    "nic_efficiency": (0.6, 0.85),
    "overlap": (0.0, 0.8),
    "tensor_overlap": (0.0, 0.5),
    "layer_seconds": (2e-6, 2e-5),
    "link_latency": (3e-6, 1e-5),
    "stage_seconds": (3e-5, 2e-4),
    "move_seconds": (2e-3, 0.3),
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--draws", type=int, default=40)
    draws = parser.parse_args().draws
    out = {}
    fits = real.Fits()
    fitted = fits.fit()
    out["fitted"] = dataclasses.asdict(fitted)
    out["errors"] = fits.errors(fitted)._asdict()
    print("fitted", out["fitted"])
    show_errors("all 33 cells", out["errors"])
    out["cells"] = table(fits, fitted)
    out["held_out"] = held_out(fits)
    out["without"] = without(fits, fitted)
    out["systems"] = systems(fits, fitted)
    out["h100"] = h100(fits, draws)
    (HERE / "numbers.json").write_text(json.dumps(out, indent=1) + "\n")


def show_errors(name, e):
    print(
        f"| {name} | {e['heuristic']:.1%} | {e['real']:.1%} | {e['worst']:.0%} | {e['gain']:.3f} "
        f"| {e['rank']:.2f} | {e['mean_gain']:.2f} / {e['published_gain']:.2f} |",
        flush=True,
    )


def table(fits, fitted):
    rows = []
    for c, p in zip(fits.table, fits.predict(fitted), strict=True):
        rows.append(
            {
                "cell": str(c),
                "heuristic": [c.seconds["heuristic"], round(p.heuristic, 1)],
                "ReaL": [c.seconds["ReaL"], round(p.real, 1)],
                "gain": [round(c.gain, 2), round(p.gain, 2)],
                "plan": {k: [len(v.devices), v.stage, v.data, v.tensor] for k, v in p.plan.items()},
            }
        )
        r = rows[-1]
        a, b, g = r["heuristic"], r["ReaL"], r["gain"]
        plan = ", ".join(
            f"{n}x{s}.{d}.{t}"
            for n, s, d, t in (r["plan"][k] for k in ("actor_gen", "actor_train", "critic_train"))
        )
        print(
            f"| {c} | {a[0]:.1f} / {a[1]:.1f} | {b[0]:.1f} / {b[1]:.1f} "
            f"| {g[0]:.2f} / {g[1]:.2f} | {plan} |"
        )
    return rows


def splits(table):
    """Name -> indices held out."""
    everything = range(len(table))
    out = {}
    for seed in range(6):
        held = sorted(random.Random(seed).sample(list(everything), len(table) // 3))
        out[f"a third at random, seed {seed}"] = held
    for length in (128, 384, 896):
        out[f"responses of {length}"] = [i for i in everything if table[i].response == length]
    for case in ("ScaleActor", "ScaleCritic", "ScaleBoth"):
        out[case] = [i for i in everything if table[i].case == case]
    out["all with a 70B model"] = [i for i in everything if 70 in table[i][1:3]]
    return out


def held_out(fits):
    out = {}
    for name, held in splits(fits.table).items():
        rest = [i for i in range(len(fits.table)) if i not in held]
        fitted = fits.fit(rest)
        e = fits.errors(fitted, held)._asdict()
        out[name] = {"fitted": dataclasses.asdict(fitted), "cells": len(held), "errors": e}
        show_errors(f"{name} ({len(held)})", e)
    return out


def without(fits, fitted):
    """The same without one term each, not refitted."""
    changes = {
        "tensor-parallel sums free": {"link_bytes_per_s": 1e18, "tensor_seconds": 0.0},
        "starting kernels free": {"layer_seconds": 0.0, "tensor_seconds": 0.0},
        "changes of layout free": {"move_seconds": 0.0},
    }
    out = {}
    for name, change in changes.items():
        predicted = [real.predict(c, real.a100(c.gpus, fitted).with_(**change)) for c in fits.table]
        out[name] = real.errors(fits.table, predicted)._asdict()
        show_errors(f"without: {name}", out[name])
    predicted = []
    for c in fits.table:
        cluster = real.a100(c.gpus, fitted)
        symmetric = Simulator(real.problem(c), cluster).score(real.heuristic(c)).seconds
        predicted.append(real.Predicted(symmetric, *real.searched(c, cluster, rule="own")))
    out["memory by this package"] = real.errors(fits.table, predicted)._asdict()
    show_errors("memory by this package, not by ReaL's rule", out["memory by this package"])
    return out


LENGTHS = {"all": (128, 384, 896), "128": (128,), "384": (384,), "896": (896,)}


def gains(cell, cluster):
    """Baselines' seconds over a searched plan's, by what must fit into a GPU."""
    symmetric = Simulator(real.problem(cell), cluster).score(real.heuristic(cell)).seconds
    out = {}
    for rule, name in (("real", "ReaL's memory rule"), ("own", "own memory rule")):
        searched = real.searched(cell, cluster, rule=rule)[0]
        out[f"symmetric / searched, {name}"] = symmetric / searched
        one = real.uniform(cell, cluster, rule=rule)[0]
        out[f"best single layout / searched, {name}"] = one / searched
    return out


def by_length(table, rows):
    """Mean gains by response length: name -> length -> mean."""
    return {
        name: {
            length: statistics.fmean(
                r[name] for r, c in zip(rows, table, strict=True) if c.response in which
            )
            for length, which in LENGTHS.items()
        }
        for name in rows[0]
    }


def systems(fits, fitted):
    """Gains as published, and by the simulator on three systems."""
    out = {"published": by_length(fits.table, [{"published": c.gain} for c in fits.table])}
    middle = {k: (a + b) / 2 for k, (a, b) in RANGES.items()}
    for name, make in {
        "A100, decoding started from Python (fitted)": lambda n: real.a100(n, fitted),
        "A100, compiled": lambda n: clusters.gpus("a100", n // 8, 8).with_(**middle),
        "H100, compiled": lambda n: clusters.gpus("h100", n // 8, 8).with_(**middle),
    }.items():
        rows = [gains(c, make(c.gpus)) for c in fits.table]
        out[name] = by_length(fits.table, rows)
    for name, found in out.items():
        for what, means in found.items():
            print(f"| {name} | {what} | " + " | ".join(f"{v:.2f}" for v in means.values()) + " |")
    return out


def h100(fits, draws):
    """Gains on H100s with compiled decoding, over draws of the constants."""
    rng = random.Random(0)
    sets = [{k: rng.uniform(a, b) for k, (a, b) in RANGES.items()} for _ in range(draws)]
    drawn = [
        [gains(c, clusters.gpus("h100", c.gpus // 8, 8).with_(**constants)) for c in fits.table]
        for constants in sets
    ]
    out = {"ranges": RANGES, "draws": draws}
    for name in drawn[0][0]:
        out[name] = {}
        for length, which in LENGTHS.items():
            means = sorted(by_length(fits.table, rows)[name][length] for rows in drawn)
            cells = sorted(
                r[name]
                for rows in drawn
                for r, c in zip(rows, fits.table, strict=True)
                if c.response in which
            )
            spans = [
                [x[round(q * (len(x) - 1))] for q in (0.05, 0.5, 0.95)] for x in (means, cells)
            ]
            out[name][length] = {"mean": spans[0], "cell": spans[1]}
            (a, m, b), (low, _, high) = spans
            print(f"| {name} | {length} | {m:.2f} ({a:.2f} to {b:.2f}) | {low:.2f} to {high:.2f} |")
    # Which constants move the mean gain: correlation over the draws.
    out["correlation"] = {}
    for name in drawn[0][0]:
        means = [by_length(fits.table, rows)[name]["all"] for rows in drawn]
        out["correlation"][name] = {
            k: round(statistics.correlation([s[k] for s in sets], means), 2) for k in RANGES
        }
        print(name, out["correlation"][name])
    return out


if __name__ == "__main__":
    main()

"""The published speed of ZeRO++ on 384 V100, and what its break-even alone would say.

    python -m experiments.zeropp.v100

TFLOP/s a GPU were read off the figures of the announcement (ZeRO++, arXiv:2306.10209; 24 DGX-2 of
16 GPUs, 1 or 4 links of 100 Gb/s a node). The model has one number for the machine, the TFLOP/s a
GPU would reach without a network, and one for the program, the share of the traffic between nodes
that hides behind compute; both are fitted to the 32 readings. No device is used.
"""

import itertools

import numpy as np

from jaxrl_eff.parallel.zero.levels import LADDER, ZeroLevel
from jaxrl_eff.planner import clusters, zero_advice

SIZES = ("18B", "49B", "91B", "138B")
# (links a node, tokens a GPU) -> TFLOP/s a GPU with ZeRO-3 and with ZeRO++, by size.
CHART = {
    (4, 1024): ((25, 23, 23, 23), (35, 36, 36, 36)),
    (4, 2048): ((40, 36, 36, 36), (53, 51, 51, 50)),
    (1, 1024): ((14, 11, 11, 11), (31, 22, 22, 22)),
    (1, 2048): ((26, 20, 20, 20), (46, 38, 38, 38)),
}
EXACT, ALL = LADDER[0], next(r for r in LADDER if r.name == "qgz")


def cluster(links: int, tflops: float) -> clusters.Cluster:
    """24 DGX-2."""
    return clusters.gpus("a100", 24).with_(
        name="v100", devices=384, per_host=16, domain=16, flops_per_s=tflops * 1e12,
        train_efficiency=1.0, nic_bytes_per_s=links * 12.5e9 / 16, nic_efficiency=1.0,
    )  # fmt: skip


def speed(links: int, tokens: int, rung: ZeroLevel, tflops: float, hidden: float) -> float:
    """TFLOP/s a GPU: compute 1, network T* / T, of which a share hides while there is compute."""
    network = zero_advice.break_even(cluster(links, tflops), rung) / tokens
    return tflops / (1 + network - min(1.0, hidden * network))


def error(tflops: float, hidden: float) -> float:
    """Mean of the relative errors of all readings."""
    off = [
        abs(speed(*case, rung, tflops, hidden) / reading - 1)
        for case, rows in CHART.items()
        for rung, row in zip((EXACT, ALL), rows, strict=True)
        for reading in row
    ]
    return float(np.mean(off))


def main() -> None:
    grid = itertools.product(range(40, 101), np.arange(0, 1.01, 0.05))
    tflops, hidden = min(grid, key=lambda at: error(*at))
    print(f"fitted: {tflops} TFLOP/s without a network, {hidden:.0%} of the traffic hidden")
    print(f"mean error of {sum(len(r) for rows in CHART.values() for r in rows)} readings: "
          f"{error(tflops, hidden):.1%}\n")  # fmt: skip
    print("| links, tokens a GPU | hidden from | ZeRO-3: chart, model | ZeRO++: chart, model "
          "| gain: chart, model |")  # fmt: skip
    print("|---|---|---|---|---|")
    for (links, tokens), (plain, quick) in CHART.items():
        a, b = (speed(links, tokens, rung, tflops, hidden) for rung in (EXACT, ALL))
        gains = [y / x for x, y in zip(plain, quick, strict=True)]
        needed = zero_advice.break_even(cluster(links, tflops), EXACT)
        print(
            f"| {links}, {tokens:,} | {needed:,.0f} | {min(plain)} to {max(plain)}, {a:.0f} | "
            f"{min(quick)} to {max(quick)}, {b:.0f} | {min(gains):.2f} to {max(gains):.2f}, "
            f"{b / a:.2f} |"
        )


if __name__ == "__main__":
    main()

"""Lengths like those of three data sets, from what the Skrull paper prints of them.

Table of arXiv:2505.19609: the share of sequences below 1K, 4K, 8K, 32K and 128K tokens, and the
longest. Within a bin lengths are spread evenly on a logarithmic scale, but for ChatQA2's 8K to 32K,
where they are spread evenly; nothing else is known of them.
"""

from typing import NamedTuple

import numpy as np

SHORTEST = 64


class Histogram(NamedTuple):
    """Shares of sequences below `EDGES`, the longest, and a bin that is evenly spread, if any."""

    below: tuple[float, ...]
    longest: int
    even: int | None = None


EDGES = (1_000, 4_000, 8_000, 32_000, 128_000)
HISTOGRAMS = {
    "wikipedia": Histogram((0.8788, 0.9934, 0.9992, 0.9999, 1.0), 78_000),
    "lmsys": Histogram((0.8712, 0.9935, 0.9987, 0.9998, 0.9999), 1_643_000),
    "chatqa2": Histogram((0.2192, 0.3148, 0.4043, 0.9986, 1.0), 99_000, even=3),
}


def sample_lengths(name: str, n: int, seed: int = 0) -> np.ndarray:
    """int64 [n]: tokens of sequences drawn from a histogram.

    Raises:
        ValueError: a name that is not in `HISTOGRAMS`.
    """
    if name not in HISTOGRAMS:
        raise ValueError(f"no histogram {name!r}; there is {', '.join(HISTOGRAMS)}.")
    below, longest, even = HISTOGRAMS[name]
    edges = [SHORTEST, *(min(e, longest) for e in EDGES), longest]
    shares = np.diff([0.0, *below, 1.0])
    rng = np.random.default_rng(seed)
    bins = rng.choice(len(shares), size=n, p=shares / shares.sum())
    low, high = np.array(edges, float)[bins], np.array(edges, float)[bins + 1]
    u = rng.random(n)
    spread = low * (high / low) ** u
    if even is not None:
        spread = np.where(bins == even, low + (high - low) * u, spread)
    return np.clip(spread.astype(np.int64), SHORTEST, longest)

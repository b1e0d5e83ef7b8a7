"""How little so many sizes can pad batches of random lengths, if only their sums mattered.

  python experiments/long_context/sizes.py

Sizes are the best for 600 batches of 256 sequences, by dynamic programming; what they add to 4,000
others is printed. No lattice of as many shapes, which say besides how much is shared, pads less.
"""

import numpy as np
from lengths import sample_lengths

SEQUENCES, LONGEST = 256, 8 * 26_000


def totals(name: str, batches: int, seed: int) -> np.ndarray:
    """Tokens of batches, int64."""
    found = sample_lengths(name, batches * SEQUENCES, seed)
    return np.minimum(found, LONGEST).reshape(batches, SEQUENCES).sum(axis=1)


def best_sizes(values: np.ndarray, count: int) -> np.ndarray:
    """Of at most `count` sizes those that add least when every value is rounded up to one."""
    x = np.sort(values)
    before = np.concatenate([[0], np.cumsum(x)])
    least, choices = np.full(len(x) + 1, np.inf), []
    least[0] = 0
    for _ in range(count):
        new, chosen = np.full(len(x) + 1, np.inf), np.zeros(len(x) + 1, int)
        for end in range(1, len(x) + 1):
            start = np.arange(end)
            added = x[end - 1] * (end - start) - (before[end] - before[:end])
            chosen[end] = (least[:end] + added).argmin()
            new[end] = (least[:end] + added)[chosen[end]]
        least = new
        choices.append(chosen)
    sizes, end = [], len(x)
    for chosen in reversed(choices):
        sizes.append(x[end - 1])
        end = chosen[end]
    return np.unique(sizes)


def main() -> None:
    for name in ("wikipedia", "lmsys"):
        seen, others = totals(name, 600, seed=1), totals(name, 4_000, seed=2)
        for count in (6, 12, 24, 48):
            sizes = np.append(best_sizes(seen, count), max(seen.max(), others.max()))
            rounded = sizes[np.searchsorted(sizes, others)]
            print(f"{name}, {count} sizes: {rounded.sum() / others.sum() - 1:.2%} more")


if __name__ == "__main__":
    main()

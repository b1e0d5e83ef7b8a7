"""A digit hidden in a row of letters, to be found again however long the row is.

    dbcahj=7gfc...aeb?  ->  7

Most rows are short and a few are long, as in real mixtures: their lengths are log-uniform in two
ranges. Whether a model finds the digit at every depth of every length is the plainest test of a
long context.
"""

import math

import numpy as np

from jaxrl_eff.data.sources import Example, Examples

LETTERS = "abcdefghij"
ALPHABET = LETTERS + "0123456789=?"


def hidden(length: int, depth: float | int, digit: int, rng: np.random.Generator) -> Example:
    """One row of `length` characters with its question; `depth` 0 hides at its begin, 1 at its end.

    Returns:
        prompt, truth and completion (both the digit), depth, length.
    """
    row = rng.choice(list(LETTERS), length - 3)
    at = round(depth * len(row))
    text = "".join(row[:at]) + f"={digit}" + "".join(row[at:]) + "?"
    return {
        "prompt": text,
        "truth": str(digit),
        "completion": str(digit),
        "depth": float(depth),
        "length": length,
    }


def examples(
    count: int,
    *,
    split: str = "train",
    shortest: int = 8,
    longest: int = 512,
    long_share: float | int = 0.1,
    seed: int = 0,
) -> Examples:
    """Rows by index, the same ones for equal arguments.

    Args:
        count: how many.
        split: "train" or "held_out": other rows.
        shortest, longest: characters of a row. The geometric mean of both divides short from long.
        long_share: of rows that are long.
        seed: of everything.

    Raises:
        ValueError: sizes that make no rows.
    """
    if not 4 <= shortest <= longest:
        raise ValueError(f"shortest is {shortest}, longest {longest}; 4 <= shortest <= longest.")
    if count < 1 or not 0 <= long_share <= 1:
        raise ValueError(f"{count} rows with a long_share of {long_share}; at least 1, and 0..1.")
    if split not in ("train", "held_out"):
        raise ValueError(f"split is {split!r}, not 'train' or 'held_out'.")
    middle = math.sqrt(shortest * longest)

    def read(index: int) -> Example:
        rng = np.random.default_rng((seed, split == "train", index))
        low, high = (middle, longest) if rng.random() < long_share else (shortest, middle)
        length = round(math.exp(rng.uniform(math.log(low), math.log(high))))
        return hidden(length, rng.random(), int(rng.integers(10)), rng)

    return Examples(count, read, f"needles, {split}")

"""A retrieval task: a digit hidden in a row of letters, to be found at any row length.

    dbcahj=7gfc...aeb?  ->  7

Most rows are short and a few are long, as in real mixtures: lengths are log-uniform in two ranges.
Finding the digit at every depth of every length is the simplest test of a long context.
"""

import math

import numpy as np

from jaxrl_eff.data.sources import Example, Examples

LETTERS = "abcdefghij"
ALPHABET = LETTERS + "0123456789=?"


def hidden(length: int, depth: float | int, digit: int, rng: np.random.Generator) -> Example:
    """One row of `length` characters, ending in "?"; depth 0 is its beginning, 1 its end.

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
    """A source of rows by index, the same for equal arguments.

    Args:
        count: number of rows.
        split: "train" or "held_out": different rows.
        shortest, longest: characters of a row. Their geometric mean separates short from long.
        long_share: share of rows that are long.
        seed: of all random choices.

    Raises:
        ValueError: an argument is out of range.
    """
    if not 4 <= shortest <= longest:
        raise ValueError(f"shortest is {shortest}, longest {longest}; 4 <= shortest <= longest.")
    if count < 1 or not 0 <= long_share <= 1:
        raise ValueError(f"{count} rows with a long_share of {long_share}; at least 1, and 0..1.")
    if split not in ("train", "held_out"):
        raise ValueError(f"unknown split {split!r}; expected one of ['train', 'held_out'].")
    middle = math.sqrt(shortest * longest)

    def read(index: int) -> Example:
        rng = np.random.default_rng((seed, split == "train", index))
        low, high = (middle, longest) if rng.random() < long_share else (shortest, middle)
        length = round(math.exp(rng.uniform(math.log(low), math.log(high))))
        return hidden(length, rng.random(), int(rng.integers(10)), rng)

    return Examples(count, read, f"needles, {split}")

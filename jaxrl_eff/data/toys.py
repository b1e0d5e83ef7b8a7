"""Toy tasks on digits with computable answers, for watching every algorithm learn in minutes.

A task shows some digits and ">" and asks for them reversed, or sorted: "1234>" -> "4321". Its
numbers are split once into train and held-out, so that evaluation uses unseen numbers. A given
share of supervised examples can be wrong, which leaves something for reinforcement learning to
improve; preferences pair the truth with a corrupted answer.

Example:
    >>> from jaxrl_eff import toys
    >>> task = toys.reverse_digits(3, train=100, held_out=10)
    >>> example = toys.prompts(task, "held_out")[0]
    >>> toys.gold(example, example["prompt"][2::-1]), toys.gold(example, "")
    (True, False)
"""

import functools
from dataclasses import dataclass

import numpy as np

from jaxrl_eff.data.sources import Example, Examples

ALPHABET = "0123456789>"
TASKS = {"reverse": lambda digits: digits[::-1], "sort": lambda digits: "".join(sorted(digits))}


@dataclass(frozen=True)
class Task:
    """A task, and the numbers that it uses. Made by `reverse_digits` or `sort_digits`.

    Raises:
        ValueError: the name is unknown, or there are not enough numbers.
    """

    name: str
    digits: int
    train: int
    held_out: int
    seed: int

    def __post_init__(self) -> None:
        if self.name not in TASKS:
            raise ValueError(f"unknown task {self.name!r}; expected one of {[*TASKS]}.")
        _check_digits(self.digits)
        if min(self.train, self.held_out) < 0 or self.train + self.held_out > 10**self.digits:
            raise ValueError(
                f"{self.train} numbers for training and {self.held_out} held out do not split the "
                f"{10**self.digits} numbers of {self.digits} digits."
            )

    def truth(self, digits: str) -> str:
        """Returns the right answer."""
        return TASKS[self.name](digits)


def reverse_digits(
    digits: int = 4, *, train: int | None = None, held_out: int | None = None, seed: int = 0
) -> Task:
    """The task of writing the digits backwards: "1234>" -> "4321".

    Args:
        digits: of each number, leading zeros included.
        train: numbers to train on; by default 4096, or all that are not held out if fewer.
        held_out: numbers to evaluate on; by default 512, or an eighth of all if fewer.
        seed: of the choice of numbers.
    """
    return _task("reverse", digits, train, held_out, seed)


def sort_digits(
    digits: int = 4, *, train: int | None = None, held_out: int | None = None, seed: int = 0
) -> Task:
    """The task of sorting the digits: "3142>" -> "1234". Arguments as `reverse_digits`."""
    return _task("sort", digits, train, held_out, seed)


def prompts(task: Task, split: str = "train") -> Examples:
    """A source of {"prompt": "1234>", "truth": "4321"} for every number of the split.

    Args:
        task: the task.
        split: "train" or "held_out".
    """
    numbers = _numbers(task, split)

    def read(index: int) -> Example:
        shown = f"{numbers[index]:0{task.digits}d}"
        return {"prompt": f"{shown}>", "truth": task.truth(shown)}

    return Examples(len(numbers), read, f"{task.name}_digits, {split}")


def completions(
    task: Task, split: str = "train", *, wrong: float | int = 0.0, seed: int = 0
) -> Examples:
    """Adds {"completion": answer} to `prompts`, for supervised learning.

    Args:
        task: the task.
        split: "train" or "held_out".
        wrong: share of examples, rounded to a whole number of them, whose completion is
            corrupted. The same ones are wrong in every epoch.
        seed: of the choice of wrong examples and their corruptions.
    """
    if not 0 <= wrong <= 1:
        raise ValueError(f"wrong is {wrong}; a share lies between 0 and 1.")
    base = prompts(task, split)
    corrupted = np.random.default_rng(seed).permutation(base.size) < round(wrong * base.size)

    def read(index: int) -> Example:
        example = base[index]
        right = example["truth"]
        answer = corrupt(right, np.random.default_rng((seed, index))) if corrupted[index] else right
        return {**example, "completion": answer}

    return Examples(base.size, read, base.name)


def preferences(
    task: Task, split: str = "train", *, keep_length: bool = True, seed: int = 0
) -> Examples:
    """Adds {"chosen": the truth, "rejected": a corrupted answer} to `prompts`.

    Args:
        task: the task.
        split: "train" or "held_out".
        keep_length: if False, rejected answers can also lack a digit or repeat one.
        seed: of the corruptions.
    """
    base = prompts(task, split)

    def read(index: int) -> Example:
        example = base[index]
        bad = corrupt(
            example["truth"], np.random.default_rng((seed, index)), keep_length=keep_length
        )
        return {**example, "chosen": example["truth"], "rejected": bad}

    return Examples(base.size, read, base.name)


def corrupt(answer: str, rng: np.random.Generator, *, keep_length: bool = True) -> str:
    """Returns an answer other than the given one.

    Some digits are changed, to any digit or to others of the answer (a less obvious error), or all
    are shuffled; without `keep_length` one can be dropped or doubled instead.
    """
    ways = ["change", "mix", "shuffle"] + ([] if keep_length else ["lose", "double"])
    while True:
        digits = list(answer)
        way, at = ways[rng.integers(len(ways))], int(rng.integers(len(digits)))
        if way in ("change", "mix"):
            pool = "0123456789" if way == "change" else answer
            for i in rng.choice(len(digits), rng.integers(1, len(digits) + 1), replace=False):
                digits[i] = pool[rng.integers(len(pool))]
        elif way == "shuffle":
            rng.shuffle(digits)
        elif way == "lose":
            del digits[at]
        else:
            digits.insert(at, digits[at])
        if "".join(digits) != answer:
            return "".join(digits)
        if len(set(answer)) == 1:  # e.g. 7777, where only a changed digit makes a difference
            ways = ["change"]


def gold(example: Example, response: str) -> bool:
    """Returns True if the response is exactly the truth."""
    return response == _truth(example)


def digit_share(example: Example, response: str) -> float:
    """Share of positions that are right, 0..1; surplus characters count as wrong positions.

    A smoother reward than `gold`: 1 exactly where `gold` is True.
    """
    truth = _truth(example)
    right = sum(a == b for a, b in zip(truth, response, strict=False))
    return right / max(len(truth), len(response))


def _truth(example: Example) -> str:
    truth = example.get("truth")
    if not isinstance(truth, str):
        raise ValueError(f"field 'truth' is {truth!r:.80}, but must be text.")
    return truth


def _check_digits(digits: int) -> None:
    if not 1 <= digits <= 18:
        raise ValueError(f"digits is {digits}; it may be 1 to 18.")


def _task(name: str, digits: int, train: int | None, held_out: int | None, seed: int) -> Task:
    _check_digits(digits)  # before powers of 10 are taken
    if held_out is None:
        held_out = min(512, 10**digits // 8)
    if train is None:
        train = min(4096, 10**digits - held_out)
    return Task(name, digits, train, held_out, seed)


@functools.lru_cache(maxsize=32)
def _numbers(task: Task, split: str) -> np.ndarray:
    if split not in ("train", "held_out"):
        raise ValueError(f"unknown split {split!r}; expected one of ['train', 'held_out'].")
    # Held-out numbers depend on the seed alone, so that they stay the same for any `train`.
    every = 10**task.digits
    held = np.random.default_rng((task.seed, 0)).choice(every, task.held_out, replace=False)
    if split == "held_out":
        return held
    more = task.train + task.held_out
    drawn = np.random.default_rng((task.seed, 1)).choice(every, more, replace=False)
    return drawn[~np.isin(drawn, held)][: task.train]

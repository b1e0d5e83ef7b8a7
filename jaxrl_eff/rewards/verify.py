r"""Rewards that a rule can compute: text in, number out.

A reward is a function `(example, response) -> float`; the ones here are made by functions that
take the field names and settings, and `weighted` adds them up. Numbers are compared as exact
fractions. Nothing a model wrote is ever executed, nor used as a pattern. Left out: symbolic
equality of formulas, and running code, which needs a sandbox outside this process.
"""

import math
import re
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

import numpy as np

from jaxrl_eff.data.text import said

Example = dict[str, Any]
Reward = Callable[[Example, str], float]

# Thousands are grouped by commas in threes, or not at all: "3,4" is two numbers.
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(rf"(?<![\w.])[-+−]?\$?[-−]?(?:{_DIGITS})(?:\s?/\s?\d+(?!\d|\.\d))?")
_TEX_FRACTION = re.compile(r"([-−]?)\\[dt]?frac\{(\d{1,100})\}\{(\d{1,100})\}")
_LARGEST = float(np.finfo(np.float32).max)
_LONGEST = 100  # characters of a number; longer ones are no answer, and slow to compare


def exact(*, field: str = "answer", strip: bool = True) -> Reward:
    """1 if the response is the field's text, else 0; `strip` ignores blanks around both."""

    def reward(example: Example, response: str) -> float:
        want = _text(example, field)
        return float(response.strip() == want.strip() if strip else response == want)

    return reward


def numeric(*, field: str = "answer", anywhere: bool = True) -> Reward:
    r"""1 if the response's answer is the same number as the field's, else 0.

    The field may be a number or text, such as GSM8K's solutions, which end in `#### 1,234`.

    Args:
        field: of the example.
        anywhere: without `####` or `\boxed{}` in the response, its last number counts as the
            answer; if False there is none then.

    Raises:
        ValueError: on use, the field holds no number.
    """

    def reward(example: Example, response: str) -> float:
        truth = example.get(field)
        exactly = isinstance(truth, int | float)
        want = Fraction(str(truth)) if exactly else number(_text(example, field))
        if want is None:
            raise ValueError(f"field {field!r} holds no number: {truth!r:.80}.")
        return float(number(response, anywhere=anywhere) == want)

    return reward


def number(text: str, *, anywhere: bool = True) -> Fraction | None:
    r"""The number that a text gives as its answer, exactly; None if it gives none.

    It stands after the last `####`, or else in the last `\boxed{}`, or else is the text's last
    number. Dollar signs, commas between thousands, a trailing dot or percent sign are ignored;
    `1/2`, `\frac{1}{2}` and `-$3.50` are understood, and `1e5` is not.
    """
    which = -1
    if "####" in text:
        text, which = text.rpartition("####")[2], 0
    elif (inside := boxed(text)) is not None:
        text = inside
    elif not anywhere:
        return None
    text = _TEX_FRACTION.sub(r"\1\2/\3", text).replace("\\$", "$")
    found = [match.group() for match in _NUMBER.finditer(text)]
    return _fraction(found[which]) if found else None


def boxed(text: str) -> str | None:
    r"""What the last closed `\boxed{...}` of a text holds, braces within included; or None."""
    found, opened = None, []
    for brace in re.finditer(r"\\boxed\{|\\[{}]|[{}]", text):
        if brace.group() in ("\\boxed{", "{"):
            opened.append((brace.group() != "{", brace.end()))
        elif brace.group() == "}" and opened:
            is_box, begin = opened.pop()
            found = text[begin : brace.start()] if is_box else found
    return found


def matches(pattern: str) -> Reward:
    """1 if the whole response matches the regular expression, in which a dot matches any character.

    The pattern is the experimenter's: one with nested repetition may take exponential time.
    """
    compiled = re.compile(pattern, re.DOTALL)
    return lambda example, response: float(compiled.fullmatch(response) is not None)


def tagged(*names: str) -> Reward:
    """1 if the response is `<a>...</a> <b>...</b>` for the names in order, each tag once."""
    blocks = r"\s*".join(rf"<{name}>.*?</{name}>" for name in map(re.escape, names))
    form = re.compile(rf"\s*{blocks}\s*", re.DOTALL)
    tags = [tag for name in names for tag in (f"<{name}>", f"</{name}>")]
    return lambda example, response: float(
        all(response.count(tag) == 1 for tag in tags) and form.fullmatch(response) is not None
    )


def contains(words: Iterable[str], *, every: bool = False) -> Reward:
    """1 if any of the words (or every one) is among the response's words, else 0; case ignored."""
    wanted = _word_set(words)
    return lambda example, response: float(
        wanted <= set(_words(response)) if every else not wanted.isdisjoint(_words(response))
    )


def word_share(words: Iterable[str]) -> Reward:
    """Share of the response's words that are in the list, 0..1; case ignored, 0 without words."""
    wanted = _word_set(words)

    def reward(example: Example, response: str) -> float:
        said = _words(response)
        return sum(word in wanted for word in said) / max(len(said), 1)

    return reward


def length_penalty(*, soft: int, hard: int, unit: str = "characters") -> Reward:
    """0 up to `soft`, then falling evenly to -1 at `hard` and beyond.

    Yu et al. 2025 (DAPO), arXiv:2503.14476, Eq. 13, on text instead of tokens.

    Args:
        soft, hard: lengths, 0 <= soft < hard.
        unit: "characters" or "words" (runs without blanks).
    """
    if not 0 <= soft < hard:
        raise ValueError(f"soft is {soft} and hard {hard}; it must be 0 <= soft < hard.")
    if unit not in ("characters", "words"):
        raise ValueError(f"unit is {unit!r}, not 'characters' or 'words'.")

    def reward(example: Example, response: str) -> float:
        n = len(response) if unit == "characters" else len(response.split())
        return -min(max((n - soft) / (hard - soft), 0.0), 1.0)

    return reward


def weighted(*parts: tuple[float | int, Reward]) -> Reward:
    """The sum of weight * reward over (weight, reward) pairs."""
    return lambda example, response: sum(
        (w * float(fn(example, response)) for w, fn in parts), start=0.0
    )


def host_reward(
    fn: Reward,
    source: Any,
    tokenizer: Any,
    *,
    stop: Iterable[int] | None = None,
    prefix: str = "",
    writes: str = "score",
) -> Callable[..., dict[str, np.ndarray]]:
    """A reward as the function of a host call, `local(..., host=True)`.

    Args:
        fn: `(example, response) -> float` (or bool).
        source: what the loader read, which `example` indexes. Filler rows, where `example` is -1,
            score 0.
        tokenizer: decodes the response.
        stop: ids that end a response, not shown to `fn`; the tokenizer's `stop` by default.
        prefix: of the arrays read, such as "greedy_".
        writes: name of the array written.

    Returns:
        `(batch, key) -> {writes: float32 [B]}`, which reads tokens [B, T], mask [B, T] and
        example [B] as numpy arrays. The response is the text of the tokens whose mask is 1, as
        `data.text.said` reads them.

    Raises:
        ValueError: on use, `fn` raised or gave no finite float32; names example and response.
    """

    def call(batch: dict[str, np.ndarray], key: Any = None) -> dict[str, np.ndarray]:
        del key
        tokens, mask, example = (
            np.asarray(batch[prefix + name]) for name in ("tokens", "mask", "example")
        )
        scores = np.zeros(len(tokens), np.float32)
        for row, index in enumerate(example.tolist()):
            if index >= 0:
                response = said(tokenizer, tokens[row][mask[row] > 0].tolist(), stop=stop)
                scores[row] = score(fn, source[index], index, response)
        return {writes: scores}

    return call


def score(fn: Reward, example: Example, index: int, response: str) -> float:
    """The reward of one response, refused if training could not use it.

    Args:
        fn: the reward; messages call it by its `__name__`.
        example: what it is given.
        index: the example's row, for messages.
        response: text of the response.

    Raises:
        ValueError: `fn` raised, or gave what is not a finite float32; names reward, example and
            response.
    """
    name = getattr(fn, "__name__", "")
    known = name.isidentifier() and name != "reward"  # neither a lambda nor one of this module's
    where = f"the reward {name!r}" if known else "the reward"
    where += f" of example {index} for the response {response!r:.200}"
    try:
        value = float(fn(example, response))
    except Exception as error:
        raise ValueError(f"{where} raised {type(error).__name__}: {error}") from error
    if not math.isfinite(value):
        raise ValueError(f"{where} is {value}, not a finite number.")
    if abs(value) > _LARGEST:
        raise ValueError(f"{where} is {value}, but float32 ends at {_LARGEST:.8g}.")
    return value


def _fraction(text: str) -> Fraction | None:
    text = re.sub(r"[$,\s+]", "", text).replace("−", "-")
    if len(text) > _LONGEST or text.startswith("--"):
        return None
    top, _, bottom = text.partition("/")
    if bottom and not int(bottom):
        return None
    return Fraction(top) / int(bottom or 1)


def _text(example: Example, field: str) -> str:
    if field not in example:
        raise ValueError(f"there is no field {field!r}; there is {sorted(map(str, example))}.")
    return str(example[field])


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())


def _word_set(words: Iterable[str]) -> set[str]:
    if isinstance(words, str):
        raise ValueError(f"words is the text {words!r}; give a sequence of words.")
    wanted = {word.lower() for word in words}
    for word in wanted:
        if _words(word) != [word]:
            raise ValueError(f"{word!r} is not one word, so no response could hold it.")
    return wanted

r"""Rewards computed by rules: functions from text to a number.

A reward is a function `(example, response) -> float`; the functions here make rewards from field
names and settings, and `weighted` adds them up. Numbers are compared as exact fractions; `symbolic`
compares formulas. A model's output is never executed, nor used as a pattern. Not supported: running
code, which needs a sandbox outside this process.
"""

import math
import re
from collections.abc import Callable, Iterable
from decimal import Decimal
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

import numpy as np

from jaxrl_eff.data import sources
from jaxrl_eff.data.text import said
from jaxrl_eff.rollout.rewards import answers
from jaxrl_eff.rollout.rewards.answers import boxed as boxed
from jaxrl_eff.rollout.rewards.answers import number as number

Example = dict[str, Any]
Reward = Callable[[Example, str], float]

_LARGEST = float(np.finfo(np.float32).max)


def exact(*, field: str = "answer", strip: bool = True) -> Reward:
    """Returns a reward: 1 if the response is the field's text, else 0.

    `strip` ignores blanks around both.

    Example:
        >>> from jaxrl_eff import rewards
        >>> rewards.exact(field="truth")({"truth": "21"}, " 21 ")
        1.0
    """

    def reward(example: Example, response: str) -> float:
        want = _text(example, field)
        return float(response.strip() == want.strip() if strip else response == want)

    return reward


def numeric(*, field: str = "answer", anywhere: bool = True) -> Reward:
    r"""Returns a reward: 1 if the response's answer is the same number as the field's, else 0.

    The field can be a number or text, such as GSM8K's solutions, which end in `#### 1,234`.

    Args:
        field: of the example.
        anywhere: True: without `####` or `\boxed{}` in the response, its last number counts as the
            answer; False: it has no answer then.

    Raises:
        ValueError: on use, the field has no number.

    Example:
        >>> from jaxrl_eff import rewards
        >>> rewards.numeric()({"answer": "#### 1,234"}, "so it is 1234.0")
        1.0
    """

    def reward(example: Example, response: str) -> float:
        return float(number(response, anywhere=anywhere) == _truth(example, field))

    return reward


def matches(pattern: str) -> Reward:
    """Returns a reward: 1 if the whole response matches the regular expression, else 0.

    A dot matches any character. The pattern is trusted: one with nested repetition, such as
    `(a+)+b`, can take exponential time.

    Raises:
        ValueError: the pattern is not a regular expression.

    Example:
        >>> from jaxrl_eff import rewards
        >>> reward = rewards.matches("[0-9]+")
        >>> reward({}, "123"), reward({}, "123 or so")
        (1.0, 0.0)
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"pattern is {pattern!r}, no regular expression: {error}.") from None
    return lambda example, response: float(compiled.fullmatch(response) is not None)


def tagged(*names: str) -> Reward:
    """Returns a reward: 1 for `<a>...</a> <b>...</b>` with the names in order, each tag once.

    Raises:
        ValueError: no name, a duplicate, or an invalid name of a tag.

    Example:
        >>> from jaxrl_eff import rewards
        >>> rewards.tagged("think", "answer")({}, "<think>1 + 1</think> <answer>2</answer>")
        1.0
    """
    if not names or len(set(names)) < len(names):
        raise ValueError(f"names is {names}; it must be at least one name, and none twice.")
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[^\s<>/]+", name):
            raise ValueError(f"{name!r} is no name of a tag.")
    blocks = r"\s*".join(rf"<{name}>.*?</{name}>" for name in map(re.escape, names))
    form = re.compile(rf"\s*{blocks}\s*", re.DOTALL)
    tags = [tag for name in names for tag in (f"<{name}>", f"</{name}>")]
    return lambda example, response: float(
        all(response.count(tag) == 1 for tag in tags) and form.fullmatch(response) is not None
    )


def contains(words: Iterable[str], *, every: bool = False) -> Reward:
    """Returns a reward: 1 if the response has any (or every one) of the words; ignores case.

    Example:
        >>> from jaxrl_eff import rewards
        >>> rewards.contains(["please", "thanks"])({}, "Thanks a lot!")
        1.0
    """
    wanted = _word_set(words)
    return lambda example, response: float(
        wanted <= set(_words(response)) if every else not wanted.isdisjoint(_words(response))
    )


def word_share(words: Iterable[str]) -> Reward:
    """Returns a reward: fraction of the response's words in the list; ignores case, 0 if none.

    Example:
        >>> from jaxrl_eff import rewards
        >>> rewards.word_share(["good"])({}, "good and good")
        0.6666666666666666
    """
    wanted = _word_set(words)

    def reward(example: Example, response: str) -> float:
        said = _words(response)
        return sum(word in wanted for word in said) / max(len(said), 1)

    return reward


def length_penalty(*, soft: int, hard: int, unit: str = "characters") -> Reward:
    """Returns a reward: 0 up to `soft`, then linearly down to -1 at `hard` and beyond.

    Yu et al. 2025 (DAPO), arXiv:2503.14476, Eq. 13, on text instead of tokens.

    Args:
        soft, hard: lengths, 0 <= soft < hard.
        unit: "characters" or "words" (runs without blanks).

    Example:
        >>> from jaxrl_eff import rewards
        >>> reward = rewards.length_penalty(soft=4, hard=8)
        >>> reward({}, "five."), reward({}, "eight."), reward({}, "far too long")
        (-0.25, -0.5, -1.0)
    """
    if not 0 <= soft < hard:
        raise ValueError(f"soft is {soft} and hard {hard}; it must be 0 <= soft < hard.")
    if unit not in ("characters", "words"):
        raise ValueError(f"unknown unit {unit!r}; expected one of ['characters', 'words'].")

    def reward(example: Example, response: str) -> float:
        n = len(response) if unit == "characters" else len(response.split())
        return -min(max((n - soft) / (hard - soft), 0.0), 1.0)

    return reward


def weighted(*parts: tuple[float | int, Reward]) -> Reward:
    """Returns the sum of weight * reward over (weight, reward) pairs; weights must be finite.

    Example:
        >>> from jaxrl_eff import rewards
        >>> reward = rewards.weighted((1.0, rewards.exact()), (0.5, rewards.matches("[0-9]+")))
        >>> reward({"answer": "2"}, "3")
        0.5
    """
    for weight, _ in parts:
        if not math.isfinite(weight):
            raise ValueError(f"a weight is {weight}, not a finite number.")
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
    """Wraps a reward as the function of a host call, `local(..., host=True)`.

    Args:
        fn: `(example, response) -> float` (or bool).
        source: the loader's source, which `example` indexes. Filler rows, with `example` -1, score
            0.
        tokenizer: decodes the response.
        stop: ids that end a response, not shown to `fn`; the tokenizer's `stop` by default.
        prefix: prefix of the names of the arrays read, such as "greedy_".
        writes: name of the array written.

    Returns:
        `(batch, key) -> {writes: float32 [B]}`, which reads tokens [B, T], mask [B, T] and
        example [B] as numpy arrays. The response is the text of the tokens whose mask is 1,
        decoded by `data.text.said`.

    Raises:
        ValueError: on use, `fn` raised or returned no finite float32; the message has example and
            response.

    Example:
        >>> from jaxrl_eff import CharTokenizer, rewards
        >>> tokenizer, source = CharTokenizer("0123456789>"), [{"answer": "21"}]
        >>> score = rewards.host_reward(rewards.exact(), source, tokenizer)
        >>> tokens, mask = np.array([[4, 5, 13, 5, 4, 2]]), np.array([[0, 0, 0, 1, 1, 1]])
        >>> score({"tokens": tokens, "mask": mask, "example": np.array([0])})
        {'score': array([1.], dtype=float32)}
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
                where = sources.place(source, index)
                scores[row] = score(fn, source[index], where, response)
        return {writes: scores}

    return call


def score(fn: Reward, example: Example, place: str, response: str) -> float:
    """Computes the reward of one response, and rejects values that training could not use.

    Args:
        fn: the reward; messages use its `__name__`.
        example: the example.
        place: location of the example, from `sources.place`, for messages.
        response: text of the response.

    Raises:
        ValueError: `fn` raised, or returned no finite float32; the message has reward, example and
            response.
    """
    name = getattr(fn, "__name__", "")
    known = name.isidentifier() and name != "reward"  # neither a lambda nor one of this module's
    where = f"the reward {name!r}" if known else "the reward"
    where += f" of {place} for the response {response!r:.200}"
    try:
        value = float(fn(example, response))
    except Exception as error:
        raise ValueError(f"{where} raised {type(error).__name__}: {error}") from error
    if not math.isfinite(value):
        raise ValueError(f"{where} is {value}, not a finite number.")
    if abs(value) > _LARGEST:
        raise ValueError(f"{where} is {value}, but float32 ends at {_LARGEST:.8g}.")
    return value


def _truth(example: Example, field: str) -> Fraction:
    """Returns the number in the example's field.

    Raises:
        ValueError: there is none.
    """
    value = _field(example, field)
    if isinstance(value, str):
        found = answers.truth(value)
    elif isinstance(value, bool) or not isinstance(value, Real | Decimal):
        found = None
    elif isinstance(value, Integral):
        found = Fraction(int(value))
    else:  # as printed: 0.1 is 1/10
        found = Fraction(str(value)) if math.isfinite(value) else None
    if found is None:
        raise ValueError(
            f"field {field!r} holds no number: {value!r:.80}; it may be a number, a text that is "
            "one, or a text whose number stands behind '####' or in '\\boxed{}'."
        )
    return found


def _field(example: Example, field: str) -> Any:
    if field not in example:
        raise ValueError(f"unknown field {field!r}; expected one of {sorted(map(str, example))}.")
    return example[field]


def _text(example: Example, field: str) -> str:
    value = _field(example, field)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"field {field!r} is {value!r:.80}, neither text nor a number.")
    return str(value)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())


def _word_set(words: Iterable[str]) -> set[str]:
    if isinstance(words, str):
        raise ValueError(f"words is the text {words!r}; give a sequence of words.")
    words = list(words)
    for word in words:
        if not isinstance(word, str) or _words(word) != [word.lower()]:
            raise ValueError(f"{word!r} is not one word, so no response could hold it.")
    wanted = {word.lower() for word in words}
    if not wanted:
        raise ValueError("words is empty, so every response would be worth the same.")
    return wanted

"""Checks of the border between prompt and response: training and generation must tokenize it alike.

A tokenizer can merge characters across the place where a prompt ends and a response begins. If
training text has " O" as one token there, and a prompt ends in the space alone, then the model
answers from tokens that it never saw in training.
"""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from jaxrl_eff.data.chat import Message, render_chats
from jaxrl_eff.data.tokenizer import Tokenizer

_AROUND = 3  # tokens shown on either side of a difference


def of_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """Difference between a conversation and the prompts of its assistant turns; "" if none.

    Raises:
        ValueError: as `chat.render_chat`.
    """
    turns = [n for n, m in enumerate(messages) if n and m["role"] == "assistant"]
    wanted = [(messages, False), *((messages[:n], True) for n in turns)]
    whole, *prompts = render_chats(tokenizer, wanted)
    trained = tokenizer.encode(whole)
    for n, prompt in zip(turns, prompts, strict=True):
        if not whole.startswith(prompt):
            return (
                f"turn {n} (assistant) of a conversation does not continue the generation prompt, "
                f"which ends in {prompt[-40:]!r}; the text trained on there is "
                f"{whole[_same(prompt, whole) :][:40]!r}"
            )
        given = tokenizer.encode(prompt)
        if trained[: len(given)] != given:
            return (
                "training text and generation prompt have other tokens at their border: "
                + _lists(tokenizer, given, trained)
            )
    return ""


def of_completion(tokenizer: Tokenizer, prompt: str, completion: str) -> str:
    """Difference between prompt and completion tokenized apart and as one text; "" if none."""
    apart = tokenizer.encode(prompt) + tokenizer.encode(completion)
    joined = tokenizer.encode(prompt + completion)
    if apart == joined:
        return ""
    return (
        "prompt and completion, made into tokens apart, have other tokens at their border than "
        "their text as a whole: " + _lists(tokenizer, apart, joined, names=("apart", "whole"))
    )


def holds_completion(example: Mapping[str, Any], prompt: str, completion: str) -> bool:
    """Returns True if the prompt of an example ends with its completion.

    Args:
        prompt, completion: names of fields.
    """
    text, end = (str(example.get(field, "")).strip() for field in (prompt, completion))
    return bool(end) and len(text) > len(end) and text.endswith(end)


def _lists(
    tokenizer: Tokenizer,
    given: Sequence[int],
    trained: Sequence[int],
    names: tuple[str, str] = ("prompt", "training"),
) -> str:
    """Formats both lists of tokens around the first difference."""
    at = _same(given, trained)
    here = slice(max(at - _AROUND + 1, 0), at + _AROUND)
    return ", ".join(
        f"{name} {[_shown(tokenizer, i) for i in ids[here]]}"
        for name, ids in zip(names, (given, trained), strict=True)
    )


def _same(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Number of leading items that are equal."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _shown(tokenizer: Tokenizer, token: int) -> str:
    """A token as in the vocabulary, where a leading space is visible."""
    inner = getattr(tokenizer, "inner", None)
    return inner.id_to_token(token) if inner else tokenizer.decode([token], special=True)

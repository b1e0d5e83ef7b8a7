"""Conversations -> text, token ids, and a mask of the assistant's tokens.

A checkpoint's chat template is a Jinja program; `templates` runs it. The template's own
`{% generation %}` blocks, where it has them, mark the assistant's text. Other templates are
rendered turn by turn: what turn n adds to the conversation before it (including the assistant's
opening) is the assistant's. This requires that a template never changes what it has already
written, which is checked.

Left out: tools and documents as arguments of the template.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl_eff.data import templates
from jaxrl_eff.data.tokenizer import Tokenizer

Message = Mapping[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
# Mark the ends of a {% generation %} block in the rendered text; noncharacters, never in text.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MARKS = re.compile(r"\{%[-+]?\s*generation\b")


def render_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> str:
    """Renders a conversation as the model reads it.

    Args:
        messages: dicts with `role` (one of `ROLES`) and `content`. Other keys are passed to the
            template, without those that are None, in nested values as well.
        add_generation_prompt: end with the opening of an assistant turn.

    Raises:
        ValueError: there is no template, a message has the wrong form, or the template refuses the
            conversation or exceeds the limits of `templates`.
        ImportError: Jinja is missing.
    """
    return render_chats(tokenizer, [(messages, add_generation_prompt)])[0]


def render_chats(
    tokenizer: Tokenizer, wanted: Sequence[tuple[Sequence[Message], bool]]
) -> list[str]:
    """Renders several pairs of (messages, add_generation_prompt), each as `render_chat`."""
    plain = [(_plain(messages), opening) for messages, opening in wanted]
    return [_unmark(text)[0] for text in _render(tokenizer, plain)]


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> tuple[list[int], list[int]]:
    """Token ids of the conversation, and a mask that is 1 for the assistant's tokens.

    The token that ends an assistant's turn is included; a newline that the template adds after it
    is not. A token that spans a boundary is included.

    Raises:
        ValueError: as `render_chat`; or a turn is rendered differently once others follow.
    """
    messages = _plain(messages)
    whole, turns = [(messages, add_generation_prompt)], _by_turn(messages)
    marks = _MARKS.search(tokenizer.chat_template or "") is not None
    rendered = _render(tokenizer, whole if marks else [*whole, *turns])
    text, spans = _unmark(rendered[0])
    by_turns = _OPEN not in rendered[0]
    if by_turns:
        parts = _render(tokenizer, turns) if marks and turns else rendered[1:]
        spans = _turn_spans(tokenizer, messages, text, [_unmark(part)[0] for part in parts])
    ids, offsets = tokenizer.encode_spans(text)
    mask = [0] * len(ids)
    for start, end in spans:
        turn = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
        if by_turns:
            turn = _until_end_of_turn(tokenizer, ids, turn)
        for i in turn:
            mask[i] = 1
    return ids, mask


def to_answer(messages: Sequence[Message]) -> Sequence[Message]:
    """The messages that the assistant should answer next, without its last answer if present.

    The last user or tool turn is the question; everything from the first assistant turn after it
    on is dropped. A conversation without a question ends before the first assistant turn.

    Raises:
        ValueError: nothing is left.
    """
    roles = [m.get("role") if isinstance(m, Mapping) else None for m in messages]
    asked = max((n for n, role in enumerate(roles) if role in ("user", "tool")), default=-1)
    end = next((n for n in range(asked + 1, len(roles)) if roles[n] == "assistant"), len(roles))
    if not end:
        what = "begins with the assistant's answer" if roles else "has no turns"
        raise ValueError(f"the conversation {what}, so there is nothing to answer.")
    return messages[:end]


def _by_turn(messages: Sequence[Message]) -> list[tuple[Sequence[Message], bool]]:
    """Inputs for `_turn_spans`: each assistant turn's conversation without and with that turn."""
    return [
        part
        for n, message in enumerate(messages)
        if message["role"] == "assistant"
        for part in ((messages[:n], True), (messages[: n + 1], False))
    ]


def _turn_spans(
    tokenizer: Tokenizer, messages: Sequence[Message], whole: str, parts: Sequence[str]
) -> list[tuple[int, int]]:
    """Characters [start, end) that each assistant turn added."""
    spans = []
    turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    for n, before, after in zip(turns, parts[::2], parts[1::2], strict=True):
        if not after.startswith(before) or not whole.startswith(after):
            raise ValueError(
                f"turn {n} (assistant): the chat template of {tokenizer.origin} writes it "
                "differently depending on what follows, so what the assistant said cannot be "
                "marked; give a template with {% generation %} blocks, or single-turn examples."
            )
        spans.append((len(before), len(after)))
    return spans


def _until_end_of_turn(tokenizer: Tokenizer, ids: list[int], turn: list[int]) -> list[int]:
    """Drops the blank tokens that a template adds after the token that ends a turn."""
    keep = len(turn)
    while keep and not tokenizer.decode([ids[turn[keep - 1]]], special=True).strip():
        keep -= 1
    if not keep:
        return turn
    last = ids[turn[keep - 1]]
    # Plain decoding hides special tokens, whatever their names are.
    ended = last in tokenizer.stop or not tokenizer.decode([last])
    return turn[:keep] if ended else turn


def _render(tokenizer: Tokenizer, wanted: Sequence[tuple[Sequence[Message], bool]]) -> list[str]:
    """Renders conversations that `_plain` has checked, with marks in the text."""
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{tokenizer.origin} has no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json)."
        )
    return templates.render(
        tokenizer.chat_template,
        tokenizer.origin,
        wanted,
        special=tokenizer.special,
        marks=(_OPEN, _CLOSE),
    )


def _plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Checks the messages and returns them as plain dicts, without keys that are None.

    A parquet file gives every message the keys of all messages, with None where one has none; a
    template that tests `'tool_calls' in message` must not see these. The `content` of a message
    with tool calls and no text is None, as templates expect, however the file stores that.
    """
    return [_checked(n, message) for n, message in enumerate(messages)]


def _checked(n: int, message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"turn {n} is a {type(message).__name__}, but should be a message.")
    plain = _without_nulls(message)
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"turn {n}: unknown role {role!r}; expected one of {[*ROLES]}.")
    if content is None and plain.get("tool_calls"):
        return {**plain, "content": None}
    if not isinstance(content, str):
        raise ValueError(f"turn {n} ({role}) has content={content!r:.60}, but it should be text.")
    if _OPEN in content or _CLOSE in content:
        raise ValueError(f"turn {n} ({role}) contains the noncharacter U+FDD0 or U+FDD1.")
    return plain


def _without_nulls(value: Any) -> Any:
    """Copies dicts and lists without keys that are None, at any depth."""
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(v) for v in value]
    return value


def _unmark(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """Text without the marks, and the spans between them."""
    text, spans, start = "", [], 0
    for part in re.split(f"([{_OPEN}{_CLOSE}])", marked):
        if part == _OPEN:
            start = len(text)
        elif part == _CLOSE:
            spans.append((start, len(text)))
        else:
            text += part
    return text, spans

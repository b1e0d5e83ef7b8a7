"""Conversations -> text, token ids, and a mask of what the assistant said.

A checkpoint's chat template is a Jinja program; it is run in Jinja's sandbox with the functions
that transformers gives it. Which tokens the assistant said comes from the template's own
`{% generation %}` blocks where it has them. Other templates are rendered turn by turn: what turn n
adds to the conversation before it (with the assistant's opening) is what the assistant said. That
only works if a template never changes what it has already written, so this is checked.

Left out: tools and documents as arguments of the template.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jaxrl_eff.data.tokenizer import Tokenizer

Message = Mapping[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
# Mark the ends of a {% generation %} block in the rendered text; noncharacters, never in text.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


def render_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> str:
    """The conversation as the model reads it.

    Args:
        messages: dicts with `role` (one of `ROLES`) and `content`.
        add_generation_prompt: end with the opening of an assistant turn.

    Raises:
        ValueError: no template, a message of the wrong form, or a refusal by the template.
        ImportError: Jinja is missing.
    """
    text = _render(tokenizer, messages, add_generation_prompt)
    return text.replace(_OPEN, "").replace(_CLOSE, "")


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> tuple[list[int], list[int]]:
    """Token ids of the conversation, and 1 for each that the assistant said.

    The token that ends an assistant's turn counts as said; a newline that the template puts after
    it does not. A token that spans a boundary counts as said.

    Raises:
        ValueError: as `render_chat`; or a turn that is rendered otherwise once others follow.
    """
    marked = _render(tokenizer, messages, add_generation_prompt)
    text, spans = _unmark(marked)
    by_turns = _OPEN not in marked
    if by_turns:
        spans = _turn_spans(tokenizer, messages, text)
    ids, offsets = tokenizer.encode_spans(text)
    mask = [0] * len(ids)
    for start, end in spans:
        turn = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
        if by_turns:
            turn = _until_end_of_turn(tokenizer, ids, turn)
        for i in turn:
            mask[i] = 1
    return ids, mask


def _turn_spans(
    tokenizer: Tokenizer, messages: Sequence[Message], whole: str
) -> list[tuple[int, int]]:
    """Characters [start, end) that each assistant turn added."""
    spans = []
    for n, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:n], True)
        after = _render(tokenizer, messages[: n + 1], False)
        if not after.startswith(before) or not whole.startswith(after):
            raise ValueError(
                f"turn {n} (assistant): the chat template of {tokenizer.origin} writes it "
                "differently depending on what follows, so what the assistant said cannot be "
                "marked; give a template with {% generation %} blocks, or single-turn examples."
            )
        spans.append((len(before), len(after)))
    return spans


def _until_end_of_turn(tokenizer: Tokenizer, ids: list[int], turn: list[int]) -> list[int]:
    """Drops the blank tokens that a template puts after the token that ends a turn."""
    keep = len(turn)
    while keep and not tokenizer.decode([ids[turn[keep - 1]]], special=True).strip():
        keep -= 1
    if not keep:
        return turn
    last = ids[turn[keep - 1]]
    # Plain decoding hides special tokens, whatever their names are.
    ended = last in tokenizer.stop or not tokenizer.decode([last])
    return turn[:keep] if ended else turn


def _render(tokenizer: Tokenizer, messages: Sequence[Message], prompt: bool) -> str:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{tokenizer.origin} has no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json)."
        )
    for n, message in enumerate(messages):
        _check(n, message)
    template = _compile(tokenizer.chat_template, tokenizer.origin)
    import jinja2

    try:
        return template.render(
            messages=[dict(m) for m in messages],
            tools=None,
            documents=None,
            add_generation_prompt=prompt,
            **tokenizer.special,
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(f"the chat template of {tokenizer.origin} refused: {error}") from error


def _check(n: int, message: Message) -> None:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"turn {n} has role={role!r}; there is {', '.join(ROLES)}.")
    if content is None and message.get("tool_calls"):
        return
    if not isinstance(content, str):
        raise ValueError(f"turn {n} ({role}) has content={content!r}, but it should be text.")
    if _OPEN in content or _CLOSE in content:
        raise ValueError(f"turn {n} ({role}) contains the noncharacter U+FDD0 or U+FDD1.")


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


@lru_cache(maxsize=8)
def _compile(source: str, origin: str) -> Any:
    """The template in an immutable sandbox, with what transformers gives to templates."""
    try:
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError("chat templates need Jinja: pip install 'jaxrl_eff[hf]'.") from error

    class Generation(Extension):
        """`{% generation %} ... {% endgeneration %}` puts marks around what it renders."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_mark")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return f"{_OPEN}{caller()}{_CLOSE}"

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes <, > and & for HTML.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template of {origin} is not Jinja: {error}.") from error

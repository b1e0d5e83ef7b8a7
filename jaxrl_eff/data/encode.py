"""Functions from an example to token ids and a mask, for the loader's `encode`.

Each function here takes a tokenizer and field names and returns a pure function of an example.
Nothing is added silently: `bos` has no default, since a prompt must begin the same way in
fine-tuning, in generation and in evaluation, and checkpoints differ. Prompt and response are
tokenized separately and joined, as they are when the response is generated.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxrl_eff.data.chat import encode_chat, render_chat, to_answer
from jaxrl_eff.data.packing import Pair, Segment
from jaxrl_eff.data.tokenizer import Tokenizer

Example = dict[str, Any]


def encode_text(
    tokenizer: Tokenizer, *, bos: bool, eos: bool = True, field: str = "text"
) -> Callable[[Example], Segment]:
    """Encodes [bos] text [eos]; all is learned except the first token, which has no context.

    Example:
        >>> from jaxrl_eff.data import CharTokenizer, encode_text
        >>> tokens, mask = encode_text(CharTokenizer("0123456789>"), bos=True)({"text": "12"})
        >>> tokens.tolist(), mask.tolist()
        ([1, 4, 5, 2], [0.0, 1.0, 1.0, 1.0])
    """
    begin, end = _specials(tokenizer, bos, eos)

    def encode(example: Example) -> Segment:
        ids = begin + tokenizer.encode(read(example, field)) + end
        return _segment(ids[:1], ids[1:])

    return encode


def encode_prompt_completion(
    tokenizer: Tokenizer,
    *,
    bos: bool,
    eos: bool = True,
    prompt: str = "prompt",
    completion: str = "completion",
) -> Callable[[Example], Segment]:
    """Encodes [bos] prompt completion [eos]; completion and eos are learned.

    Example:
        >>> from jaxrl_eff import CharTokenizer, encode_prompt_completion
        >>> encode = encode_prompt_completion(CharTokenizer("0123456789>"), bos=True)
        >>> tokens, mask = encode({"prompt": "12>", "completion": "21"})
        >>> tokens.tolist(), mask.tolist()
        ([1, 4, 5, 13, 5, 4, 2], [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    """
    begin, end = _specials(tokenizer, bos, eos)

    def encode(example: Example) -> Segment:
        return _segment(
            begin + tokenizer.encode(read(example, prompt)),
            tokenizer.encode(read(example, completion)) + end,
        )

    return encode


def encode_messages(
    tokenizer: Tokenizer, *, field: str = "messages"
) -> Callable[[Example], Segment]:
    """Encodes a conversation by the tokenizer's chat template, which adds bos and ends of turns.

    The assistant's tokens are learned, including the token that ends its turn.

    Example:
        >>> from jaxrl_eff.data import CharTokenizer, encode_messages
        >>> template = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
        >>> encode = encode_messages(CharTokenizer("0123456789>", template))
        >>> turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
        >>> tokens, mask = encode({"messages": turns})
        >>> tokens.tolist(), mask.tolist()
        ([4, 2, 5, 2], [0.0, 0.0, 1.0, 1.0])
    """

    def encode(example: Example) -> Segment:
        ids, mask = encode_chat(tokenizer, read(example, field, list))
        mask[:1] = [0] * len(mask[:1])  # the first token has no context
        return np.array(ids, np.int32), np.array(mask, np.float32)

    return encode


def encode_preference(
    tokenizer: Tokenizer,
    *,
    bos: bool,
    eos: bool = True,
    prompt: str = "prompt",
    chosen: str = "chosen",
    rejected: str = "rejected",
) -> Callable[[Example], Pair]:
    """Encodes the chosen and rejected responses, each as `encode_prompt_completion`.

    Example:
        >>> from jaxrl_eff.data import CharTokenizer, encode_preference
        >>> encode = encode_preference(CharTokenizer("0123456789>"), bos=True)
        >>> chosen, rejected = encode({"prompt": "12>", "chosen": "21", "rejected": "12"})
        >>> rejected[0].tolist()
        [1, 4, 5, 13, 4, 5, 2]
    """
    good, bad = (
        encode_prompt_completion(tokenizer, bos=bos, eos=eos, prompt=prompt, completion=side)
        for side in (chosen, rejected)
    )
    return lambda example: (good(example), bad(example))


def encode_prompt(
    tokenizer: Tokenizer, *, bos: bool, field: str = "prompt"
) -> Callable[[Example], np.ndarray]:
    """Encodes [bos] prompt, as ids int32 [n].

    Example:
        >>> from jaxrl_eff import CharTokenizer, encode_prompt
        >>> encode = encode_prompt(CharTokenizer("0123456789>"), bos=True)
        >>> encode({"prompt": "12>"})
        array([ 1,  4,  5, 13], dtype=int32)
    """
    begin, _ = _specials(tokenizer, bos, False)
    return lambda example: np.array(begin + tokenizer.encode(read(example, field)), np.int32)


def encode_chat_prompt(
    tokenizer: Tokenizer, *, field: str = "messages"
) -> Callable[[Example], np.ndarray]:
    """Encodes a conversation up to the opening of the assistant's next turn, as ids int32 [n].

    A string in the field counts as one message of the user. An answer that ends the conversation is
    the target, and not part of the prompt; see `chat.to_answer`.

    Example:
        >>> from jaxrl_eff.data import CharTokenizer, encode_chat_prompt
        >>> template = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
        >>> encode_chat_prompt(CharTokenizer("0123456789>", template))({"messages": "1"}).tolist()
        [4, 2]
    """

    def encode(example: Example) -> np.ndarray:
        messages = read(example, field, (list, str))
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        text = render_chat(tokenizer, to_answer(messages), add_generation_prompt=True)
        return np.array(tokenizer.encode(text), np.int32)

    return encode


def read(example: Example, field: str, kind: type | tuple[type, ...] = str) -> Any:
    """Returns a field of an example.

    Raises:
        ValueError: the field is missing or has another type; the message shows what was found.
    """
    if field not in example:
        raise ValueError(f"unknown field {field!r}; expected one of {sorted(map(str, example))}.")
    value = example[field]
    if not isinstance(value, kind):
        wanted = kind if isinstance(kind, tuple) else (kind,)
        raise ValueError(
            f"field {field!r} is {value!r:.60}, a {type(value).__name__} instead of "
            f"{' or '.join(k.__name__ for k in wanted)}."
        )
    return value


def _specials(tokenizer: Tokenizer, bos: bool, eos: bool) -> tuple[list[int], list[int]]:
    for name, wanted in (("bos", bos), ("eos", eos)):
        if wanted and getattr(tokenizer, name) is None:
            raise ValueError(f"{name}=True, but the tokenizer has no {name} token.")
    return [tokenizer.bos] if bos else [], [tokenizer.eos] if eos else []


def _segment(given: list[int], learned: list[int]) -> Segment:
    """Ids and mask. The first token is never learned, as nothing precedes it."""
    mask = np.zeros(len(given) + len(learned), np.float32)
    mask[max(len(given), 1) :] = 1
    return np.array(given + learned, np.int32), mask

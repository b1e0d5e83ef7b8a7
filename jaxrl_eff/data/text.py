"""Text of a model's responses: token ids -> text, at once or streamed.

Evaluation, rewards and everything that is displayed decode responses through this module, so that
they see the same text. Special tokens that a model writes, such as `<think>`, are part of it.
"""

from collections.abc import Iterable, Iterator, Sequence

from jaxrl_eff.data.tokenizer import Tokenizer

_CONTEXT = 16  # preceding tokens that can change the next one's text


def said(tokenizer: Tokenizer, ids: Iterable[int], *, stop: Iterable[int] | None = None) -> str:
    """The text of a response (or prompt), special tokens included.

    Leading bos and padding, and trailing padding and stop tokens, are hidden. The same tokens in
    the middle are shown: without them "5<eos>7" would read as 57.

    Args:
        tokenizer: of the model that wrote the ids.
        ids: of the response, in order.
        stop: ids that end a response; the tokenizer's `stop` by default.
    """
    return tokenizer.decode(list(_spoken(tokenizer, ids, stop)), special=True)


def decode_stream(
    tokenizer: Tokenizer, ids: Iterable[int], *, after: Sequence[int] = ()
) -> Iterator[str]:
    """Yields text as ids arrive; the pieces joined are what `said` adds to the text of `after`.

    A piece is held back while it ends inside a character, whose bytes can span several tokens. Each
    step decodes a window of a few tokens, since a token's text depends on the one before it (a
    leading space); the cost does not grow with the length.
    """

    def text(part: Sequence[int]) -> str:
        return tokenizer.decode(part, special=True)

    seen = [int(i) for i in after[-_CONTEXT:]]
    start, done = 0, len(seen)  # seen[start:done] is the left context, already shown
    for i in _spoken(tokenizer, ids):
        seen.append(i)
        shown, whole = text(seen[start:done]), text(seen[start:])
        if len(whole) > len(shown) and not whole.endswith("\ufffd"):
            yield whole[len(shown) :]
            start, done = done, len(seen)
    rest = text(seen[start:])[len(text(seen[start:done])) :]
    if rest:
        yield rest


def _spoken(
    tokenizer: Tokenizer, ids: Iterable[int], stop: Iterable[int] | None = None
) -> Iterator[int]:
    """Yields ids as they arrive, without leading bos and padding, trailing stops and padding."""
    front = {tokenizer.bos, tokenizer.pad}
    behind = {tokenizer.pad, *(tokenizer.stop if stop is None else stop)}
    held: list[int] = []
    started = False
    for i in map(int, ids):
        if i in front and not started and not held:
            continue
        if i in behind:
            held.append(i)
            continue
        yield from held
        yield i
        held, started = [], True

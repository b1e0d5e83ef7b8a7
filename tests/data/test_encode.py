import numpy as np
import pytest

from jaxrl_eff.data import encode
from jaxrl_eff.data.tokenizer import CharTokenizer

TOKENIZER = CharTokenizer("abc>")  # <pad> <bos> <eos> a b c >
A, B, C, TO = 3, 4, 5, 6


def check(got, ids, mask):
    np.testing.assert_array_equal(got[0], ids)
    np.testing.assert_array_equal(got[1], mask)
    assert got[0].dtype == np.int32 and got[1].dtype == np.float32


def test_text_is_learned_but_for_its_first_token():
    example = {"text": "abc"}
    check(encode.encode_text(TOKENIZER, bos=True)(example), [1, A, B, C, 2], [0, 1, 1, 1, 1])
    check(encode.encode_text(TOKENIZER, bos=False, eos=False)(example), [A, B, C], [0, 1, 1])


def test_completion_and_eos_are_learned():
    example = {"q": "ab>", "a": "ba"}
    fields = {"prompt": "q", "completion": "a"}
    check(
        encode.encode_prompt_completion(TOKENIZER, bos=True, **fields)(example),
        [1, A, B, TO, B, A, 2],
        [0, 0, 0, 0, 1, 1, 1],
    )
    check(
        encode.encode_prompt_completion(TOKENIZER, bos=False, eos=False, **fields)(example),
        [A, B, TO, B, A],
        [0, 0, 0, 1, 1],
    )


def test_a_completion_without_a_prompt_does_not_learn_its_first_token():
    encoder = encode.encode_prompt_completion(TOKENIZER, bos=False)
    check(encoder({"prompt": "", "completion": "ab"}), [A, B, 2], [0, 1, 1])


def test_a_preference_is_two_completions():
    example = {"prompt": "a>", "chosen": "a", "rejected": "bb"}
    chosen, rejected = encode.encode_preference(TOKENIZER, bos=True)(example)
    check(chosen, [1, A, TO, A, 2], [0, 0, 0, 1, 1])
    check(rejected, [1, A, TO, B, B, 2], [0, 0, 0, 1, 1, 1])


def test_a_prompt_is_what_the_completion_follows():
    example = {"prompt": "ab>", "completion": "ba"}
    prompt = encode.encode_prompt(TOKENIZER, bos=True)(example)
    whole, mask = encode.encode_prompt_completion(TOKENIZER, bos=True)(example)
    np.testing.assert_array_equal(prompt, whole[mask == 0])
    assert prompt.dtype == np.int32


def test_messages_follow_the_chat_template():
    pytest.importorskip("jinja2")
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}>"
        "{% else %}{{ m.content }}<eos>{% endif %}{% endfor %}"
    )
    tokenizer = CharTokenizer("abc>", template)
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "bc"},
        {"role": "user", "content": "b"},
    ]
    check(
        encode.encode_messages(tokenizer)({"messages": turns}),
        [A, TO, B, C, 2, B, TO],
        [0, 0, 1, 1, 1, 0, 0],
    )
    prompt = encode.encode_chat_prompt(tokenizer, field="prompt")
    np.testing.assert_array_equal(prompt({"prompt": turns}), [A, TO, B, C, 2, B, TO])
    np.testing.assert_array_equal(prompt({"prompt": "ab"}), [A, B, TO])


def test_a_missing_field_or_token_is_named():
    with pytest.raises(
        ValueError, match=r"unknown field 'text'; expected one of \['answer', 'question'\]"
    ):
        encode.encode_text(TOKENIZER, bos=True)({"question": "a", "answer": "b"})
    with pytest.raises(ValueError, match=r"field 'text' is 3, a int instead of str"):
        encode.encode_text(TOKENIZER, bos=True)({"text": 3})

    class Bare(CharTokenizer):
        bos = None

    with pytest.raises(ValueError, match="bos=True, but the tokenizer has no bos token"):
        encode.encode_prompt(Bare("a"), bos=True)

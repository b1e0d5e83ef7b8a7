"""Training text must continue the prompts that a model is given."""

import json

import pytest

from jaxrl_eff.data import borders
from jaxrl_eff.data.tokenizer import CharTokenizer, load_tokenizer

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "One two"}]


@pytest.fixture
def merging(tmp_path):
    """Makes a tokenizer of bytes with the one merge " O", with a chat template."""

    def make(template):
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        vocab = {c: i for i, c in enumerate(alphabet)} | {"ĠO": len(alphabet)}
        inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[("Ġ", "O")]))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = tokenizers.decoders.ByteLevel()
        inner.add_special_tokens(["<end>"])
        inner.save(str(tmp_path / "tokenizer.json"))
        settings = {"eos_token": "<end>", "chat_template": template}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return load_tokenizer(tmp_path)

    return make


def template(opening, written=None):
    written = opening if written is None else written
    return (
        "{% for m in messages %}{% if m.role == 'user' %}user: {{ m.content }}\n"
        "{% else %}" + written + "{{ m.content + eos_token }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + opening + "{% endif %}"
    )


def test_a_token_across_the_border_is_told_with_both_lists(merging):
    told = borders.of_chat(merging(template("assistant: ")), TALK)
    assert told == (
        "training text and generation prompt have other tokens at their border: "
        "prompt ['t', ':', 'Ġ'], training ['t', ':', 'ĠO', 'n', 'e']"
    )


@pytest.mark.parametrize("opening", ["assistant:", "assistant:\n", "<end>", ""])
def test_a_border_between_tokens_is_not_told(merging, opening):
    assert borders.of_chat(merging(template(opening)), TALK) == ""


def test_every_turn_of_the_assistant_is_looked_at(merging):
    tokenizer = merging(template("assistant: "))
    quiet = [TALK[0], {"role": "assistant", "content": "two"}]
    assert borders.of_chat(tokenizer, quiet) == ""
    assert "'ĠO'" in borders.of_chat(tokenizer, [*TALK, *quiet])
    assert "'ĠO'" in borders.of_chat(tokenizer, [*quiet, *TALK])
    assert borders.of_chat(tokenizer, TALK[:1]) == ""


def test_an_opening_that_is_not_trained_on_is_told(merging):
    told = borders.of_chat(merging(template("assistant:<think>", "assistant:")), TALK)
    assert "turn 1 (assistant)" in told and "does not continue the generation prompt" in told
    assert "assistant:<think>'" in told and "'One two<end>\\n'" in told


def test_completions_that_would_merge_with_their_prompts_are_told(merging):
    tokenizer = merging(None)
    assert borders.of_completion(tokenizer, "A:", " One") == ""
    assert borders.of_completion(tokenizer, "A: ", "One") == (
        "prompt and completion, made into tokens apart, have other tokens at their border than "
        "their text as a whole: apart ['A', ':', 'Ġ', 'O', 'n'], whole ['A', ':', 'ĠO', 'n', 'e']"
    )
    assert borders.of_completion(CharTokenizer("ab"), "a", "b") == ""


@pytest.mark.parametrize(
    ("prompt", "completion", "holds"),
    [("1 + 1 = 2", "2", True), ("1 + 1 = 2\n", " 2", True), ("1 + 1 =", "2", False),
     ("2", "2", False), ("a", "", False)],
)  # fmt: skip
def test_a_prompt_that_ends_with_its_completion_is_noticed(prompt, completion, holds):
    example = {"q": prompt, "a": completion}
    assert borders.holds_completion(example, "q", "a") == holds

"""Tokenizers: there and back, special tokens, and text that arrives piece by piece."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_eff.data.text import decode_stream, said
from jaxrl_eff.data.tokenizer import CharTokenizer, load_tokenizer

DATA = Path(os.environ.get("JAXRL_EFF_DATA", Path(__file__).parents[3] / "shared" / "data"))


def save_bytes_tokenizer(directory: Path, **settings_) -> None:
    """A tokenizer of single bytes with a few merges, so that characters span tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    inner.train_from_iterator(["user assistant hello hello user assistant"] * 3, trainer)
    directory.mkdir(exist_ok=True)
    inner.save(str(directory / "tokenizer.json"))
    told = {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|end|>", **settings_}
    (directory / "tokenizer_config.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bytes")
    save_bytes_tokenizer(directory)
    return load_tokenizer(directory)


def test_characters_there_and_back():
    toy = CharTokenizer("ab+=01")
    assert toy.vocab == 9
    assert toy.encode("a0b") == [3, 7, 4]
    assert toy.encode("a<eos>", special=True) == [1, 3, 2]
    assert toy.decode([1, 3, 7, 4, 2, 0]) == "a0b"
    assert toy.decode([1, 3, 2], special=True) == "<bos>a<eos>"
    with pytest.raises(ValueError, match="'x' at 1"):
        toy.encode("ax")
    with pytest.raises(ValueError, match="id 9"):
        toy.decode([9])
    with pytest.raises(ValueError, match=r"\['a'\]"):
        CharTokenizer("aba")


def test_a_saved_character_tokenizer_needs_no_library(tmp_path):
    toy = CharTokenizer("xyz\n 'é", "{{ messages }}")
    toy.save(tmp_path)
    code = (
        "import sys; sys.modules['tokenizers'] = None\n"
        "from jaxrl_eff.data.tokenizer import load_tokenizer\n"
        f"print(ascii(load_tokenizer({str(tmp_path)!r})))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ascii(toy)
    assert load_tokenizer(tmp_path) == toy


@given(st.text("xyz\n 'é"))
@settings(deadline=None)
def test_the_library_reads_a_character_tokenizer_alike(tmp_path_factory, text):
    tokenizers = pytest.importorskip("tokenizers")
    toy = CharTokenizer("xyz\n 'é")
    directory = tmp_path_factory.getbasetemp() / "chars"
    toy.save(directory)
    inner = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert inner.encode(text).ids == toy.encode(text, special=True)
    assert inner.decode(toy.encode(text, special=True)) == text
    encoding = inner.encode(text, add_special_tokens=False)
    assert (encoding.ids, encoding.offsets) == toy.encode_spans(text)


@given(st.text(max_size=30))
@settings(deadline=None)
def test_streamed_text_is_the_decoded_text(byte_tokenizer, text):
    ids = byte_tokenizer.encode(text)
    pieces = list(decode_stream(byte_tokenizer, ids))
    assert "".join(pieces) == byte_tokenizer.decode(ids) == text
    assert all(pieces)


@given(st.lists(st.integers(0, 299), max_size=30))
@settings(deadline=None)
def test_streamed_rubbish_is_the_decoded_rubbish(byte_tokenizer, ids):
    ids = [i for i in ids if i < byte_tokenizer.vocab]
    streamed = "".join(decode_stream(byte_tokenizer, ids))
    # Bytes that are no text may be grouped otherwise; the text among them is the same.
    whole = said(byte_tokenizer, ids)
    assert streamed.replace("\ufffd", "") == whole.replace("\ufffd", "")


def test_no_half_characters_are_shown(byte_tokenizer):
    ids = byte_tokenizer.encode("a😀b")
    assert len(ids) > 3
    assert list(decode_stream(byte_tokenizer, ids)) == ["a", "😀", "b"]
    assert list(decode_stream(byte_tokenizer, ids[:3])) == ["a", "\ufffd"]


def test_what_is_said_hides_ends_and_padding_but_nothing_inside():
    toy = CharTokenizer("0123456789")
    five, seven = toy.encode("57")
    pad, bos, eos = toy.pad, toy.bos, toy.eos
    for ids, text in (
        ([five, seven, eos], "57"),
        ([pad, bos, five, seven, eos, pad, pad], "57"),
        ([five, eos, seven, eos], "5<eos>7"),
        ([five, pad, pad, seven], "5<pad><pad>7"),
        ([eos, five], "<eos>5"),
        ([five, bos], "5<bos>"),
        ([eos, bos, five], "<eos><bos>5"),
        ([eos], ""),
        ([], ""),
    ):
        assert said(toy, ids) == text
        assert "".join(decode_stream(toy, ids)) == text
    assert said(toy, [five, seven], stop=[seven]) == "5"
    assert "".join(decode_stream(toy, [seven], after=[bos, five, eos])) == "7"


def test_special_tokens_that_a_model_says_are_text(tmp_path):
    save_bytes_tokenizer(tmp_path, bos_token="<|im_end|>")
    tok = load_tokenizer(tmp_path)
    assert tok.bos == tok.eos
    ids = [tok.bos, *tok.encode("<|im_start|>a"), tok.eos]
    assert said(tok, ids) == "<|im_start|>a"
    assert said(tok, [tok.eos, tok.eos]) == ""
    assert said(tok, [*tok.encode("a"), tok.eos, *tok.encode("b"), tok.pad]) == "a<|im_end|>b"


def test_special_tokens_of_the_files(tmp_path):
    save_bytes_tokenizer(tmp_path, bos_token="<|im_start|>")
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    tok = load_tokenizer(tmp_path)
    start, end, pad = (tok.inner.token_to_id(f"<|{t}|>") for t in ("im_start", "im_end", "end"))
    assert (tok.bos, tok.eos, tok.pad) == (start, end, pad)
    assert tok.stop == (7, end)
    assert tok.special["eos_token"] == "<|im_end|>"
    assert tok.encode("a", special=True) == tok.encode("a")
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": [{pad}, {end}]}}')
    assert load_tokenizer(tmp_path).stop == (pad, end)
    assert tok.decode([start, *tok.encode("hi"), end]) == "hi"
    assert tok.decode([end], special=True) == "<|im_end|>"
    tok.save(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert again.encode("hello", special=True) == tok.encode("hello", special=True)
    save_bytes_tokenizer(tmp_path, bos_token="<nope>")
    with pytest.raises(ValueError, match="bos_token='<nope>'"):
        load_tokenizer(tmp_path)


def test_ids_stand_in_where_no_special_token_is_named(tmp_path):
    save_bytes_tokenizer(tmp_path, pad_token=None)
    (tmp_path / "config.json").write_text('{"bos_token_id": 5, "pad_token_id": -1}')
    tok = load_tokenizer(tmp_path)
    assert (tok.bos, tok.pad) == (5, None)


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "tokenizer.model").write_text("")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json.*tokenizer\.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        load_tokenizer(tmp_path)


@pytest.mark.skipif(
    not (DATA / "stories260K").exists(),
    reason="stories260K is not there; set JAXRL_EFF_DATA to the folder of checkpoints",
)
def test_stories_text():
    tok = load_tokenizer(DATA / "stories260K" / "hf")
    told = json.loads((DATA / "stories260K" / "greedy200.json").read_text())
    assert (tok.vocab, tok.bos, tok.eos, tok.stop) == (512, 1, 2, (1, 2))
    assert tok.encode(told["text"], special=True) == told["ids"]
    assert tok.decode(told["ids"]) == told["text"]
    assert "".join(decode_stream(tok, told["ids"])) == told["text"]
    prompt = tok.encode("Once upon a time, there was", special=True)
    assert "".join(decode_stream(tok, told["ids"][len(prompt) :], after=prompt)) == (
        told["text"].removeprefix("Once upon a time, there was")
    )

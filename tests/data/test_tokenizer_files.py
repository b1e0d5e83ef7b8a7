"""The files beside tokenizer.json: what changes tokens is used, or refused by name."""

import json
import warnings
from pathlib import Path

import pytest
from test_tokenizer import save_bytes_tokenizer

from jaxrl_eff.data import known_fields
from jaxrl_eff.data.tokenizer import load_tokenizer

TEXT = "hello<|end|> user assistant<tool>x <|im_end|> <|im_start|>"


def written(to: Path, bos: str = "", **settings) -> Path:
    """A tokenizer with these settings; with `bos`, tokenizer.json adds it before a text."""
    save_bytes_tokenizer(to, **settings)
    if bos:
        tokenizers = pytest.importorskip("tokenizers")
        inner = tokenizers.Tokenizer.from_file(str(to / "tokenizer.json"))
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, inner.token_to_id(bos))]
        )
        inner.save(str(to / "tokenizer.json"))
    return to


def listed(index: int, content: str, **flags) -> dict:
    plain = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
    return {str(index): {"content": content, **plain, **flags}}


# Settings of tokenizer_config.json, and the content of other files.
CASES = {
    "plain": ({}, {}),
    "a template of tokens around the text": ({"add_bos_token": True, "bos": "<|im_start|>"}, {}),
    "tokens of the vocabulary become special": ({"additional_special_tokens": ["hel"]}, {}),
    "extra tokens": ({"extra_special_tokens": ["hel", "sistan"]}, {}),
    "extra tokens by role": ({"extra_special_tokens": {"tool_token": "hel"}}, {}),
    "a role of its own": ({"image_token": "sistan"}, {}),
    "flags of a listed token": (
        {"added_tokens_decoder": listed(0, "<|end|>", special=True, lstrip=True, rstrip=True)},
        {},
    ),
    "a listed token that is new": ({"added_tokens_decoder": listed(277, "<tool>")}, {}),
    "special tokens are split": ({"split_special_tokens": True}, {}),
    "an old list of tokens": ({}, {"added_tokens.json": {"<tool>": 277}}),
    "an old map of special tokens": (
        {}, {"special_tokens_map.json": {"eos_token": "<|end|>", "pad_token": {"content": "hel"}}},
    ),
    "a map beside listed tokens is not read": (
        {"added_tokens_decoder": listed(0, "<|end|>", special=True)},
        {"special_tokens_map.json": {"eos_token": "<|end|>"}},
    ),
}  # fmt: skip


def case_at(name: str, to: Path) -> Path:
    settings, files = CASES[name]
    settings = dict(settings)
    bos = settings.pop("bos", "")
    if bos:
        settings["bos_token"] = bos
    written(to, bos, eos_token="<|im_end|>", tokenizer_class="PreTrainedTokenizerFast", **settings)
    for file, content in files.items():
        (to / file).write_text(json.dumps(content))
    return to


@pytest.mark.parity
@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_transformers(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers", reason="needs the extra 'parity'")
    ours = load_tokenizer(case_at(name, tmp_path / "a"))
    ours.save(tmp_path / "b")
    for directory in (tmp_path / "a", tmp_path / "b"):
        theirs = transformers.AutoTokenizer.from_pretrained(directory)
        assert ours.encode(TEXT) == theirs(TEXT, add_special_tokens=False)["input_ids"]
        assert ours.encode(TEXT, special=True) == theirs(TEXT)["input_ids"]
        assert (ours.eos, ours.pad) == (theirs.eos_token_id, theirs.pad_token_id)
        assert ours.decode(ours.encode(TEXT)) == theirs.decode(
            theirs(TEXT)["input_ids"], skip_special_tokens=True
        )
    assert load_tokenizer(tmp_path / "b").encode(TEXT, special=True) == ours.encode(
        TEXT, special=True
    )


@pytest.mark.parity
def test_transformers_settings_are_all_known(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers", reason="needs the extra 'parity'")
    case_at("plain", tmp_path / "a")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    told = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    assert set(told) <= known_fields.READ | known_fields.HARMLESS
    roles = set(transformers.PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES)
    assert {r for r in roles if r.endswith("_token")} <= known_fields.READ
    assert not known_fields.READ & known_fields.HARMLESS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"add_bos_token": True, "bos_token": "<|end|>"}, "add_bos_token=True, but tokenizer"),
        ({"add_eos_token": True}, "add_eos_token=True, but tokenizer.json does not add"),
        ({"add_eos_token": "yes"}, "add_eos_token='yes', but it should be true or false"),
        ({"add_prefix_space": True}, "add_prefix_space=True, but tokenizer.json"),
        ({"do_lower_case": True}, "do_lower_case=True is not supported"),
        ({"auto_map": {"AutoTokenizer": ["a.B", None]}}, "auto_map="),
        ({"strange": 3}, "strange=3 is not known here"),
        ({"eos_token": {"x": 1}}, "eos_token={'x': 1}, but it should be a text"),
        ({"eos_token": 7}, "eos_token=7"),
        ({"unk_token": "<nope>"}, "unk_token='<nope>'"),
        ({"additional_special_tokens": ["<nope>"]}, "additional_special_tokens[0]='<nope>'"),
        ({"additional_special_tokens": 3}, "additional_special_tokens=3"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder=[1]"),
        ({"added_tokens_decoder": {"x": {}}}, "added_tokens_decoder has 'x'"),
        ({"added_tokens_decoder": listed(7, "<|end|>")}, "added_tokens_decoder.7"),
        ({"added_tokens_decoder": listed(0, "<|end|>", lstrip=3)}, "0.lstrip=3"),
        ({"split_special_tokens": 1}, "split_special_tokens=1"),
        ({"chat_template": 5}, "chat_template=5"),
        ({"chat_template": [{"name": "default"}]}, "chat_template should be a text"),
        ({"chat_template": [{"name": "a", "template": "b"}]}, "no 'default'"),
    ],
    ids=str,
)
def test_a_setting_that_is_not_followed_is_refused_by_name(settings, message, tmp_path):
    written(tmp_path, **settings)
    with pytest.raises(ValueError) as caught:
        load_tokenizer(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"add_eos_token": True}, {"strange": 3}], ids=str)
def test_what_is_ignored_is_as_if_it_was_not_there(settings, tmp_path):
    plain = load_tokenizer(written(tmp_path / "a"))
    tok = load_tokenizer(written(tmp_path / "b", **settings), ignore=tuple(settings))
    assert tok.encode(TEXT, special=True) == plain.encode(TEXT, special=True)
    assert not set(settings) & set(tok.settings)


def test_unknown_fields_that_say_nothing_are_one_warning(tmp_path):
    written(tmp_path, strange=None, odd=False, empty=[])
    with pytest.warns(UserWarning, match="strange, odd, empty") as caught:
        load_tokenizer(tmp_path)
    assert len(caught) == 1


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "holds a list"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"eos_token": "a", "eos_token": "b"}', "'eos_token' is 'a' and 'b'"),
        ("\ud800", "not JSON"),
    ],
    ids=["list", "deep", "twice", "bytes"],
)
def test_files_that_are_no_objects_are_named(name, content, message, tmp_path):
    written(tmp_path)
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert name in str(caught.value)


@pytest.mark.parametrize("content", ['{"eos_token_id": "x"}', '{"eos_token_id": [true]}'])
def test_ids_of_other_types_are_named(content, tmp_path):
    written(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id="):
        load_tokenizer(tmp_path)


def test_the_template_is_that_of_the_first_file_in_transformers_order(tmp_path):
    written(tmp_path, chat_template="settings")
    (tmp_path / "chat_template.json").write_text('{"chat_template": "processor"}')
    assert load_tokenizer(tmp_path).chat_template == "settings"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_tokenizer(tmp_path).chat_template == "file"
    others = tmp_path / "additional_chat_templates"
    others.mkdir()
    (others / "tool_use.jinja").write_text("tools")
    assert load_tokenizer(tmp_path).chat_template == "file"
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"\['tool_use'\], but no 'default'"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_draws_at_random_is_refused(tmp_path):
    written(tmp_path)
    path = tmp_path / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["model"]["dropout"] = 0.1
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"model\.dropout=0\.1"):
        load_tokenizer(tmp_path)

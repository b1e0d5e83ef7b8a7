"""Keys and passwords of a config are in nothing that a run writes or says."""

import dataclasses
import json

import launch
import pytest

from jaxrl_eff import secret
from jaxrl_eff.cli import report
from jaxrl_eff.train import config_file, identity, startup

HIDE = "sk-very-hidden"


@pytest.mark.parametrize(
    "name",
    [
        "key",
        "api_key",
        "apiKey",
        "API_KEY",
        "WANDB-API-KEY",
        "token",
        "hfToken",
        "password",
        "auth",
    ],
)
def test_names_of_secrets(name):
    assert secret.named(name)
    assert HIDE not in json.dumps(secret.redacted({name: HIDE, "a": {name: [HIDE, {"b": HIDE}]}}))


@pytest.mark.parametrize("name", ["tokenizer", "max_tokens", "monkey", "keyboard", "project", "lr"])
def test_other_names_stay(name):
    assert secret.redacted({name: "as it is"}) == {name: "as it is"}


def test_what_is_not_secret_stays_what_it_is():
    plain = {"a": (1, 2.5, None), "key": None, "token": "", "auth": False, "b": ["x", True]}
    assert secret.redacted(plain) == plain
    assert isinstance(secret.redacted(plain)["a"], tuple)
    url = secret.redacted({"url": "https://me:pw@host/x and http://host/y@z"})["url"]
    assert "pw" not in url and url.endswith("@host/x and http://host/y@z")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("https://host/x.jsonl?rows=3&token={}&a=b", "https://host/x.jsonl?rows=3&token="),
        ("s3://host/x?X-Amz-Signature={}", "s3://host/x?X-Amz-Signature="),
        ("Bearer {}", "Bearer "),
        ("hf_{}", ""),
        ("--with sk-{}", "--with "),
    ],
)
def test_secrets_within_a_text(text, kept):
    value = text.format("abcdefghijklmnop0123")
    for once in (secret.redacted({"a": [value]})["a"][0], secret.told("config.a", value)):
        assert "abcdef" not in once and kept in once
    assert secret.redacted(secret.redacted(value)) == secret.redacted(value)


def test_a_changed_secret_is_another_hash_and_an_equal_one_the_same():
    a, b, c = (secret.redacted({"key": x})["key"] for x in ("one", "two", "one"))
    assert a != b and a == c and a.startswith("(hidden, ")
    assert secret.redacted({"key": a}) == {"key": a}


def config(key):
    return launch.config(
        "algorithm=grpo",
        f"wandb={{'project': 'mine', 'settings': {{'api_key': {key!r}}}}}",
        f"grpo.data.options={{'digits': 2, 'auth_token': {key!r}}}",
    )


def test_no_document_of_a_run_holds_one():
    """config.json, the record by which a run is resumed, --help, and what processes compare."""
    run = config(HIDE)
    values = dataclasses.asdict(run)
    said = [
        json.dumps(secret.redacted(values)), "".join(config_file.flat(values)),
        json.dumps(identity.essence(run, {})), json.dumps(startup.facts(run)),
    ]  # fmt: skip
    assert HIDE in json.dumps(values)
    for text in said:
        assert HIDE not in text
    assert "mine" in said[0]


def test_the_report_of_an_older_run_holds_none_either(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"wandb": {"api_key": HIDE}}))
    assert HIDE not in report.write(tmp_path).read_text()


def test_resuming_notices_another_secret_without_saying_it():
    before, same, other = (identity.essence(config(k), {}) for k in (HIDE, HIDE, "sk-other"))
    assert identity.differences(before, same) == []
    (line,) = identity.differences(before, other)
    assert line.startswith("config.grpo.data.options.auth_token was") and "sk-" not in line


def test_errors_name_the_place_alone():
    with pytest.raises(ValueError, match=r"config\.wandb\.api_key is '\(hidden") as error:
        config_file.override({"wandb": {"api_key": HIDE}}, "wandb.api_key.more", "1")
    assert HIDE not in str(error.value)
    assert HIDE not in secret.told("config.wandb.api_key[0]", HIDE)
    assert secret.told("config.wandb.project", "mine") == "'mine'"

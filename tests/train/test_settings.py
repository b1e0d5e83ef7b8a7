"""Configs: everything unknown or of the wrong type is named with its path and what is allowed."""

import os
import re
import time
from pathlib import Path

import jax
import launch
import pytest
from launch import ROOT, TINY

from jaxrl_eff import schema
from jaxrl_eff.algorithms.ppo import PPOConfig
from jaxrl_eff.models.rope import frequencies
from jaxrl_eff.train import assembly, base, config_file, settings, summary
from jaxrl_eff.train.config_file import ConfigError

MODEL = {"shape": {"layers": 1}}
SFT = {"algorithm": "sft", "steps": 1, "batch": 2, "data": {}}


ENDLESS = {}
ENDLESS["a"] = ENDLESS


def OPTIM(actor):
    return {"sft": {**SFT, "optim": {"actor": actor}}}


def run(**changes):
    return settings.run({"model": MODEL, "stages": ("sft",), "sft": SFT, **changes})


def test_defaults_and_conversions():
    out = run(sft={**SFT, "steps": 3, "optim": {"actor": {"lr": 1, "frozen": ["embed.*"]}}})
    stage = out.stage["sft"]
    assert stage.steps == 3 and out.seed == 0 and stage.plan == "all"
    assert stage.optim["actor"].lr == 1.0 and isinstance(stage.optim["actor"].lr, float)
    assert stage.optim["actor"].frozen == ("embed.*",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedd": 1}, r"config: unknown field 'sedd'.*Did you mean 'seed'\?"),
        ({"sftt": {"x": 1}}, r"config: unknown field 'sftt'.*Did you mean 'sft'\?"),
        ({"sft": {**SFT, "stps": 1}}, r"config.sft: unknown field 'stps'.*Did you mean 'steps'\?"),
        ({"sft": {**SFT, "data": {"pth": ""}}}, r"config.sft.data: unknown field 'pth'.*'path'\?"),
        (
            {"sft": {**SFT, "optim": {"actor": {"learning": 1}}}},
            r"config.sft.optim.actor: unknown field 'learning'; expected one of \[.*'lr'",
        ),
        ({"sft": {**SFT, "steps": "3"}}, r"config.sft.steps is '3' \(str\), but it must be int"),
        ({"sft": {**SFT, "steps": True}}, r"config.sft.steps is True \(bool\), but it must be int"),
        ({"sft": {**SFT, "data": 3}}, r"config.sft.data is 3 \(int\), but it must be DataSettings"),
        ({"sft": {**SFT, "plan": 3}}, r"config.sft.plan is 3"),
        ({"seed": -1}, r"config.seed is -1, but must be at least 0"),
        ({"seed": 1.5}, r"config.seed is 1.5 \(float\), but it must be int"),
        (
            {"nonfinite": "ignore"},
            r"config: unknown nonfinite 'ignore'; expected one of \['stop', 'skip'\]",
        ),
        ({"stages": ()}, r"config.stages is empty"),
        ({"stages": "sft"}, r"config.stages is 'sft', but it must be a tuple"),
        (
            {"stages": ("sft", "dpo")},
            r"config.stages: unknown stage 'dpo'; expected one of \['sft'\]",
        ),
        ({"model": 3}, r"config.model is 3"),
        ({"sft": {k: v for k, v in SFT.items() if k != "batch"}}, r"config.sft.batch is missing"),
        ({"sft": {**SFT, "steps": 0}}, r"config.sft.steps is 0, but must be at least 1"),
        ({"sft": {**SFT, "batch": 2**63}}, r"config.sft.batch is 9223372036854775808, but must be"),
        ({"sft": {**SFT, "batch": 10**9999}}, r"config.sft.batch is a number of 33216 bits"),
        (OPTIM({"lr": float("nan")}), r"config.sft.optim.actor.lr is nan, but must be at least 0"),
        (OPTIM({"lr": float("inf")}), r"config.sft.optim.actor.lr is inf, but must be at least 0"),
        (OPTIM({"lr": 10**400}), r"config.sft.optim.actor.lr is a number of 1329 bits"),
        (OPTIM({"frozen": ("(",)}), r"actor.frozen\[0\] is '\(', no regular expression: missing"),
        (OPTIM({"options": {"a": object()}}), r"options.a is <object .*; a config holds text, num"),
        (OPTIM({3: 1}), r"config.sft.optim.actor: unknown field 3; expected one of"),
        ({"sft": {**SFT, "models": {3: "base"}}}, r"config.sft.models has the key 3 \(int\)"),
        ({"sft": {**SFT, "loss": ENDLESS}}, r"config.sft.loss.a.a.*nested more than 32 deep"),
        ({"sft": {**SFT, "evaluate": {"temperature": -1.0}}}, r"evaluate.temperature is -1.0, but"),
        ({"checkpoint": {"every": -1}}, r"config.checkpoint.every is -1, but must be at least 0"),
        ({"checkpoint": {"keep": 0}}, r"config.checkpoint.keep is 0, but must be at least 1"),
        ({"simulate_devices": -2}, r"config.simulate_devices is -2, but must be at least 0 and at"),
        (
            {"expect": {"metric": "a/eval", "at_least": float("nan")}},
            r"config.expect.at_least is n",
        ),
        ({"stages": ("sft", "sft")}, r"config.stages has \['sft'\] more than once"),
        ({"stages": ("a/b",), "a/b": SFT}, r"config.stages has 'a/b'; a stage's name begins with"),
        ({"stages": ("",), "": SFT}, r"config.stages has ''; a stage's name begins with"),
    ],
)
def test_what_is_wrong_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        run(**changes)


def test_a_missing_model_is_named():
    with pytest.raises(ValueError, match=r"config.model is missing"):
        settings.run({"stages": ("sft",), "sft": SFT})


def test_an_algorithms_own_checks_carry_the_path():
    with pytest.raises(ValueError, match=r"^config.ppo.loss.*clip.*2"):
        schema.build(PPOConfig, {"clip": 2.0}, "config.ppo.loss")


def test_optional_numbers_may_be_none():
    assert schema.build(PPOConfig, {"value_clip": None}, "x").value_clip is None
    assert schema.build(PPOConfig, {"value_clip": 1}, "x").value_clip == 1.0
    with pytest.raises(ValueError, match=r"x.value_clip is 'no'"):
        schema.build(PPOConfig, {"value_clip": "no"}, "x")


# The command line's part


def test_overrides_reach_fields_that_the_file_does_not_mention():
    config = config_file.load(
        TINY, ["seed=7", "sft.optim.actor.clip_norm=0.5", "sft.data.eos=false"]
    )
    out = settings.run(config)
    assert out.seed == 7
    assert out.stage["sft"].optim["actor"].clip_norm == 0.5
    assert out.stage["sft"].data.eos is False


@pytest.mark.parametrize(
    ("now", "text", "value"),
    [
        (1, "2", 2),
        (1.0, "1e-4", 1e-4),
        (False, "true", True),
        (None, "False", False),
        ("a", "123", "123"),
        ("a", "'quoted'", "quoted"),
        (("a",), "a,b", ("a", "b")),
        (("a",), "('a', 'b')", ("a", "b")),
        (None, "{'default': {'tensor': 2}}", {"default": {"tensor": 2}}),
        (None, "None", None),
        (None, "text with = and [", "text with = and ["),
    ],
)
def test_values_are_read_as_python_or_as_text(now, text, value):
    config = {"a": {"b": now}} if now is not None else {}
    config_file.override(config, "a.b", text)
    assert config == {"a": {"b": value}} and type(config["a"]["b"]) is type(value)


def test_overrides_are_rewritten_for_absl():
    argv = ["prog", "--config=x.py:a=b", "--config.a.b=c=d", "-config.s", "1", "--quiet", "file"]
    wanted = ["prog", "--config=x.py:a=b", "--config.=a.b=c=d", "--config.=s=1", "--quiet", "file"]
    assert config_file.rewrite(argv) == wanted
    with pytest.raises(ConfigError, match=r"--config.a needs a value"):
        config_file.rewrite(["prog", "--config.a", "--quiet"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed.x=1", r"--config.seed.x: config.seed is 0, which has no fields"),
        ("a..b=1", r"--config.a..b has an empty name"),
    ],
)
def test_overrides_that_lead_nowhere(text, message):
    with pytest.raises(ConfigError, match=message):
        where, _, value = text.partition("=")
        config_file.override({"seed": 0}, where, value)


REQUIRED = """
from ml_collections import ConfigDict, config_dict
def get_config():
  return ConfigDict({"seed": config_dict.required_placeholder(int)})
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(: 1", r"line 1: SyntaxError"),
        ("import nothere", r"line 1: ModuleNotFoundError: No module named 'nothere'"),
        ("x = 1", r"has no function get_config"),
        ("def get_config():\n  return 1", r"gave int, but no config"),
        ("def get_config():\n  return {}['x']", r"line 2: KeyError: 'x'"),
        ("def get_config(arg=None):\n  raise ValueError('no such thing')", r": no such thing"),
        ("import sys\nsys.exit('bye')", r"line 2: SystemExit: bye"),
        ("def get_config():\n  raise SystemExit(0)", r"line 2: SystemExit: 0"),
        ("def get_config():\n  return get_config()", r"line 2: RecursionError"),
        ("get_config = 3", r"get_config is 3, but no function"),
        ("\0", r"SyntaxError.*null bytes"),
        (REQUIRED, r"RequiredValueError"),
    ],
)
def test_config_files_that_cannot_be_used(tmp_path, text, message):
    file = tmp_path / "broken.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        config_file.load(str(file))
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_config_files_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("nothere.py", str(tmp_path)):
        with pytest.raises(ConfigError, match=r"is no file; .* one of .*configs/quickstart.py"):
            config_file.load(name)
    (tmp_path / "config.txt").write_text("")
    with pytest.raises(ConfigError, match=r"config.txt is no Python file; its name must end in"):
        config_file.load(str(tmp_path / "config.txt"))
    os.mkfifo(tmp_path / "pipe.py")
    with pytest.raises(ConfigError, match=r"pipe.py is no file"):
        config_file.load(str(tmp_path / "pipe.py"))
    with pytest.raises(ConfigError, match=r"takes no argument, but got 'x=1' behind the colon"):
        config_file.load("configs/quickstart.py:x=1")
    with pytest.raises(ConfigError, match=r"unknown argument 'x'; expected one of \['algorithm'"):
        config_file.load(f"{TINY}:x=1")
    monkeypatch.chdir(tmp_path)  # the repository's configs are listed from anywhere
    with pytest.raises(ConfigError, match=r"'.+/configs/quickstart.py'"):
        config_file.load("nothere.py")


# The configs that come with the package

CONFIGS = sorted(p for p in (ROOT / "configs").glob("*.py") if p.stem not in ("__init__", "common"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_is_accepted_and_documented(path):
    began = time.monotonic()
    out = settings.run(config_file.load(str(path)))
    assert out.stages and time.monotonic() - began < 5
    text = Path(path).read_text()
    assert re.match(r'r?"""', text) and f"configs/{path.name}" in text, "show its command"
    assert f"configs/{path.name}" in config_file.describe()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_that_needs_no_file_fits_its_devices(path, monkeypatch):
    out = settings.run(config_file.load(str(path)))
    needs = [s for s in out.stages if out.stage[s].data.source in ("jsonl", "parquet")]
    if needs or out.tokenizer == "model":
        pytest.skip("it takes a model or data by path")
    monkeypatch.setattr(jax, "device_count", lambda: out.simulate_devices or 1)
    assembled = assembly.assemble(out)
    assert [s.name for s in assembled.stages] == list(out.stages)
    if out.expect.metric:
        assert summary.expectation(out, {out.expect.metric: 2.0, out.expect.rises_over: 0.0})


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn", "llama3"])
def test_a_context_is_stretched(kind):
    """The slowest wave turns as far over the long context as before over the short one."""
    run = launch.config("algorithm=sft", f"model.rope={{'kind': '{kind}', 'factor': 4.0}}")
    lm = base.model(run, base.tokenizer(run))
    before = base.model(launch.config("algorithm=sft"), base.tokenizer(run))
    assert lm.max_length == 4 * before.max_length
    ours, theirs = (frequencies(m.rope, m.head_dim)[0] for m in (lm, before))
    assert ours[-1] * 4 == pytest.approx(theirs[-1], rel=1e-5)
    assert (ours[0] == theirs[0]) == (kind != "linear")


def test_a_stretch_that_cannot_be_is_said():
    for rope, message in (
        ("{'kind': 'ntk'}", "ntk takes a factor alone"),
        ("{'kind': 'dynamic'}", "unknown Rope.kind 'dynamic'"),
        ("{'knid': 'yarn'}", "config.model.rope: unknown field 'knid'"),
    ):
        run = launch.config("algorithm=sft", f"model.rope={rope}")
        with pytest.raises(ValueError, match=message):
            base.model(run, base.tokenizer(run))


# Errors of a command


def test_any_error_is_one_line_and_exit_code_2(capsys, monkeypatch):
    def left(error):
        with pytest.raises(SystemExit) as stop, config_file.explained():
            raise error
        return stop.value.code, capsys.readouterr().err

    assert left(ValueError("config.x is\n3")) == (2, "error: config.x is 3\n")
    told = (2, "error: KeyError: 'x' (JAXRL_EFF_TRACEBACK=1 tells where)\n")
    assert left(KeyError("x")) == told
    code, err = left(AssertionError())
    assert code == 2 and err.startswith("error: AssertionError: no message")
    assert len(left(ValueError("x" * 10**6))[1]) < 3000
    assert left(BrokenPipeError()) == (0, "") and left(KeyboardInterrupt()) == (130, "")
    monkeypatch.setenv(config_file.TRACEBACK, "1")
    with pytest.raises(KeyError), config_file.explained():
        raise KeyError("x")

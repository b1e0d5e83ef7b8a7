"""The command that prints what a model says."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import launch
import numpy as np
import pytest

from jaxrl_eff.checkpoints import save_hf
from jaxrl_eff.cli import generate
from jaxrl_eff.data.tokenizer import CharTokenizer
from jaxrl_eff.models import LMConfig, init, unstack_layers
from jaxrl_eff.rollout import Sampling, sample

DATA = Path(os.environ.get("JAXRL_EFF_DATA", Path(__file__).parents[3] / "shared" / "data"))
TEMPLATE = (
    "{% for m in messages %}{{ 'ab'[loop.index0 % 2] + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}b{% endif %}"
)
TOY = CharTokenizer("abcdefgh ", TEMPLATE)
CFG = LMConfig(
    vocab=TOY.vocab, layers=2, width=16, heads=2, kv_heads=1, head_dim=8, ffn=24, max_length=160,
    bos=1, eos=(2,), pad=0, init_std=0.3,
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return init(CFG, jax.random.key(3))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, params):
    directory = tmp_path_factory.mktemp("run")
    save_hf(directory / "export", CFG, params, tokenizer_from=TOY)
    return directory


def run(capsys, *argv) -> tuple[int, str, str]:
    return launch.called(generate.main, capsys, *argv)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streamed_tokens_are_those_of_the_rollout(params, temperature, key):
    sampling = Sampling(max_tokens=20, temperature=temperature, top_k=6)
    prompt = [1, 4, 5, 6]
    batch = {"prompt": jnp.asarray([prompt]), "prompt_length": jnp.asarray([4])}
    out = jax.jit(sample(CFG, sampling))(params, batch, key)
    wanted = np.asarray(out["tokens"][0])[np.asarray(out["mask"][0]) > 0].tolist()
    if wanted[-1] == 2:
        wanted = wanted[:-1]
    for mine in (params, jax.jit(unstack_layers, static_argnums=0)(CFG, params)):
        assert list(generate.stream(CFG, mine, sampling, prompt, key)) == wanted


def test_a_run_continues_a_prompt(workdir, capsys, params):
    args = ("--prompt=abc", "--max_tokens=12", "--seed=5")
    code, out, err = run(capsys, f"--model={workdir}", *args)
    assert (code, err) == (0, "")
    sampling = Sampling(max_tokens=12)
    ids = TOY.encode("abc", special=True)
    wanted = TOY.decode(generate.stream(CFG, params, sampling, ids, jax.random.key(5)))
    assert out == wanted + "\n"
    assert run(capsys, f"--model={workdir}/export", *args)[1] == out


def test_a_conversation_is_kept(workdir, capsys, monkeypatch, params):
    monkeypatch.setattr(sys, "stdin", io.StringIO("cd\n\nef\n"))
    code, out, err = run(
        capsys, f"--model={workdir}", "--chat", "--max_tokens=6", "--temperature=0"
    )
    assert (code, err) == (0, "")
    sampling, key = Sampling(max_tokens=6, temperature=0.0), jax.random.key(0)

    def answer(text):
        return TOY.decode(generate.stream(CFG, params, sampling, TOY.encode(text), key))

    first = answer("acd<eos>b")
    second = answer(f"acd<eos>b{first}<eos>aef<eos>b")
    assert out == f"{first}\n{second}\n"


def test_what_is_wrong_is_one_line(workdir, capsys, monkeypatch, tmp_path, params):
    monkeypatch.setattr(generate, "_load", lambda *_: pytest.fail("read the weights first"))
    export = workdir / "export"

    def refuses(message, *argv):
        code, out, err = run(capsys, *argv)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert message in err

    model, prompt = f"--model={export}", "--prompt=a"
    refuses("--model", prompt)
    refuses("either --prompt", model)
    refuses("either --prompt", model, prompt, "--chat")
    refuses("unrecognized arguments: --promt=a", model, "--promt=a", prompt)
    refuses("no such directory", f"--model={tmp_path}/none", prompt)
    refuses("neither a config.json nor an export/", f"--model={tmp_path}", prompt)
    refuses("'z' at 0", model, "--prompt=z")
    refuses("max_tokens=0", model, prompt, "--max_tokens=0")
    refuses("invalid int value: 'many'", model, prompt, "--max_tokens=many")
    refuses("temperature=-1.0", model, prompt, "--temperature=-1")
    refuses("top_p=2.0", model, prompt, "--top_p=2")
    refuses("--max_tokens=1000, together more than the 160", model, prompt, "--max_tokens=1000")

    save_hf(
        tmp_path / "critic",
        CFG.replace(head="value"),
        init(CFG.replace(head="value"), jax.random.key(0)),
        tokenizer_from=TOY,
    )
    refuses("value model", f"--model={tmp_path}/critic", prompt)
    save_hf(tmp_path / "bare", CFG, params)
    refuses("no tokenizer.json", f"--model={tmp_path}/bare", prompt)
    CharTokenizer(TOY.alphabet).save(tmp_path / "bare")
    refuses("no chat template", f"--model={tmp_path}/bare", "--chat")
    (tmp_path / "bare" / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    refuses("unknown model_type 'mamba'", f"--model={tmp_path}/bare", prompt)


def test_wrong_weights_are_one_line(workdir, capsys, tmp_path):
    for path in (workdir / "export").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    code, _, err = run(capsys, f"--model={tmp_path}", "--prompt=a")
    assert code == 2 and "pytorch_model.bin" in err and err.count("\n") == 1


@pytest.mark.skipif(
    not (DATA / "stories260K").exists(),
    reason="stories260K is not there; set JAXRL_EFF_DATA to the folder of checkpoints",
)
def test_the_command_tells_the_story():
    told = json.loads((DATA / "stories260K" / "greedy200.json").read_text())["text"]
    begin = "Once upon a time, there was"
    out = subprocess.run(
        [
            sys.executable, "-m", "jaxrl_eff", "generate", f"--model={DATA}/stories260K/hf",
            f"--prompt={begin}", "--max_tokens=150", "--temperature=0",
        ],
        capture_output=True, check=True, encoding="utf-8", cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert told.startswith(begin + out.stdout.rstrip("\n"))
    assert len(out.stdout) > 200 and out.stderr == ""

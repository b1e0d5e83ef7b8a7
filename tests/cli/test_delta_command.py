"""The command that makes, shows, audits, applies, removes and composes delta files."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import launch
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrl_eff.checkpoints import deltas
from jaxrl_eff.cli import delta

DATA = Path(os.environ.get("JAXRL_EFF_DATA", Path(__file__).parents[3] / "shared" / "data"))


def written(directory, seed=None):
    """A directory with the same weights, changed here and there if a seed is given."""
    rng = np.random.default_rng(0)
    state = {f"layers.{i}.weight": rng.normal(0, 1, (40, 50)).astype(np.float16) for i in range(3)}
    state["norm.weight"] = np.ones(50, np.float16)
    for name, x in state.items() if seed is not None else ():
        rng = np.random.default_rng(seed)
        some = rng.random(x.shape) < (0.02 if name != "norm.weight" else 0)
        x[some] += rng.normal(0, 0.1, int(some.sum())).astype(np.float16)
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    for name, seed in (("base", None), ("a", 1), ("b", 2)):
        written(home / name, seed)
    for name in ("a", "b"):
        delta.main([
            "diff", f"--base={home}/base", f"--tuned={home}/{name}", f"--out={home}/{name}.d",
            f"--method=task {name}",
        ])  # fmt: skip
    return home


def run(capsys, *argv):
    return launch.called(delta.main, capsys, *argv)


def files(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def test_base_and_delta_give_the_tuned_model_and_back(home, capsys, tmp_path):
    told = deltas.content_hash(load_file(home / "a" / "model.safetensors"))
    code, out, err = run(
        capsys, "apply", f"--base={home}/base", f"--delta={home}/a.d", f"--out={tmp_path}/a"
    )
    assert (code, err) == (0, "") and out.endswith(f"{tmp_path}/a: {told}\n")
    assert files(tmp_path / "a") == files(home / "a")
    args = f"--model={tmp_path}/a", f"--delta={home}/a.d", f"--out={tmp_path}/base"
    code, out, err = run(capsys, "remove", *args)
    assert (code, err) == (0, "") and out.endswith("the base again.\n")
    assert files(tmp_path / "base") == files(home / "base")


def test_what_is_in_a_file_is_shown(home, capsys):
    code, out, _ = run(capsys, "show", f"{home}/a.d")
    told = deltas.load(home / "a.d")
    assert code == 0 and told.method == "task a"
    for part in (told.base, "set, with originals", "task a", "40x50", "float16", "norm"):
        assert (part in out) == (part != "norm")
    bits, least = map(float, re.search(r"layers\.0.*?([\d.]+) +([\d.]+)$", out, re.M).groups())
    assert least < bits < 16


def test_the_audit_decides(home, capsys, tmp_path):
    given = f"--base={home}/base", f"--delta={home}/a.d"
    code, out, err = run(capsys, "audit", *given, "--max_rms=0.5", f"--json={tmp_path}/j")
    assert (code, err) == (0, "") and "passed: " in out
    assert json.loads((tmp_path / "j").read_text())["passed"] is True
    code, out, err = run(capsys, "audit", *given, "--max_share=0.001", f"--json={tmp_path}/j")
    assert (code, err) == (1, "") and "failed: layers.0.weight: share is 0.0" in out
    assert len(json.loads((tmp_path / "j").read_text())["failures"]) == 3
    (tmp_path / "j").unlink()
    code, out, err = run(capsys, "apply", *given, f"--out={tmp_path}/out", "--max_share=0.001")
    assert code == 1 and "over 0.001" in out and err == f"{tmp_path}/out is not written:\n"
    assert list(tmp_path.iterdir()) == []


def test_a_sum_is_applied_and_undone(home, capsys, tmp_path):
    code, out, err = run(
        capsys, "compose", f"{home}/a.d", f"{home}/b.d", "--weights=1,-0.5", f"--out={tmp_path}/s"
    )
    both = deltas.overlap(deltas.load(home / "a.d"), deltas.load(home / "b.d"))
    assert (code, err) == (0, "") and f"{both.shared:,} entries in both" in out and both.shared
    code, _, err = run(
        capsys, "apply", f"--base={home}/base", f"--delta={tmp_path}/s", f"--out={tmp_path}/out",
        f"--undo={tmp_path}/u", "--max_rms=1",
    )  # fmt: skip
    assert (code, err) == (0, "")
    base, a, b, got = (
        load_file(d / "model.safetensors")
        for d in (home / "base", home / "a", home / "b", tmp_path / "out")
    )
    for name in base:
        w, x, y = (t[name].astype(np.float64) for t in (base, a, b))
        change = ((x - w) - 0.5 * (y - w)).astype(np.float32)
        wanted = (base[name].astype(np.float32) + change).astype(np.float16)
        np.testing.assert_array_equal(got[name], wanted)
    args = f"--model={tmp_path}/out", f"--delta={tmp_path}/u", f"--out={tmp_path}/base"
    assert run(capsys, "remove", *args)[0] == 0
    assert files(tmp_path / "base") == files(home / "base")


def test_what_is_wrong_is_one_line(home, capsys, tmp_path):
    def refuses(message, *argv):
        before = sorted(tmp_path.iterdir())
        code, out, err = run(capsys, *argv)
        assert (code, err.count("\n")) == (2, 1) and out == "", (out, err)
        assert message in err
        assert sorted(tmp_path.iterdir()) == before

    base, a = f"--base={home}/base", f"--delta={home}/a.d"
    out = f"--out={tmp_path}/out"
    (tmp_path / "text").write_text("no delta\n")
    refuses("required: COMMAND")
    refuses("invalid choice: 'patch'", "patch")
    refuses("--tuned", "diff", base, out)
    refuses("unrecognized arguments: --too=1", "show", f"{home}/a.d", "--too=1")
    refuses("is there already", "diff", base, f"--tuned={home}/a", f"--out={home}/a.d")
    refuses("no directory", "diff", base, f"--tuned={tmp_path}/none", out)
    refuses("no model.safetensors", "diff", base, f"--tuned={tmp_path}", out)
    refuses("there is no file", "show", f"{tmp_path}/none")
    refuses("text cannot be read", "show", f"{tmp_path}/text")
    refuses("no delta", "show", f"{home}/base/model.safetensors")
    refuses("made for the base", "apply", f"--base={home}/a", a, out)
    refuses("is there already", "apply", base, a, f"--out={home}/b")
    refuses("is there already", "apply", base, a, out, f"--undo={home}/b.d")
    refuses("not the base", "remove", f"--model={home}/b", a, out)
    refuses("--max_kl needs --probe", "audit", base, a, "--max_kl=1")
    refuses("rms=-1.0 should be at least 0", "audit", base, a, "--max_rms=-1")
    refuses("invalid float value: 'much'", "audit", base, a, "--max_rms=much")
    refuses("--probe_tokens=0", "audit", base, a, f"--probe={tmp_path}/text", "--probe_tokens=0")
    refuses("2 files, but 1 --weights", "compose", f"{home}/a.d", f"{home}/b.d", "--weights=1", out)
    refuses("'1,x' should be numbers", "compose", f"{home}/a.d", "--weights=1,x", out)
    run(capsys, "diff", base, f"--tuned={home}/b", f"--out={tmp_path}/bare", "--no_originals")
    refuses("no originals", "compose", f"{home}/a.d", f"{tmp_path}/bare", out)
    refuses("no originals", "remove", f"--model={home}/b", f"--delta={tmp_path}/bare", out)


@pytest.mark.skipif(
    not (DATA / "stories260K").exists(),
    reason="stories260K is not there; set JAXRL_EFF_DATA to the folder of checkpoints",
)
def test_kl_on_texts_from_the_shell(tmp_path):
    """Of a real model with a hundredth of a matrix changed."""
    base = DATA / "stories260K" / "hf"
    table = deltas.read_directory(base)
    name = "model.layers.0.mlp.up_proj.weight"
    values = np.array(table[name])
    values[::10, ::10] *= -3
    deltas.save(deltas.diff(table, {**table, name: values}), tmp_path / "d")
    (tmp_path / "texts").write_text("Once upon a time there was a dog.\n\nShe was happy.\n")
    command = [
        sys.executable, "-m", "jaxrl_eff", "delta", "audit", f"--base={base}",
        f"--delta={tmp_path}/d", f"--probe={tmp_path}/texts",
    ]  # fmt: skip
    place = dict(cwd=Path(__file__).parents[2], capture_output=True, encoding="utf-8")
    done = subprocess.run(command, **place)
    assert (done.returncode, done.stderr) == (0, "")
    kl = float(re.search(r"KL from the base: (\S+) nats", done.stdout)[1])
    assert 1e-4 < kl < 1

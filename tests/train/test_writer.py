"""metrics.jsonl survives kills and resumes without a gap, a double or an invalid line."""

import json
import math
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_eff.train.writer import Writer, encodable, read


def lines(path):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(x, parse_constant=refuse) for x in path.read_text().splitlines()]


def test_a_step_is_one_line(tmp_path):
    w = Writer(tmp_path)
    w.step(
        1, "ppo", {"actor_train/kl": jnp.float32(0.5), "reward": np.float64(2)},
        seconds={"actor_gen": 0.25}, tokens_per_s=1000, flops_per_s=1e9, mfu=0.5,
    )  # fmt: skip
    (row,) = lines(tmp_path / "metrics.jsonl")  # before close: flushed
    assert row.pop("time") > 0
    assert row == {
        "step": 1,
        "stage": "ppo",
        "values": {"actor_train/kl": 0.5, "reward": 2.0},
        "seconds": {"actor_gen": 0.25},
        "tokens_per_s": 1000.0,
        "flops_per_s": 1e9,
        "mfu": 0.5,
    }
    w.close()
    w.close()
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_unknown_rates_are_left_out(tmp_path):
    w = Writer(tmp_path, tensorboard=False)
    w.step(1, "sft", {})
    w.close()
    assert set(read(tmp_path / "metrics.jsonl")[0]) == {
        "step",
        "stage",
        "time",
        "values",
        "seconds",
    }
    assert not (tmp_path / "tensorboard").exists()


def test_not_a_number_stays_valid_json_and_comes_back(tmp_path):
    w = Writer(tmp_path, tensorboard=False)
    w.step(1, "sft", {"a": math.nan, "b": math.inf, "c": -math.inf})
    w.samples(1, "sft", [{"prompt": "NaN", "reward": math.nan}])
    w.close()
    assert lines(tmp_path / "metrics.jsonl")[0]["values"] == {
        "a": "NaN",
        "b": "Infinity",
        "c": "-Infinity",
    }
    values = read(tmp_path / "metrics.jsonl")[0]["values"]
    assert math.isnan(values["a"]) and (values["b"], values["c"]) == (math.inf, -math.inf)
    sample = read(tmp_path / "samples.jsonl")[0]
    assert sample["prompt"] == "NaN" and math.isnan(sample["reward"])


def test_resuming_drops_what_comes_after(tmp_path):
    w = Writer(tmp_path, tensorboard=False)
    for step in range(1, 6):
        w.step(step, "sft", {"loss": step})
        w.samples(step, "sft", [{"prompt": "p", "completion": f"{step}\u2028\n", "reward": 0}])
    w.close()
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 6, "stage": "s')  # killed while writing
    assert len(read(tmp_path / "metrics.jsonl")) == 5
    w = Writer(tmp_path, resume_step=3)
    w.step(4, "sft", {"loss": 40})
    w.samples(4, "sft", [{"prompt": "p", "completion": "new", "reward": 1}])
    w.close()
    assert [r["values"]["loss"] for r in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 40]
    assert [r["step"] for r in lines(tmp_path / "samples.jsonl")] == [1, 2, 3, 4]
    Writer(tmp_path, resume_step=0).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_appending_mends_a_cut_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "stage": "a", "values": {}}\n{"st')
    w = Writer(tmp_path, tensorboard=False)
    w.step(2, "a", {})
    w.close()
    assert [r["step"] for r in lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_disabled_writes_nothing(tmp_path):
    w = Writer(tmp_path / "run", enabled=False, wandb={"project": "x"})
    w.step(1, "a", {"x": 1.0})
    w.samples(1, "a", [{}])
    w.document("plan", {})
    w.close()
    assert not (tmp_path / "run").exists()


def test_documents_are_strict_json(tmp_path):
    w = Writer(tmp_path, tensorboard=False)
    w.document("plan", {"a": (1, math.inf, np.int32(3), jnp.ones(2)), "p": tmp_path, 4: None})
    w.close()
    assert json.loads((tmp_path / "plan.json").read_text()) == {
        "a": [1, "Infinity", 3, [1.0, 1.0]],
        "p": str(tmp_path),
        "4": None,
    }
    assert encodable(True) is True


def test_wandb_missing_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxrl_eff\[wandb\]'"):
        Writer(tmp_path, wandb={"project": "x"})


def test_wandb_gets_the_same_numbers_and_one_id(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end")
    )
    fake = types.SimpleNamespace(
        init=lambda **kw: calls.append(kw) or run,
        util=types.SimpleNamespace(generate_id=lambda: "abc"),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (1, 2):
        w = Writer(tmp_path, wandb={"project": "x"}, tensorboard=False)
        w.step(step, "sft", {"loss": 1.0})
        w.close()
    start = {"id": "abc", "resume": "allow", "dir": str(tmp_path), "project": "x"}
    assert calls == [
        start, (1, {"sft/loss": 1.0}), "end", start, (2, {"sft/loss": 1.0}), "end",
    ]  # fmt: skip


def test_a_line_that_is_nested_too_deeply_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + "[" * 100_000 + "\n")
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1}]

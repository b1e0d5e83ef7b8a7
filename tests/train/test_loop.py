"""The training loop: every algorithm learns, nothing is compiled twice, nothing is poisoned."""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import launch
import numpy as np
import pytest

from jaxrl_eff import core
from jaxrl_eff.data import toys
from jaxrl_eff.train import assembly, parts, writer

LEARNS = ("grpo", "ppo")  # runs long enough to see the reward rise
SAMPLES = ("ppo", "grpo", "rloo", "remax", "raft")


def sevens(example, response):
    """A reward that any algorithm can raise in seconds."""
    del example
    return response.count("7") / 4


@pytest.fixture
def assembled(monkeypatch):
    """What the runs of a test assembled."""
    seen, assemble = [], assembly.assemble

    def noted(run):
        seen.append(assemble(run))
        return seen[-1]

    monkeypatch.setattr(assembly, "assemble", noted)
    return seen


@pytest.mark.parametrize(
    "algorithm", ["sft", "reward_model", "dpo", "ppo", "grpo", "rloo", "remax", "raft"]
)
def test_every_algorithm_runs(algorithm, tmp_path, monkeypatch, assembled):
    monkeypatch.setitem(parts.REWARDS, "sevens", lambda: sevens)
    steps = 30 if algorithm in LEARNS else 3
    changes = []
    if algorithm in SAMPLES:
        changes += [f"{algorithm}.reward.name=sevens", f"{algorithm}.data.eos=false"]
    if algorithm in LEARNS:
        changes += [f"{algorithm}.batch=16", f"{algorithm}.optim.actor.lr=0.01"]
    if algorithm == "ppo":
        changes += ["ppo.loss.kl_coef=0.01", "ppo.loss.kl_target=20.0"]
    run = launch.config(f"algorithm={algorithm},steps={steps}", *changes)
    assert launch.train(run, tmp_path)
    rows = launch.numbers(tmp_path)
    assert [step for step, _, _ in rows] == list(range(1, steps + 1))
    for _, _, values in rows:
        assert all(math.isfinite(v) for v in values.values()), values
        assert all(v == 1 for k, v in values.items() if k.endswith("/finite"))
        if algorithm in SAMPLES and algorithm != "raft":
            assert values["actor_train/logp_gap_max"] <= 1e-4
    if algorithm in LEARNS:
        score = [v["advantage/score"] for _, _, v in rows]
        assert np.mean(score[-3:]) > np.mean(score[:3]) + 0.3, score
    (stage,) = assembled[0].stages
    once = {c.name: 0 if c.host else 1 for c in stage.step.calls}
    assert stage.step.traces == once


def test_after_the_first_step_nothing_is_compiled(tmp_path, monkeypatch):
    compiled, at_line, step = [], [], writer.Writer.step

    def listen(event, *_, **__):
        if "backend_compile" in event:
            compiled.append(event)

    def noted(self, *args, **kwargs):
        at_line.append(len(compiled))
        step(self, *args, **kwargs)

    monkeypatch.setattr(writer.Writer, "step", noted)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        launch.train(launch.config("algorithm=grpo,steps=5", "grpo.samples_every=3"), tmp_path)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert at_line[0] > 0 and len(set(at_line)) == 1  # a line is written after the next dispatch


def test_an_implicit_transfer_within_a_step_is_an_error(tmp_path, monkeypatch):
    put = core.Step.put

    def leaking(self, batch):
        data = put(self, batch)
        jnp.add(next(iter(data.values())), np.int32(0))
        return data

    monkeypatch.setattr(core.Step, "put", leaking)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        launch.train(launch.config(), tmp_path)


# Numbers that are not finite

DIVERGES = ("sft.optim.actor.name=sgd", "sft.optim.actor.lr=1e30", "sft.optim.actor.clip_norm=0.0")
FIVE = "algorithm=sft,steps=5,every=1"


def parameters_are_finite(workdir):
    """Every array of every checkpoint."""
    import orbax.checkpoint as ocp

    kept = sorted((workdir / "checkpoints").iterdir())
    for checkpoint in kept:
        arrays = ocp.PyTreeCheckpointer().restore(checkpoint / "state")
        assert all(np.isfinite(np.asarray(a)).all() for a in jax.tree.leaves(arrays))
    return [p.name for p in kept]


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_nan_stops_the_run_and_is_named(tmp_path, capsys):
    assert not launch.train(launch.config(FIVE, *DIVERGES), tmp_path)
    said = capsys.readouterr().out
    assert "error: " in said and "of actor_train is nan at step 2 of stage sft" in said
    assert "nonfinite='skip'" in said and "PASS" not in said
    assert parameters_are_finite(tmp_path) == ["00000001"]
    assert not (tmp_path / "export").exists()
    assert [step for step, _, _ in launch.numbers(tmp_path)] == [1, 2]  # the bad one can be seen


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_nan_may_be_skipped(tmp_path, capfd):
    run = launch.config(FIVE, *DIVERGES, "nonfinite=skip", "checkpoint.keep=5")
    assert launch.train(run, tmp_path)
    assert capfd.readouterr().err.count("the update was skipped") == 4
    assert len(parameters_are_finite(tmp_path)) == 5
    finite = [v["actor_train/finite"] for _, _, v in launch.numbers(tmp_path)]
    assert finite == [1, 0, 0, 0, 0]


def test_a_reward_that_fails_is_named(tmp_path, monkeypatch):
    def broken(example, response):
        if response != "0":  # which is how the reward is tried when the run is assembled
            raise KeyError("answer")
        return 0.0

    monkeypatch.setitem(parts.REWARDS, "broken", lambda: broken)
    run = launch.config("algorithm=rloo,every=1", "rloo.reward.name=broken")
    with pytest.raises(
        ValueError, match=r"the reward 'broken' of example \d+ .* raised KeyError: 'answer'"
    ):
        launch.train(run, tmp_path)


# What a run leaves behind


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """A run with evaluation, and an expectation that it misses."""
    workdir = tmp_path_factory.mktemp("graded")
    run = launch.config(
        "algorithm=grpo,steps=4,evaluate=1",
        "grpo.evaluate.every=2",
        "grpo.samples_every=2",
        "grpo.plan={'default': {'devices': [0, 1]}, 'ref_inf': {'devices': [1]}}",
        "expect={'metric': 'grpo/eval', 'rises_over': 'grpo/eval_before', 'rise': 2.0}",
    )
    return workdir, run, launch.train(run, workdir)


def test_a_missed_expectation_fails(graded):
    workdir, run, passed = graded
    assert not passed and launch.document(workdir, "result")["passed"] is False
    easy = dataclasses.replace(run.expect, rise=-1.0, at_least=0.0)
    assert launch.train(dataclasses.replace(run, expect=easy), workdir)
    assert launch.document(workdir, "result")["passed"] is True


def test_evaluations_are_numbers_among_the_others(graded):
    evals = [(s, v) for s, _, v in launch.numbers(graded[0]) if set(v) & {"eval", "eval_before"}]
    assert [(s, *v) for s, v in evals] == [(0, "eval_before"), (2, "eval"), (4, "eval")]
    results = launch.document(graded[0], "result")["results"]
    assert results["grpo/eval_before"] == evals[0][1]["eval_before"]
    assert results["grpo/eval"] == evals[2][1]["eval"]


def test_samples_show_prompt_completion_and_reward(graded):
    lines = (graded[0] / "samples.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert {r["step"] for r in rows} == {0, 2, 4}
    trained = [r for r in rows if "held_out" not in r]
    assert len(trained) == 2 * 16 and all(r["stage"] == "grpo" for r in rows)
    for r in trained:
        digits = r["prompt"].removesuffix(">")
        assert len(digits) == 2 and digits.isdigit() and 0 <= r["reward"] <= 1
        said = re.findall("<(?:pad|bos|eos)>|[0-9>]", r["completion"])
        assert "".join(said) == r["completion"] and len(said) <= 4
        example = {"truth": digits[::-1]}
        assert r["reward"] == pytest.approx(toys.digit_share(example, r["completion"]))


def test_the_plan_timeline_and_config_are_written(graded):
    workdir, run, _ = graded
    plan = launch.document(workdir, "plan")["grpo"]
    assert list(plan) == ["actor_gen", "ref_inf", "rew", "advantage", "actor_train"]
    assert plan["ref_inf"]["devices"] == [1] and plan["ref_inf"]["of"] == "ref"
    assert plan["actor_gen"]["axes"]["data"] == 2 and plan["rew"]["kind"] == "host"
    spans = launch.document(workdir, "timeline")["grpo"]
    assert {s["call"] for s in spans} == set(plan)
    assert all(0 <= s["start"] <= s["end"] for s in spans)
    config = launch.document(workdir, "config")
    assert config["stage"]["grpo"]["steps"] == 4 and config["seed"] == run.seed
    assert list((workdir / "tensorboard").iterdir())
    row = writer.read(workdir / "metrics.jsonl")[-3]
    assert set(row["seconds"]) == set(plan) and row["tokens_per_s"] > 0 and row["flops_per_s"] > 0

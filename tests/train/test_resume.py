"""A run that is stopped and started again ends where one that was never stopped ends."""

import json
import re
import shutil
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import launch
import numpy as np
import pytest
from launch import cache  # noqa: F401 (fixture)

from jaxrl_eff.checkpoints.run import Checkpoints
from jaxrl_eff.core import Model
from jaxrl_eff.planner import clusters
from jaxrl_eff.train import state, writer

THREE = f"--config={launch.TINY}:algorithm=three,steps=3,devices=2,every=1,evaluate=1"
CHECKPOINTS = "jaxrl_eff.checkpoints.run:Checkpoints"

# Every moment is in another part of the run; the run resumes in between.
MOMENTS = (
    "jaxrl_eff.train.writer:Writer.step:after:step=1:KILL",  # stage 1, a step logged and not saved
    "jaxrl_eff.checkpoints.run:_crc:before:2:KILL",  # arrays written, no manifest
    f"{CHECKPOINTS}._adopt:before:1:KILL",  # manifest written, not renamed
    "jaxrl_eff.train.state:shelve:after:1:KILL",  # between two stages
    "jaxrl_eff.train.loop:_announce:after:1:KILL",  # compiled, no step of this stage taken
    "jaxrl_eff.train.writer:Writer.step:after:step=4:TERM",  # asked to stop
    f"{CHECKPOINTS}._rotate:before:1:KILL",  # the new one stands, the old ones are not deleted
    "jaxrl_eff.train.state:initial:after:1:KILL",  # models of a stage made, nothing taken
    "jaxrl_eff.train.console:Console.stage:before:2:KILL",  # evaluated before a first step
    f"{CHECKPOINTS}.save:after:step=8:KILL",  # while arrays are being written
    "jaxrl_eff.train.writer:Writer.document:before:4:KILL",  # exported, no result written
)
FEW = (MOMENTS[2], MOMENTS[9], MOMENTS[10])  # in a save, in another one, after the export


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):  # noqa: F811
    """The run that is never stopped."""
    workdir = tmp_path_factory.mktemp("whole")
    code, out, err = launch.command(THREE, f"--workdir={workdir}", cache=cache)
    assert code == 0, out + err
    return workdir


@pytest.mark.slow  # by default runs are stopped in this process
@pytest.mark.parametrize("moments", [FEW, MOMENTS], ids=["few", "many"])
def test_killed_at_any_moment_it_ends_bitwise_the_same(moments, whole, cache, tmp_path):  # noqa: F811
    for moment in moments:
        code, out, err = launch.command(THREE, f"--workdir={tmp_path}", cache=cache, kill=moment)
        if moment.endswith("TERM"):
            assert code == 0 and "the same command continues" in out, (moment, out, err)
        else:
            assert code == -9, (moment, out, err)
    code, out, err = launch.command(THREE, f"--workdir={tmp_path}", cache=cache)
    assert code == 0, out + err
    assert "resumed at stage ppo, step 3" in out and "refused" not in out
    assert launch.export(tmp_path) == launch.export(whole)
    assert launch.numbers(tmp_path) == launch.numbers(whole)
    for name in ("samples.jsonl", "config.json", "plan.json"):
        assert (tmp_path / name).read_text() == (whole / name).read_text(), name
    ended, unstopped = (launch.document(d, "result") for d in (tmp_path, whole))
    assert ended["results"] == unstopped["results"] and set(ended["results"]) == {
        "ppo/eval_before",
        "ppo/eval",
    }
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if not p.name.isdigit()]


def test_checkpoints_hold_what_continues_a_run(whole):
    newest = max((whole / "checkpoints").iterdir())
    meta = json.loads((newest / "record.json").read_text())
    assert meta["record"]["stage"] == "ppo" and meta["record"]["step"] == 3
    assert "models/kl/params/beta" in meta["leaves"]
    assert any(name.startswith("models/critic/opt") for name in meta["leaves"])
    # No later stage needs these, and a run resumed in this one would not have them.
    assert not any(name.startswith("shelf/") for name in meta["leaves"])
    rows = [values for _, _, values in launch.numbers(whole, "ppo")]
    betas = {v["advantage/beta"] for v in rows if "advantage/beta" in v}
    assert len(betas) == 3  # the coefficient moved, so its state mattered


def test_a_finished_run_started_again_says_the_same(whole, cache):  # noqa: F811
    before = launch.export(whole), launch.numbers(whole), launch.document(whole, "result")
    code, out, err = launch.command(THREE, f"--workdir={whole}", "--quiet", cache=cache)
    assert code == 0, out + err
    after = launch.export(whole), launch.numbers(whole), launch.document(whole, "result")
    assert after[:2] == before[:2] and after[2]["results"] == before[2]["results"]
    assert "held-out samples" not in err


@pytest.mark.slow
def test_killed_after_random_seconds_it_ends_bitwise_the_same(whole, cache, tmp_path):  # noqa: F811
    rng = np.random.default_rng()
    while True:
        process = launch.start([THREE, f"--workdir={tmp_path}"], cache)
        try:
            process.communicate(timeout=float(rng.uniform(3, 12)))
            break
        except launch.subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
    assert process.returncode == 0
    assert launch.export(tmp_path) == launch.export(whole)
    assert launch.numbers(tmp_path) == launch.numbers(whole)


def stopped(monkeypatch, run, workdir, *, after):
    """Runs until `after` lines of metrics are written."""
    step, left = writer.Writer.step, [after]

    def killing(self, *args, **kwargs):
        step(self, *args, **kwargs)
        left[0] -= 1
        if left[0] == 0:
            self.close()
            raise launch.Killed

    with monkeypatch.context() as m:
        m.setattr(writer.Writer, "step", killing)
        with pytest.raises(launch.Killed):
            launch.train(run, workdir)


def failed(monkeypatch, run, workdir, *, at):
    """Runs until the metrics of step `at` should be written, which fails."""
    step = writer.Writer.step

    def fail(self, number, *args, **kwargs):
        if number == at:
            raise RuntimeError("stopped")
        return step(self, number, *args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(writer.Writer, "step", fail)
        with pytest.raises(RuntimeError, match="stopped"):
            launch.train(run, workdir)


SFT = "algorithm=sft,steps=4,every=1"


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sft")
    assert launch.train(launch.config(SFT), workdir)
    return workdir


def test_the_loader_left_something_over(sft):
    """So that the tests of resuming test it."""
    waiting = [
        json.loads((p / "record.json").read_text())["record"]["data"]["waiting"]
        for p in (sft / "checkpoints").iterdir()
    ]
    assert any(waiting)


@pytest.mark.parametrize("axes", ["fsdp=2,tensor=2", "data=8", "microbatches=2"])
def test_onto_another_mesh_it_is_equal_to_rounding(sft, axes, tmp_path, monkeypatch):
    stopped(monkeypatch, launch.config(SFT), tmp_path, after=2)
    named = dict(a.split("=") for a in axes.split(","))
    row = {"devices": 8 if "data" in named else 4 if "tensor" in named else 2}
    row |= {k: int(v) for k, v in named.items()}
    run = launch.config(SFT, f"sft.plan={{'default': {row}}}")
    assert launch.train(run, tmp_path)
    got, want = launch.tensors(tmp_path), launch.tensors(sft)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-4, err_msg=name)
    losses = [[v["actor_train/loss"] for _, _, v in launch.numbers(d)] for d in (tmp_path, sft)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["sft", "grpo"])
def test_scheduled_by_constants_it_ends_bitwise_the_same(algorithm, tmp_path, monkeypatch):
    """And however long steps take, which schedules are otherwise judged by."""
    plan = "{'default': {'devices': [0, 1, 2, 3], 'data': 2, 'seq': 2}}"
    changes = (
        f"{algorithm}.plan={plan}",
        f"{algorithm}.schedule={{'name': 'skrull', 'room': 24, 'shapes': 3, 'measure': False}}",
    )
    run = launch.config(f"algorithm={algorithm},steps=4,every=1", *changes)
    monkeypatch.setattr(clusters, "_measured", None)  # CPUs must not be asked
    assert launch.train(run, tmp_path / "whole")
    stopped(monkeypatch, run, tmp_path / "killed", after=2)
    clusters._local.cache_clear()
    assert launch.train(run, tmp_path / "killed")
    assert launch.export(tmp_path / "killed") == launch.export(tmp_path / "whole")
    told = [launch.document(tmp_path / d, "schedule") for d in ("whole", "killed")]
    assert told[0] == told[1]


def damage(checkpoint):
    """Cuts the largest file in half, as a full disk does."""
    file = max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    with file.open("r+b") as f:
        f.truncate(file.stat().st_size // 2)


class OldModel(NamedTuple):
    """`core.Model` with the names that its fields once had."""

    params: Any
    opt: Any
    past: Any
    left: Any
    held: Any


def test_a_checkpoint_with_the_former_names_of_a_models_fields_is_read(tmp_path):
    def field(n):
        return {"past/held": jnp.full(3, float(n)), "embed": {"left": jnp.full(2, float(n))}}

    old = OldModel({"left": jnp.ones(3)}, field(1), {"actor_gen": (field(2),)}, field(3), field(4))
    shelf = {"sft/actor": {"left": {"held": jnp.zeros(1)}}}
    first = Checkpoints(tmp_path, fingerprint="f")
    for step in (1, 2):  # the second keeps what did not change apart
        moved = old._replace(params={"left": jnp.full(3, float(step))})
        first.save(step, {"models": {"actor": moved}, "shelf": shelf}, {})
    first.close()
    run = Checkpoints(tmp_path, fingerprint="f", renamed=state.renamed)
    wanted = {"models": {"actor": Model(*moved)}, "shelf": shelf}
    got = run.restore(jax.eval_shape(lambda: wanted))
    jax.tree.map(np.testing.assert_array_equal, got.state, wanted)
    run.save(3, got.state, {})
    run.close()
    saved = json.loads((tmp_path / "00000003" / "record.json").read_text())["leaves"]
    assert {k for k in saved if k.startswith("models/actor/node_copy")} == {
        "models/actor/node_copy/embed/left", "models/actor/node_copy/past/held",
    }  # fmt: skip
    assert Checkpoints(tmp_path, fingerprint="f").restore(jax.eval_shape(lambda: wanted)).step == 3


def test_a_truncated_checkpoint_is_refused_by_name(sft, tmp_path, capfd):
    shutil.copytree(sft, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "checkpoints" / "00000004")
    assert launch.train(launch.config(SFT), tmp_path)
    said = capfd.readouterr().err
    assert re.search(r"checkpoint .*00000004 is refused: .* bytes and should have", said)
    assert launch.export(tmp_path) == launch.export(sft)
    assert launch.numbers(tmp_path) == launch.numbers(sft)


def test_without_a_good_checkpoint_it_begins_anew(sft, tmp_path, capfd):
    shutil.copytree(sft, tmp_path, dirs_exist_ok=True)
    for checkpoint in (tmp_path / "checkpoints").iterdir():
        damage(checkpoint)
    assert launch.train(launch.config(SFT), tmp_path)
    assert capfd.readouterr().err.count("is refused") >= 3
    assert launch.export(tmp_path) == launch.export(sft)
    assert launch.numbers(tmp_path) == launch.numbers(sft)


def test_a_foreign_checkpoint_is_refused_by_name(sft, tmp_path, capfd, monkeypatch):
    stopped(monkeypatch, launch.config(SFT), tmp_path, after=3)
    shutil.copytree(sft / "checkpoints" / "00000003", tmp_path / "checkpoints" / "00000009")
    record = tmp_path / "checkpoints" / "00000009" / "record.json"
    meta = json.loads(record.read_text())
    record.write_text(json.dumps(meta | {"fingerprint": "another"}))
    manifest = record.with_name("manifest.json")
    table = json.loads(manifest.read_text())
    table["record.json"] = [record.stat().st_size, zlib.crc32(record.read_bytes())]
    manifest.write_text(json.dumps(table))
    assert launch.train(launch.config(SFT), tmp_path)
    assert re.search(r"00000009 is refused: it belongs to another run", capfd.readouterr().err)
    assert launch.export(tmp_path) == launch.export(sft)


def test_a_run_of_another_config_is_not_overwritten(sft):
    before = launch.numbers(sft)
    with pytest.raises(ValueError, match=r"another config .*steps was 4, is 5.* directory"):
        launch.train(launch.config(SFT, "sft.steps=5"), sft)
    assert launch.numbers(sft) == before


def test_what_does_not_change_results_may_change(sft):
    run = launch.config(SFT, "sft.samples_every=1", "checkpoint.keep=1", "nonfinite=skip")
    assert launch.train(run, sft)


@pytest.mark.parametrize(
    ("arg", "change", "message"),
    [
        (SFT, "model.shape.width=48", r"00000004 is refused: .* float32\[.*overwrite"),
        (SFT, "sft.optim.actor.name=sgd", r"00000004 is refused: .*overwrite"),
        (SFT, "sft.steps=3", r"config\.sft\.steps is 3, but .* has taken 4 steps"),
        ("algorithm=grpo,steps=4", "seed=0", r"is in stage 'sft', but config\.stages is \('grpo'"),
        (
            "algorithm=three,steps=4",
            "stages=('rm','sft') rm.models.reward=base",
            r"took 0 steps before stage 'sft', but",
        ),
    ],
)
def test_accepted_changes_that_cannot_be_continued_overwrite_nothing(sft, arg, change, message):
    before = sorted((sft / "checkpoints").rglob("*"))
    run = launch.config(arg, *change.split(" "))
    with pytest.raises(ValueError, match=message):
        launch.train(run, sft, accept_changes=True)
    assert sorted((sft / "checkpoints").rglob("*")) == before


def test_other_data_are_read_from_their_beginning_if_accepted(tmp_path, capfd):
    rows = [f'{{"prompt": "{i}>", "completion": "{i}"}}\n' for i in range(40)]
    data = {"source": "jsonl", "path": str(tmp_path / "t.jsonl"), "length": 24}
    run = launch.config("algorithm=sft,steps=2", f"sft.data={data}")
    (tmp_path / "t.jsonl").write_text("".join(rows))
    assert launch.train(run, tmp_path / "run")
    (tmp_path / "t.jsonl").write_text("".join(rows[:30]))
    more = launch.config("algorithm=sft,steps=3", f"sft.data={data}")
    with pytest.raises(ValueError, match=r"contents of config\.sft\.data\.path was"):
        launch.train(more, tmp_path / "run")
    assert launch.train(more, tmp_path / "run", accept_changes=True)
    assert "sft: the data are read from their beginning again" in capfd.readouterr().err
    assert [step for step, _, _ in launch.numbers(tmp_path / "run")] == [1, 2, 3]

"""A run that is continued computes what it computed, or is refused by name."""

import dataclasses
import json

import launch
import pytest

from jaxrl_eff.train import identity, settings

SFT = "algorithm=sft"


def rows(path, k):
    lines = (json.dumps({"prompt": f"{i}>", "completion": str(i * k)}) for i in range(9))
    path.write_text("\n".join(lines))
    return str(path)


def reading(path):
    return launch.config(
        SFT,
        f"sft.data={{'source': 'jsonl', 'path': {path!r}, 'format': 'completion', 'length': 9}}",
    )


FREE = (
    "simulate_devices=4", "checkpoint.every=7", "checkpoint.minutes=1.0", "export=false",
    "nonfinite=skip", "sft.plan=fsdp", "sft.samples_every=3", "sft.evaluate.problems=0",
    "sft.sync.name=changes", "expect.metric=sft/eval",
)  # fmt: skip
COUNTS = (
    "seed=1", "sft.steps=9", "sft.batch=4", "sft.optim.actor.lr=0.5", "sft.data.eos=false",
    "model.shape.layers=1", "sft.schedule.name=skrull", "sft.zero.name=int8",
)  # fmt: skip


@pytest.mark.parametrize("change", FREE)
def test_where_a_run_runs_is_free(change):
    assert identity.fingerprint(launch.config(SFT, change)) == identity.fingerprint(
        launch.config(SFT)
    )


@pytest.mark.parametrize("change", COUNTS)
def test_what_a_run_computes_counts(change):
    assert identity.fingerprint(launch.config(SFT, change)) != identity.fingerprint(
        launch.config(SFT)
    )


@pytest.mark.parametrize("name", ["search", "export", "evaluate", "sync", "plan", "checkpoint"])
def test_a_stage_of_any_name_counts(name):
    def of(lr):
        run = launch.config(SFT, f"sft.optim.actor.lr={lr}")
        return dataclasses.replace(run, stages=(name,), stage={name: run.stage["sft"]})

    assert identity.fingerprint(of(1e-3)) != identity.fingerprint(of(0.5))


def test_options_of_any_name_count():
    one, other = (
        launch.config("algorithm=grpo", f"grpo.reward.options={{'path': {p!r}}}") for p in "ab"
    )
    assert identity.fingerprint(one) != identity.fingerprint(other)


def test_the_precision_of_weights_counts_and_checkpoints_do_not():
    whole, *rounded = (
        identity.fingerprint(launch.config("algorithm=grpo", *changes))
        for changes in (
            (),
            ("grpo.weights={'actor_gen': 'int8'}",),
            ("grpo.weights={'actor_gen': 'int8'}", "checkpoint.every=2"),
            ("grpo.weights={'actor_gen': 'int4'}",),
        )
    )
    assert rounded[0] == rounded[1] and len({whole, *rounded}) == 3


def test_data_count_by_their_contents(tmp_path):
    one = identity.fingerprint(reading(rows(tmp_path / "a.jsonl", 1)))
    assert identity.fingerprint(reading(rows(tmp_path / "copy.jsonl", 1))) == one
    assert identity.fingerprint(reading(rows(tmp_path / "a.jsonl", 2))) != one


def test_models_count_by_their_contents(tmp_path):
    def of(directory):
        run = launch.config(SFT)
        return dataclasses.replace(run, model=settings.ModelSettings(path=str(directory)))

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(bytes(99))
    before = identity.fingerprint(of(tmp_path / "one"))
    assert identity.fingerprint(of(tmp_path / "two")) == before
    (tmp_path / "two" / "README.md").write_text("A card of the model is not read.")
    assert identity.fingerprint(of(tmp_path / "two")) == before
    (tmp_path / "two" / "model.safetensors").write_bytes(bytes(98) + b"1")
    assert identity.fingerprint(of(tmp_path / "two")) != before


def test_large_files_count_at_both_ends_and_between(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "WHOLE_BYTES", 100)
    monkeypatch.setattr(identity, "SAMPLES", 4)
    monkeypatch.setattr(identity, "SAMPLE_BYTES", 100)
    file = tmp_path / "x"
    seen = set()
    for place in (None, 0, 350, 999):
        text = bytearray(1000)
        if place is not None:
            text[place] = 1
        file.write_bytes(text)
        seen.add(identity.digest_of(file))
    assert len(seen) == 4


def begun(workdir, run):
    """A workdir with metrics of a run."""
    me = identity.identify(run, workdir)
    (workdir / "identity.json").write_text(json.dumps(me.document()))
    (workdir / "metrics.jsonl").write_text("{}\n")
    return me


def test_other_data_under_a_run_are_refused_by_name(tmp_path):
    run = reading(rows(tmp_path / "a.jsonl", 1))
    begun(tmp_path, run)
    assert identity.identify(run, tmp_path).changes == ()
    rows(tmp_path / "a.jsonl", 7)
    with pytest.raises(ValueError, match=r"contents of config\.sft\.data\.path was .* bytes"):
        identity.identify(run, tmp_path)


def test_changes_may_be_accepted_and_are_said(tmp_path):
    first = begun(tmp_path, launch.config(SFT))
    other = launch.config(SFT, "sft.optim.actor.lr=0.5")
    second = identity.identify(other, tmp_path, accept_changes=True)
    assert second.changes == ("config.sft.optim.actor.lr was 0.003, is 0.5",)
    assert second.accepted == (first.fingerprint,) and second.fingerprint != first.fingerprint
    (tmp_path / "identity.json").write_text(json.dumps(second.document()))
    again = identity.identify(other, tmp_path)  # accepted once is accepted
    assert again.changes == () and again.accepted == second.accepted


@pytest.mark.parametrize("text", [None, "", "[]", '{"values": 3}'])
def test_metrics_of_an_unknown_run_are_not_overwritten(tmp_path, text):
    begun(tmp_path, launch.config(SFT))
    (tmp_path / "identity.json").unlink()
    if text is not None:
        (tmp_path / "identity.json").write_text(text)
    with pytest.raises(ValueError, match=r"no identity\.json that says of which"):
        identity.identify(launch.config(SFT), tmp_path)


def test_checkpoints_of_another_run_are_not_overwritten_where_its_metrics_are_gone(tmp_path):
    begun(tmp_path, launch.config(SFT))
    (tmp_path / "metrics.jsonl").unlink()
    other = launch.config(SFT, "sft.optim.actor.lr=0.5")
    assert identity.identify(other, tmp_path).changes == ()  # nothing would be lost
    (tmp_path / "checkpoints" / "00000004").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"another config .*lr was 0.003, is 0.5"):
        identity.identify(other, tmp_path)
    (tmp_path / "identity.json").unlink()
    with pytest.raises(ValueError, match=r"holds checkpoints of a run, but no identity\.json"):
        identity.identify(other, tmp_path)


def test_a_directory_that_is_called_like_a_stage_is_none_of_the_run(tmp_path, monkeypatch):
    run = launch.config("algorithm=three")
    before = identity.fingerprint(run)
    monkeypatch.chdir(tmp_path)
    for name in ("base", "sft", "rm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("x")
    assert identity.fingerprint(run) == before

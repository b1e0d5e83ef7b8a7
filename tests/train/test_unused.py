"""Values that nothing would read, and stages that cannot fit, are refused before anything long."""

import dataclasses
import re

import launch
import pytest

from jaxrl_eff.parallel import devices
from jaxrl_eff.train import assembly, examples, fits

SFT, GRPO, DPO, PPO = (f"algorithm={a}" for a in ("sft", "grpo", "dpo", "ppo"))


def assemble(arg, *changes):
    return assembly.assemble(launch.config(arg, *changes))


@pytest.mark.parametrize(
    ("arg", "change", "path"),
    [
        (SFT, "sft.sampling={'max_tokens': 3}", "sampling is"),
        (SFT, "sft.reward.name=gold", "reward.name is 'gold'"),
        (SFT, "sft.staleness=1", "staleness is 1"),
        (SFT, "sft.sync.name=changes", "sync.name is 'changes'"),
        (SFT, "sft.models.ref=base", "models.ref is 'base'"),
        (SFT, "sft.models.critic=base", "models.critic is 'base'"),
        (SFT, "sft.optim.actor.final=0.1", "optim.actor.final is 0.1"),
        (DPO, "dpo.models.critic=base", "models.critic is 'base'"),
        (GRPO, "grpo.models.critic=base", "models.critic is 'base'"),
        (GRPO, "grpo.models.reward=base", "models.reward is 'base'"),
        (GRPO, "grpo.data.packed=false", "data.packed is False"),
        (PPO, "ppo.reward={'name': 'model', 'options': {'a': 1}}", "reward.options is {'a': 1}"),
        (SFT, "sft.adapt.actor={'name': 'lora', 'rank': 2, 'density': 0.1}", "actor.density is"),
        (SFT, "sft.adapt.actor={'name': 'lisa', 'selector': 'lift'}", "actor.selector is 'lift'"),
        (SFT, "sft.adapt.actor={'name': 'static', 'layers': 1}", "adapt.actor.layers is 1"),
        ("algorithm=raft", "raft.models.ref=base", "models.ref is 'base'"),
    ],
)
def test_what_nothing_reads_is_refused_by_name(arg, change, path):
    name = arg.partition("=")[2]
    with pytest.raises(ValueError, match=re.escape(f"config.{name}: ")) as error:
        assemble(arg, change)
    assert path in str(error.value) and "which nothing reads" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "sft.evaluate.max_tokens=3",
            "config.sft.evaluate.max_tokens is 3, but .*problems is",
        ),
        ("sft.schedule.room=64", "config.sft.schedule.room is 64, but config.sft.schedule.name is"),
        ("sft.zero.block=64", "config.sft.zero.block is 64, but config.sft.zero.name is not"),
        ("expect.at_least=0.5", "config.expect.at_least is 0.5, but config.expect.metric is not"),
    ],
)
def test_a_section_without_its_switch_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        launch.config(SFT, change)


def test_a_section_that_is_switched_off_may_keep_its_values():
    run = launch.config(SFT, "sft.evaluate={'problems': 0, 'before': True}")
    assert run.stage["sft"].evaluate.before


def test_what_a_search_would_read_needs_a_plan():
    config = launch.config_file.load(f"{launch.TINY}:{SFT}", ["sft.search.evaluations=9"])
    assert launch.settings.run(config)
    del config["sft"]["plan"]
    with pytest.raises(ValueError, match=r"config.sft.search is given, but config.sft.plan is not"):
        launch.settings.run(config)


# Memory


@pytest.mark.parametrize("arg", [SFT, GRPO])
def test_a_batch_larger_than_memory_is_refused(arg, monkeypatch):
    monkeypatch.setattr(devices, "host_memory_bytes", lambda: 10**9)
    name = arg.partition("=")[2]
    with pytest.raises(ValueError, match=rf"config.{name}: batch is 100000000: that many .* GB"):
        assemble(arg, f"{name}.batch=100000000")


def test_rollouts_count(monkeypatch):
    run = launch.config(GRPO, "grpo.batch=2000")
    s, sampling = run.stage["grpo"], assemble(GRPO).stages[0].sampling
    monkeypatch.setattr(devices, "host_memory_bytes", lambda: 500_000)
    # 8 bytes for each of 4 prompt tokens fit; 12 for each of 8 tokens of 4 responses do not.
    with pytest.raises(ValueError, match="2000: that many prompts with 4 responses of 8 tokens"):
        fits.check_batch(s, sampling)
    fits.check_batch(s, dataclasses.replace(sampling, samples=1))


def test_models_larger_than_memory_are_refused(monkeypatch):
    step = assemble(PPO).stages[0].step
    fits.check_models(step)
    # Two devices hold 15,968 parameters twice and 15,985 once in 4 bytes, with two moments each.
    monkeypatch.setattr(devices, "host_memory_bytes", lambda: 10**5)
    with pytest.raises(ValueError, match=r"take \d.\d\d MB at least, .*this machine has 0.10 MB"):
        fits.check_models(step)


def test_a_model_of_terabytes_is_refused():
    with pytest.raises(ValueError, match=r"config.sft: models and optimizers take [\d,.]+ GB"):
        assemble(SFT, "model.shape.width=1048576", "model.shape.ffn=4194304")


# Examples


def test_every_row_is_tried():
    def fails(row):
        if row == 5:
            raise KeyError("answer")

    with pytest.raises(ValueError, match="the reward fails for example 5: KeyError: 'answer'"):
        examples.try_all("the reward", fails, list(range(9)))
    with pytest.raises(ValueError, match="the reward: there are no examples"):
        examples.try_all("the reward", fails, [])
    assert examples.try_all("the reward", fails, list(range(5))) == ()


def test_what_was_not_tried_in_time_is_said():
    (note,) = examples.try_all("the reward", id, list(range(9)), 0.0)
    assert note == "the reward was tried on 1 of 9 examples, in 0 s"
    assert examples.try_all("the reward", id, [1], 0.0) == ()


def test_an_evaluation_longer_than_the_model_is_refused():
    with pytest.raises(ValueError, match=r"sft.evaluate: .* make 33 tokens.*max_length is 32"):
        assemble(f"{SFT},evaluate=1", "sft.evaluate.max_tokens=29")
    assert assemble(f"{SFT},evaluate=1", "sft.evaluate.max_tokens=28")


def test_held_out_rows_are_all_tried_before_training(tmp_path):
    rows = [f'{{"prompt": "{i}>", "completion": "1", "answer": "{i}"}}\n' for i in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(rows))
    rows[5] = '{"prompt": "5>", "completion": "1", "answer": null}\n'
    (tmp_path / "held.jsonl").write_text("".join(rows))
    data = {"source": "jsonl", "path": f"{tmp_path}/train.jsonl", "length": 16, "prompt_length": 4}
    measure = {
        "problems": 8, "data": f"{tmp_path}/held.jsonl", "max_tokens": 2,
        "reward": {"name": "numeric"},
    }  # fmt: skip
    changes = [f"sft.data={data}", f"sft.evaluate={measure}"]
    with pytest.raises(
        ValueError, match=r"config.sft.evaluate: .* fails for .*held.jsonl, line 6: .*answer"
    ):
        assemble(SFT, *changes)
    assert assemble(SFT, *changes, "sft.evaluate.problems=5")


def test_an_example_is_named_by_its_line_also_after_others_were_set_apart(tmp_path):
    rows = ['{"prompt": "1>", "completion": "1"}\n'] * 40
    rows[36] = '{"prompt": 1, "completion": "1"}\n'
    (tmp_path / "t.jsonl").write_text("".join(["\n", *rows]))
    data = {"path": str(tmp_path / "t.jsonl"), "length": 16, "prompt_length": 4, "held_out": 8}
    with pytest.raises(ValueError, match=r"t\.jsonl, line 38: field 'prompt' is 1"):
        assemble(SFT, f"sft.data={data}")


def test_a_held_out_part_leaves_something_to_train_on(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"prompt": "1>", "completion": "1"}\n' * 4)
    data = {"path": str(tmp_path / "t.jsonl"), "length": 16, "held_out": 4}
    with pytest.raises(ValueError, match=r"data.held_out is 4, but .*t\.jsonl has 4 examples"):
        assemble(SFT, f"sft.data={data}")

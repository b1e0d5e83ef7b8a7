"""The command as a newcomer meets it: mistakes are named in one line, before the long work."""

import json
import time

import jax
import launch
import pytest
from launch import cache  # noqa: F401 (fixture)

from jaxrl_eff.train import assembly, identity, settings, summary

SFT = "algorithm=sft"
THREE = "algorithm=three"


def assemble(arg, *changes):
    return assembly.assemble(launch.config(arg, *changes))


def file(tmp_path, rows):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def directory(tmp_path, vocab, **changes):
    """A Hugging Face directory as far as assembling reads it."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab,
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 48,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    } | changes
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


EMPTY = "sft.data.options={}"
WRONG = [
    # algorithm, model, tokenizer
    (
        SFT,
        ["sft.algorithm=stf"],
        r"config.sft: unknown algorithm 'stf'; expected one of \['sft', 'rew",
    ),
    (SFT, ["sft.steps=0"], r"config.sft.steps is 0, but must be at least 1"),
    (SFT, ["model.path=/no/where"], r"config.model.*(no|not).*path and shape|has both path and sh"),
    (SFT, ["model.shape={}", "model.path=/no/where"], r"config.model: .*/no/where"),
    (SFT, ["model.shape.layrs=1"], r"config.model.shape: unknown field 'layrs'.*'layers'"),
    (SFT, ["model.shape.kv_heads=0"], r"config.model.shape.kv_heads is 0, but must be at least 1"),
    (SFT, ["model.shape.kv_heads=4"], r"config.model.*heads"),
    (SFT, ["model.shape.vocab=5"], r"config.model: .*vocab.* 5.*14"),
    (SFT, ["model.dtype=float33"], r"config.model: .*float33"),
    (SFT, ["model.remat=some"], r"config.model: .*remat.*some"),
    (SFT, ["tokenizer=model"], r"config.tokenizer is .*config.model.path is empty"),
    (SFT, ["tokenizer=/no/where"], r"config.tokenizer: .*/no/where"),
    (SFT, ["tokenizer=chars:aa"], r"config.tokenizer: .*\['a'\] more than once"),
    # data
    (
        SFT,
        ["sft.data.source=csv"],
        r"config.sft: unknown data.source 'csv'; expected one of \['jsonl',",
    ),
    (SFT, ["sft.data.source=jsonl"], r"config.sft: data.options is .*the source is 'jsonl'"),
    (SFT, ["sft.data.source=jsonl", EMPTY], r"config.sft: data.path is empty"),
    (
        SFT,
        ["sft.data.source=jsonl", EMPTY, "sft.data.path=/no/x.jsonl"],
        r"config.sft.*: .*/no/x.jsonl",
    ),
    (
        SFT,
        ["sft.data.options.digts=3"],
        r"config.sft: data.options: unknown field 'digts'; expected",
    ),
    (SFT, ["sft.data.options.digits=99"], r"config.sft.*: digits is 99"),
    (SFT, ["sft.data.format=prompt"], r"'prompt'; sft needs one of \['text', 'completion'"),
    (
        SFT,
        ["sft.data.format=json"],
        r"config.sft: unknown data.format 'json'; expected one of \['text'",
    ),
    (SFT, ["sft.data.fields={'promt': 'x'}"], r"config.sft: data.fields .*promt"),
    (SFT, ["sft.data.template=a{prompt}"], r"data.template is 'a\{prompt\}', but the toy 'revers"),
    (SFT, ["sft.data.held_out=3"], r"config.sft: data.held_out is 3, but the toy 'reverse' makes"),
    (SFT, ["sft.data.length=0"], r"config.sft: data.length is 0"),
    (SFT, ["sft.data.overlong=cut"], r"config.sft: unknown overlong 'cut'"),
    ("algorithm=grpo", ["grpo.data.prompt_length=0"], r"config.grpo: data.prompt_length is 0"),
    ("algorithm=grpo", ["grpo.sampling.max_tokens=30"], r"config.grpo: .*34.*max_length.* 32"),
    ("algorithm=dpo", ["dpo.data.format=completion"], r"dpo needs one of \['preference'\]"),
    # optimizer, loss, sampling, reward
    (SFT, ["sft.optim={}"], r"config.sft: optim lacks 'actor', which the stage trains"),
    (SFT, ["sft.optim.critic.lr=1.0"], r"config.sft: optim: unknown role 'critic'"),
    (SFT, ["sft.optim.actor.name=adam2"], r"config.sft.optim.actor: unknown optimizer 'adam2'"),
    (SFT, ["sft.optim.actor.lr=-1.0"], r"config.sft.optim.actor.lr is -1.0, but must be"),
    (SFT, ["sft.optim.actor.schedule=cos"], r"config.sft.optim.actor: unknown schedule 'cos'"),
    (SFT, ["sft.optim.actor.warmup=9"], r"config.sft.optim.actor: warmup is 9 updates"),
    (SFT, ["sft.optim.actor.frozen=('no.*',)"], r"config.sft.optim.actor: .*no\.\*"),
    (SFT, ["sft.optim.actor.options.b3=1"], r"config.sft.optim.actor: adamw: unknown option 'b3'"),
    ("algorithm=ppo", ["ppo.loss.clp=1"], r"config.ppo.loss: unknown field 'clp'.*'clip'"),
    ("algorithm=ppo", ["ppo.loss.clip=2.0"], r"config.ppo.loss: .*clip.*2"),
    ("algorithm=grpo", ["grpo.sampling.samples=1"], r"config.grpo: .*GRPO.*samples"),
    ("algorithm=grpo", ["grpo.sampling.top_p=2.0"], r"config.grpo.*top_p.*2"),
    ("algorithm=grpo", ["grpo.reward.name=golden"], r"config.grpo.reward: unknown reward 'golden'"),
    ("algorithm=grpo", ["grpo.reward.options.x=1"], r"config.grpo.reward: options .*'x'"),
    ("algorithm=grpo", ["grpo.reward.name=model"], r"config.grpo: models lacks 'reward'"),
    # models
    ("algorithm=ppo", ["ppo.models={}"], r"config.ppo: models lacks 'critic'"),
    ("algorithm=ppo", ["ppo.models.critc=base"], r"config.ppo: models: unknown role 'critc'"),
    ("algorithm=ppo", ["ppo.models.critic=rm"], r"models.critic is 'rm': neither 'base', nor an"),
    (THREE, ["ppo.models.actor=rm"], r"models.actor is 'rm', a value model without a vocabulary"),
    (THREE, ["ppo.models.actor=sft/critic"], r"'sft/critic', but stage 'sft' has \['actor'\]"),
    (THREE, ["stages=ppo,sft,rm"], r"config.ppo: models.actor is 'sft': neither"),
    # plans and sizes
    (SFT, ["sft.plan=thirds"], r"config.sft.plan: unknown plan 'thirds'; expected one of"),
    (
        SFT,
        ["sft.plan.default.devices=[9]"],
        r"config.sft.plan: .* names devices \[9\]; there are 8",
    ),
    (SFT, ["sft.plan.default.tensor=3"], r"config.sft.plan: .*cannot be meshed"),
    (SFT, ["sft.plan.default.tensr=3"], r"config.sft.plan: .*unknown field 'tensr'"),
    (SFT, ["sft.batch=7"], r"config.sft: actor_train reads 'tokens' with 7 rows, which do not div"),
    (SFT, ["sft.plan.default.microbatches=3"], r"config.sft: .*8 rows.*3 \(microbatches\)"),
    ("algorithm=ppo", ["ppo.loss.minibatches=3"], r"config.ppo: .*3 \(minibatches\)"),
    # evaluation, expectation
    (SFT + ",evaluate=1", ["sft.evaluate.problems=99"], r"problems is 99, but 12 are held out"),
    (SFT + ",evaluate=1", ["sft.evaluate.max_tokens=0"], r"config.sft.evaluate: max_tokens is 0"),
    (
        SFT + ",evaluate=1",
        ["sft.evaluate.reward.name=x"],
        r"config.sft.evaluate: unknown reward 'x'",
    ),
    (SFT + ",evaluate=1", ["sft.evaluate.data=/no/x"], r"config.sft.evaluate: .*/no/x"),
    (SFT, ["expect.metric=sft/accuracy"], r"config.expect.metric is 'sft/accuracy'; it must be"),
    (SFT, ["expect.metric=sft/eval"], r"config.expect.metric is 'sft/eval', but 'sft' has no eval"),
    (
        SFT + ",evaluate=1",
        [
            "expect.metric=sft/eval",
            "expect.rises_over=sft/eval_before",
            "sft.evaluate.before=false",
        ],
        r"config.expect.rises_over is 'sft/eval_before', but .*before",
    ),
]


@pytest.mark.parametrize(("arg", "changes", "message"), WRONG, ids=lambda v: str(v)[:60])
def test_mistakes_are_found_before_anything_is_compiled(arg, changes, message):
    began = time.monotonic()
    with pytest.raises((ValueError, OSError), match=message) as error:
        assemble(arg, *changes)
    assert "\n" not in str(error.value).strip() and str(error.value).startswith("config")
    assert time.monotonic() - began < 20


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path):
    path = directory(tmp_path / "small", 10)
    with pytest.raises(ValueError, match=r"config.model: .*vocabulary.*10.*tokenizer.*14"):
        assemble(SFT, "model.shape={}", f"model.path={path}")


def test_models_of_one_run_read_the_same_tokens(tmp_path):
    path = directory(tmp_path / "other", 20)
    with pytest.raises(ValueError, match=r"vocabulary of 20, but the base model's is 14"):
        assemble("algorithm=ppo", f"ppo.models.critic={path}")


def test_an_unknown_architecture_is_refused(tmp_path):
    path = directory(tmp_path / "odd", 14, model_type="oddball", architectures=["OddLM"])
    with pytest.raises(ValueError, match=r"config.model: .*(oddball|OddLM)"):
        assemble(SFT, "model.shape={}", f"model.path={path}")


def test_fields_that_examples_lack_are_named_before_training(tmp_path):
    path = file(tmp_path, [{"question": "1>", "answer": "1"}] * 9)
    data = [f"sft.data.path={path}", "sft.data.source=jsonl", "sft.data.options={}"]
    with pytest.raises(ValueError, match=r"config.sft: .*prompt.*(question|answer)"):
        assemble(SFT, *data)
    named = "sft.data.fields={'prompt': 'question', 'completion': 'answer'}"
    assert assemble(SFT, *data, named)
    with pytest.raises(ValueError, match=r"data.template 'no' has no \{prompt\} in it"):
        assemble(SFT, *data, named, "sft.data.template=no")
    measured = [*data, named, "sft.data.held_out=4", "sft.evaluate.reward.name=gold"]
    with pytest.raises(ValueError, match=r"evaluate: the reward 'gold' fails .*'truth' is None"):
        assemble(SFT + ",evaluate=1", *measured, "sft.evaluate.problems=4")
    with pytest.raises(ValueError, match=r"there is nothing held out; set data.held_out"):
        assemble(SFT + ",evaluate=1", *data, named)


def test_the_header_tells_devices_meshes_and_parameters(tmp_path):
    out = assemble("algorithm=ppo", "ppo.plan.ref_inf={'devices': [7]}")
    facts = summary.facts(out, tmp_path)
    assert facts["devices"].startswith("8 x cpu") and jax.__version__ in facts["devices"]
    assert "ref_inf on devices 7: one device" in facts["ppo"]
    assert "actor_train" in facts["ppo"] and "data=2" in facts["ppo"]
    assert "15,968 parameters" in facts["model"] and "MB a device" in facts["ppo"]


def test_what_a_checkpoint_must_agree_in():
    def mark(*changes):
        return identity.fingerprint(launch.config(SFT, *changes))

    assert mark() == mark() == mark("sft.plan=all", "export=false", "checkpoint.every=7")
    different = [mark(), mark("seed=1"), mark("sft.steps=3"), mark("sft.optim.actor.lr=1.0")]
    assert len(set(different)) == 4


def test_expectations():
    def met(results, **expect):
        run = settings.run(launch.config_file.load(launch.TINY) | {"expect": expect})
        return summary.expectation(run, results)

    assert met({})
    assert met({"a": 0.5}, metric="a", at_least=0.5)
    assert not met({"a": 0.4}, metric="a", at_least=0.5)
    assert met({"a": 0.5, "b": 0.2}, metric="a", rises_over="b", rise=0.3)
    assert not met({"a": 0.4, "b": 0.2}, metric="a", rises_over="b", rise=0.3)
    assert not met({"a": float("nan")}, metric="a", at_least=0.0)


# The command itself


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing, e.g. --config=configs/quickstart.py"),
        ([f"--config={launch.TINY}"], "--workdir is missing"),
        (
            ["--config=nothere.py", "--workdir={}"],
            "--config=nothere.py is no file; expected one of ['conf",
        ),
        ([f"--config={launch.TINY}", "--workdir={}", "more"], "unknown arguments ['more']"),
        ([f"--config={launch.TINY}", "--workdir={}/file"], "there is a file of that name"),
        (
            [f"--config={launch.TINY}", "--workdir={}", "--config.seed"],
            "--config.seed needs a value",
        ),
        (
            [f"--config={launch.TINY}", "--workdir={}", "--config.sft.stps=1"],
            "Did you mean 'steps'?",
        ),
        ([f"--config={launch.TINY}:devices=2", "--workdir={}", "--config.sft.batch=7"], "7 rows"),
        (
            [f"--config={launch.TINY}:algorithm=x", "--workdir={}"],
            "config.x: unknown algorithm 'x'",
        ),
    ],
)
def test_a_mistake_costs_one_line_and_exit_code_2(arguments, message, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = [a.format(tmp_path) for a in arguments]
    code, out, err = launch.command(*arguments)
    assert code == 2 and out == "" and err.count("\n") == 1, out + err
    assert err.startswith("error: ") and message in err


def test_an_unknown_flag_is_named(tmp_path):
    code, _, err = launch.command(f"--config={launch.TINY}", f"--wrkdir={tmp_path}")
    assert code == 2 and "error: Unknown command line flag 'wrkdir'. Did you mean: workdir" in err
    assert err.count("\n") == 1


def test_help_shows_what_there_is():
    code, out, err = launch.command("--help")
    assert code == 0 and not err
    for word in (
        "--config",
        "--workdir",
        "--quiet",
        "--coordinator",
        "--config.NAME",
        "Exit codes",
    ):
        assert word in out
    assert "configs/quickstart.py" in out and "RLHF in three stages on a plain CPU" in out
    code, out, err = launch.command(f"--config={launch.TINY}:algorithm=ppo", "--help")
    assert code == 0 and "--config.ppo.loss.kl_target = 1.0" in out
    assert "--config.ppo.optim.actor.clip_norm = 1.0" in out  # a default the file doesn't mention


def test_a_quiet_run_ends_with_table_verdict_and_paths(cache, tmp_path):  # noqa: F811
    run = [f"--config={launch.TINY}:devices=2", f"--workdir={tmp_path}", "--quiet"]
    code, out, err = launch.command(*run, cache=cache)
    assert code == 0 and not err
    lines = [line for line in out.splitlines() if line.strip()]
    assert lines[0] == "result" and lines[-1].startswith("PASS")
    assert f"exported: {tmp_path}/export" in lines and f"report: {tmp_path}/report.html" in lines
    assert "tokens/s" not in out
    rise = ["--config.expect={'metric': 'sft/eval', 'at_least': 2.0}", "--config.sft.evaluate"]
    rise[1] += "={'problems': 2, 'max_tokens': 3}"
    code, out, err = launch.command(*run[:1], f"--workdir={tmp_path}/2", *rise, cache=cache)
    assert code == 1 and out.strip().splitlines()[-1].startswith("FAIL")
    assert "expected at least 2" in out and "header" not in out and "8 x" not in out
    assert "devices        2 x cpu" in out and "tokens/s" in out

"""What a stage says of its examples before training, and which held-out problems are asked."""

import json

import launch
import pytest

from jaxrl_eff.data import sources
from jaxrl_eff.data.encode import encode_prompt
from jaxrl_eff.data.tokenizer import CharTokenizer
from jaxrl_eff.train import assembly, examples, settings, writer
from jaxrl_eff.train.settings import DataSettings

SHAPE = dict(layers=1, width=16, heads=2, kv_heads=1, head_dim=8, ffn=32, tie=True, max_length=128)
TOKENIZER = CharTokenizer("0123456789>")
PAD = "0" * 60


def rows(*prompts):
    return [{"prompt": p, "completion": "1"} for p in prompts]


def jsonl(path, found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


def assembled(tmp_path, train, *, evaluate=None, **data):
    data = dict(source="jsonl", format="completion", length=16, prompt_length=4) | data
    stage = dict(
        algorithm="sft",
        steps=1,
        batch=8,
        data=dict(path=jsonl(tmp_path / "t.jsonl", train)) | data,
        optim=dict(actor=dict(lr=1e-3)),
    )
    if evaluate:
        reward = dict(name="matches", options=dict(pattern=".*"))
        stage["evaluate"] = dict(max_tokens=2, reward=reward) | evaluate
    run = dict(seed=0, tokenizer="chars:0123456789>", model=dict(shape=SHAPE), stages=("sft",))
    return assembly.assemble(settings.run(run | dict(sft=stage))).stages[0]


def test_dropped_rows_and_problems_are_told_at_assembly(tmp_path):
    held_out = jsonl(tmp_path / "e.jsonl", rows(*[">"] * 4, *[PAD] * 4))
    stage = assembled(
        tmp_path,
        rows(*[f"{i % 10}>" if i % 10 == 0 else PAD for i in range(100)]),
        evaluate=dict(problems=8, data=held_out),
    )
    assert stage.notes == (
        "90 of 100 examples are dropped: longer than data.length=16 (up to 63 tokens)",
        "4 of 8 held-out problems cannot be asked (4 longer than data.prompt_length=4, up to 61 "
        "tokens): left out of the mean",
    )
    assert stage.evaluation.of_how_many == " of 4 of 8 problems"
    assert len(stage.evaluation.source) == stage.evaluation.problems == 4


def test_nothing_is_said_where_nothing_is_dropped(tmp_path):
    stage = assembled(tmp_path, rows("1>", "2>"), held_out=1, evaluate=dict(problems=1))
    assert stage.notes == () and stage.evaluation.of_how_many == ""


@pytest.mark.parametrize(
    ("train", "more", "message"),
    [
        (rows(PAD, PAD), {}, r"config\.sft\.data: none of 2 examples can be used: 2 have more"),
        (
            rows("1>", PAD),
            {"overlong": "error"},
            r"config\.sft\.data: .*t\.jsonl, line 2: it has 63 tokens",
        ),
        (
            [*rows("1>"), {"prompt": "1>"}],
            {},
            r"config\.sft\.data: .*t\.jsonl, line 2: .* 'completion'",
        ),
        ([], {}, r"there are no examples in .*t\.jsonl"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused_at_assembly(tmp_path, train, more, message):
    with pytest.raises(ValueError, match=message):
        assembled(tmp_path, train, **more)


def asked(prompts, problems=None, **data):
    source = sources.python_source(rows(*prompts))
    encoder = encode_prompt(TOKENIZER, bos=False)
    data = DataSettings(prompt_length=4, **data)
    return examples.asked(source, encoder, problems or len(prompts), data)


def test_problems_that_do_not_fit_are_left_out_by_name():
    found, notes = asked(["1>", PAD, "2>", "", "3333>"])
    assert [e["prompt"] for e in found] == ["1>", "2>"]
    assert notes == (
        "3 of 5 held-out problems cannot be asked (2 longer than data.prompt_length=4, up to 60 "
        "tokens; 1 without a token): left out of the mean",
    )
    # Nothing beyond the problems takes their place.
    assert len(asked(["1>", PAD, "2>"], problems=2)[0]) == 1
    assert asked(["1>", "2>"])[1] == ()


def test_problems_that_cannot_be_asked_are_refused():
    with pytest.raises(
        ValueError, match=r"1 of 2 held-out problems cannot be asked .* data.overlong is 'error'"
    ):
        asked(["1>", PAD], overlong="error")
    with pytest.raises(
        ValueError, match=r"2 of 2 held-out problems cannot be asked .* nothing is left"
    ):
        asked([PAD, PAD])
    with pytest.raises(
        ValueError, match=r"the prompt of a held-out problem fails for example 1: .*'x'"
    ):
        asked(["1>", "x"])


def test_prompts_that_hold_their_completions_are_told(tmp_path):
    stage = assembled(tmp_path, rows(*[f"{i}>1" for i in range(9)]))
    (note,) = stage.notes
    assert "all of the first 9 prompts (field 'prompt') end with their completions" in note
    assert assembled(tmp_path, rows("1>1", "2>1", "3>1", "4>1", "5>")).notes == ()


def test_the_text_that_is_learned_is_no_prompt():
    data = DataSettings(format="text", fields={"field": "body"}, prompt_length=4)
    with pytest.raises(ValueError, match="the prompt would be all that is learned, field 'body'"):
        examples.prompt_encoder(data, TOKENIZER, own_rows=True)
    encoder = examples.prompt_encoder(data, TOKENIZER, own_rows=False)
    assert encoder({"body": "1>"}).tolist() == [TOKENIZER.bos, 4, 13]


CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}>{% else %}"
    "{{ m.content + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_no_prompt_holds_the_answer(tmp_path, kind):
    """Conversations that end with the answer, in evaluation and in RL."""
    pytest.importorskip("jinja2")
    talks = [
        [{"role": "user", "content": f"{i}1"}, {"role": "assistant", "content": "777"}]
        for i in range(8)
    ]
    path = jsonl(tmp_path / "m.jsonl", [{"messages": talk} for talk in talks])
    CharTokenizer("0123456789>", CHAT).save(tmp_path / "tokenizer")
    data = dict(source="jsonl", path=path, prompt_length=16)
    reward = dict(name="matches", options=dict(pattern=".*"))
    if kind == "sft":
        data |= dict(format="messages", length=32, held_out=4)
        more = dict(evaluate=dict(problems=4, max_tokens=4, reward=reward))
    else:
        data |= dict(format="chat_prompt", fields=dict(field="messages"))
        more = dict(sampling=dict(max_tokens=4, samples=2), reward=reward)
    stage = dict(algorithm=kind, steps=1, batch=8, data=data, optim=dict(actor=dict(lr=1e-3)))
    run = dict(seed=0, tokenizer=str(tmp_path / "tokenizer"), model=dict(shape=SHAPE))
    run |= {"stages": (kind,), kind: stage | more}
    made = assembly.assemble(settings.run(run)).stages[0]
    batch = next(made.evaluation.loader if kind == "sft" else made.loader)
    for prompt, length in zip(batch["prompt"], batch["prompt_length"], strict=True):
        text = TOKENIZER.decode(prompt[:length].tolist(), special=True)
        assert len(text) == 3 and text.endswith("1>")
    made.loader.close()
    assert made.notes == ()


def test_what_is_dropped_is_told_from_the_header_to_the_report(tmp_path, capsys):
    held_out = jsonl(tmp_path / "e.jsonl", rows(*[">"] * 4, *[PAD] * 4))
    train = jsonl(tmp_path / "t.jsonl", rows(*[f"{i}>" if i < 3 else PAD for i in range(9)]))
    stage = dict(
        algorithm="sft",
        steps=2,
        batch=8,
        plan=dict(default=dict(devices=1)),
        data=dict(source="jsonl", path=train, format="completion", length=16, prompt_length=4),
        optim=dict(actor=dict(lr=1e-3)),
        evaluate=dict(
            problems=8,
            data=held_out,
            max_tokens=2,
            reward=dict(name="matches", options=dict(pattern=".*")),
        ),
    )
    run = dict(seed=0, tokenizer="chars:0123456789>", model=dict(shape=SHAPE), stages=("sft",))
    run |= dict(sft=stage, export=False)
    assert launch.train(settings.run(run), tmp_path / "run", quiet=False)
    told = " ".join(capsys.readouterr().out.split())
    assert "warning: sft: 6 of 9 examples are dropped: longer than data.length=16" in told
    assert "warning: sft: 4 of 8 held-out problems cannot be asked" in told
    assert "held-out reward 1.000 of 4 of 8 problems after 2 steps" in told
    steps = [r["values"] for r in writer.read(tmp_path / "run" / "metrics.jsonl")]
    assert [v["data/dropped"] for v in steps if "data/dropped" in v][-1] >= 10
    assert steps[-1]["eval_problems"] == 4
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    counts = result["data"]["sft"]
    assert counts["problems"] == 8 and counts["problems_asked"] == 4
    last = [v for v in steps if "data/dropped" in v][-1]
    assert counts["dropped"] == last["data/dropped"] and counts["truncated"] == 0
    assert counts["examples"] == last["data/examples"] >= 2
    assert len(result["notes"]["sft"]) == 2
    page = (tmp_path / "run" / "report.html").read_text()
    assert "problems_asked 4" in page and "6 of 9 examples are dropped" in page

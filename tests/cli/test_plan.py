"""`python -m jaxrl_eff plan`: what it prints, writes and refuses, and what its drawing shows."""

import itertools
import json
import re
import subprocess
import sys

import launch
import pytest
from launch import ROOT, TINY, environment
from pages import Page

from jaxrl_eff.cli import plan
from jaxrl_eff.cli.pages import plan_page, trace
from jaxrl_eff.cli.pages.svg import LOW
from jaxrl_eff.core import plan_rules
from jaxrl_eff.parallel import Placement
from jaxrl_eff.planner import clusters
from jaxrl_eff.planner.search import search
from jaxrl_eff.train import config_file, settings
from jaxrl_eff.train.outline import outlines

BIG = """
from ml_collections import ConfigDict

def get_config():
    c = ConfigDict()
    c.tokenizer = "/no/such/place"
    c.model = dict(
        dtype="bfloat16", remat="full",
        shape=dict(vocab=32000, layers=16, width=2048, heads=16, kv_heads=8, head_dim=128, ffn=5632,
                   max_length=2048, eos=(2,), bos=1, pad=0),
    )
    c.stages = ("sft", "rm", "ppo")
    rows = dict(steps=3, batch=64)
    file = dict(source="jsonl", path="/no/such/file")
    adam = dict(lr=1e-5)
    c.sft = dict(rows, algorithm="sft", data=dict(file, length=512), optim=dict(actor=adam))
    c.rm = dict(rows, algorithm="reward_model", data=dict(file, format="preference", length=512),
                models=dict(reward="sft"), optim=dict(reward=adam))
    c.ppo = dict(
        rows, algorithm="ppo", data=dict(file, format="prompt", prompt_length=128),
        models=dict(actor="sft", critic="rm", reward="rm"), optim=dict(actor=adam, critic=adam),
        sampling=dict(max_tokens=384), loss=dict(minibatches=4),
    )
    return c
"""


def command(*words, timeout=120):
    """Exit status, standard output and error of the command, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "jaxrl_eff", "plan", *words],
        cwd=ROOT, env=environment("/nonexistent"), capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "big.py"
    path.write_text(BIG)
    return path


@pytest.fixture(scope="module")
def outlined(big):
    return outlines(settings.run(config_file.load(str(big))))


@pytest.fixture(scope="module")
def planned(outlined):
    """The plan of the PPO stage on 16 GPUs."""
    step = outlined[-1].problem(outlined[-1].batch())
    cluster = clusters.parse("h100:2x8")
    return plan_page.Planned("ppo", step, cluster, search(step, cluster, evaluations=300))


def test_the_command_plans_a_config_of_files_that_are_not_there(big, outlined, tmp_path):
    """16 hosts, without data, tokenizer, weights or accelerator; what it writes is a plan."""
    code, out, err = command(
        f"--config={big}", "--cluster=h100:16x8", "--evaluations=150", f"--workdir={tmp_path}",
        "--config.ppo.batch=256",
    )  # fmt: skip
    assert (code, err) == (0, ""), err
    assert "ppo on h100:16x8" in out and "sft on" not in out  # one call: nothing to weigh
    for words in ("predicted", "certificate", "against plans made by rule", "disaggregated",
                  "where the time goes", "memory of a device", "reading memory",
                  "between nodes: actor_train has "):  # fmt: skip
        assert words in out, words
    tables = json.loads((tmp_path / "plan.json").read_text())
    graph = outlined[-1].graph
    placed = plan_rules.plan(tables["ppo"], graph, 128)
    assert set(placed) == {c.name for c in graph.calls if c.of}
    for call, row in tables["ppo"].items():
        assert re.search(rf"{call} +\S+ +\S", out)
        assert row["data"] * row.get("fsdp", 1) * row.get("tensor", 1) == len(row["devices"])
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert {e["name"] for e in trace["traceEvents"]} >= set(placed) | {"process_name"}
    Page((tmp_path / "timeline.html").read_text())


def test_the_plan_written_is_one_that_a_run_takes(tmp_path):
    """The table of plan.json goes into config.STAGE.plan as it is."""
    config = f"--config={TINY}:algorithm=grpo"
    code, _, err = command(
        config, "--cluster=h100:8", "--evaluations=60", f"--workdir={tmp_path}", "--stage=grpo"
    )
    assert code == 0, err
    table = json.loads((tmp_path / "plan.json").read_text())["grpo"]
    run = settings.run(config_file.load(f"{TINY}:algorithm=grpo", [f"grpo.plan={table!r}"]))
    assert run.stage["grpo"].plan == {k: {**v, "devices": tuple(v["devices"])}
                                      for k, v in table.items()}  # fmt: skip
    graph = outlines(run)[0].graph
    placed = plan_rules.plan(run.stage["grpo"].plan, graph, 8)
    assert plan_page.table(placed) == table


def test_what_a_schedule_packs_is_priced_by_expected_lengths_and_said(tmp_path, capsys):
    config = f"--config={TINY}:algorithm=grpo"
    for name in ("rows", "skrull"):
        words = (config, "--cluster=h100:2", "--evaluations=30", f"--workdir={tmp_path}",
                 f"--config.grpo.schedule.name={name}")  # fmt: skip
        assert plan.main([*words]) == 0
        told, page = capsys.readouterr().out, (tmp_path / "timeline.html").read_text()
        said = "ref_inf: packed, 188 tokens expected of 256 padded ones"
        assert (said in re.sub(r"\s+", " ", told)) == (said in page) == (name == "skrull")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--cluster=h100:8"], "--config"),
        ([f"--config={TINY}"], "--cluster"),
        ([f"--config={TINY}", "--cluster=h900:8"], "unknown hardware 'h900'"),
        ([f"--config={TINY}", "--cluster=h100"], "sizes are missing or wrong"),
        (["--config=none.py", "--cluster=h100:8"], "none.py is no file"),
        (
            [f"--config={TINY}", "--cluster=h100:8", "--stage=ppo"],
            "unknown stage 'ppo'; expected one of",
        ),
        ([f"--config={TINY}", "--cluster=h100:8", "--config.sft.bach=3"], "'bach'"),
        ([f"--config={TINY}", "--cluster=h100:8", "--devices=3"], "unrecognized arguments"),
        ([f"--config={TINY}", "--cluster=h100:8", "--evaluations=0"], "--evaluations: is 0"),
    ],
)
def test_mistakes_are_one_clear_sentence(words, told, capsys, tmp_path):
    code, _, err = launch.called(plan.main, capsys, *words, f"--workdir={tmp_path}")
    assert code == 2 and told in err and err.startswith("error: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_names_its_stage(big, capsys, tmp_path):
    words = [f"--config={big}", "--cluster=v5e:1", "--evaluations=30", f"--workdir={tmp_path}"]
    code, _, err = launch.called(plan.main, capsys, *words)
    assert code == 2 and "error: ppo: no plan fits into the" in err


def test_outlines_are_the_stages_of_a_run():
    """The same graphs, models, batches and samplers that training assembles, from settings only."""
    from jaxrl_eff.train import assembly

    run = settings.run(config_file.load(f"{TINY}:algorithm=three"))
    for one, stage in zip(outlines(run), assembly.assemble(run).stages, strict=True):
        assert one.name == stage.name and one.trained == stage.trained
        calls = [(c.name, c.kind, c.of, c.reads, c.writes, c.minibatches, c.host)
                 for c in one.graph.calls]  # fmt: skip
        assert calls == [(c.name, c.kind, c.of, c.reads, c.writes, c.minibatches, c.host)
                         for c in stage.step.graph.calls]  # fmt: skip
        assert one.lms == stage.lms and one.batch() == stage.batch
        assert one.sampling == stage.sampling


def test_a_checkpoint_is_read_from_its_config_alone(tmp_path):
    """No weights and no tokenizer lie beside config.json."""
    (tmp_path / "config.json").write_text(json.dumps(dict(
        architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=320, hidden_size=64,
        intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=1e4, tie_word_embeddings=False,
        hidden_act="silu", bos_token_id=1, eos_token_id=2, torch_dtype="bfloat16",
    )))  # fmt: skip
    run = settings.run(config_file.load(
        f"{TINY}:algorithm=grpo", [f"model={{'path': '{tmp_path}'}}", "tokenizer=model"]
    ))  # fmt: skip
    (one,) = outlines(run)
    assert one.lms["actor"].layers == 3 and one.lms["actor"].vocab == 320
    assert one.problem(one.batch()).roles["actor"].lm.width == 64


# The drawing


def box(rect):
    x, y, w, h = (float(rect.getAttribute(k)) for k in ("x", "y", "width", "height"))
    return x, y, x + w, y + h


def test_nothing_in_the_drawings_overlaps_or_is_cut_off(planned):
    page = Page(plan_page.page("A <plan>", [planned]))
    assert len(page.drawings) == 5 and "A <plan>" in page.text
    for svg in page.drawings:
        width, height = map(float, svg.getAttribute("viewBox").split()[2:])
        boxes = [box(r) for r in svg.getElementsByTagName("rect")]
        for x0, y0, x1, y1 in boxes:
            assert 0 <= x0 < x1 <= width + 0.01 and 0 <= y0 < y1 <= height
        bars = [b for b in boxes if b[3] - b[1] > LOW]  # transfers may be at once
        for a, b in itertools.combinations(bars, 2):  # a hair of overlap: least widths, rounding
            assert a[2] <= b[0] + 0.7 or b[2] <= a[0] + 0.7 or a[3] <= b[1] or b[3] <= a[1]
        for text in svg.getElementsByTagName("text"):
            long = 6.4 * len(text.firstChild.data)
            x, anchor = float(text.getAttribute("x")), text.getAttribute("text-anchor")
            left = x - {"end": long, "middle": long / 2}.get(anchor, 0.0)
            assert left >= 0 and left + long <= width + 3, text.firstChild.data


def test_the_timeline_shows_two_whole_steps(planned):
    schedule = planned.found.schedule
    rows = plan_page.two_steps(planned)
    assert len({row.label for row in rows}) == len(rows)
    assert max(b.end for row in rows for b in row.bars) == pytest.approx(2 * schedule.seconds)
    for call, p in planned.found.plan.items():
        mine = [[b.end - b.start for b in row.bars if b.text == call] for row in rows]
        mine = [sum(seconds) for seconds in mine if seconds]
        # One that overlaps the window's ends is shown in part.
        assert mine == pytest.approx([2 * schedule.costs[call].seconds] * len(mine), rel=0.02)
        assert mine and len(p.devices) >= 1
    for row in rows:
        lane = sorted((b.start, b.end) for b in row.bars if not b.thin)
        for (_, end), (start, _) in itertools.pairwise(lane):
            assert start >= end - 1e-9


def test_the_trace_has_every_span_once_a_row_and_no_overlap(planned):
    events = trace.trace([planned])["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert {(e["pid"], e["tid"]) for e in spans} <= named
    steps = {e["args"]["step"] for e in spans}
    for call in planned.found.plan:
        assert {e["args"]["step"] for e in spans if e["name"] == call} == steps
        shares = next(e for e in spans if e["name"] == call)
        parts = sum(v for k, v in shares["args"].items() if k.endswith("_s"))
        assert parts == pytest.approx(shares["dur"] / 1e6)
    for _, thread in itertools.groupby(
        sorted(spans, key=lambda e: (e["tid"], e["ts"])), key=lambda e: e["tid"]
    ):
        for a, b in itertools.pairwise(thread):
            assert a["ts"] + a["dur"] <= b["ts"] + 1e-3
    assert json.loads(trace.trace_text([planned]))["traceEvents"] == events


def test_tables_leave_out_what_is_one():
    placed = {"a": Placement((4, 5, 6, 7), fsdp=2), "b": Placement((0,), offload="params")}
    assert plan_page.table(placed) == {
        "a": {"devices": [4, 5, 6, 7], "data": 2, "fsdp": 2},
        "b": {"devices": [0], "data": 1, "offload": "params"},
    }

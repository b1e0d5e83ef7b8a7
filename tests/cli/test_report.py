"""The report shows what a run wrote, says what it didn't, and lets nothing escape its tags."""

import json
import math
import re

import launch
import pytest
from pages import Page

from jaxrl_eff.checkpoints import manifest
from jaxrl_eff.cli import report
from jaxrl_eff.cli.pages import svg
from jaxrl_eff.cli.pages.devices import device_range
from jaxrl_eff.train.writer import Writer


def place(devices, kind, of, microbatches=1, **axes):
    axes = {"stage": 1, "data": 1, "fsdp": 1, "seq": 1, "tensor": 1, **axes}
    return {"devices": devices, "axes": axes, "microbatches": microbatches, "of": of, "kind": kind}


@pytest.fixture
def run(tmp_path):
    """A run of two stages, with everything in it."""
    w = Writer(tmp_path / "run", tensorboard=False)
    for step in range(1, 41):
        values = {"sft_train/loss": 3.0 / step, "sft_train/odd": float(step)}
        w.step(step, "sft", values, seconds={"sft_train": 0.1}, tokens_per_s=1000 + step)
    for step in range(41, 700):
        values = {f"gap_{k}": v * 1e-6 for k, v in {"max": 3, "mean": 1, "p95": 2}.items()}
        loss = math.nan if step == 50 else 0.1
        w.step(step, "ppo", {"rew/score": step / 700, "loss": loss, **values}, mfu=0.5)
    for step in (41, 699):
        said = "<script>alert('x')</script> & more"
        w.samples(step, "ppo", [{"prompt": "12=", "completion": said, "reward": step, "answer": 7}])
    plan = {
        "sft": {"sft_train": place([0, 1], "train", "actor", 2, data=2)},
        "ppo": {"actor_gen": place([*range(8)], "generate", "actor", data=4, tensor=2)},
    }
    w.document("plan", plan)
    w.document(
        "timeline",
        {
            "ppo": [
                {"call": "actor_gen", "start": 0.0, "end": 2.0, "devices": [0, 1, 2, 3]},
                {"call": "rew", "start": 2.0, "end": 2.001, "devices": []},
            ]
        },
    )
    w.document(
        "result",
        {
            "passed": True,
            "expected": {"metric": "after <PPO>", "at_least": 0.75},
            "results": {"after SFT": 0.31, "after <PPO>": 0.912345},
            "exported": "/tmp/hf",
        },
    )
    w.document("config", {"seed": 17, "note": "</pre><b>"})
    w.close()
    return tmp_path / "run"


def test_everything_a_run_wrote_is_on_the_page(run):
    path = report.write(run)
    assert path == run / "report.html"
    page = Page(path.read_text())
    for expected in (
        "PASS", "after <PPO> 0.9123; expected at least 0.75", "after SFT", "0.3100", "/tmp/hf",
        "40 steps", "659 steps", "sft_train/loss", "gap", "p95", "tokens/s", "seconds by call",
        "data 4 × tensor 2", "0-7", "actor_gen", "host", "0-3", "step 41", "step 699",
        "<script>alert('x')</script> & more", "answer: 7", "</pre><b>",
    ):  # fmt: skip
        assert expected in page.all, expected
    assert "Not here" not in page.all


def test_the_page_needs_no_network_and_holds_no_foreign_markup(run):
    text = report.write(run).read_text()
    page = Page(text)
    assert page.tags.count("script") == 1 and page.tags.count("b") > 0
    assert "<script>alert" not in text and "</pre><b>" not in text


def test_every_drawing_is_sound_xml_within_its_frame(run):
    drawings = Page(report.write(run).read_text()).drawings
    assert len(drawings) >= 8
    for root in drawings:
        _, _, width, height = map(float, root.getAttribute("viewBox").split())
        assert "nan" not in re.sub(r"data-series=\"[^\"]*\"", "", root.toxml())
        for path in root.getElementsByTagName("path"):
            numbers = list(map(float, re.findall(r"-?[\d.]+", path.getAttribute("d"))))
            assert all(-0.1 <= n <= max(width, height) + 0.1 for n in numbers)
        for label in root.getElementsByTagName("text"):
            x, chars = float(label.getAttribute("x")), len(label.firstChild.data)
            anchor = label.getAttribute("text-anchor")
            left = {"end": x - 5.9 * chars, "middle": x - 2.95 * chars}[anchor]
            assert left >= -1 and left + 5.9 * chars <= width + 4, label.toxml()


def test_a_partial_run_has_a_report_that_says_what_is_absent(tmp_path):
    w = Writer(tmp_path, tensorboard=False)
    w.step(1, "sft", {"loss": math.inf, "tiny": 1e-12, "zero": 0})
    w.close()
    (tmp_path / "result.json").write_text("{cut")
    (tmp_path / "timeline.json").write_text("[]")
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 2, "sta')
    page = Page(report.write(tmp_path).read_text())
    for expected in (
        "plan.json is absent", "config.json is absent", "result.json cannot be read",
        "timeline.json holds a list", "no sample", "1 step ",
    ):  # fmt: skip
        assert expected in page.all + " ", expected


def test_conditions_on_a_metric_become_a_sentence(tmp_path):
    w = Writer(tmp_path, tensorboard=False)
    expected = {"metric": "after", "at_least": -math.inf, "rises_over": "before", "rise": 0.3}
    results = {"before": 0.3, "after": 0.91}
    w.document("result", {"expected": expected, "results": results, "passed": False, "x": None})
    w.document("plan", {"s": {"c": {**place([0], "infer", "ref"), "reallocated_bytes": 2_500_000}}})
    for step in (1, 9):
        rows = [{"prompt": p, "completion": "c", "reward": 1, "held_out": p == "h"} for p in "ht"]
        w.samples(step, "s", rows)
    w.close()
    page = Page(report.write(tmp_path).read_text())
    assert "after 0.9100; expected a rise of 0.3 over before" in page.all
    assert "FAIL" in page.all and "2.5 MB" in page.all and "0.3000" in page.all
    assert (page.text.count("h"), page.text.count("t")) == (1, 1)  # each once, at both steps
    assert "held out" in page.all and page.text.count("s, step 9") == 2


def test_odd_documents_do_not_break_the_page(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps({"a": 1, "b": {"c": {}, "d": 2}}))
    (tmp_path / "timeline.json").write_text(json.dumps({"a": [{"call": "x"}], "b": 1}))
    (tmp_path / "result.json").write_text(json.dumps({"rows": [{"a": 1}, {"b": None}], "x": [1]}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n[]\n{"values": {}}\n')
    page = Page(report.write(tmp_path).read_text())
    assert "no step yet" in page.all


def test_a_missing_or_empty_directory_is_named(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="nowhere is not a directory"):
        report.write(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no run: none of metrics\.jsonl"):
        report.write(tmp_path)
    code, _, err = launch.called(report.main, capsys, tmp_path)
    assert code == 2 and err.startswith("error: ") and str(tmp_path) in err


def test_the_command_prints_the_path(run, capsys):
    assert report.main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"


def test_ticks_are_round():
    assert svg.ticks(0.0, 1.0, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert svg.ticks(3, 97, 4) == pytest.approx([20, 40, 60, 80])
    assert svg.ticks(5, 5, 4) == [5]
    assert svg.ticks(-1e-5, 2e-5, 3) == pytest.approx([-1e-5, 0, 1e-5, 2e-5])


def test_device_ranges_read_well():
    assert device_range([0, 1, 2, 3, 6]) == "0-3, 6"
    assert device_range([1, 0]) == "1, 0"
    assert device_range([]) == ""


def test_a_straight_line_is_its_own_trend():
    line = [(float(x), 2.0 * x + 1) for x in range(100)]
    for (_, got), (_, expected) in zip(svg._smooth(line), line, strict=True):
        assert got == pytest.approx(expected, rel=1e-9)


EVIL = "<script>alert(1)</script>\"'&<!--body-->{title}"


def poisoned(value):
    """The same structure with markup in the place of every text and in front of every key."""
    if isinstance(value, dict):
        return {EVIL + k: poisoned(v) for k, v in value.items()}
    if isinstance(value, list):
        return [poisoned(v) for v in value]
    return EVIL if isinstance(value, str) else value


def documents(run):
    """What a run wrote, and the documents that only some runs write, by name."""
    found = {p.name: json.loads(p.read_text()) for p in run.glob("*.json")}
    for path in run.glob("*.jsonl"):
        found[path.name] = [json.loads(line) for line in path.read_text().splitlines()]
    found["schedule.json"] = {
        "ppo": {
            "groups": 4, "parts": 2, "room": 4096, "shapes": [[128, 64]], "calls": ["rew"],
            "lengths": [[64, 0.25]], "places": [{"groups": 1, "parts": 2, "shapes": [["a", 3]]}],
        }
    }  # fmt: skip
    found["calibration.json"] = {"ppo": [{"name": "rew", "predicted": 0.1, "measured": 0.2}]}
    return found


def numbers_as_text(value):
    """Every leaf is markup, whatever it was."""
    if isinstance(value, dict):
        return {k: numbers_as_text(v) for k, v in value.items()}
    return [numbers_as_text(v) for v in value] if isinstance(value, list) else EVIL


def values_only(value):
    """Texts are markup; the keys by which a page finds them are as they were."""
    if isinstance(value, dict):
        return {k: values_only(v) for k, v in value.items()}
    if isinstance(value, list):
        return [values_only(v) for v in value]
    return EVIL if isinstance(value, str) else value


def in_names(value, depth=1):
    """Names of stages, calls and metrics are markup."""
    if isinstance(value, dict) and depth:
        return {f"{EVIL}{k}": in_names(v, depth - 1) for k, v in value.items()}
    return value


@pytest.mark.parametrize("poison", [poisoned, numbers_as_text, values_only, in_names])
def test_text_of_no_file_is_markup(run, tmp_path, poison):
    bad = tmp_path / "<b>bad'&\"<i>"
    bad.mkdir()
    for name, value in documents(run).items():
        rows = value if name.endswith("l") else [value]
        keep = {"step", "stage", "values", "seconds", "prompt", "held_out"}
        if name.endswith("l"):  # rows of another kind are not looked at
            rows = [{k: v if k == "step" else poison(v) for k, v in r.items() if k in keep or v}
                    for r in rows[:3] + rows[-1:]]  # fmt: skip
        else:
            rows = [poison(r) for r in rows]
        (bad / name).write_text("\n".join(map(json.dumps, rows)))
    text = report.write(bad).read_text()
    page = Page(text)
    assert page.tags.count("script") == 1 and "<script>alert" not in text
    assert "<i>" not in text and "<!--body-->" not in text
    assert EVIL in page.all


def test_one_odd_document_does_not_take_the_others_along(run):
    (run / "schedule.json").write_text(json.dumps({"ppo": 3}))
    (run / "timeline.json").write_text(json.dumps({"ppo": [{"call": "a", "start": "x", "end": 1}]}))
    page = Page(report.write(run).read_text())
    for expected in ("schedule.json cannot be drawn", "timeline.json cannot be drawn", "tokens/s"):
        assert expected in page.all


def test_documents_nested_without_end_are_named(tmp_path):
    deep = '{"a":' * 5000
    for name in ("config.json", "plan.json", "metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).write_text(deep)
    page = report.write(tmp_path).read_text()
    assert "plan.json cannot be read" in page and deep not in page
    with pytest.raises(ValueError, match="nested too deeply"):
        manifest.read(tmp_path / "plan.json")

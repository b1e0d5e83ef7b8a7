"""`python -m jaxrl_eff balance`: what it reads, prints, draws and refuses."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from launch import ROOT, environment
from pages import Page

from jaxrl_eff.cli import balance
from jaxrl_eff.data.balance import skrull
from jaxrl_eff.data.balance.baselines import rows, study
from jaxrl_eff.planner.packed_rows import cost_of

LENGTHS = [40, 3000, 17, 800, 20_000, 5, 120, 900, 64, 1200] * 3


@pytest.fixture
def lengths(tmp_path):
    path = tmp_path / "lengths.txt"
    path.write_text("\n".join(map(str, LENGTHS)) + "\n\n")
    return path


def command(path, *more, mesh="data2,seq4", model="qwen2.5-0.5b", hardware="h100"):
    return [
        f"--lengths={path}",
        f"--mesh={mesh}",
        f"--model={model}",
        f"--hardware={hardware}",
        *more,
    ]


def test_it_prints_every_rule_and_draws_a_page(lengths, tmp_path, capsys):
    page = tmp_path / "deep" / "page.html"
    run = command(lengths, "--batch=12", f"--page={page}", hardware="b200")
    assert balance.main(run) == 0
    said = capsys.readouterr().out
    assert "30 in 3 batches" in said and "longest 20,000" in said and "data 2, seq 4" in said
    gains = {}
    for name in ("skrull", "exact", "unpacked", "sorted", "packed", "printed"):
        (line,) = re.findall(rf"^  {name} .*$", said, re.M)
        gains[name] = float(line.split()[2].rstrip("x"))
    assert gains["skrull"] == 1 and gains["unpacked"] > 1.5
    assert 0.9 < gains["exact"] == min(gains.values()) <= 1
    text = page.read_text()
    assert len(Page(text).drawings) == 2
    for rank in range(8):
        assert f"rank {rank}, micro-step 0: " in text
    assert "the first 64" not in text.lower()


def test_a_page_of_many_ranks_says_how_many_it_shows(lengths, tmp_path, capsys):
    page = tmp_path / "page.html"
    balance.main(command(lengths, "--shapes=0", f"--page={page}", mesh="data8,seq16"))
    assert "The first 64 of 128 ranks" in page.read_text()
    assert "rank 63, " in page.read_text() and "rank 64, " not in page.read_text()


def test_the_same_command_says_the_same(lengths, capsys):
    said = []
    for _ in range(2):
        balance.main(command(lengths, "--batch=8"))
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


@pytest.mark.parametrize(
    "text",
    [
        "3\n50\n\n7\n",
        "[3, 50, 7]",
        '{"length": 3}\n{"length": 50, "id": 1}\n{"length": 7}\n',
        "3\n50\n7",
    ],
)
def test_lengths_are_lines_or_json(tmp_path, text):
    (tmp_path / "l").write_text(text)
    found = balance.read_lengths(tmp_path / "l")
    assert found.tolist() == [3, 50, 7] and found.dtype == np.int64


@pytest.mark.parametrize(
    "text, words",
    [
        ("3\nmany\n", "line 2: 'many' is not a length"),
        ("3\n\n4.5\n", "line 3: '4.5' is not a length"),
        ("0\n", "line 1: '0' is not a length"),
        ("true\n", "line 1: 'True' is not a length"),
        ('[3, "x"]', "item 1: 'x' is not a length"),
        ("[3, 4", "is not a JSON list"),
        ('{"tokens": 3}\n', "line 1: .* is not a length"),
        ("\n", "holds no lengths"),
        ("40\n99999999\n", "length 2 of 2 is 99999999, but 4 ranks of 26000 tokens hold"),
    ],
)
def test_bad_files_are_explained(tmp_path, capsys, text, words):
    (tmp_path / "l").write_text(text)
    refused(command(tmp_path / "l"), words, capsys)


def refused(argv, words, capsys):
    with pytest.raises(SystemExit) as left:
        balance.main(argv)
    assert left.value.code == 2
    assert re.search(words, capsys.readouterr().err)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"mesh": "data2,ring4"}, "unknown axis 'ring4'; expected one of .*'seq', 'tensor'"),
        ({"mesh": "data2,seq"}, "unknown axis 'seq'"),
        ({"mesh": "data0"}, "unknown axis 'data0'"),
        ({"mesh": "seq2,seq4"}, "axis 'seq' is given twice"),
        ({"model": "gpt-5"}, "unknown model 'gpt-5'; expected one of .*, 'llama3-70b'"),
        ({"hardware": "h1000"}, "unknown hardware 'h1000'; expected one of .*'a100', 'h100'"),
        ({"hardware": "v5e", "mesh": "data100,seq8"}, "there are up to 256"),
    ],
)
def test_bad_words_are_explained(lengths, capsys, change, words):
    refused(command(lengths, **change), words, capsys)


def test_numbers_out_of_range_and_missing_files_are_explained(lengths, tmp_path, capsys):
    refused(command(lengths, "--room=0"), "--room: is 0, but must be at least 1", capsys)
    refused(command(lengths, "--shapes=-1"), "--shapes: is -1, but must be at least 0", capsys)
    refused(command(tmp_path / "none"), "none is not a file", capsys)
    refused(command(tmp_path), "is not a file", capsys)


def test_a_directory_is_a_model_too(tmp_path):
    given = dict(
        model_type="qwen2", hidden_size=896, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, intermediate_size=4864, vocab_size=151_936, rms_norm_eps=1e-6,
        rope_theta=1e6, tie_word_embeddings=True, hidden_act="silu", max_position_embeddings=32_768,
        eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(given))
    mesh = balance.read_mesh("data4,seq8")
    models = balance.read_model(str(tmp_path)), balance.MODELS["qwen2.5-0.5b"]
    ours, theirs = (balance.cost_on("h100", mesh, model) for model in models)
    assert ours == theirs


def test_wires_and_rates_are_those_of_the_mesh():
    model = balance.MODELS["qwen2.5-7b"]
    near = balance.cost_on("h100", balance.read_mesh("data4,seq8"), model)
    far = balance.cost_on("h100", balance.read_mesh("data2,seq16"), model)
    both = balance.cost_on("h100", balance.read_mesh("data2,seq4,tensor2"), model)
    assert near.bytes_per_s > 4 * far.bytes_per_s and near.hop_seconds < far.hop_seconds
    assert both.flops_per_s == 2 * near.flops_per_s
    assert near.linear == cost_of(model, flops_per_s=1, bytes_per_s=1).linear
    assert near.flops_per_s < 989e12


def test_a_study_adds_up():
    cost = balance.cost_on("h100", balance.read_mesh("seq4"), balance.MODELS["qwen2.5-0.5b"])
    same = {"groups": 2, "parts": 4, "capacity": 8192, "cost": cost}
    found = study(np.array(LENGTHS), batch=16, shapes=6, **same)
    assert [len(s.lengths) for s in found.schedules] == [16, 14]
    assert np.concatenate([s.lengths for s in found.schedules]).tolist() == LENGTHS
    own, *others = rows(found)
    assert own.name == "skrull" and own.gain == 1
    for row in others:
        assert row.seconds == pytest.approx(sum(s.seconds for s in found.rivals[row.name]))
        assert row.gain == pytest.approx(row.seconds / own.seconds)
    assert {x for s in found.schedules for x in s.shapes} <= set(found.shapes)
    exact = study(np.array(LENGTHS), batch=16, shapes=0, **same)
    assert exact.shapes is None
    plans = [skrull.plan(LENGTHS[:16], **same), skrull.plan(LENGTHS[16:], **same)]
    assert [s.seconds for s in exact.schedules] == [p.seconds for p in plans]


def test_as_a_command(lengths, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "jaxrl_eff", "balance", *command(lengths, model="x")],
        cwd=ROOT, env=environment("/nonexistent"), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: --model: unknown model 'x'")

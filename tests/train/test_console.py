"""What the console prints, where, and that nothing is wider than the terminal."""

import io
import re

import pytest
from rich.cells import cell_len

from jaxrl_eff.train.console import Console, clean, clock, cut, number
from jaxrl_eff.train.interrupts import Outlasting


def run(c):
    """A small run."""
    c.header("jaxrl_eff", {"devices": "2 x cpu", "a long name": "word " * 40})
    c.line("resumed at step 3")
    c.stage("ppo", 5)
    for step in range(1, 6):
        c.step(step, {"reward": 0.1 * step}, tokens_per_s=12345, seconds={"gen": 3.0, "train": 1.0})
        if step == 3:
            c.samples(
                "samples after step 3",
                [{"prompt": "12\x1b[2J\n" * 60, "completion": "21", "reward": 1.0}],
            )
    c.end_stage()
    c.table("Result", ["stage", "accuracy"], [["sft", 0.25], ["ppo", 0.987654]])
    c.final("report: /tmp/report.html")
    c.verdict(True, "accuracy rose by 0.737 (expected: 0.3)")
    c.close()


def plain(width=80, **kw):
    stream = io.StringIO()
    run(Console(terminal=False, stream=stream, width=width, **kw))
    return stream.getvalue().splitlines()


def test_plain_lines_show_first_and_last_step():
    lines = [line for line in plain() if line.startswith("ppo  ")]
    assert lines == [
        "ppo       1/5  reward 0.1000  12.3k tokens/s  -:-- left  gen 75% · train 25%",
        "ppo       5/5  reward 0.5000  12.3k tokens/s  done  gen 75% · train 25%",
    ]
    assert sum(line.startswith("ppo  ") for line in plain(seconds_between_lines=0)) == 5


def test_a_resumed_stage_prints_its_first_step():
    stream = io.StringIO()
    c = Console(terminal=False, stream=stream)
    c.stage("sft", 100, start=40)
    c.step(41, {"loss": 1.0})
    c.step(42, {"loss": 1.0})
    assert stream.getvalue() == "sft        41/100  loss 1.000  -:-- left\n"


def test_tables_align_and_numbers_stand_right():
    lines = plain()
    start = lines.index("Result")
    assert lines[start + 1 : start + 4] == [
        "  stage  accuracy",
        "  sft      0.2500",
        "  ppo      0.9877",
    ]
    assert lines[-1] == "PASS  accuracy rose by 0.737 (expected: 0.3)"


def test_quiet_prints_the_final_lines_only(capsys):
    lines = plain(quiet=True)
    assert lines[0] == "" and lines[1] == "Result"
    assert lines[-2] == "report: /tmp/report.html"
    assert len(lines) == 8
    Console(quiet=True).warn("a checkpoint was refused")
    assert capsys.readouterr().err == "a checkpoint was refused\n"


@pytest.mark.parametrize("width", [30, 60, 100])
def test_nothing_is_wider_than_the_screen(width):
    assert max(cell_len(line) for line in plain(width)) <= width
    stream = io.StringIO()
    run(Console(terminal=True, stream=stream, width=width))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert max(cell_len(line) for line in re.split(r"[\r\n]", text)) <= width
    assert "5/5" in text and "PASS" in text


def test_text_from_a_model_cannot_steer_the_terminal():
    assert clean("a\x1b[2Jb\nc\x07\u202e[bold]") == "a\\x1b[2Jb⏎c\\x07\\u202e[bold]"
    stream = io.StringIO()
    c = Console(terminal=True, stream=stream, width=80)
    c.samples("s", [{"prompt": "[red]x[/red]", "completion": "\x1b[31m"}])
    assert "[red]x[/red]" in stream.getvalue() and "\x1b[31m" not in stream.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("wrapped", [lambda stream: stream, Outlasting])
def test_a_poor_encoding_is_survived(terminal, wrapped):
    raw = io.BytesIO()
    c = Console(terminal=terminal, stream=wrapped(io.TextIOWrapper(raw, encoding="ascii")))
    c.samples("s", [{"prompt": "1", "completion": "ü"}])
    c.table("ü", ["ü"], [["ü"]])
    c.final("ü")
    assert b"1 ? ?" in raw.getvalue() and raw.getvalue().count(b"?") == 6


def test_numbers_and_clocks_read_well():
    shown = [number(x) for x in (0, 1, 0.12345, 123456, 1e-7, float("nan"), 12345.6)]
    assert shown == ["0", "1.000", "0.1235", "1.23e+05", "1.00e-07", "nan", "12346"]
    assert [number(x, short=True) for x in (12, 1234, 5e6)] == ["12", "1.23k", "5M"]
    assert [clock(x) for x in (5, 65, 3723)] == ["0:05", "1:05", "1:02:03"]


def test_wide_characters_count_twice():
    assert cut("日本語", 5) == "日..."
    stream = io.StringIO()
    Console(terminal=False, stream=stream, width=20).line("日本語" * 20)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 6 and all(cell_len(line) == 20 for line in lines)


def test_what_is_too_wide_for_a_table_goes_on_below():
    stream = io.StringIO()
    c = Console(terminal=False, stream=stream, width=30)
    c.table("", ["call", "for"], [["actor_gen", "reading memory 57%, sums 29%"], ["x", None]])
    assert stream.getvalue().splitlines() == [
        "",
        "  call       for",
        "  actor_gen  reading memory",
        "             57%, sums 29%",
        "  x",
        "",
    ]

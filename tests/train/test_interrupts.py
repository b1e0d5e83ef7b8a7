"""Signals stop a run without losing anything, and readers that leave do not stop it."""

import os
import signal
import subprocess
import sys
import time

import launch
import pytest
from launch import cache  # noqa: F401 (fixture)

from jaxrl_eff.checkpoints import stored
from jaxrl_eff.cli import report
from jaxrl_eff.train import assembly, evaluate, export, interrupts, progress, state

ROOT = launch.ROOT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_what_is_not_training_at_once(number):
    before = signal.getsignal(signal.SIGINT)  # ignored where a shell began the tests with "&"
    with interrupts.listening() as heard:
        heard.phase = "assembly"
        with pytest.raises(interrupts.Stopped, match="assembly"):
            os.kill(os.getpid(), number)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_step_under_way_finish(number, capfd):
    with interrupts.listening() as heard, heard.training():
        os.kill(os.getpid(), number)
        assert heard.asked(1)
    assert ("Ctrl-C again" in capfd.readouterr().err) == (number == signal.SIGINT)
    heard.phase = "the start of stage b"
    with pytest.raises(interrupts.Stopped, match="stage b"):
        heard.check()  # it came too late for the last stage's last step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_the_end_changes_nothing(number):
    with interrupts.listening() as heard:
        heard.over()
        os.kill(os.getpid(), number)
        time.sleep(0.01)


def test_no_failure_of_an_except_clause_swallows_a_stop():
    assert not issubclass(interrupts.Stopped, Exception)


def test_a_second_sigterm_changes_nothing():
    with interrupts.listening() as heard, heard.training():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard.asked(1)


def test_a_second_ctrl_c_ends_the_process():
    code = (
        "import os, signal; from jaxrl_eff.train import interrupts\n"
        "with interrupts.listening() as heard, heard.training():\n"
        "    for _ in range(2): os.kill(os.getpid(), signal.SIGINT)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGINT and b"Traceback" not in done.stderr


def test_a_closed_terminal_is_ignored():
    before = signal.getsignal(signal.SIGHUP)
    with interrupts.listening() as heard, heard.training():
        os.kill(os.getpid(), signal.SIGHUP)
        assert not heard.asked(1)
    assert signal.getsignal(signal.SIGHUP) == before


def test_output_that_nobody_takes_is_dropped():
    reader, writer = os.pipe()
    with os.fdopen(writer, "w", buffering=1) as pipe:
        stream = interrupts.Outlasting(pipe)
        stream.write("heard\n")
        os.close(reader)
        for _ in range(3):
            assert stream.write("not heard\n") == 10
            stream.flush()
        os.write(stream.fileno(), b"by a library\n")


def test_a_closed_standard_output_takes_everything():
    code = (
        "import sys; from jaxrl_eff.train import interrupts; interrupts.outlast_readers()\n"
        "print('x', flush=True); assert not sys.stdout.isatty() and sys.stdout.encoding\n"
    )
    done = subprocess.run(f'exec >&-; {sys.executable} -c "{code}"', shell=True, cwd=ROOT)
    assert done.returncode == 0


def test_sigterm_counts_in_every_phase(tmp_path, monkeypatch, capsys):
    """One run that is asked to stop in each of them in turn, and continued."""
    run = launch.config("algorithm=sft,steps=2,every=1,evaluate=1")
    phases = [
        (assembly, "assemble", "assembly"),
        (state, "initial", "the start of stage sft"),
        (evaluate.Evaluation, "__call__", "the start of stage sft"),  # before the first step
        (progress.StepLog, "__call__", "stage sft, step 2 of 2"),
        (stored, "load", "restoring"),
        (export, "write", "the export"),
        (report, "write", "the report"),
    ]
    for owner, name, phase in phases:
        with monkeypatch.context() as m:
            of = getattr(owner, name)

            def signalled(*args, of=of, **kwargs):
                signal.raise_signal(signal.SIGTERM)
                return of(*args, **kwargs)

            m.setattr(owner, name, signalled)
            assert launch.train(run, tmp_path, quiet=False)
        assert f"stopped at {phase}" in capsys.readouterr().out, phase
        assert not (tmp_path / "result.json").exists() or phase in ("the export", "the report")
    assert launch.train(run, tmp_path)
    assert launch.document(tmp_path, "result")["export"]
    evaluated = [v for _, _, v in launch.numbers(tmp_path) if "eval" in v]
    assert len(evaluated) == 1 and (tmp_path / "report.html").is_file()
    assert launch.train(run, tmp_path / "whole")
    assert launch.export(tmp_path) == launch.export(tmp_path / "whole")
    assert launch.numbers(tmp_path) == launch.numbers(tmp_path / "whole")


def test_ctrl_c_saves_and_a_reader_that_leaves_does_not_matter(cache, tmp_path):  # noqa: F811
    """One run of many steps, whose output is closed after a line; stopped, and continued."""
    config = f"--config={launch.TINY}:algorithm=sft,steps=4000,devices=2"
    process = launch.start([config, f"--workdir={tmp_path}"], cache)
    try:
        process.stdout.readline()
        process.stdout.close()
        process.stderr.close()
        metrics = tmp_path / "metrics.jsonl"
        end = time.monotonic() + 240
        while not metrics.is_file() or '"step": 3,' not in metrics.read_text():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 0
    finally:
        process.kill()
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert int(saved.name) == launch.numbers(tmp_path)[-1][0] >= 3

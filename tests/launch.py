"""Starts runs for the tests: in this process, or as the command that a person types."""

import json
import os
import subprocess
import sys
from pathlib import Path

import programs
import pytest
from safetensors.numpy import load_file

from jaxrl_eff import main
from jaxrl_eff.cli import report
from jaxrl_eff.train import config_file, settings, writer
from jaxrl_eff.train import run as whole

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "tests" / "tiny.py")
CACHE = os.environ["JAX_COMPILATION_CACHE_DIR"]


class Killed(BaseException):
    """Stands for SIGKILL within this process."""


def config(arg="", *changes):
    """Settings of tests/tiny.py, e.g. config("algorithm=ppo,steps=4", "seed=1")."""
    return settings.run(config_file.load(f"{TINY}:{arg}", changes))


def train(run, workdir, *, quiet=True, accept_changes=False):
    """The whole of a run in this process, over its eight simulated devices."""
    return whole.train(
        run, Path(workdir), quiet=quiet, accept_changes=accept_changes, draw=report.write
    )


def environment(cache):
    """Of a command: its devices are its own; the compilation cache is one for all tests."""
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS", "NPROC")}
    env |= {"PYTHONPATH": str(ROOT)}  # this copy, even where another one is installed
    env |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PLATFORMS": "cpu", "NPROC": "32"}
    return env | {"XLA_FLAGS": programs.QUICKLY.strip()}


def start(arguments_, cache, *, kill="", code=main.__name__):
    """The command, in a process of its own; `kill` is a moment for `tests/killed.py`."""
    run = ["-m", code] if not kill else [str(ROOT / "tests" / "killed.py"), kill]
    return subprocess.Popen(
        [sys.executable, *run, *arguments_],
        cwd=ROOT,
        env=environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(*arguments_, cache=CACHE, timeout=300, **options):
    """Exit code, standard output, standard error."""
    process = start(arguments_, cache, **options)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def called(main_, capsys, *arguments_):
    """A command in this process: exit code, standard output, standard error."""
    try:
        main_([str(a) for a in arguments_])
        code = 0
    except SystemExit as stop:
        code = stop.code
    out = capsys.readouterr()
    return code, out.out, out.err


def numbers(workdir, stage=None):
    """(step, stage, values) of metrics.jsonl, without times."""
    rows = writer.read(Path(workdir) / "metrics.jsonl")
    return [(r["step"], r["stage"], r["values"]) for r in rows if stage in (None, r["stage"])]


def export(workdir):
    """Bytes of the exported parameters."""
    return (Path(workdir) / "export" / "model.safetensors").read_bytes()


def tensors(workdir):
    """The exported parameters by name."""
    return load_file(Path(workdir) / "export" / "model.safetensors")


def document(workdir, name):
    return json.loads((Path(workdir) / f"{name}.json").read_text())


@pytest.fixture(scope="session")
def cache():
    """The compilation cache that commands share with the tests of this process."""
    return CACHE

"""Tries what a command should refuse, and says what it did instead."""

import contextlib
import dataclasses
import importlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from jaxrl_eff.train import config_file, settings

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 300  # what a trial may take


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What is tried.

    Attributes:
        module: whose command is called with `argv`; "" assembles the config of `spec`.
        changes: (path, value) pairs put into that config.
        environment: of a process of its own, which a command gets if there is any.
        stdin: what it reads.
    """

    module: str = ""
    argv: tuple[str, ...] = ()
    spec: str | dict = ""
    changes: tuple[tuple[str, object], ...] = ()
    environment: dict[str, str] | None = None
    stdin: str = ""


@dataclasses.dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        kind: of what it is.
        name: what is wrong with it.
        words: one of these must be in the message.
        attempt: (home, folder) -> what is tried; files go into the folder.
    """

    kind: str
    name: str
    words: tuple[str, ...]
    attempt: Callable[[Path, Path], Attempt]


def outcome(case: Case, home_: Path, folder: Path) -> str:
    """Tries a case; "" if it was refused as it should be, else what was wrong."""
    attempt = case.attempt(home_, folder)
    before = _listing(home_), _listing(folder)
    began = time.monotonic()
    try:
        code, err = _process(attempt) if attempt.environment is not None else _here(attempt)
    except (TimeoutError, subprocess.TimeoutExpired):
        return f"still running after {SECONDS} s"
    last = err.strip().splitlines()[-1:] or [""]
    wrong = []
    if code != 2:
        wrong.append(f"exit code {code}")
    if "Traceback" in err:
        wrong.append("a traceback")
    if not last[0].startswith("error:"):
        wrong.append("no error at the end")
    words = [w.replace("HOME", str(home_)) for w in case.words]
    if not any(w in last[0] for w in words):
        wrong.append(f"none of {words} in it")
    after = _listing(home_), {k: v for k, v in _listing(folder).items() if k in before[1]}
    if after != before:
        wrong.append("files were changed")
    seconds = f" ({time.monotonic() - began:.1f} s)"
    return f"{', '.join(wrong)}: {last[0][:300]}{seconds}" if wrong else ""


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for path in sorted(folder.rglob("*")):
        with contextlib.suppress(OSError):
            stat = path.lstat()
            found[str(path)] = (stat.st_size if path.is_file() else 0, stat.st_mode)
    return found


def _here(attempt: Attempt) -> tuple[int, str]:
    """Exit code and standard error of an attempt in this process."""
    out, err = io.StringIO(), io.StringIO()

    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    stdin, sys.stdin = sys.stdin, io.StringIO(attempt.stdin)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if attempt.module:
                name = "main" if attempt.module == "main" else f"cli.{attempt.module}"
                code = importlib.import_module(f"jaxrl_eff.{name}").main(list(attempt.argv))
            else:
                code = _assemble(attempt)
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.stdin = stdin
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return code or 0, err.getvalue()


def _assemble(attempt: Attempt) -> int:
    from jaxrl_eff.train import assembly

    with config_file.explained():
        spec = attempt.spec
        config = config_file.load(spec) if isinstance(spec, str) else spec
        for path, value in attempt.changes:
            *way, last = path.split(".")
            section = config
            for name in way:
                section = section.setdefault(name, {})
            section[last] = value
        assembly.assemble(settings.run(config))
    return 0


def _command(attempt: Attempt) -> list[str]:
    return ["jaxrl_eff.main"] if attempt.module == "main" else ["jaxrl_eff", attempt.module]


def _process(attempt: Attempt) -> tuple[int, str]:
    env = os.environ | {"JAX_PLATFORMS": "cpu"} | attempt.environment
    env.pop("XLA_FLAGS", None)
    argv = [a.encode("utf-8", "surrogateescape") for a in attempt.argv]
    done = subprocess.run(
        [sys.executable, "-m", *_command(attempt), *argv],
        cwd=ROOT, env=env, input=attempt.stdin.encode(), capture_output=True, timeout=SECONDS,
    )  # fmt: skip
    return done.returncode, done.stderr.decode("utf-8", "replace")

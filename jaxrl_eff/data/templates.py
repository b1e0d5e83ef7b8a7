"""Chat templates -> text, within bounds of time, memory and length.

Templates are rendered by `template_worker` in one process beside this one. It is started when the
first template is rendered, ended with this process, and started anew after a template has made it
end. A round trip costs one or two tenths of a millisecond, so texts that belong together are asked
for together.
"""

import atexit
import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrl_eff.data import template_worker as worker

SECONDS = 5.0  # of computing, for all texts that are asked for together
MEMORY = 2**30  # bytes of the whole process that renders
CHARACTERS = 2**24  # of a text


def render(
    source: str,
    origin: str,
    wanted: Sequence[tuple[Sequence[Mapping[str, Any]], bool]],
    *,
    special: Mapping[str, str],
    marks: tuple[str, str] = ("", ""),
) -> list[str]:
    """The texts of conversations by a template.

    Args:
        source: the template.
        origin: where it came from, for messages.
        wanted: for each text the messages, and whether the opening of an assistant's turn ends it.
        special: text of the special tokens by role (`bos_token`, ...).
        marks: written before and after what `{% generation %}` blocks render.

    Raises:
        ValueError: the template is not Jinja, refuses a conversation, fails, or goes beyond
            `SECONDS`, `MEMORY` or `CHARACTERS`; one line that names the origin.
        ImportError: Jinja is missing.
    """
    try:
        arguments = (source, marks, list(wanted), dict(special), CHARACTERS)
        request = pickle.dumps((SECONDS, arguments))
    except Exception as error:
        raise ValueError(f"a conversation holds what is no plain value: {error}") from error
    with _lock:
        kind, text = _running().ask(request)
    if kind == worker.TEXT:
        return json.loads(text)
    if kind == worker.MISSING:
        raise ImportError("chat templates need Jinja: pip install 'jaxrl_eff[hf]'.")
    text = " ".join(text.split())
    text = text if len(text) <= _SHOWN else text[:_SHOWN] + " ..."
    said = {
        worker.NOT_JINJA: f"is not Jinja: {text}.",
        worker.REFUSED: f"refused: {text}",
        worker.MEMORY: f"needs more than {MEMORY / 2**30:g} GiB of memory.",
        worker.OUTPUT: f"writes {text} characters; at most {CHARACTERS:,} are read.",
        _TIME: f"does not end within {SECONDS:g} s of computing.",
        _ENDED: f"ended the process that renders it ({text}).",
    }
    raise ValueError(f"the chat template of {origin} {said[kind]}")


_SHOWN = 300  # characters of an error's message
_TIME, _ENDED = b"T", b"E"  # kinds of answers that the worker cannot give itself
_lock = threading.Lock()


@dataclass(frozen=True)
class _Worker:
    """The process that renders, started by the process `owner`."""

    process: subprocess.Popen
    owner: int

    def ask(self, request: bytes) -> tuple[bytes, str]:
        """Kind and text of the answer; see `template_worker.answer`."""
        try:
            self._send(request)
            kind = self._receive(1)
            (size,) = worker.LENGTH.unpack(self._receive(worker.LENGTH.size))
            return kind, self._receive(size).decode()
        except (OSError, EOFError):
            self.close()
            code = self.process.returncode
            if -code in (signal.SIGPROF, signal.SIGALRM):
                return _TIME, ""
            if -code in (signal.SIGKILL, signal.SIGABRT):
                return worker.MEMORY, ""
            return _ENDED, f"exit code {code}"
        except BaseException:  # an interrupt: what comes next would not be the answer
            self.close(kill=True)
            raise

    def close(self, kill: bool = False) -> None:
        """Waits for the end of the process, which the end of its input brings about."""
        if kill:
            self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            try:
                stream.close()
            except OSError:  # what was not sent cannot be flushed
                continue
        self.process.wait()

    def _send(self, request: bytes) -> None:
        self.process.stdin.write(worker.LENGTH.pack(len(request)) + request)
        self.process.stdin.flush()

    def _receive(self, size: int) -> bytes:
        data = self.process.stdout.read(size)
        if len(data) < size:
            raise EOFError
        return data


_workers: list[_Worker] = []  # at most one


def _running() -> _Worker:
    """The process that renders; a new one if there is none, it has ended, or this is a fork."""
    if _workers and _workers[0].owner == os.getpid() and _workers[0].process.poll() is None:
        return _workers[0]
    if importlib.util.find_spec("jinja2") is None:
        raise ImportError("chat templates need Jinja: pip install 'jaxrl_eff[hf]'.")
    while _workers:
        _workers.pop().close()
    process = subprocess.Popen(
        # -P: modules beside the script would hide others of their names.
        [sys.executable, "-P", str(Path(worker.__file__).resolve())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for this process, which closes that one
    )
    _workers.append(_Worker(process, os.getpid()))
    _workers[0]._send(pickle.dumps((sys.path, MEMORY)))
    return _workers[0]


@atexit.register
def _end() -> None:
    if _workers and _workers[0].owner == os.getpid():
        _workers.pop().close(kill=True)

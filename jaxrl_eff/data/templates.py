"""Chat templates -> text, within limits on time, memory and length.

Templates are rendered by `template_worker` in one separate process. A round trip costs 0.1 to 0.2
milliseconds, so related texts are requested together.
"""

import json
import pickle
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from jaxrl_eff.beside import Beside, Ended
from jaxrl_eff.data import template_worker as worker

SECONDS = 5.0  # of compute, for all texts of one request
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
    """Renders conversations with a template.

    Args:
        source: the template.
        origin: where it was loaded from, for messages.
        wanted: for each text the messages, and True if an assistant opening ends it.
        special: text of the special tokens by role (`bos_token`, ...).
        marks: written before and after the output of `{% generation %}` blocks.

    Raises:
        ValueError: the template is not Jinja, refuses a conversation, fails, or exceeds `SECONDS`,
            `MEMORY` or `CHARACTERS`; the message is one line that names the origin.
        ImportError: Jinja is missing.
    """
    try:
        arguments = (source, marks, list(wanted), dict(special), CHARACTERS)
        request = pickle.dumps((SECONDS, arguments))
    except Exception as error:
        raise ValueError(f"a conversation holds what is no plain value: {error}") from error
    kind, text = _ask(request)
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
_TIME, _ENDED = b"T", b"E"  # kinds of answers for a worker that was ended


def _ask(request: bytes) -> tuple[bytes, str]:
    """Sends a request; returns kind and text of the answer, see `template_worker.answer`."""
    try:
        return _renderer.ask(worker.LENGTH.pack(len(request)) + request, _read)
    except Ended as end:
        if -end.code in (signal.SIGPROF, signal.SIGALRM):
            return _TIME, ""
        if -end.code in (signal.SIGKILL, signal.SIGABRT):
            return worker.MEMORY, ""
        return _ENDED, str(end)


def _read(answers: BinaryIO) -> tuple[bytes, str]:
    kind = _exactly(answers, 1)
    (size,) = worker.LENGTH.unpack(_exactly(answers, worker.LENGTH.size))
    return kind, _exactly(answers, size).decode()


def _exactly(answers: BinaryIO, size: int) -> bytes:
    data = answers.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _begin(process: subprocess.Popen) -> None:
    first = pickle.dumps((sys.path, MEMORY))
    process.stdin.write(worker.LENGTH.pack(len(first)) + first)
    process.stdin.flush()


_renderer = Beside(worker.__file__, _begin)

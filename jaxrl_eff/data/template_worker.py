"""Renders chat templates in a separate process, within limits that the operating system enforces.

`templates` starts this file as a script and communicates through its standard streams. A template
is a program from the checkpoint's author: Jinja's sandbox keeps it from Python's internals, but one
expression can run forever or exhaust memory inside the interpreter, where no Python check would
run. The kernel then ends this process, and only this one.

Protocol: each request is a length (8 bytes) and a pickled tuple; each answer is one byte for its
kind, a length, and text in UTF-8. Little of the package is imported, so that a start takes 0.1 s.
"""

import json
import pickle
import struct
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO

TEXT, REFUSED, NOT_JINJA, MISSING, MEMORY, OUTPUT = b"t", b"r", b"n", b"m", b"o", b"l"
LENGTH = struct.Struct("<Q")


def compiled(source: str, marks: tuple[str, str]) -> Any:
    """Compiles a template in an immutable sandbox, with the functions that transformers provides.

    Args:
        source: Jinja.
        marks: written before and after the output of `{% generation %}` blocks.

    Raises:
        ImportError: Jinja is missing.
        jinja2.TemplateSyntaxError: the source is not Jinja.
    """
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %} ... {% endgeneration %}` puts marks around what it renders."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_mark")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return f"{marks[0]}{caller()}{marks[1]}"

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes <, > and & for HTML.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


_compiled = lru_cache(maxsize=8)(compiled)


def answer(
    source: str,
    marks: tuple[str, str],
    wanted: Sequence[tuple[Sequence[Mapping[str, Any]], bool]],
    special: Mapping[str, str],
    most: int,
) -> tuple[bytes, str]:
    """Renders texts; returns the kind of answer, and a JSON list of the texts or an error message.

    Args:
        source, marks: as in `compiled`.
        wanted: for each text the messages, and True if an assistant opening ends it.
        special: text of the special tokens by role.
        most: maximum characters of a text.
    """
    try:
        template = _compiled(source, marks)
    except ImportError as error:
        return MISSING, str(error)
    except MemoryError:
        return MEMORY, ""
    except Exception as error:
        return NOT_JINJA, _said(error)
    texts = []
    for messages, opening in wanted:
        try:
            text = template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=opening,
                **special,
            )
        except MemoryError:
            return MEMORY, ""
        except RecursionError:
            return REFUSED, "it calls itself without end, or nests too deeply"
        except Exception as error:
            return REFUSED, _said(error)
        if len(text) > most:
            return OUTPUT, f"{len(text):,}"
        texts.append(text)
    return TEXT, json.dumps(texts)


def _said(error: Exception) -> str:
    """Message of an error, with its type unless the template itself or Jinja raised it."""
    import jinja2

    if isinstance(error, jinja2.TemplateError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answers requests until the other side closes the stream.

    The first request is (path of modules, bytes of memory); each later one (seconds, arguments of
    `answer`).
    """
    sys.path[:], memory = _read(requests)
    from jaxrl_eff.beside import bound  # found by the path just read

    clock = bound(memory)
    while (request := _read(requests)) is not None:
        seconds, arguments = request
        clock(seconds)
        kind, text = answer(*arguments)
        clock(0)
        data = text.encode("utf-8", "backslashreplace")
        answers.write(kind + LENGTH.pack(len(data)) + data)
        answers.flush()


def _read(stream: BinaryIO) -> Any:
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    return pickle.loads(stream.read(LENGTH.unpack(head)[0]))


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)

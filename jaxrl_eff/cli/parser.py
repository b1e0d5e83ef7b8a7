"""The argument parser of all commands, and the types of their arguments.

A command's help is the docstring of its file, as it is written there.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jaxrl_eff.train import config_file

REQUIRED = object()
# Help of the options that several commands have.
MODEL = "a Hugging Face directory, or the workdir of a finished run"
PAGE = "also draw the result as a page, in this file"
SEED_OF = "random seed"


class Parser(argparse.ArgumentParser):
    """A parser of whole option names that reports an error in one line, with exit code 2."""

    def __init__(self, prog: str, description: str | None, **more: Any):
        style = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog, description=description, formatter_class=style, allow_abbrev=False, **more
        )

    def option(
        self,
        name: str,
        value: str,
        what: str,
        kind: Callable[[str], Any] = str,
        default: Any = REQUIRED,
        **more: Any,
    ) -> None:
        """Adds `--name=VALUE`; its help is `what`, and the default if that says something."""
        needed = default is REQUIRED
        if not needed and default not in (None, "", []):
            shown = ",".join(map(str, default)) if isinstance(default, list) else default
            what = f"{what} (default {shown})"
        given = {"required": True} if needed else {"default": default}
        self.add_argument(name, metavar=value, help=what, type=kind, **given, **more)

    def flag(self, name: str, what: str) -> None:
        """Adds `--name`, which is off unless it is given."""
        self.add_argument(name, action="store_true", help=what)

    def error(self, message: str) -> NoReturn:
        config_file.fail(f"{message}; see --help.")

    def run(
        self, argv: Sequence[str] | None, action: Callable[[argparse.Namespace], int | None]
    ) -> int:
        """Calls `action` with the parsed options; errors become one line. Returns the exit code."""
        with config_file.explained():
            given = sys.argv[1:] if argv is None else list(argv)
            return action(self.parse_args(config_file.rewrite(given))) or 0


def command(name: str, description: str | None) -> Parser:
    """Returns the parser of `python -m jaxrl_eff NAME`."""
    return Parser(f"python -m jaxrl_eff {name}", description)


def number(kind: type, low: float | int, high: float | int = math.inf) -> Callable[[str], Any]:
    """Returns an argument's type: a finite int or float within a range."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"invalid {kind.__name__} value: {text!r}") from None
        if not low <= value <= high or math.isinf(value):
            most = f" and at most {high:,}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"is {text}, but must be at least {low}{most}")
        return value

    return read


SEED = number(int, 0, 2**32 - 1)
COUNT = number(int, 1)


def numbers(kind: type) -> Callable[[str], list[Any]]:
    """Returns an argument's type: numbers separated by commas."""

    def read(text: str) -> list[Any]:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            message = f"{text!r} should be numbers separated by commas"
            raise argparse.ArgumentTypeError(message) from None

    return read


def write_page(path: str, text: str) -> None:
    """Writes a page, with its directory, and says so."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")
    print(f"written: {path}")

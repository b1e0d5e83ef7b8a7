"""User-visible output of a run.

On a terminal a progress bar stays at the bottom, with the loss or reward, tokens/s, the remaining
time and the share of each call in a step; everything else scrolls above it. Without a terminal the
same facts are printed as plain lines, rarely enough for a log file. `quiet` prints only the final
lines.

A model's text goes through `clean`, since terminals would execute control characters in it.
"""

import itertools
import math
import sys
import textwrap
import time
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from io import TextIOBase
from typing import Any


class Console:
    """Writer to one stream, which nothing else should use while it is open."""

    def __init__(
        self,
        quiet: bool = False,
        terminal: bool | None = None,
        *,
        stream: TextIOBase | None = None,
        width: int | None = None,
        seconds_between_lines: float | int = 10.0,
    ):
        """Does not print yet.

        Args:
            quiet: True to print only `table`, `final` and `verdict`.
            terminal: True to draw a bar; None: detected.
            stream: standard output by default.
            width: in columns; None is the terminal's, or 100.
            seconds_between_lines: of progress, without a terminal. First and last always print.
        """
        self._stream = stream or sys.stdout
        is_terminal = self._stream.isatty() if terminal is None else terminal
        self._quiet = quiet
        self._between = seconds_between_lines
        self._blank = False
        self._rich: Any = None
        self._live: Any = None
        self._progress: _Progress | None = None
        if is_terminal and not quiet:
            from rich.console import Console as Rich

            self._rich = Rich(file=self._stream, force_terminal=True, width=width, highlight=False)
        self._width = self._rich.width if self._rich else width or 100

    # Opening ------------------------------------------------------------------------------------

    def header(self, title: str, facts: Mapping[str, str]) -> None:
        """Prints a title and aligned `name  value` lines (devices, meshes, parameters, memory)."""
        if self._quiet:
            return
        self._print(title, style="bold")
        column = max((cells(name) for name in facts), default=0)
        for name, value in facts.items():
            lines = wrap(value, self._width - column - 4)
            for first, line in zip(itertools.chain([name], itertools.repeat("")), lines):  # noqa: B905
                self._print(f"  {pad(first, column)}  {line}")
        self._gap()

    def line(self, text: str) -> None:
        """Prints a remark, wrapped."""
        if not self._quiet:
            self._wrapped(text)

    def warn(self, text: str) -> None:
        """Prints a warning; if quiet, to standard error."""
        if self._quiet:
            print(_encodable(clean(text), sys.stderr), file=sys.stderr, flush=True)
        else:
            self._wrapped(f"warning: {text}", style="yellow")

    # Progress -----------------------------------------------------------------------------------

    def stage(self, name: str, steps: int, *, start: int = 0) -> None:
        """Begins the progress of a stage of `steps` steps, `start` of them already taken."""
        self.end_stage()
        self._progress = _Progress(name, steps, start)
        if self._rich is not None:
            from rich.live import Live

            self._live = Live(
                get_renderable=self._progress.renderable,
                console=self._rich,
                refresh_per_second=4,
                transient=True,
            )
            self._live.start()

    def step(
        self,
        step: int,
        values: Mapping[str, float | int],
        *,
        tokens_per_s: float | int | None = None,
        seconds: Mapping[str, float | int] | None = None,
    ) -> None:
        """Shows step `step` (1 is the first) of the stage.

        Args:
            values: the one or two main numbers: loss or reward.
            seconds: by call; shown as fractions of the step.
        """
        progress = self._progress
        if progress is None or self._quiet:
            return
        progress.step(step, values, tokens_per_s, seconds or {})
        due = time.monotonic() - progress.printed >= self._between
        if self._rich is None and (progress.steps_seen == 1 or step >= progress.steps or due):
            progress.printed = time.monotonic()
            self._print(cut("  ".join(progress.words()), self._width))

    def end_stage(self) -> None:
        """Replaces the bar by its last line."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            if self._progress is not None and self._progress.steps_seen:
                self._print(cut("  ".join(self._progress.words()), self._width))
        self._progress = None

    def samples(self, title: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Prints samples: `prompt`, `completion` and, if given, `reward` of each row."""
        if self._quiet:
            return
        self._print(cut(f"  {title}", self._width), style="dim")
        for row in rows:
            reward = row.get("reward")
            mark = "" if reward is None else f"{number(reward):>7}"
            said = f"{clean(str(row.get('prompt', '')))} → {clean(str(row.get('completion', '')))}"
            lines = wrap(said, self._width - len(mark) - 5)
            if len(lines) > 4:
                lines = [*lines[:3], cut(lines[3], self._width - len(mark) - 8) + " ..."]
            for first, text in zip(itertools.chain([mark], itertools.repeat("")), lines):  # noqa: B905
                self._print(f"  {first:>{len(mark)}}  {text}")

    # Closing ------------------------------------------------------------------------------------

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Iterable[Sequence[Any]],
        *,
        final: bool = True,
    ) -> None:
        """Prints an aligned table; columns of only numbers are right-aligned.

        Args:
            final: True to print even if quiet.
        """
        if self._quiet and not final:
            return
        raw = [list(row) for row in rows]
        body = [[_cell(x) for x in row] for row in raw]
        number_like = [
            all(_is_number(r[i]) or r[i] is None for r in raw) for i in range(len(columns))
        ]
        widths = _fit([list(columns), *body], self._width - 2)

        def show(row: Sequence[str], style: str = "") -> None:
            parts = [
                pad(cut(x, w), w, right=right)
                for x, w, right in zip(row, widths, number_like, strict=True)
            ]
            self._print(("  " + "  ".join(parts)).rstrip(), style=style)

        self._gap()
        if title:
            self._print(cut(title, self._width), style="bold")
        show([clean(c) for c in columns], style="dim")
        for row in body:
            show(row)
        self._gap()

    def final(self, text: str) -> None:
        """Prints a closing line even if quiet, such as a path. Unwrapped, for copying."""
        self._print(clean(text))

    def verdict(self, passed: bool, text: str) -> None:
        """Prints the last line: PASS or FAIL, and its subject."""
        self.end_stage()
        style = "bold green" if passed else "bold red"
        self._wrapped(f"{'PASS' if passed else 'FAIL'}  {text}", style=style)

    def close(self) -> None:
        """Removes the bar. Can be called twice."""
        self.end_stage()

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wrapped(self, text: str, style: str = "") -> None:
        for line in wrap(text, self._width):
            self._print(line, style=style)

    def _gap(self) -> None:
        """Prints one blank line, never two."""
        if not self._blank:
            self._print("")

    def _print(self, text: str, style: str = "") -> None:
        self._blank = not text
        text = _encodable(text, self._stream)
        if self._rich is None:
            print(text, file=self._stream, flush=True)
            return
        from rich.text import Text

        self._rich.print(Text(text, style=style), soft_wrap=True)


class _Progress:
    """State of one stage's bar."""

    def __init__(self, name: str, steps: int, start: int):
        self.name, self.steps, self.at = name, max(steps, 1), start
        self.steps_seen = 0
        self.printed = 0.0
        self._facts: list[str] = []
        self._split = ""
        self._began = self._last = 0.0
        self._start = start

    def step(
        self,
        step: int,
        values: Mapping[str, float | int],
        tokens_per_s: float | int | None,
        seconds: Mapping[str, float | int],
    ) -> None:
        self._last = time.monotonic()
        if self.steps_seen == 0:  # this step includes compilation, so timing starts after it
            self._began, self._start = self._last, step
        self.at = step
        self.steps_seen += 1
        self._facts = [f"{name} {number(value)}" for name, value in values.items()]
        if tokens_per_s is not None:
            self._facts.append(f"{number(tokens_per_s, short=True)} tokens/s")
        total = sum(seconds.values())
        largest = sorted(seconds.items(), key=lambda item: -item[1]) if total > 0 else []
        shares = [f"{name} {s / total:.0%}" for name, s in largest]
        self._split = " · ".join(shares)

    def time_left(self) -> str:
        done, rest = self.at - self._start, self.steps - self.at
        if rest <= 0:
            return "done"
        return (
            f"{clock((self._last - self._began) / done * rest)} left" if done > 0 else "-:-- left"
        )

    def words(self) -> list[str]:
        """Returns the facts of a plain line."""
        count = f"{self.at:>{len(str(self.steps))}}/{self.steps}"
        parts = [f"{self.name:<8}", count, *self._facts, self.time_left(), self._split]
        return [part for part in parts if part]

    def renderable(self) -> Any:
        """Returns the bar and, below it, the split of the step."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        left = self.time_left() if self.steps_seen else "compiling"
        facts = "  ".join([f"{self.at}/{self.steps}", *self._facts, left])
        grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1, min_width=8)
        grid.add_column(no_wrap=True, overflow="ellipsis")
        bar = ProgressBar(total=self.steps, completed=self.at)
        grid.add_row(Text(self.name, style="bold"), bar, Text(facts))
        if not self._split:
            return grid
        split = Text(f"  {self._split}", style="dim", no_wrap=True, overflow="ellipsis")
        return Group(grid, split)


def number(value: Any, *, short: bool = False) -> str:
    """Formats four significant digits; if `short`, with k, M, G, T."""
    value = float(value)
    if short and math.isfinite(value):
        for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= unit:
                return f"{value / unit:.3g}{name}"
        return f"{value:.3g}"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:#.4g}".rstrip(".") if abs(value) < 1e4 else f"{value:.0f}"
    return f"{value:.2e}"


def clock(seconds: float | int) -> str:
    """Formats as `1:02:03` or `2:03`."""
    minutes, s = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"


def clean(text: str) -> str:
    """Returns one line without control characters: newlines become ⏎, others their escape."""
    text = text.replace("\r\n", "\n").replace("\n", "⏎").replace("\t", " ")
    safe = (
        c if unicodedata.category(c)[0] != "C" or c == "\u200d" else ascii(c)[1:-1] for c in text
    )
    return "".join(safe)


def cells(text: str) -> int:
    """Returns the terminal columns of the text."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def cut(text: str, width: int) -> str:
    """Truncates the text to at most `width` columns, ending in `...`."""
    if cells(text) <= width:
        return text
    while text and cells(text) > width - 3:
        text = text[:-1]
    return (text + "...")[: max(width, 0)]


def pad(text: str, width: int, *, right: bool = False) -> str:
    """Pads the text with spaces to `width` columns, aligned left or right."""
    fill = " " * (width - cells(text))
    return fill + text if right else text + fill


def wrap(text: str, width: int) -> list[str]:
    """Wraps into lines of at most `width` columns. Returns at least one line."""
    text = clean(text)
    columns = max(width, 8) * len(text) // max(cells(text), 1) if text else max(width, 8)
    return textwrap.wrap(text, max(columns, 8), break_on_hyphens=False) or [""]


def _encodable(text: str, stream: TextIOBase) -> str:
    """Replaces characters that the stream's encoding lacks by `?`."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, errors="replace").decode(encoding)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _cell(x: Any) -> str:
    if isinstance(x, float):
        return number(x)
    return "" if x is None else clean(str(x))


def _fit(rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """Returns column widths whose sum, with two spaces between, is at most `width`."""
    widths = [max(map(cells, column)) for column in zip(*rows, strict=True)]
    while sum(widths) + 2 * (len(widths) - 1) > width and max(widths) > 4:
        widths[widths.index(max(widths))] -= 1
    return widths

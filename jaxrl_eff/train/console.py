"""User-visible output of a run.

On a terminal a progress bar stays at the bottom, with the loss or reward, tokens/s, the remaining
time and the share of each call in a step; everything else scrolls above it. Without a terminal the
same facts are printed as plain lines, rarely enough for a log file. `quiet` prints only the final
lines.

A model's text goes through `clean`, since terminals would execute control characters in it.
"""

import math
import sys
import time
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from io import TextIOBase
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console as Rich
from rich.console import Group, RenderableType
from rich.live import Live
from rich.measure import Measurement
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


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
        if hasattr(self._stream, "reconfigure"):  # a poor encoding prints ? for what it lacks
            self._stream.reconfigure(errors="replace")
        is_terminal = self._stream.isatty() if terminal is None else terminal
        self._quiet = quiet
        self._between = seconds_between_lines
        self._blank = False
        self._terminal = is_terminal and not quiet
        self._live: Live | None = None
        self._progress: _Progress | None = None
        self._rich = Rich(
            file=self._stream,
            force_terminal=self._terminal,
            width=width or (None if self._terminal else 100),
            highlight=False,
            markup=False,
            emoji=False,
        )
        self._width = self._rich.width

    # Opening ------------------------------------------------------------------------------------

    def header(self, title: str, facts: Mapping[str, str]) -> None:
        """Prints a title and aligned `name  value` lines (devices, meshes, parameters, memory)."""
        if self._quiet:
            return
        self._print(title, style="bold")
        grid = _grid()
        for name, value in facts.items():
            grid.add_row(clean(name), clean(value))
        self._draw(grid, whole=True)
        self._gap()

    def line(self, text: str) -> None:
        """Prints a remark, wrapped."""
        if not self._quiet:
            self._draw(Text(clean(text)))

    def warn(self, text: str) -> None:
        """Prints a warning; if quiet, to standard error."""
        if self._quiet:
            print(clean(text), file=sys.stderr, flush=True)
        else:
            self._draw(Text(f"warning: {clean(text)}", style="yellow"))

    # Progress -----------------------------------------------------------------------------------

    def stage(self, name: str, steps: int, *, start: int = 0) -> None:
        """Begins the progress of a stage of `steps` steps, `start` of them already taken."""
        self.end_stage()
        self._progress = _Progress(name, steps, start)
        if self._terminal:
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
        if not self._terminal and (progress.steps_seen == 1 or step >= progress.steps or due):
            progress.printed = time.monotonic()
            self._print(progress.line())

    def end_stage(self) -> None:
        """Replaces the bar by its last line."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            if self._progress is not None and self._progress.steps_seen:
                self._print(self._progress.line())
        self._progress = None

    def samples(self, title: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Prints samples: `prompt`, `completion` and, if given, `reward` of each row."""
        if self._quiet:
            return
        self._print(f"  {title}", style="dim")
        for row in rows:
            reward = row.get("reward")
            mark = "" if reward is None else f"{number(reward):>7}"
            said = Text(f"{clean(row.get('prompt', ''))} → {clean(row.get('completion', ''))}")
            lines = said.wrap(self._rich, max(self._width - len(mark) - 5, 8))
            text = "\n".join(line.plain for line in lines[:4])
            grid = _grid()
            grid.add_row(mark, f"{text[:-4]} ..." if len(lines) > 4 else text)
            self._draw(grid)

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
        rows = list(rows)
        drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for i, name in enumerate(columns):
            numbers = all(is_number(row[i]) or row[i] is None for row in rows)
            drawn.add_column(clean(name), justify="right" if numbers else "left", overflow="fold")
        for row in rows:
            drawn.add_row(*map(_cell, row))
        self._gap()
        if title:
            self._print(title, style="bold")
        self._draw(Padding(drawn, (0, 0, 0, 2), expand=False))
        self._gap()

    def final(self, text: str) -> None:
        """Prints a closing line even if quiet, such as a path. Unwrapped, for copying."""
        self._print(clean(text), whole=True)

    def verdict(self, passed: bool, text: str) -> None:
        """Prints the last line: PASS or FAIL, and its subject."""
        self.end_stage()
        style = "bold green" if passed else "bold red"
        self._draw(Text(f"{'PASS' if passed else 'FAIL'}  {clean(text)}", style=style))

    def close(self) -> None:
        """Removes the bar. Can be called twice."""
        self.end_stage()

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _gap(self) -> None:
        """Prints one blank line, never two."""
        if not self._blank:
            self._print("")

    def _print(self, text: str, style: str = "", whole: bool = False) -> None:
        """Prints a line, cut to the width unless it is to stay `whole`."""
        self._blank = not text
        text = text if whole else cut(text, self._width)
        if self._terminal:
            self._rich.print(Text(text, style=style), soft_wrap=True)
        else:
            self._plain(text)

    def _draw(self, what: RenderableType, *, whole: bool = False) -> None:
        """Prints lines within the width; without spaces at their ends, except on a terminal.

        Args:
            whole: True keeps words that are too long, such as hashes, in one piece.
        """
        self._blank = False
        if self._terminal:
            self._rich.print(what)
        else:
            options = self._rich.options
            if whole:
                words = Measurement.get(self._rich, options.update(width=10_000), what).minimum
                options = options.update(width=max(self._width, words))
            for line in self._rich.render_lines(what, options, pad=False):
                self._plain("".join(part.text for part in line).rstrip())

    def _plain(self, line: str) -> None:
        # Not through rich, which ends the program where a pipe is closed.
        print(line, file=self._stream, flush=True)


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
        self._split = " · ".join(f"{name} {s / total:.0%}" for name, s in largest)

    def time_left(self) -> str:
        done, rest = self.at - self._start, self.steps - self.at
        if rest <= 0:
            return "done"
        return (
            f"{clock((self._last - self._began) / done * rest)} left" if done > 0 else "-:-- left"
        )

    def line(self) -> str:
        """Returns the facts as a plain line."""
        count = f"{self.at:>{len(str(self.steps))}}/{self.steps}"
        parts = [f"{self.name:<8}", count, *self._facts, self.time_left(), self._split]
        return "  ".join(part for part in parts if part)

    def renderable(self) -> RenderableType:
        """Returns the bar and, below it, the split of the step."""
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


def clean(text: Any) -> str:
    """Returns one line without control characters: newlines become ⏎, others their escape."""
    text = str(text).replace("\r\n", "\n").replace("\n", "⏎").replace("\t", " ")
    safe = (
        c if unicodedata.category(c)[0] != "C" or c == "\u200d" else ascii(c)[1:-1] for c in text
    )
    return "".join(safe)


def cut(text: str, width: int) -> str:
    """Truncates the text to at most `width` columns, ending in `...`."""
    if cell_len(text) <= width:
        return text
    return (set_cell_size(text, max(width - 3, 0)) + "...")[: max(width, 0)]


def _grid() -> Table:
    """A grid of `  name  text`, indented; the text is wrapped."""
    grid = Table.grid(padding=(0, 0, 0, 2), pad_edge=True)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def is_number(x: Any) -> bool:
    """True for integers and floats, not for booleans."""
    return isinstance(x, int | float) and not isinstance(x, bool)


def _cell(x: Any) -> str:
    if isinstance(x, float):
        return number(x)
    return "" if x is None else clean(x)

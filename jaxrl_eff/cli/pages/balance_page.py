"""A schedule as a page: what it gains over other rules, and when every rank does what.

The page holds all that it shows and looks like a run's report.
"""

from collections.abc import Mapping
from typing import Any

from jaxrl_eff.cli.pages import page as frame
from jaxrl_eff.cli.pages import svg
from jaxrl_eff.cli.pages.svg import Bar, Row
from jaxrl_eff.data.balance.assignment import Assignment
from jaxrl_eff.data.balance.baselines import Study, rows
from jaxrl_eff.train.console import number

COLUMNS = ("rule", "seconds", "skrull's gain", "over limit", "micro-steps", "padding", "balance",
           "distributed")  # fmt: skip
_MOST = 64  # ranks that are drawn
_LOCAL, _DISTRIBUTED, _WAITING = 2, 0, 4
_COLORS = {
    "local sequences": _LOCAL,
    "distributed sequences": _DISTRIBUTED,
    "waiting for the exchange": _WAITING,
}
_PALE = 0.35
_LIMIT = (
    "The limit is all arithmetic at full rate, spread evenly. A balance of 100 % means that no "
    'rank waits. The schedule keeps to its shapes; "exact", the same without that, and the other '
    "rules have a shape for every micro-step."
)


def table(found: Study, times: str = "×") -> list[tuple[Any, ...]]:
    """A row of `COLUMNS` for every rule."""
    return [
        (
            r.name, number(r.seconds), f"{r.gain:.2f}{times}", f"{r.over_limit:.2f}{times}",
            r.steps, f"{r.padding:.1%}", f"{r.balance:.1%}", f"{r.distributed:.1%}",
        )
        for r in rows(found)
    ]  # fmt: skip


def page(title: str, facts: Mapping[str, str], found: Study) -> str:
    """The text of the page; `facts` are told at its top."""
    own, *others = rows(found)
    first = found.schedules[0]
    bars = frame.compared(
        (own.name, own.seconds),
        [(r.name, r.seconds) for r in others],
        ("limit", own.seconds / own.over_limit),
    )
    ranks = first.groups * first.parts
    some = f"The first {_MOST} of {ranks} ranks. " if ranks > _MOST else ""
    remark = (
        f"{first.rule}. {some}Paler is padding; gaps are ranks waiting for the slowest, and fixed "
        "costs. Hold the pointer over a bar for its tokens."
    )
    return frame.whole(
        title,
        frame.head(title, "Estimated by a cost model; nothing was run."),
        frame.section("Given", frame.pairs(facts.items())),
        frame.section(
            "Against other rules",
            bars,
            frame.table(COLUMNS, table(found), right=len(COLUMNS) - 1),
            frame.note(_LIMIT),
        ),
        frame.section(
            "The first batch, by rank",
            frame.wide(_timeline(first)),
            frame.legend(_COLORS),
            frame.note(remark),
        ),
    )


def _timeline(s: Assignment) -> str:
    """The SVG of a batch: a row a rank, micro-step behind micro-step."""
    seconds = s.rank_seconds().reshape(len(s.shapes), -1).max(1)
    starts = [s.cost.step_seconds + float(seconds[:j].sum()) for j in range(len(s.shapes))]
    tokens = s.tokens().reshape(len(s.shapes), -1, 2)
    attention = s.attention().reshape(len(s.shapes), -1, 2)
    drawn = []
    for rank in range(min(s.groups * s.parts, _MOST)):
        group, part = divmod(rank, s.parts)
        bars: list[Bar] = []
        for j, start in enumerate(starts):
            bars += _step(s, j, start, tokens[j, rank], attention[j, rank], rank)
        label = f"group {group}" if part == s.parts // 2 else ""
        drawn.append(Row(label, bars, space=8 if part == 0 and group else 0))
    return svg.bars(drawn, end=float(s.seconds), seconds=True, lines=starts[1:], high=9, pitch=11)


def _step(s: Assignment, j: int, start: float, tokens: Any, attention: Any, rank: int) -> list[Bar]:
    """The work of one rank in one micro-step."""
    shape, c = s.shapes[j], s.cost
    mine, shared = (float(x) for x in attention)
    whole = c.seconds(*shape, s.parts, mine, shared) - c.micro_seconds
    local, rest = c.products(shape.local), c.products(shape.columns) - c.products(shape.local)
    empty = [c.linear * float(n - m) / c.flops_per_s for n, m in zip(shape, tokens, strict=True)]
    waits = max(0.0, whole - local - mine - rest - shared)
    told = (
        f"rank {rank}, micro-step {j}: {tokens[0]:,} local tokens of {shape.local:,} columns, "
        f"{tokens[1]:,} distributed of {shape.distributed:,}; {number(whole * 1e3)} ms"
    )
    bars, x = [], start + c.micro_seconds
    for color, length, opacity in (
        (_LOCAL, local + mine - empty[0], 1.0),
        (_LOCAL, empty[0], _PALE),
        (_DISTRIBUTED, rest + shared - empty[1], 1.0),
        (_DISTRIBUTED, empty[1], _PALE),
        (_WAITING, waits, 1.0),
    ):
        bars.append(Bar(x, x + length, color, told, opacity=opacity))
        x += length
    return bars

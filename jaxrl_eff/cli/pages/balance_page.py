"""A schedule as a page: what it gains over other rules, and when every rank does what.

The page holds all that it shows and looks like a run's report.
"""

from collections.abc import Mapping
from typing import Any

from jaxrl_eff.cli.pages import plan_page, svg
from jaxrl_eff.cli.pages.page import legend, whole
from jaxrl_eff.cli.pages.svg import escaped
from jaxrl_eff.data.balance.assignment import Assignment
from jaxrl_eff.data.balance.baselines import Study, rows
from jaxrl_eff.train.console import number

WIDTH, BAR, GAP = 1000, 11, 8  # of the timeline, in its own units
_MOST = 64  # ranks that are drawn
_COLORS = {"local sequences": 2, "distributed sequences": 0, "waiting for the exchange": 4}
_PALE = ' opacity="0.35"'
_LONG = 8  # times the schedule: longer bars end there


def page(title: str, facts: Mapping[str, str], found: Study) -> str:
    """The text of the page; `facts` are told at its top."""
    lead = "Estimated by a cost model; nothing was run."
    head = f"<header><h1>{escaped(title)}</h1><p class=lead>{lead}</p></header>"
    given = "".join(
        f"<tr><td>{escaped(name)}</td><td>{escaped(said)}</td></tr>" for name, said in facts.items()
    )
    first = found.schedules[0]
    body = f"""{head}<section><h2>Given</h2><div class=wide><table class=pairs>{given}</table></div>
</section><section><h2>Against other rules</h2>{_bars(found)}{_table(found)}
<p class=dim>The limit is all arithmetic at full rate, spread evenly. A balance of 100 % means that
no rank waits. The schedule keeps to its shapes;
"exact", the same without that, and the other rules have a shape for every micro-step.</p></section>
<section><h2>The first batch, by rank</h2><div class=wide>{timeline(first)}</div>
{legend(_COLORS)}<p class=dim>{escaped(first.rule)}. {_drawn(first)}Paler is padding; gaps are
ranks waiting for the slowest, and fixed costs. Hold the pointer over a bar for its tokens.</p>
</section>"""
    return whole(title, body)


def _drawn(s: Assignment) -> str:
    ranks = s.groups * s.parts
    return f"The first {_MOST} of {ranks} ranks. " if ranks > _MOST else ""


def _bars(found: Study) -> str:
    first, *others = rows(found)
    own = first.seconds
    drawn = [(first.name, [(2, own, first.name)], f"{number(own)} s")]
    drawn += [
        (
            r.name,
            [(7, min(r.seconds, _LONG * own), r.name)],
            f"{number(r.seconds)} s, {r.gain:.2f}×",
        )
        for r in others
    ]
    limit = own / first.over_limit
    drawn.append(("limit", [(0, limit, "limit")], f"{number(limit)} s"))
    cut = any(r.seconds > _LONG * own for r in others)
    note = f"<p class=dim>Bars end at {_LONG} times the schedule.</p>" if cut else ""
    return f"<div class=wide>{plan_page.stacked(drawn)}</div>{note}"


def _table(found: Study) -> str:
    heads = ("rule", "seconds", "skrull's gain", "over limit", "micro-steps", "padding", "balance",
             "distributed")  # fmt: skip
    body = ""
    for r in rows(found):
        cells = (
            number(r.seconds), f"{r.gain:.2f}×", f"{r.over_limit:.2f}×", f"{r.steps:,}",
            f"{r.padding:.1%}", f"{r.balance:.1%}", f"{r.distributed:.1%}",
        )  # fmt: skip
        figures = "".join(f"<td class=n>{escaped(c)}</td>" for c in cells)
        body += f"<tr><td>{escaped(r.name)}</td>{figures}</tr>"
    head = f"<th>{heads[0]}</th>" + "".join(f"<th class=n>{escaped(h)}</th>" for h in heads[1:])
    return f"<div class=wide><table><tr>{head}</tr>{body}</table></div>"


def timeline(s: Assignment) -> str:
    """The SVG of a batch: a row a rank, micro-step behind micro-step."""
    ranks = min(s.groups * s.parts, _MOST)
    seconds = s.rank_seconds().reshape(len(s.shapes), -1).max(1)
    starts = [s.cost.step_seconds + float(seconds[:j].sum()) for j in range(len(s.shapes))]
    tokens = s.tokens().reshape(len(s.shapes), -1, 2)
    attention = s.attention().reshape(len(s.shapes), -1, 2)
    left, total = 74.0, float(s.seconds)
    scale = (WIDTH - left - 16) / total
    bottom = 8 + ranks * BAR + (ranks - 1) // s.parts * GAP
    out = _axis(total, left, scale, bottom)
    for r in range(ranks):
        g, i = divmod(r, s.parts)
        y = 6 + r * BAR + g * GAP
        if i == 0:
            middle = y + min(s.parts, ranks - r) * BAR / 2 + 3
            out.append(svg.label(left - 8, middle, f"group {g}", "end"))
        for j, start in enumerate(starts):
            out.append(_step(s, j, start, tokens[j, r], attention[j, r], (left, y, scale), r))
    for start in starts[1:]:
        out.append(f'<path class="grid" d="M{left + start * scale:.2f} 4V{bottom}"/>')
    return svg.svg_of("timeline", bottom + 22, out, width=WIDTH)


def _axis(total: float, left: float, scale: float, bottom: int) -> list[str]:
    marks, out = svg.ticks(0.0, total, 8), []
    for tick in marks:
        x = left + tick * scale
        text = f"{tick * 1e3:g} ms" if total < 1 else f"{tick:g} s"
        out.append(f'<path class="grid" d="M{x:.1f} 4V{bottom}"/>')
        out.append(svg.label(x, bottom + 15, text, "end" if x > WIDTH - 30 else "middle"))
    return out


def _step(
    s: Assignment, j: int, start: float, tokens: Any, attention: Any, at: tuple, rank: int
) -> str:
    """Draws the work of one rank in one micro-step, on the time axis of all."""
    left, y, scale = at
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
    x, bars = left + (start + c.micro_seconds) * scale, []
    for color, length, paler in (
        (_COLORS["local sequences"], local + mine - empty[0], False),
        (_COLORS["local sequences"], empty[0], True),
        (_COLORS["distributed sequences"], rest + shared - empty[1], False),
        (_COLORS["distributed sequences"], empty[1], True),
        (_COLORS["waiting for the exchange"], waits, False),
    ):
        wide = length * scale
        if wide > 0.05:
            bars.append(
                f'<rect x="{x:.2f}" y="{y}" width="{wide:.2f}" height="{BAR - 2}" '
                f'style="fill:{svg.color(color)}"{_PALE * paler}/>'
            )
        x += wide
    return f"<g><title>{escaped(told)}</title>{''.join(bars)}</g>"

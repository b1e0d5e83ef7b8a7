"""Samples of a run: the first and last answers to the same prompts, side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl_eff.cli.pages.curves import by_stage
from jaxrl_eff.cli.pages.page import note, plain, section, table
from jaxrl_eff.cli.pages.svg import Html, escaped
from jaxrl_eff.train.console import number

_LONGEST_TEXT = 1200


def answers(samples: Sequence[Mapping[str, Any]]) -> str:
    """Held-out answers over the whole run, then what each stage sampled."""
    held = [row for row in samples if row.get("held_out")]
    groups = {"held out": held} if held else {}
    groups |= by_stage(row for row in samples if not row.get("held_out"))
    parts = [f"<h3>{escaped(name)}</h3>{_first_and_last(rows)}" for name, rows in groups.items()]
    return section("Samples", *parts)


def _first_and_last(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same prompts side by side at the first and the last step, or else one after the other."""
    first, last = min(r["step"] for r in rows), max(r["step"] for r in rows)
    early = {str(r.get("prompt", "")): r for r in rows if r["step"] == first}
    late = {str(r.get("prompt", "")): r for r in rows if r["step"] == last}
    both = [prompt for prompt in early if prompt in late]
    if first != last and both:
        heads = ["prompt", _moment(early[both[0]]), "reward", _moment(late[both[0]]), "reward"]
        lines = [[_said(p), *_answer(early[p]), *_answer(late[p])] for p in both[:8]]
        return table(heads, lines, "samples")
    lines = [
        [str(step), _said(p), *_answer(r)]
        for step, group in {first: early, last: late}.items()
        for p, r in list(group.items())[:6]
    ]
    return table(["step", "prompt", "completion", "reward"], lines, "samples")


def _moment(row: Mapping[str, Any]) -> str:
    return f"{row.get('stage', '')}, step {row['step']}"


def _answer(row: Mapping[str, Any]) -> list[Html]:
    reward = row.get("reward")
    shown = number(reward) if isinstance(reward, int | float) else ""
    named = ("step", "stage", "prompt", "completion", "reward", "held_out", "example")
    rest = [f"{key}: {plain(value)}" for key, value in row.items() if key not in named]
    more = note(", ".join(rest)) if rest else ""
    return [
        Html(_said(row.get("completion", "")) + more),
        Html(f"<span class=reward>{escaped(shown)}</span>"),
    ]


def _said(value: Any) -> Html:
    text = str(value)
    if not text.strip():
        return Html("<div class='said dim'>(empty)</div>")
    cut = text[:_LONGEST_TEXT] + (" […]" if len(text) > _LONGEST_TEXT else "")
    return Html(f"<div class=said>{escaped(cut)}</div>")

"""The page of what a model remembers: needles found by depth and length, loss by position."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl_eff.cli.pages import page as frame
from jaxrl_eff.cli.pages import svg

Grid = Mapping[tuple[int, float], float]  # (length, depth) -> share

_WIDE, _HIGH, _LEFT, _TOP = 62, 26, 66, 8  # of a cell, and what stands before the cells


def page(title: str, found: Grid, loss: Sequence[Any]) -> str:
    """Both figures on a page that holds all it shows."""
    mean = sum(found.values()) / len(found)
    curve = [frame.charts([frame.figure("nats a token", {"": list(loss)})])] if loss else []
    return frame.whole(
        title,
        frame.head(title, f"{mean:.0%} of the needles are found."),
        frame.section(
            "Needles by depth and length",
            frame.wide(_heat(found)),
            frame.note("Depth 0 % is the beginning of the text; lengths are tokens."),
        ),
        frame.section("Loss by position", *curve),
    )


def _heat(found: Grid) -> str:
    """The grid as an SVG: a column a length, a row a depth, greener for more found."""
    lengths, depths = (sorted({k[i] for k in found}) for i in (0, 1))
    parts = []
    for (length, depth), share in found.items():
        x, y = _LEFT + lengths.index(length) * _WIDE, _TOP + depths.index(depth) * _HIGH
        parts.append(
            f'<rect x="{x}" y="{y}" width="{_WIDE - 3}" height="{_HIGH - 3}" rx="3" '
            f'style="fill:{svg.color(2)}" fill-opacity="{0.08 + 0.92 * share:.3f}"/>'
        )
        parts.append(svg.label(x + _WIDE / 2 - 1, y + 15, f"{share:.0%}", "middle", "cell"))
    bottom = _TOP + len(depths) * _HIGH
    for i, depth in enumerate(depths):
        parts.append(svg.label(_LEFT - 8, _TOP + i * _HIGH + 15, f"{depth:.0%}", "end"))
    for i, length in enumerate(lengths):
        parts.append(svg.label(_LEFT + (i + 0.5) * _WIDE - 1, bottom + 13, f"{length:,}", "middle"))
    width = _LEFT + len(lengths) * _WIDE
    drawn = svg.svg_of("grid-of-shares", bottom + 20, parts, width=width)
    return f'<div style="max-width:{1.3 * width:.0f}px">{drawn}</div>'

r"""Measures how far back a model remembers: hidden needles by depth and length, loss by position.

  python -m jaxrl_eff needle --model=runs/long --lengths=64,128,256,512 --page=needle.html
  python -m jaxrl_eff needle --model=DIR --lengths=1024,4096,16384 --text=book.txt

A needle is found if every token of its answer is the likeliest one after those before it. With a
tokenizer of characters the needle is a digit in a row of letters (`data/needles.py`); otherwise a
sentence with a number, at depths from the begin to the end of the text given. With --text the loss
of that text is shown by position as well: a model that uses its context gets better along it.

Exit codes: 0 measured; 2 something in the command is wrong.
"""

import argparse
import functools
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_eff.checkpoints import load_hf, read_config
from jaxrl_eff.cli.generate import find
from jaxrl_eff.cli.pages import page as frame
from jaxrl_eff.cli.pages import svg as charts
from jaxrl_eff.cli.pages.svg import escaped
from jaxrl_eff.data import needles
from jaxrl_eff.data.tokenizer import CharTokenizer, Tokenizer, load_tokenizer
from jaxrl_eff.models import LMConfig, apply, unembed
from jaxrl_eff.parallel import Placement, host
from jaxrl_eff.parallel.attention import sequence
from jaxrl_eff.train import config_file
from jaxrl_eff.types import Array, Float, Int, PyTree

Grid = dict[tuple[int, float], float]  # (length, depth) -> share

SENTENCE, ASKED = " The number of the harbour is {}.", "\nThe number of the harbour is"
_WHOLE = 2048  # tokens
BINS = 24  # of positions, in the figure of the loss
WINDOWS = 8  # of the text, at most


class Case(NamedTuple):
    """Tokens of a text with a needle and of the answer behind it."""

    length: int
    depth: float
    tokens: list[int]
    answer: int  # how many of the last tokens are the answer


def cases(
    tokenizer: Tokenizer, lengths: Sequence[int], depths: int, samples: int, text: str, seed: int
) -> list[Case]:
    """Needles at evenly spaced depths of every length, different ones in every sample.

    Raises:
        ValueError: there is no text to hide a sentence in, or a length has no room for it.
    """
    out, rng = [], np.random.default_rng(seed)
    places = [i / max(depths - 1, 1) for i in range(depths)]
    letters = isinstance(tokenizer, CharTokenizer)
    hay = [] if letters else tokenizer.encode(text)
    if not letters and not hay:
        raise ValueError("--text=FILE is needed: the text that needles are hidden in.")
    for length in lengths:
        for depth in places:
            for _ in range(samples):
                if letters:
                    if length < 6:
                        raise ValueError(f"--lengths has {length}; a needle needs 6 or more.")
                    row = needles.hidden(length - 2, depth, int(rng.integers(10)), rng)
                    ids = tokenizer.encode(row["prompt"], special=True)
                    answer = tokenizer.encode(row["truth"])
                else:
                    ids, answer = _sentence(tokenizer, hay, length, depth, rng)
                out.append(Case(length, depth, [*ids, *answer], len(answer)))
    return out


def _sentence(
    tokenizer: Tokenizer, hay: list[int], length: int, depth: float, rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    number = f"{rng.integers(1000, 10_000)}"
    needle, asked = tokenizer.encode(SENTENCE.format(number)), tokenizer.encode(ASKED)
    answer = tokenizer.encode(f" {number}")
    room = length - len(needle) - len(asked) - len(answer) - 1
    if room < 1:
        raise ValueError(
            f"--lengths has {length}, but needle and question alone take {-room} more."
        )
    start = int(rng.integers(len(hay)))
    around = [hay[(start + i) % len(hay)] for i in range(room)]
    at = round(depth * room)
    first = [tokenizer.bos] if tokenizer.bos is not None else []
    return [*first, *around[:at], *needle, *around[at:], *asked], answer


@functools.partial(jax.jit, static_argnums=0)
def _read(
    cfg: LMConfig, params: PyTree, tokens: Int[Array, "1 T"], length: Int[Array, ""]
) -> tuple[Float[Array, "T"], Int[Array, "T"]]:
    """log p of every token, and the likeliest one in its place, a piece of the text at a time."""
    at = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    # In pieces: whole scores of a long text would not fit into memory.
    attend = sequence.attend(Placement((0,))) if tokens.shape[1] > _WHOLE else None
    hidden, _ = apply(cfg, params, tokens, at, (at < length).astype(jnp.int32), attend=attend)
    following = jnp.roll(tokens, -1, axis=1)[0]
    pieces = max(1, math.ceil(hidden.shape[1] * cfg.vocab / 2**25))
    each = math.ceil(hidden.shape[1] / pieces)
    extra = pieces * each - hidden.shape[1]

    def of(piece: Any) -> Any:
        h, y = piece
        logits = jax.nn.log_softmax(unembed(cfg, params, h))
        return jnp.take_along_axis(logits, y[:, None], 1)[:, 0], logits.argmax(-1).astype(jnp.int32)

    cut = jnp.pad(hidden[0], ((0, extra), (0, 0))).reshape(pieces, each, -1)
    found = jax.lax.map(of, (cut, jnp.pad(following, (0, extra)).reshape(pieces, each)))
    logp, best = (jnp.roll(x.reshape(-1)[: tokens.shape[1]], 1) for x in found)
    return logp, best


def found(cfg: LMConfig, params: PyTree, case: Case) -> bool:
    """Returns True where the likeliest tokens are the answer's."""
    row = np.zeros((1, _padded(len(case.tokens))), np.int32)
    row[0, : len(case.tokens)] = case.tokens
    _, best = _read(cfg, params, jnp.asarray(row), jnp.int32(len(case.tokens)))
    end = len(case.tokens)
    return bool(
        (np.asarray(best)[end - case.answer : end] == row[0, end - case.answer : end]).all()
    )


def _padded(n: int) -> int:
    return -(-n // 64) * 64


def grid(
    cfg: LMConfig, params: PyTree, all_cases: Sequence[Case]
) -> dict[tuple[int, float], float]:
    """(length, depth) -> share of needles that are found."""
    seen: dict[tuple[int, float], list[bool]] = {}
    for case in all_cases:
        seen.setdefault((case.length, case.depth), []).append(found(cfg, params, case))
    return {k: sum(v) / len(v) for k, v in seen.items()}


def by_position(
    cfg: LMConfig, params: PyTree, ids: Sequence[int], length: int
) -> list[tuple[float, float]]:
    """(position, mean loss in nats a token) in bins whose width grows along a window of the text.

    Raises:
        ValueError: the text is shorter than a window.
    """
    windows = min(WINDOWS, len(ids) // length)
    if not windows:
        raise ValueError(f"--text has {len(ids)} tokens; the longest of --lengths is {length}.")
    rows = np.asarray(ids[: windows * length], np.int32).reshape(windows, 1, length)
    loss = np.mean([-np.asarray(_read(cfg, params, row, jnp.int32(length))[0]) for row in rows], 0)
    edges = np.unique(np.geomspace(1, length, BINS + 1).astype(int))
    bins = itertools.pairwise(edges)
    return [(float((a + b) / 2), float(loss[a:b].mean())) for a, b in bins]


def heat(found_: Grid) -> str:
    """The grid as an SVG: a column a length, a row a depth, greener for more found."""
    lengths, depths = (sorted({k[i] for k in found_}) for i in (0, 1))
    wide, high, left, top = 62, 26, 66, 8
    parts = []
    for (length, depth), share in found_.items():
        x, y = left + lengths.index(length) * wide, top + depths.index(depth) * high
        parts.append(
            f'<rect x="{x}" y="{y}" width="{wide - 3}" height="{high - 3}" rx="3" '
            f'fill="{charts.color(2)}" fill-opacity="{0.08 + 0.92 * share:.3f}"/>'
            f'<text x="{x + wide / 2 - 1}" y="{y + 15}" text-anchor="middle" '
            f'style="fill:var(--fg)">{share:.0%}</text>'
        )
    bottom = top + len(depths) * high
    for i, depth in enumerate(depths):
        y = top + i * high + 15
        parts.append(f'<text x="{left - 8}" y="{y}" text-anchor="end">{depth:.0%}</text>')
    for i, length in enumerate(lengths):
        x = left + i * wide + wide / 2 - 1
        parts.append(f'<text x="{x}" y="{bottom + 13}" text-anchor="middle">{length:,}</text>')
    width = left + len(lengths) * wide
    svg = charts.svg_of("chart", bottom + 20, parts, width=width)
    return f'<div style="max-width:{1.3 * width:.0f}px">{svg}</div>'


def page(title: str, found_: Grid, loss: Sequence[Any]) -> str:
    """Both figures on a page that holds all it shows."""
    mean = sum(found_.values()) / len(found_)
    body = (
        f"<header><h1>{escaped(title)}</h1><p class=lead>{mean:.0%} of the needles are "
        "found.</p></header><section><h2>Needles by depth and length</h2><div class=wide>"
        f"{heat(found_)}</div><p class=dim>Depth 0 % is the begin of the text; lengths are tokens."
        "</p></section>"
    )
    if loss:
        body += (
            "<section><h2>Loss by position</h2>"
            f"{frame.figure('nats a token', {'': list(loss)})}</section>"
        )
    return frame.whole(title, body)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints and draws."""
    parser = config_file.Parser(
        prog="python -m jaxrl_eff needle",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add: Any = parser.add_argument
    add("--model", required=True, help="a Hugging Face directory, or the workdir of a run")
    add("--lengths", default="64,128,256", help="tokens, separated by commas (%(default)s)")
    add("--depths", type=int, default=5, help="how many (%(default)s)")
    add("--samples", type=int, default=8, help="needles a length and depth (%(default)s)")
    add("--text", help="a file: hides the needles, and its loss is shown by position")
    add("--seed", type=config_file.SEED, default=0, help="of the needles (%(default)s)")
    add("--page", metavar="FILE.html", help="draws both figures")
    args = parser.parse_args(argv)
    with config_file.explained():
        _run(args)


def _run(args: argparse.Namespace) -> None:
    host.devices()
    try:
        lengths = sorted({int(n) for n in args.lengths.split(",")})
    except ValueError:
        raise ValueError(f"--lengths={args.lengths} is no list of integers.") from None
    for name in ("depths", "samples"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}, but must be at least 1.")
    directory = find(args.model)
    cfg = read_config(directory)
    if cfg.head != "lm":
        raise ValueError(f"{directory} holds a value model, which says nothing.")
    if lengths[0] < 1:
        raise ValueError(f"--lengths has {lengths[0]}, but must be at least 1.")
    if lengths[-1] > cfg.max_length:
        print(
            f"note: {lengths[-1]} tokens are more than the model's {cfg.max_length}.",
            file=sys.stderr,
        )
    text = Path(args.text).read_text(encoding="utf-8") if args.text else ""
    tokenizer = load_tokenizer(directory)
    all_cases = cases(tokenizer, lengths, args.depths, args.samples, text, args.seed)
    params = load_hf(directory, cfg)
    share = grid(cfg, params, all_cases)
    depths = sorted({depth for _, depth in share})
    print("needles found, by depth and length in tokens")
    print(" " * 6 + "".join(f"{n:>9,}" for n in lengths))
    for depth in depths:
        print(f"{depth:>6.0%}" + "".join(f"{share[n, depth]:>9.0%}" for n in lengths))
    loss = []
    if text:
        loss = by_position(cfg, params, tokenizer.encode(text), lengths[-1])
        print("\nloss of the text, nats a token")
        for at, value in loss:
            print(f"{at:>9,.0f} {value:9.4f}")
    if args.page:
        path = Path(args.page)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(f"What {args.model} remembers", share, loss), encoding="utf-8")
        print(f"written: {path}")

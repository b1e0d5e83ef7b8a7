"""Measures how far back a model remembers.

  python -m jaxrl_eff needle --model=runs/long --lengths=64,128,256,512 --page=needle.html
  python -m jaxrl_eff needle --model=DIR --lengths=1024,4096,16384 --text=book.txt

A needle is a short fact hidden in a long text, which the model is then asked for. The command hides
needles at several depths in texts of several lengths, and prints the share that is found: those
where every token of the answer is the likeliest one. If the model's tokens are single characters,
a needle is a digit in a row of letters; else it is a sentence with a number in the text of --text.
With --text the loss of that text is printed by position, too: it falls along the text if the model
uses its context.

Exit codes: 0 measured; 2 the command cannot be done.
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

from jaxrl_eff.checkpoints import load_hf
from jaxrl_eff.cli import parser
from jaxrl_eff.cli.generate import find, language_model
from jaxrl_eff.cli.pages import needle_page
from jaxrl_eff.data import needles
from jaxrl_eff.data.tokenizer import CharTokenizer, Tokenizer, load_tokenizer
from jaxrl_eff.models import LMConfig, apply, unembed
from jaxrl_eff.parallel import Placement, host
from jaxrl_eff.parallel.attention import sequence
from jaxrl_eff.train.console import Console
from jaxrl_eff.types import Array, Float, Int, PyTree

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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    words = parser.command("needle", __doc__)
    add = words.option
    add("--model", "DIR", parser.MODEL)
    add("--lengths", "N,N", "lengths of the texts in tokens", parser.numbers(int), [64, 128, 256])
    add("--depths", "N", "number of depths, evenly from beginning to end", parser.COUNT, 5)
    add("--samples", "N", "needles for each length and depth", parser.COUNT, 8)
    add("--text", "FILE", "text to hide needles in and to measure the loss of", default="")
    add("--seed", "N", parser.SEED_OF, parser.SEED, 0)
    add("--page", "FILE.html", parser.PAGE, default=None)
    return words.run(argv, _run)


def _run(args: argparse.Namespace) -> None:
    host.devices()
    lengths = sorted(set(args.lengths))
    directory = find(args.model)
    cfg = language_model(directory)
    if lengths[0] < 1:
        raise ValueError(f"--lengths has {lengths[0]}, but must be at least 1.")
    if lengths[-1] > cfg.max_length:
        note = f"note: {lengths[-1]} tokens are more than the model's {cfg.max_length}."
        print(note, file=sys.stderr)
    text = Path(args.text).read_text(encoding="utf-8") if args.text else ""
    tokenizer = load_tokenizer(directory)
    all_cases = cases(tokenizer, lengths, args.depths, args.samples, text, args.seed)
    params = load_hf(directory, cfg)
    share = grid(cfg, params, all_cases)
    console = Console(terminal=False)
    depths = sorted({depth for _, depth in share})
    rows = [[f"{d:.0%}", *(f"{share[n, d]:.0%}" for n in lengths)] for d in depths]
    columns = ["depth", *(f"{n:,}" for n in lengths)]
    console.table("needles found, by depth and length in tokens", columns, rows)
    loss = []
    if text:
        loss = by_position(cfg, params, tokenizer.encode(text), lengths[-1])
        rows = [[f"{at:,.0f}", f"{value:.4f}"] for at, value in loss]
        console.table("loss of the text", ["position", "nats a token"], rows)
    if args.page:
        title = f"What {args.model} remembers"
        parser.write_page(args.page, needle_page.page(title, share, loss))

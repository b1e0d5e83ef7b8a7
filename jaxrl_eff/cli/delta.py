"""Stores what a fine-tune changed as a small file, and applies, removes or adds up such files.

  python -m jaxrl_eff delta diff --base=DIR --tuned=DIR --out=FILE
  python -m jaxrl_eff delta show FILE
  python -m jaxrl_eff delta audit --base=DIR --delta=FILE --max_rms=0.05
  python -m jaxrl_eff delta apply --base=DIR --delta=FILE --out=DIR --max_rms=0.05 --undo=FILE
  python -m jaxrl_eff delta remove --model=DIR --delta=FILE --out=DIR
  python -m jaxrl_eff delta compose FILE FILE --weights=1,0.5 --out=FILE

Every DIR is a Hugging Face directory. Inputs are read one tensor at a time and never changed.
Exit codes: 0 done; 1 the delta exceeds one of the --max limits (`apply` then writes nothing);
2 the command cannot be done.
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_eff.checkpoints import deltas, read_config
from jaxrl_eff.checkpoints.deltas.coding import bound
from jaxrl_eff.checkpoints.deltas.file import index_bytes
from jaxrl_eff.cli import parser
from jaxrl_eff.data.tokenizer import load_tokenizer
from jaxrl_eff.train.console import Console


def _diff(args: argparse.Namespace) -> None:
    _free(args.out)
    base, tuned = (deltas.read_directory(d) for d in (args.base, args.tuned))
    delta = deltas.diff(base, tuned, originals=not args.no_originals, method=args.method)
    _saved(delta, args.out)


def _show(args: argparse.Namespace) -> None:
    delta, indices = deltas.load(args.file), index_bytes(args.file)
    size = Path(args.file).stat().st_size
    facts = {
        "base": _plain(delta.base) or "unknown",
        "semantics": delta.semantics + (", with originals" if delta.reversible else ""),
        "method": _plain(delta.method) or "not said",
        "granularity": _plain(delta.granularity),
        "entries": f"{delta.count:,} ({delta.density:.3%} of the tensors below)",
        "size": f"{size:,} bytes, {size / max(1, delta.count):.2f} an entry",
    }
    rows = []
    for name, e in delta.tensors.items():
        shape = "x".join(map(str, e.shape)) or "scalar"
        each, least = 8 * indices[name] / len(e), bound(len(e), e.size)
        numbers = f"{len(e):,}", f"{len(e) / e.size:.3%}", f"{each:.2f}", f"{least:.2f}"
        rows.append((_plain(name), shape, e.dtype, *numbers))
    columns = ("tensor", "shape", "dtype", "entries", "share", "bits/index", "bound")
    console = Console(terminal=False, width=shutil.get_terminal_size((100, 24)).columns)
    console.header(args.file, facts)
    console.table("", columns, rows)


def _plain(text: str) -> str:
    """Text of a file as it may be printed: what moves a terminal's cursor is spelt out."""
    return text if text.isprintable() else repr(text)[1:-1]


def _audit(args: argparse.Namespace) -> None:
    limits, kl = _asked(args)
    delta = deltas.load(args.delta, base=deltas.read_directory(args.base))
    found = deltas.audit_directory(args.base, delta, limits=limits, kl=kl)
    _told(found, args.json)


def _apply(args: argparse.Namespace) -> None:
    limits, kl = _asked(args)
    delta = deltas.load(args.delta, base=deltas.read_directory(args.base))
    if args.undo:
        _free(args.undo)
    try:
        found = deltas.merge(args.base, delta, args.out, limits=limits, kl=kl, undo=args.undo)
    except deltas.AuditError as error:
        print(f"{args.out} is not written:", file=sys.stderr)
        found = error.audit
    _told(found, args.json)
    print(f"{args.out}: {deltas.content_hash(deltas.read_directory(args.out))}")


def _remove(args: argparse.Namespace) -> None:
    delta = deltas.load(args.delta, base=deltas.read_directory(args.model))
    deltas.rollback(args.model, delta, args.out)
    print(f"{args.out}: {delta.base}, the base again.")


def _compose(args: argparse.Namespace) -> None:
    _free(args.out)
    weights = args.weights or [1.0] * len(args.files)
    if len(weights) != len(args.files):
        raise ValueError(f"there are {len(args.files)} files, but {len(weights)} --weights.")
    parts = [deltas.load(file) for file in args.files]
    delta = deltas.compose(parts, weights)
    for (i, j), both in deltas.overlaps(parts).items():
        print(
            f"{args.files[i]} and {args.files[j]}: {both.shared:,} entries in both "
            f"(Jaccard {both.jaccard:.3g}), {both.conflict_rate:.1%} of them with opposite signs."
        )
    _saved(delta, args.out)


def _saved(delta: deltas.Delta, path: str) -> None:
    size = deltas.save(delta, path)
    each = size / max(1, delta.count)
    print(f"{path}: {delta.count:,} entries, {size:,} bytes ({each:.2f} an entry).")


def _told(found: deltas.Audit, path: str | None) -> None:
    """Prints an audit; ends the program where it failed."""
    print(found.text())
    if path:
        Path(path).write_text(found.json() + "\n", encoding="utf-8")
    if not found.passed:
        raise SystemExit(1)


def _free(path: str) -> None:
    if Path(path).exists():
        raise FileExistsError(f"{path} is there already.")


def _asked(args: argparse.Namespace) -> tuple[deltas.Limits, Callable[[Any, Any], float] | None]:
    """The limits, and what measures KL if there is a probe set."""
    given = {name: getattr(args, f"max_{name}") for name in ("share", "rms", "largest", "kl")}
    limits = deltas.Limits(**given)
    if args.probe is None:
        if limits.kl is not None:
            raise ValueError("--max_kl needs --probe=FILE, with a text a line.")
        return limits, None
    return limits, deltas.hf_kl(_rows(args.base, Path(args.probe), args.probe_tokens))


def _rows(directory: str, path: Path, length: int) -> np.ndarray:
    """The lines of a file as rows of tokens, cut at `length`, padded with -1."""
    if length < 1:
        raise ValueError(f"--probe_tokens={length} should be at least 1.")
    length = min(length, read_config(directory).max_length)
    tokenizer = load_tokenizer(directory)
    lines = [x for x in path.read_text(encoding="utf-8").splitlines() if x.strip()]
    if not lines:
        raise ValueError(f"--probe={path}: it holds no text.")
    ids = [tokenizer.encode(line, special=True)[:length] for line in lines]
    width = max(map(len, ids))
    return np.array([row + [-1] * (width - len(row)) for row in ids], np.int32)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    words = parser.command("delta", __doc__)
    commands = words.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], what: str) -> parser.Parser:
        sub = commands.add_parser(name, prog=f"{words.prog} {name}", help=what, description=what)
        sub.set_defaults(run=run)
        return sub

    sub = command("diff", _diff, "write the difference of two models to a file")
    sub.option("--base", "DIR", "the model before fine-tuning")
    sub.option("--tuned", "DIR", "the model after it, with the same tensors")
    sub.option("--out", "FILE", "where to write the delta")
    sub.option("--method", "TEXT", "how it was trained, to be recorded", default="")
    sub.flag("--no_originals", "leave out old values: smaller, but no `remove` or `compose`")
    sub = command("show", _show, "print what a delta contains, tensor by tensor")
    sub.add_argument("file", metavar="FILE", help="the delta")
    _audited(command("audit", _audit, "measure how much a delta would change its base"))
    sub = command("apply", _apply, "write base plus delta, if it stays within the limits")
    sub.option("--out", "DIR", "where to write the model")
    sub.option("--undo", "FILE", "also write a delta with originals, for `remove`", default=None)
    _audited(sub)
    sub = command("remove", _remove, "restore the base exactly; its hash is checked")
    sub.option("--model", "DIR", "what `apply` wrote")
    sub.option("--delta", "FILE", "the delta, with originals")
    sub.option("--out", "DIR", "where to write the base")
    sub = command("compose", _compose, "write the weighted sum of deltas of one base")
    sub.add_argument("files", nargs="+", metavar="FILE", help="deltas, with originals")
    each = "one weight for each delta, e.g. 1,0.5 (default: all 1)"
    sub.option("--weights", "N,N", each, parser.numbers(float), None)
    sub.option("--out", "FILE", "where to write the delta")
    return words.run(argv, lambda args: args.run(args))


def _audited(sub: parser.Parser) -> None:
    sub.option("--base", "DIR", "the model that the delta was made for")
    sub.option("--delta", "FILE", "the delta")
    sub.option("--max_share", "X", "most changed entries of a tensor, as a share", float, None)
    sub.option("--max_rms", "X", "largest ||change|| / ||tensor||", float, None)
    sub.option("--max_largest", "X", "largest |change| / |weight| of an entry", float, None)
    sub.option("--max_kl", "X", "largest KL from the base on --probe, nats a token", float, None)
    sub.option("--probe", "FILE", "texts on which KL is measured, one a line", default=None)
    sub.option("--probe_tokens", "N", "tokens of each line that are read", int, 512)
    sub.option("--json", "FILE", "also write the audit as JSON", default=None)

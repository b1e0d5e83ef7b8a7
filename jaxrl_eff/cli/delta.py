"""Deltas of Hugging Face directories: what a fine-tune changed, as a small file.

  python -m jaxrl_eff delta diff --base=DIR --tuned=DIR --out=FILE
  python -m jaxrl_eff delta show FILE
  python -m jaxrl_eff delta audit --base=DIR --delta=FILE --max_rms=0.05
  python -m jaxrl_eff delta apply --base=DIR --delta=FILE --out=DIR --max_rms=0.05 --undo=FILE
  python -m jaxrl_eff delta remove --model=DIR --delta=FILE --out=DIR
  python -m jaxrl_eff delta compose FILE FILE --weights=1,0.5 --out=FILE

Directories are read a tensor at a time and never changed. `apply` refuses what fails the audit of
the limits that were given: exit status 1. What cannot be done at all is one line and status 2.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_eff.checkpoints import deltas, read_config
from jaxrl_eff.checkpoints.deltas.coding import bound
from jaxrl_eff.checkpoints.deltas.file import index_bytes
from jaxrl_eff.data.tokenizer import load_tokenizer
from jaxrl_eff.train import config_file


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
    for name, value in facts.items():
        print(f"{name:11}  {value}")
    width = max([6, *(len(_plain(name)) for name in delta.tensors)])
    head = ("tensor", "shape", "dtype", "entries", "share", "bits/index", "bound")
    row = f"{{:{width}}}  {{:>14}}  {{:>9}}  {{:>12}}  {{:>8}}  {{:>10}}  {{:>6}}"
    print(row.format(*head))
    for name, e in delta.tensors.items():
        shape = "x".join(map(str, e.shape)) or "scalar"
        each, least = 8 * indices[name] / len(e), bound(len(e), e.size)
        numbers = f"{len(e):,}", f"{len(e) / e.size:.3%}", f"{each:.2f}", f"{least:.2f}"
        print(row.format(_plain(name), shape, e.dtype, *numbers))


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


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} should be numbers: 1,0.5") from None


def _parser() -> argparse.ArgumentParser:
    parser = config_file.Parser(
        prog="python -m jaxrl_eff delta", allow_abbrev=False, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, parser_class=config_file.Parser)

    def command(name: str, run: Callable[[argparse.Namespace], None], what: str) -> Any:
        sub = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub.add_argument

    def audited(add: Any) -> None:
        add("--max_share", type=float, help="most changed entries of a tensor, as a share")
        add("--max_rms", type=float, help="largest ||change|| / ||tensor||")
        add("--max_largest", type=float, help="largest |change| / |weight| of an entry")
        add("--max_kl", type=float, help="KL from the base on the probe set, nats a token")
        add("--probe", help="a text a line, on which KL is measured")
        add("--probe_tokens", type=int, default=512, help="of each line (default 512)")
        add("--json", help="write the audit here as well")

    add = command("diff", _diff, "what a fine-tune changed, as a file")
    add("--base", required=True, help="a Hugging Face directory")
    add("--tuned", required=True, help="another, with the same tensors")
    add("--out", required=True, help="the file to write")
    add("--method", default="", help="how it was trained, for the record")
    add("--no_originals", action="store_true", help="smaller, but cannot be removed or composed")
    add = command("show", _show, "what is in a file")
    add("file")
    add = command("audit", _audit, "what a delta would do to its base")
    add("--base", required=True, help="the Hugging Face directory that it was made for")
    add("--delta", required=True, help="the file")
    audited(add)
    add = command("apply", _apply, "base and delta -> model, if the audit is passed")
    add("--base", required=True, help="the Hugging Face directory that it was made for")
    add("--delta", required=True, help="the file")
    add("--out", required=True, help="the directory to write")
    add("--undo", help="write a delta with originals here, for `remove`")
    audited(add)
    add = command("remove", _remove, "model and delta -> base, proven by its hash")
    add("--model", required=True, help="what `apply` wrote")
    add("--delta", required=True, help="the file, with originals")
    add("--out", required=True, help="the directory to write")
    add = command("compose", _compose, "the weighted sum of deltas of one base")
    add("files", nargs="+")
    add("--weights", type=_numbers, help="one for each file: 1,0.5 (default 1 each)")
    add("--out", required=True, help="the file to write")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command; what is wrong with it is one line and exit code 2."""
    parser = _parser()
    args = parser.parse_args(argv)
    with config_file.explained():
        args.run(args)

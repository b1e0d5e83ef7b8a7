"""Merging of a delta into a Hugging Face directory, and its removal.

The files are copied and the changed entries written into the copies, so memory holds the delta but
never the model, and unchanged data keeps every byte. The new directory is audited and then created
atomically.
"""

import re
import shutil
import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

from jaxrl_eff.checkpoints import load_hf, read_config
from jaxrl_eff.checkpoints.deltas.apply import check, put_into, resolved
from jaxrl_eff.checkpoints.deltas.audit import (
    Audit,
    AuditError,
    Divergence,
    Limits,
    Suite,
    asked,
    lm_kl,
    measured,
)
from jaxrl_eff.checkpoints.deltas.delta import Delta
from jaxrl_eff.checkpoints.deltas.file import save
from jaxrl_eff.checkpoints.deltas.tensors import content_hash, read_directory, read_file
from jaxrl_eff.checkpoints.hf_load import weight_files
from jaxrl_eff.types import Int

# Other copies of the weights, which would not have the delta.
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx|index\.json)")


def merge(
    directory: str | PathLike[str],
    delta: Delta,
    out: str | PathLike[str],
    *,
    limits: Limits = Limits(),
    kl: Divergence | None = None,
    suite: Suite | None = None,
    undo: str | PathLike[str] | None = None,
) -> Audit:
    """Writes the model with the delta, if the audit passes.

    Args:
        directory: of the base.
        delta: made for it, with the names of the tensors in its files.
        out: a directory that does not exist yet.
        limits, kl, suite: as in `audit.audit`, but base and tuned are directories; see `hf_kl`.
            Without any of them nothing can fail.
        undo: output file for the delta with originals and the base's hash, which `rollback` needs;
            None: the delta has them already, or they are not needed.

    Raises:
        AuditError: the audit failed; nothing is written.
        FileExistsError: `out` exists.
        ValueError: the delta is for another base; a file is damaged.
    """
    directory, out = _ends(directory, out)
    asked(limits, kl)
    base = read_directory(directory)
    delta = resolved(base, delta)
    partial = _beside(out)
    try:
        _write(directory, partial, delta, originals=False)
        models = (directory, partial)
        found = measured(base, delta, models, limits=limits, kl=kl, suite=suite)
        if not found.passed:
            raise AuditError(found)
        if undo is not None:
            save(delta, undo)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return found


def audit_directory(
    directory: str | PathLike[str],
    delta: Delta,
    *,
    limits: Limits = Limits(),
    kl: Divergence | None = None,
    suite: Suite | None = None,
) -> Audit:
    """Audits a delta as `merge` does, without merging.

    If `kl` or `suite` is given, the tuned model is written to a temporary directory.

    Raises:
        ValueError: the delta is for another base; a file is damaged.
    """
    directory = Path(directory)
    asked(limits, kl)
    base = read_directory(directory)
    delta = resolved(base, delta)
    with tempfile.TemporaryDirectory() as tuned:
        if kl or suite:
            _write(directory, Path(tuned), delta, originals=False)
        models = (directory, Path(tuned))
        return measured(base, delta, models, limits=limits, kl=kl, suite=suite)


def rollback(directory: str | PathLike[str], delta: Delta, out: str | PathLike[str]) -> None:
    """Restores the base from the model with the delta, verified by its hash.

    Args:
        directory: the output of `merge`.
        delta: with originals and the base's hash.
        out: a directory that does not exist yet.

    Raises:
        FileExistsError: `out` exists.
        ValueError: no originals, no hash; or the result is not the base, and is not written.
    """
    directory, out = _ends(directory, out)
    if not delta.reversible:
        raise ValueError("the delta holds no originals, so it cannot be taken back.")
    if not delta.base:
        raise ValueError("the delta does not know its base's hash, so nothing would be proven.")
    check(read_directory(directory), delta, content=False)
    partial = _beside(out)
    try:
        _write(directory, partial, delta, originals=True)
        if (there := content_hash(read_directory(partial))) != delta.base:
            raise ValueError(
                f"without the delta {directory} is {there}, not the base {delta.base}: it was not "
                "the base with this delta alone."
            )
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def hf_kl(rows: Int[Any, "B T"], *, dtype: str = "float32") -> Divergence:
    """Returns `audit.lm_kl` between Hugging Face directories; both models must fit in memory."""

    def kl(base: Path, tuned: Path) -> float:
        cfg = read_config(base).replace(dtype=dtype, param_dtype=dtype)
        return lm_kl(cfg, rows)(load_hf(base, cfg), load_hf(tuned, cfg))

    return kl


def _ends(directory: str | PathLike[str], out: str | PathLike[str]) -> tuple[Path, Path]:
    directory, out = Path(directory), Path(out)
    weight_files(directory)
    if out.exists():
        raise FileExistsError(f"{out} is there already; name a directory that is not.")
    return directory, out


def _beside(out: Path) -> Path:
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def _write(directory: Path, to: Path, delta: Delta, *, originals: bool) -> None:
    """Copies the directory's files, and writes the entries into the copied weights."""
    weights = weight_files(directory)
    texts = [p for p in directory.iterdir() if p.is_file() and not _WEIGHTS.fullmatch(p.name)]
    index = directory / "model.safetensors.index.json"
    for path in [*weights, *texts, *([index] if index.exists() else [])]:
        shutil.copyfile(path, to / path.name)
    for path in weights:
        tensors = read_file(to / path.name, write=True)[1]
        for name in tensors.keys() & delta.tensors.keys():
            put_into(tensors[name], delta.tensors[name], originals=originals)

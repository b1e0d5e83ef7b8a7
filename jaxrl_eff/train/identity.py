"""The identity of a run: the settings that affect its results, and hashes of the files they name.

A resumed run must compute the same results. Settings that affect only where it runs and how often
it reports are left out, by field name; data, models and adapters are compared by contents,
independently of their location.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxrl_eff.train import config_file
from jaxrl_eff.train.settings import Run, StageSettings

# Fields that do not affect results. A path is replaced by a hash of its contents.
FREE_RUN = ("simulate_devices", "checkpoint", "expect", "wandb", "export", "nonfinite", "stage")
FREE_STAGE = ("plan", "search", "evaluate", "samples_every", "sync")
# Files up to this size are hashed completely, larger ones at evenly spaced positions.
WHOLE_BYTES = 256 << 20
SAMPLES, SAMPLE_BYTES = 256, 1 << 20

Contents = dict[str, str]


def essence(run: Run, contents: Mapping[str, str]) -> dict[str, str]:
    """Returns all values that affect a run's results: path in the config -> value.

    Args:
        run: the settings.
        contents: see `contents_of`.
    """
    kept = {k: v for k, v in dataclasses.asdict(run).items() if k not in FREE_RUN}
    kept["model"].pop("path")
    for name in run.stages:
        kept[name] = _stage(run, run.stage[name])
    lines = dict(line.split(" = ", 1) for line in config_file.flat(kept))
    return lines | {f"contents of {path}": digest for path, digest in contents.items()}


def _stage(run: Run, stage: StageSettings) -> dict[str, Any]:
    kept = {k: v for k, v in dataclasses.asdict(stage).items() if k not in FREE_STAGE}
    kept["data"].pop("path")
    kept["models"] = {
        role: name if _of_run(run, name) else _unless_path(name)
        for role, name in stage.models.items()
    }
    for part in kept["adapt"].values():
        part["start"] = _unless_path(part["start"])
    return kept


def _of_run(run: Run, name: str) -> bool:
    """Returns True if a role starts from the base or a stage, even if a directory has that name."""
    return name == "base" or name.partition("/")[0] in run.stages


def _unless_path(name: str) -> str:
    return "a path" if name and Path(name).exists() else name


def contents_of(run: Run) -> Contents:
    """Returns hashes of all files and directories that a run reads, by their path in the config.

    A directory's hash is that of its files, sorted by name. Unreadable paths are left out: the code
    that needs them raises an error.
    """
    named = {"config.model.path": run.model.path}
    if not run.tokenizer.startswith("chars:") and run.tokenizer != "model":
        named["config.tokenizer"] = run.tokenizer
    for name in run.stages:
        stage = run.stage[name]
        named[f"config.{name}.data.path"] = stage.data.path
        named |= {
            f"config.{name}.models.{role}": path
            for role, path in stage.models.items()
            if not _of_run(run, path)
        }
        named |= {f"config.{name}.adapt.{role}.start": a.start for role, a in stage.adapt.items()}
    found = {}
    for path, file in named.items():
        if file and (digest := digest_of(Path(file))):
            found[path] = digest
    return found


def digest_of(path: Path) -> str:
    """Returns size and hash of a file, or of all files of a directory; "" if unreadable."""
    try:
        if path.is_file():
            size = path.stat().st_size
            return f"{size:,} bytes, {_hash(path, size)}"
        if not path.is_dir():
            return ""
        total, seen = 0, hashlib.blake2b(digest_size=8)
        for file in sorted(p for p in path.iterdir() if p.is_file() and _counts(p)):
            size = file.stat().st_size
            total += size
            seen.update(f"{file.name} {size} {_hash(file, size)}\n".encode(errors="replace"))
        return f"{total:,} bytes, {seen.hexdigest()}"
    except OSError:
        return ""


def _counts(path: Path) -> bool:
    """Returns True if a file of a directory affects results; for a model's, if it is read."""
    models = ("config.json", "adapter_config.json")
    if not any((path.parent / name).is_file() for name in models):
        return True
    return path.suffix in (".json", ".safetensors", ".model", ".jinja", ".txt")


def _hash(path: Path, size: int) -> str:
    seen = hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            while block := file.read(SAMPLE_BYTES):
                seen.update(block)
        else:
            for i in range(SAMPLES):
                file.seek((size - SAMPLE_BYTES) * i // (SAMPLES - 1))
                seen.update(file.read(SAMPLE_BYTES))
    return seen.hexdigest()


def fingerprint(run: Run, contents: Mapping[str, str] | None = None) -> str:
    """Hashes a run's essence, 16 hexadecimal digits; reads the files if `contents` is None."""
    return _hash_of(essence(run, contents_of(run) if contents is None else contents))


def _hash_of(essence_: Mapping[str, str]) -> str:
    text = json.dumps(essence_, sort_keys=True)
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Returns one line for every value that differs between two essences, its path first."""
    names = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
    return [f"{k} was {before.get(k, 'unset')}, is {now.get(k, 'unset')}" for k in names]


@dataclasses.dataclass(frozen=True)
class Identity:
    """The identity of a workdir's run, and of the same run before accepted changes.

    Attributes:
        fingerprint: for new checkpoints.
        accepted: fingerprints of older checkpoints, from before accepted changes.
        changes: lines of `differences` from the run so far.
        values: the run's `essence`.
    """

    fingerprint: str
    accepted: tuple[str, ...]
    changes: tuple[str, ...]
    values: dict[str, str]

    def document(self) -> dict[str, Any]:
        """Returns the contents of WORKDIR/identity.json."""
        return {
            "fingerprint": self.fingerprint, "accepted": self.accepted, "values": self.values
        }  # fmt: skip


def _holds(workdir: Path) -> str | None:
    """Returns the kind of a run's data in a workdir that another run would destroy, or None."""
    from jaxrl_eff.checkpoints import (
        manifest,  # imported late: it imports JAX, and config errors should be reported first
    )

    metrics, folder = workdir / "metrics.jsonl", workdir / "checkpoints"
    if metrics.is_file() and metrics.stat().st_size:
        return "metrics"
    kept = (folder / manifest.name(step) for step in manifest.steps(folder))
    return "checkpoints" if any(map(manifest.ours, kept)) else None


def identify(run: Run, workdir: Path, *, accept_changes: bool = False) -> Identity:
    """Compares a run with the one in a workdir.

    Raises:
        ValueError: they differ and changes are not accepted, with the first differing values; or
            the workdir has metrics or checkpoints but no identity.
    """
    values = essence(run, contents_of(run))
    mine = _hash_of(values)
    if (holds := _holds(workdir)) is None:
        return Identity(mine, (), (), values)
    try:
        before = json.loads((workdir / "identity.json").read_text(encoding="utf-8"))
        was, accepted = before["values"], tuple(before["accepted"])
        theirs, changes = before["fingerprint"], tuple(differences(was, values))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(
            f"--workdir={workdir} holds {holds} of a run, but no identity.json that says of which. "
            "Give this one its own directory, or delete that one."
        ) from None
    if changes and not accept_changes:
        raise ValueError(
            f"--workdir={workdir} holds a run of another config ({'; '.join(changes[:3])}). Give "
            "this one its own directory, delete that one, or go on with --accept_changes."
        )
    if changes:
        accepted = tuple(dict.fromkeys((*accepted, theirs)))
    return Identity(mine, accepted, changes, values)

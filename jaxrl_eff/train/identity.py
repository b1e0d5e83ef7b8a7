"""The identity of a run: the settings that decide its results, and contents of files they name.

A run that is continued must compute what it computed before. Settings that say only where it runs
and how often it reports are left out, by their place in the schema; data, models and adapters count
by their contents, wherever they lie.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxrl_eff.train import config_file
from jaxrl_eff.train.settings import Run, StageSettings

# Fields that change nothing of what is computed. A path counts by the contents of its file.
FREE_RUN = ("simulate_devices", "checkpoint", "expect", "wandb", "export", "nonfinite", "stage")
FREE_STAGE = ("plan", "search", "evaluate", "samples_every", "sync")
# Files up to this size are hashed whole, larger ones at evenly spaced places.
WHOLE_BYTES = 256 << 20
SAMPLES, SAMPLE_BYTES = 256, 1 << 20

Contents = dict[str, str]


def essence(run: Run, contents: Mapping[str, str]) -> dict[str, str]:
    """Everything that decides what a run computes: the path of a value in the config -> the value.

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
    if not stage.sync.exact:
        # After a checkpoint weights are sent whole, so its steps decide about later rounding.
        kept["sync"] = dataclasses.asdict(stage.sync)
        kept["checkpoint_every"] = run.checkpoint.every
    return kept


def _of_run(run: Run, name: str) -> bool:
    """True if a role starts from the base or a stage, whatever directory is called so, too."""
    return name == "base" or name.partition("/")[0] in run.stages


def _unless_path(name: str) -> str:
    return "a path" if name and Path(name).exists() else name


def contents_of(run: Run) -> Contents:
    """The config's path of every file or directory that a run learns from -> a hash of it.

    Directories count by their files, sorted by name. What cannot be read is left out: whoever needs
    it says so.
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
    """Bytes and a hash of a file, or of all files of a directory; "" if it cannot be read."""
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
    """True if a file of a directory decides what is computed; of a model's, files that are read."""
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
    """A hash of a run's essence, 16 hexadecimal digits; reads the files if `contents` is None."""
    return _hash_of(essence(run, contents_of(run) if contents is None else contents))


def _hash_of(essence_: Mapping[str, str]) -> str:
    text = json.dumps(essence_, sort_keys=True)
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """One line for every value that two essences differ in, the config's path first."""
    names = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
    return [f"{k} was {before.get(k, 'unset')}, is {now.get(k, 'unset')}" for k in names]


@dataclasses.dataclass(frozen=True)
class Identity:
    """The identity of a workdir's run, and of the same run before accepted changes.

    Attributes:
        fingerprint: of checkpoints that are written.
        accepted: fingerprints of older checkpoints, from before changes that were accepted.
        changes: lines of `differences` to the run so far.
        values: `essence`.
    """

    fingerprint: str
    accepted: tuple[str, ...]
    changes: tuple[str, ...]
    values: dict[str, str]

    def document(self) -> dict[str, Any]:
        """The contents of WORKDIR/identity.json."""
        return {
            "fingerprint": self.fingerprint, "accepted": self.accepted, "values": self.values
        }  # fmt: skip


def _holds(workdir: Path) -> str | None:
    """What of a run is in a workdir and would be lost to another one: metrics, checkpoints."""
    from jaxrl_eff.checkpoints import (
        manifest,  # late: it takes JAX with it, which mistakes need not wait for
    )

    metrics, folder = workdir / "metrics.jsonl", workdir / "checkpoints"
    if metrics.is_file() and metrics.stat().st_size:
        return "metrics"
    kept = (folder / manifest.name(step) for step in manifest.steps(folder))
    return "checkpoints" if any(map(manifest.ours, kept)) else None


def identify(run: Run, workdir: Path, *, accept_changes: bool = False) -> Identity:
    """Compares a run with the one that a workdir holds.

    Raises:
        ValueError: they differ and changes are not accepted, naming the first values that do; or
            the workdir has metrics or checkpoints and does not say of what.
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

"""Metrics and samples of a run, one line per step, in files that outlive the run.

`metrics.jsonl` and `samples.jsonl` are authoritative; TensorBoard and Weights & Biases get copies.
Every line is flushed, so a killed run loses at most the line being written, and a resumed run drops
the lines after the step it resumes from: the curves are those of an uninterrupted run.
"""

import json
import math
import socket
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxrl_eff import files


class Writer:
    """Appends to the files of a run directory. For process 0; elsewhere use `enabled=False`."""

    def __init__(
        self,
        workdir: str | Path,
        *,
        resume_step: int | None = None,
        resume_stage: str | None = None,
        evaluated: bool = True,
        tensorboard: bool = True,
        wandb: Mapping[str, Any] | None = None,
        enabled: bool = True,
        guard: Callable[[], None] = lambda: None,
    ):
        """Opens, or creates, the run directory.

        Args:
            workdir: has metrics.jsonl, samples.jsonl and tensorboard/.
            resume_step: the last valid step (0: none). Lines of later steps, and a line truncated
                by a kill, are removed. None: append.
            resume_stage: the stage of that step. Measurements of the next stage before its first
                step have the same number and will be repeated.
            evaluated: False: held-out measurements after `resume_step` will be repeated, so their
                lines are removed.
            wandb: arguments of `wandb.init` (project, name, ...); None: no W&B.
            enabled: False writes nothing at all.
            guard: called before anything is written; raises if another run now has the directory.

        Raises:
            ImportError: W&B is requested but not installed.
            OSError: a file cannot be written, here or later; the message has the path.
        """
        self._workdir = Path(workdir)
        self._enabled = enabled
        self._resume_step = resume_step
        self._tensorboard, self._guard = tensorboard, guard
        self._events: Any = None
        self._wandb: Any = None
        if not enabled:
            return
        if wandb is not None:
            self._wandb = _wandb_run(self._workdir, wandb)
        self._workdir.mkdir(parents=True, exist_ok=True)
        last = (resume_step, resume_stage, evaluated)
        self._metrics = _open(self._workdir / "metrics.jsonl", *last)
        self._samples = _open(self._workdir / "samples.jsonl", *last)

    def step(
        self,
        step: int,
        stage: str,
        values: Mapping[str, Any],
        *,
        seconds: Mapping[str, float | int] | None = None,
        tokens_per_s: float | int | None = None,
        flops_per_s: float | int | None = None,
        mfu: float | int | None = None,
    ) -> None:
        """Writes one step.

        Args:
            step: steps taken in the whole run, this one included, over all stages.
            values: metrics by name (`actor_train/kl`): anything that `float` accepts.
            seconds: by call.
            mfu: fraction of the peak in [0, 1], if the peak is known.
        """
        if not self._enabled:
            return
        self._guard()
        values = {name: float(value) for name, value in values.items()}
        rates = {"tokens_per_s": tokens_per_s, "flops_per_s": flops_per_s, "mfu": mfu}
        rates = {name: float(rate) for name, rate in rates.items() if rate is not None}
        seconds = {name: float(s) for name, s in (seconds or {}).items()}
        line = {"step": step, "stage": stage, "time": round(time.time(), 3), "values": values}
        _append(self._metrics, {**line, "seconds": seconds, **rates})
        flat = {**values, **{f"seconds/{name}": s for name, s in seconds.items()}, **rates}
        flat = {f"{stage}/{name}": value for name, value in flat.items()}
        if self._tensorboard:
            events = self._open_events()
            for name, value in flat.items():
                if math.isfinite(value):  # others cannot be plotted
                    events.scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(flat, step=step)

    def samples(self, step: int, stage: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes one line per row: prompt, completion, reward and any other keys."""
        if not self._enabled:
            return
        self._guard()
        for row in rows:
            _append(self._samples, {"step": step, "stage": stage, **row})

    def document(self, name: str, value: Any, *, merge: bool = False) -> None:
        """Writes `NAME.json` (config, plan, timeline, result) into the run directory, atomically.

        Args:
            merge: True to keep the file's other keys, from before the run was resumed.
        """
        if not self._enabled:
            return
        self._guard()
        path = self._workdir / f"{name}.json"
        if merge and path.is_file():
            value = (_parse(path.read_text(encoding="utf-8")) or {}) | value
        files.write(path, json.dumps(encodable(value), indent=1) + "\n")

    def close(self) -> None:
        """Flushes and closes open files. Can be called twice."""
        if not self._enabled:
            return
        self._metrics.close()
        self._samples.close()
        if self._events is not None:
            self._events.close()
            self._events = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def _open_events(self) -> Any:
        if self._events is None:
            purge = None if self._resume_step is None else self._resume_step + 1
            self._events = _Events(files.directory(self._workdir / "tensorboard"), purge)
        return self._events


class _Events:
    """A file of scalars for TensorBoard. Written synchronously, not by a thread of its own: on a
    full disk such a thread would die silently and block the run."""

    def __init__(self, directory: Path, purge: int | None):
        """Creates the file; TensorBoard discards earlier files' data of steps from `purge` on."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # slow import, hence late
        from tensorboardX.record_writer import masked_crc32c
        from tensorboardX.summary import scalar

        self._event, self._scalar, self._crc = Event, scalar, masked_crc32c
        now = time.time()
        name = f"events.out.tfevents.{now:.0f}.{socket.gethostname()}.{time.monotonic_ns()}"
        self._file = files.Growing(directory / name)
        self._write(Event(wall_time=now, file_version="brain.Event:2"))
        if purge is not None:
            start = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=now, step=purge, session_log=start))

    def scalar(self, name: str, value: float, step: int) -> None:
        """Adds one number."""
        summary = self._scalar(name, value)
        self._write(self._event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, event: Any) -> None:
        """Appends a record: its length and its bytes, each with a checksum."""
        data = event.SerializeToString()
        size = struct.pack("<Q", len(data))
        sums = [struct.pack("<I", self._crc(part)) for part in (size, data)]
        self._file.write(b"".join((size, sums[0], data, sums[1])))


def read(path: str | Path) -> list[dict[str, Any]]:
    """Returns the objects of a .jsonl file; none if it is missing. Skips a truncated line.

    NaN and infinities, which JSON lacks, are stored as strings; in `values`, `seconds` and the
    rates they are converted back to floats.
    """
    path = Path(path)
    if not path.is_file():
        return []
    rows = (
        _parse(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
    )
    return [row for row in rows if row is not None]


def encodable(value: Any) -> Any:
    """Converts a value to strict JSON: NaN and infinities as strings, arrays as lists."""
    if isinstance(value, Mapping):
        return {str(name): encodable(v) for name, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [encodable(v) for v in value]
    if hasattr(value, "tolist"):  # numpy and jax arrays and scalars
        return encodable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _decoded(v) for name, v in value.items()}
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    numeric = ("values", "seconds", "tokens_per_s", "flops_per_s", "mfu", "reward")
    return {name: _decoded(v) if name in numeric else v for name, v in row.items()}


def _append(file: files.Growing, row: Mapping[str, Any]) -> None:
    file.write(json.dumps(encodable(row), allow_nan=False) + "\n")


def _open(path: Path, step: int | None, stage: str | None, evaluated: bool) -> files.Growing:
    if path.is_file():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [
            line for line in lines if (row := _parse(line)) and _counts(row, step, stage, evaluated)
        ]
        # A link is replaced by this run's own file, with the valid lines.
        if kept != lines or not path.read_bytes().endswith(b"\n") or files.shared(path):
            files.write(path, "".join(line + "\n" for line in kept))
    elif path.is_symlink():  # dangling
        path.unlink()
    return files.Growing(path)


def _counts(row: Mapping[str, Any], step: int | None, stage: str | None, evaluated: bool) -> bool:
    if step is None or row.get("step", 0) < step:
        return True
    if row["step"] > step or stage not in (None, row.get("stage")):
        return False
    held_out = "eval" in row.get("values", ()) or row.get("held_out") is True
    return evaluated or not held_out


def _wandb_run(workdir: Path, arguments: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError(
            "the config asks for Weights & Biases, which isn't installed: "
            "pip install 'jaxrl_eff[wandb]'"
        ) from error
    workdir.mkdir(parents=True, exist_ok=True)
    remembered = workdir / "wandb_id.txt"
    name = remembered.read_text().strip() if remembered.is_file() else wandb.util.generate_id()
    files.write(remembered, name + "\n")
    return wandb.init(**{"id": name, "resume": "allow", "dir": str(workdir), **arguments})

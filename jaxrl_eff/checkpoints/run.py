"""Checkpoints that survive a kill at any time, with a diagnosis of damaged ones.

Orbax writes the arrays asynchronously, each process its own shards, within a small protocol on an
ordinary (shared) file system:

    saving-00000040/state/          orbax, in the background
    saving-00000040/still/          likewise, arrays unchanged since the previous checkpoint
    saving-00000040/record.json     stage, data position, seed, ...; and the shape of every leaf
    saving-00000040/manifest.json   size and CRC-32 of every file, written last
    00000040/                       the same directory renamed: only now is it a checkpoint
    00000040/noted.json             later: results of its evaluation

So a directory with a plain number is complete: before the manifest is written, orbax' own index is
compared with the leaves. A checkpoint that was truncated or altered later does not match its
manifest; one that still cannot be restored is rejected by name, and the previous one is used. Other
names in the directory are left alone. The tree is stored as a flat table from names to arrays:
namedtuples, `None` and `()` of optimizer states are structure, which the reader supplies.

Arrays that training does not change (a reference policy, the base of an adapter) are the same
objects at every save. From the second save, which detects this, they are written separately, and
after that their files are hard links: every checkpoint is complete, and the disk holds them once.
Damage to such a file affects all checkpoints.

Not supported: object stores without atomic rename (mount them), and PRNG keys, which the loop
derives from seed and step.
"""

import functools
import logging
import math
import shutil
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxrl_eff import files
from jaxrl_eff.checkpoints import manifest, stored
from jaxrl_eff.checkpoints.manifest import DELETING, SAVING
from jaxrl_eff.checkpoints.manifest import crc as _crc
from jaxrl_eff.parallel.processes.agreement import first_says
from jaxrl_eff.types import Array


@dataclass(frozen=True)
class Restored:
    """Contents of a checkpoint: the step after which it was saved, the arrays, and the record."""

    step: int
    state: Any
    record: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run; `messages` has a line for each rejected one.

    Example:
        >>> from jaxrl_eff import Checkpoints
        >>> checkpoints = Checkpoints("checkpoints", fingerprint="run 1")
        >>> checkpoints.save(3, {"w": jnp.ones(2)}, {"note": "half way"})
        >>> checkpoints.wait()
        >>> checkpoints.peek()
        {'note': 'half way'}
        >>> checkpoints.restore({"w": jax.ShapeDtypeStruct((2,), jnp.float32)}).step
        3
        >>> checkpoints.close()
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int = 3,
        keep_best: int = 1,
        mode: str = "max",
        fingerprint: str | None,
        accepted: tuple[str, ...] = (),
        renamed: Callable[[str], str] = lambda name: name,
        guard: Callable[[], None] = lambda: None,
    ):
        """Does not access the directory yet.

        Args:
            directory: created by the first save. All processes must see the same one.
            keep: number of newest checkpoints to keep.
            keep_best: number of best checkpoints by score to keep in addition.
            mode: "max" if larger scores are better, "min" if smaller.
            fingerprint: must match for a checkpoint to belong to this run; None inspects any run.
            accepted: fingerprints of older checkpoints that also belong to the run.
            renamed: name of a leaf, as it may be in an older checkpoint -> its name now.
            guard: called before anything is written; raises if another run now has the directory.

        Raises:
            ValueError: `keep`, `keep_best` or `mode` is out of range.
        """
        if keep < 1 or keep_best < 0:
            raise ValueError(f"keep={keep}, keep_best={keep_best}; at least 1 and 0 are needed.")
        if mode not in ("max", "min"):
            raise ValueError(f"unknown mode {mode!r}; expected one of ['max', 'min'].")
        self.directory = Path(directory).absolute()
        self.messages: list[str] = []
        self.unfit: list[str] = []  # messages of intact checkpoints that hold other arrays
        self._keep, self._keep_best, self._sign = keep, keep_best, 1 if mode == "max" else -1
        self._fingerprint, self._guard, self._renamed = fingerprint, guard, renamed
        self._mine = None if fingerprint is None else (fingerprint, *accepted)
        self._refused: set[int] = set()
        self._verified: set[int] = set()
        self._saved: dict[str, weakref.ref[Array]] = {}  # arrays of the last save
        self._still: tuple[int, frozenset[str]] = (-1, frozenset())  # a step, its unchanged arrays
        self._marks: dict[str, tuple[int, int]] = {}  # of the files of the unchanged part
        self._last = -1  # the step saved or restored last
        self._pending: Future[None] | None = None
        self._broken = False  # True if a save has failed
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    @functools.cached_property
    def _orbax(self) -> Any:
        return stored.writer()  # imports take a second, which runs that never save avoid

    def save(
        self, step: int, state: Any, record: dict[str, Any], *, score: float | int | None = None
    ) -> None:
        """Starts a save; returns once the arrays can be donated.

        Simulated CPU devices share the buffers with the writer; XLA copies instead of overwriting a
        buffer that is still read.

        Args:
            step: number of steps taken. A checkpoint of the same step is replaced.
            state: any pytree of jax.Arrays.
            record: JSON-serializable; returned by `peek` and `restore`.
            score: ranks the checkpoint for `keep_best`; NaN counts as no score.

        Raises:
            ValueError: the tree has no array, or good checkpoints of later steps exist, which this
                run should have restored.
            TypeError: a leaf is not a jax.Array.
            OSError: this save or the previous one failed; the message has the path.
        """
        import orbax.checkpoint as ocp

        self.wait()
        table = stored.table(state)
        if later := [s for s in self._own() if s > step and s not in self._refused]:
            raise ValueError(
                f"step {step} cannot be saved in {self.directory}, which holds step {max(later)} "
                "of the same run; restore it, or use another directory."
            )
        still = stored.unchanged(table, self._saved)
        linked = bool(still) and self._still[1] == still and self._whole(self._still[0])
        source = self._path(self._still[0]) if linked else None
        saving = self.directory / manifest.name(step, SAVING)
        meta = {
            "step": step,
            "fingerprint": self._fingerprint,
            "score": score if score is not None and math.isfinite(score) else None,
            "leaves": {k: [list(v.shape), str(v.dtype)] for k, v in table.items()},
            "still": sorted(still),
            "record": record,
        }
        first_says(lambda: self._begin(saving, meta), f"{saving} could not be made")
        arrays = {name: x for name, x in table.items() if x.size}  # orbax rejects empty ones
        parts = {"state": {name: x for name, x in arrays.items() if name not in still}}
        if still and not linked:
            parts["still"] = {name: arrays[name] for name in still}
        with jax.transfer_guard("allow"), ExitStack() as opened:
            way = opened.enter_context(files.plainly(saving))
            try:
                for part in sorted(parts, reverse=True):  # the second waits for the first
                    self._orbax.save(way / part, args=ocp.args.PyTreeSave(parts[part]))
            except Exception as error:
                raise self._failed(step, saving, error) from error
            writing = opened.pop_all()
        self._saved = {name: weakref.ref(x) for name, x in arrays.items()}
        self._still, self._last = (step, still), step
        self._pending = self._threads.submit(self._commit, step, saving, source, writing)

    def note(self, changes: dict[str, Any], *, score: float | int | None = None) -> None:
        """Adds later results to the record of the checkpoint saved or restored last.

        Args:
            changes: replace values of the record.
            score: ranks the checkpoint, as in `save`.

        Raises:
            Exception: the error of that save, if it failed.
        """
        self.wait()
        if jax.process_index() == 0:
            self._guard()
            ranked = {} if score is None or not math.isfinite(score) else {"score": score}
            noted = {"record": changes, **ranked}
            manifest.write(self._path(self._last) / "noted.json", noted)

    def peek(self) -> dict[str, Any] | None:
        """Returns the record of the newest good checkpoint, or None. Reads no array."""
        self.wait()
        step = self._newest()
        return None if step is None else manifest.meta(self._path(step))["record"]

    def restore(self, abstract: Any, *, partial: bool = False) -> Restored | None:
        """Restores the newest good checkpoint; returns None if there is none.

        Args:
            abstract: the requested tree of jax.ShapeDtypeStructs with their shardings (on any
                mesh), or a function from a checkpoint's record to that tree.
            partial: True to skip arrays of the checkpoint that `abstract` lacks.

        The arrays are fresh buffers, which the next step can donate.

        Raises:
            OSError, jax.errors.JaxRuntimeError, MemoryError: reading failed for a reason outside
                the checkpoint.
        """
        self.wait()
        while (step := self._newest()) is not None:
            meta = manifest.meta(self._path(step))
            target = abstract(meta["record"]) if callable(abstract) else abstract
            written = {self._renamed(name): name for name in meta["leaves"]}
            leaves = {now: meta["leaves"][name] for now, name in written.items()}
            reason = stored.difference(leaves, target, partial)
            differs = reason is not None
            if not differs:
                still = frozenset(meta.get("still", ()))
                state, reason = stored.tried(self._path(step), target, written, still)
                if reason is None:
                    self._last = step
                    return Restored(step, state, meta["record"])
            self._refuse(step, reason)
            self.unfit += self.messages[-1:] if differs else []
        return None

    def wait(self) -> None:
        """Blocks until the running save has become a checkpoint; raises its error, if any."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            try:
                pending.result()
            except BaseException:
                self._still = -1, frozenset()  # not a checkpoint, so it cannot be linked to
                self._broken = True
                raise

    def close(self) -> None:
        """Waits for the running save, and frees the writer's threads."""
        try:
            self.wait()
        finally:
            self._threads.shutdown()
            if "_orbax" in self.__dict__:
                self._close_orbax()

    def _close_orbax(self) -> None:
        try:
            self._orbax.close()
        except Exception:
            if not self._broken:  # otherwise it repeats the error that `wait` raised
                raise

    def _whole(self, step: int) -> bool:
        """Returns True if the unchanged part is as it was written, as seen by process 0."""
        still = self._path(step) / "still"
        reason = f"{still} cannot be read"
        return bool(first_says(lambda: int(manifest.marks(still) == self._marks), reason))

    def _begin(self, saving: Path, meta: dict[str, Any]) -> int:
        """Removes leftovers of killed saves, and makes the directory of a new checkpoint."""
        self._guard()
        files.directory(self.directory)
        manifest.clear(self.directory, SAVING, DELETING)
        self._make_room(saving)
        saving.mkdir()
        manifest.write(saving / "record.json", meta)
        return 0

    def _make_room(self, path: Path) -> None:
        if (aside := manifest.make_room(path)) is not None:
            text = "%s was no checkpoint and stood in the way; it is now %s."
            logging.getLogger("absl").warning(text, path, aside.name)

    def _path(self, step: int) -> Path:
        return self.directory / manifest.name(step)

    def _own(self) -> list[int]:
        """Returns steps of this run's checkpoints, newest first."""
        steps = [s for s in manifest.steps(self.directory) if manifest.ours(self._path(s))]
        return [s for s in steps if self._foreign(self._path(s)) is None]

    def _foreign(self, path: Path) -> str | None:
        return manifest.foreign(path, self._mine)

    def _commit(self, step: int, saving: Path, source: Path | None, writing: ExitStack) -> None:
        """Turns the files written by orbax into a checkpoint, and removes old checkpoints.

        Args:
            source: the checkpoint whose unchanged part is linked into this one.
            writing: closed once orbax has finished writing.
        """
        try:
            with writing:
                self._orbax.wait_until_finished()
            if jax.process_index() != 0:
                return
            written = [p for p in saving.rglob("*") if p.is_file()]
            table = {str(p.relative_to(saving)): [p.stat().st_size, _crc(p)] for p in written}
            if source is not None:
                files.linked(source / "still", saving / "still")
                theirs = manifest.read(source / "manifest.json")
                table |= {name: v for name, v in theirs.items() if name.startswith("still/")}
            if reason := manifest.lacking(saving):
                raise OSError(f"not all of it is there: {reason}")
            self._guard()
            manifest.write(saving / "manifest.json", table)
            self._adopt(step, saving)
            self._marks = manifest.marks(self._path(step) / "still")
            self._rotate(step)
        except Exception as error:
            raise self._failed(step, saving, error) from error

    def _failed(self, step: int, saving: Path, error: Exception) -> OSError:
        """Returns the error for a failed save; in a single process, deletes its files."""
        if jax.process_count() == 1 and manifest.ours(saving):
            shutil.rmtree(saving, ignore_errors=True)
        return OSError(
            f"checkpoint {self._path(step)} could not be written: {stored.reason_of(error)}. "
            "Those before it stand; the same command continues from there."
        )

    def _adopt(self, step: int, saving: Path) -> None:
        if manifest.ours(self._path(step)):
            self._delete(step)
        self._make_room(self._path(step))
        saving.rename(self._path(step))
        self._refused.discard(step)
        self._verified.add(step)

    def _rotate(self, step: int) -> None:
        own = self._own()
        now = [s for s in own if s <= step]
        scores = {s: manifest.meta(self._path(s))["score"] for s in now}
        ranked = [s for s in now if scores[s] is not None]
        ranked.sort(key=lambda s: -self._sign * scores[s])
        kept = {*now[: self._keep], *ranked[: self._keep_best]}
        for old in own:  # rejected later checkpoints belong to a future that is being rewritten
            if old not in kept and (old <= step or old in self._refused):
                self._delete(old)

    def _delete(self, step: int) -> None:
        # Renamed first: a kill during deletion must not leave a partial directory under its name.
        doomed = self.directory / manifest.name(step, DELETING)
        self._make_room(doomed)
        self._path(step).rename(doomed)
        shutil.rmtree(doomed)

    def _recover(self) -> None:
        """Finishes what a kill interrupted: a save just before its directory was renamed, and
        deletions, which no later save may be there to finish.
        """
        if self._fingerprint is not None and manifest.steps(self.directory, DELETING):
            self._guard()
            manifest.clear(self.directory, DELETING)
        for step in manifest.steps(self.directory, SAVING):
            saving = self.directory / manifest.name(step, SAVING)
            if self._fingerprint is None or self._path(step).exists() or not manifest.ours(saving):
                continue
            if self._foreign(saving) is None and manifest.damage(saving) is None:
                self._adopt(step, saving)

    def _newest(self) -> int | None:
        """Returns the newest step that process 0 finds intact and of this run, or None."""
        found = first_says(self._first_good, f"{self.directory} could not be read")
        if jax.process_count() > 1:
            self._refused |= {s for s in manifest.steps(self.directory) if s > found}
        return None if found < 0 else found

    def _first_good(self) -> int:
        """Returns the newest step whose checkpoint is intact and of this run, or -1."""
        self._recover()
        for step in manifest.steps(self.directory):
            if step in self._refused:
                continue
            path = self._path(step)
            reason = None if step in self._verified else manifest.damage(path)
            reason = reason or self._foreign(path)
            if reason is None:
                self._verified.add(step)
                return step
            self._refuse(step, reason)
        return -1

    def _refuse(self, step: int, reason: str) -> None:
        self._refused.add(step)
        self.messages.append(f"checkpoint {self._path(step)} is refused: {reason}.")

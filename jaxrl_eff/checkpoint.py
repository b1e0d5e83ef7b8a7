"""Checkpoints that a kill at any moment cannot spoil, and that name what is wrong with them.

Orbax writes the arrays, asynchronously, each process its own shards. Around it stands a small
protocol on an ordinary (shared) file system:

    saving-00000040/state/          orbax, in the background
    saving-00000040/still/          likewise, what has not changed since the checkpoint before
    saving-00000040/record.json     stage, data position, seed, ...; and the shape of every leaf
    saving-00000040/manifest.json   size and CRC-32 of every file, written last
    00000040/                       the same directory renamed: only now is it a checkpoint

So a directory with a plain number is complete, and one that was truncated or altered later no
longer fits its manifest. The tree is stored as a flat table from names to arrays: namedtuples,
`None` and `()` of optimizer states are structure, which the reader supplies.

Arrays that training leaves alone (a reference policy, the base under an adapter) are the very same
objects at every save. They are written apart once that is seen, at the second save, and from then
on their files are hard links: every checkpoint is whole, and the disk holds them once. What spoils
such a file spoils it for all.

Left out: object stores without atomic rename (mount them), and PRNG keys, which the loop derives
from seed and step.
"""

import functools
import json
import math
import os
import shutil
import weakref
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_eff.shapes import Array
from jaxrl_eff.tree import flat


@dataclass(frozen=True)
class Restored:
    """What a checkpoint held: the step after which it was saved, the arrays, and the record."""

    step: int
    state: Any
    record: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run in one directory.

    `messages` collects one line for every checkpoint that was refused, with the reason.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int = 3,
        keep_best: int = 1,
        mode: str = "max",
        fingerprint: str | None,
    ):
        """Touches nothing yet.

        Args:
            directory: created by the first save. All processes must see the same one.
            keep: how many of the newest to keep.
            keep_best: how many of the best by score to keep besides.
            mode: whether a larger ("max") or a smaller ("min") score is better.
            fingerprint: what must agree for a checkpoint to belong to this run. `None` accepts
                any (to look at a run rather than continue it).

        Raises:
            ValueError: `keep`, `keep_best` or `mode` is out of range.
        """
        if keep < 1 or keep_best < 0:
            raise ValueError(f"keep={keep}, keep_best={keep_best}; at least 1 and 0 are needed.")
        if mode not in ("max", "min"):
            raise ValueError(f"mode is {mode!r}; allowed are 'max' and 'min'.")
        self.directory = Path(directory).absolute()
        self.messages: list[str] = []
        self._keep, self._keep_best, self._sign = keep, keep_best, 1 if mode == "max" else -1
        self._fingerprint = fingerprint
        self._refused: set[int] = set()
        self._verified: set[int] = set()
        self._saved: dict[str, weakref.ref[Array]] = {}  # what the last save was given
        self._still: tuple[int, frozenset[str]] = (-1, frozenset())  # a step, what is apart in it
        self._pending: Future[None] | None = None
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    @functools.cached_property
    def _orbax(self) -> Any:
        import orbax.checkpoint as ocp  # a second of imports, which runs that never save don't pay

        options = ocp.AsyncOptions(create_directories_asynchronously=False)
        return ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(), async_options=options)

    def save(
        self, step: int, state: Any, record: dict[str, Any], *, score: float | int | None = None
    ) -> None:
        """Starts to save; returns once the arrays are safe from donation.

        On accelerators that is when they are on the host. Simulated CPU devices share the buffers
        with the writer, and XLA copies instead of overwriting one that is still read.

        Args:
            step: number of steps taken. A checkpoint of the same step is replaced.
            state: any pytree of jax.Arrays.
            record: JSON-able; comes back from `peek` and `restore`.
            score: ranks the checkpoint for `keep_best`; NaN counts as no score.

        Raises:
            ValueError: the tree holds no array, or good checkpoints of later steps exist, which
                this run should have restored.
            TypeError: a leaf is no jax.Array.
            Exception: whatever made the previous save fail.
        """
        import orbax.checkpoint as ocp

        self.wait()
        table = _table(state)
        if later := [s for s in self._own() if s > step and s not in self._refused]:
            raise ValueError(
                f"step {step} cannot be saved in {self.directory}, which holds step {max(later)} "
                "of the same run; restore it, or use another directory."
            )
        still = self._unchanged(table)
        linked = bool(still) and self._still[1] == still and self._whole(self._still[0])
        source = self._path(self._still[0]) if linked else None
        saving = self.directory / f"saving-{step:08d}"
        if jax.process_index() == 0:
            for rest in [*self.directory.glob("saving-*"), *self.directory.glob("deleting-*")]:
                shutil.rmtree(rest)
            saving.mkdir(parents=True)
            meta = {
                "step": step,
                "fingerprint": self._fingerprint,
                "score": score if score is not None and math.isfinite(score) else None,
                "leaves": {k: [list(v.shape), str(v.dtype)] for k, v in table.items()},
                "still": sorted(still),
                "record": record,
            }
            _write(saving / "record.json", meta)
        arrays = {name: x for name, x in table.items() if x.size}  # orbax refuses empty ones
        parts = {"state": {name: x for name, x in arrays.items() if name not in still}}
        if still and not linked:
            parts["still"] = {name: arrays[name] for name in still}
        with jax.transfer_guard("allow"):
            for part in sorted(parts, reverse=True):  # the second waits for the first
                self._orbax.save(saving / part, args=ocp.args.PyTreeSave(parts[part]))
        self._saved = {name: weakref.ref(x) for name, x in arrays.items()}
        self._still = step, still
        self._pending = self._threads.submit(self._commit, step, saving, source)

    def peek(self) -> dict[str, Any] | None:
        """The record of the newest good checkpoint, or None. No array is read into memory."""
        self.wait()
        step = self._newest()
        return None if step is None else _read(self._path(step) / "record.json")["record"]

    def restore(self, abstract: Any, *, partial: bool = False) -> Restored | None:
        """The newest good checkpoint, or None if there is none.

        Args:
            abstract: the wanted tree of jax.ShapeDtypeStructs with their shardings (on any mesh),
                or a function from a checkpoint's record to that tree.
            partial: leave out what the checkpoint has and `abstract` doesn't.

        The arrays are fresh buffers, which the next step can donate.
        """
        self.wait()
        while (step := self._newest()) is not None:
            meta = _read(self._path(step) / "record.json")
            target = abstract(meta["record"]) if callable(abstract) else abstract
            reason = _difference(meta["leaves"], target, partial)
            if reason is None:
                return Restored(step, self._load(step, target), meta["record"])
            self._refuse(step, reason)
        return None

    def wait(self) -> None:
        """Blocks until the save under way is a checkpoint; raises what made it fail."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            try:
                pending.result()
            except BaseException:
                self._still = -1, frozenset()  # it is no checkpoint, and nothing to link to
                raise

    def close(self) -> None:
        """Waits, and frees the writer's threads."""
        try:
            self.wait()
        finally:
            self._threads.shutdown()
            if "_orbax" in self.__dict__:
                self._orbax.close()

    def _unchanged(self, table: dict[str, Array]) -> frozenset[str]:
        """Names of the arrays that the last save was given too; all processes say the same."""
        names = sorted(name for name, x in table.items() if x.size)
        same = np.array(
            [name in self._saved and self._saved[name]() is table[name] for name in names]
        )
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            same = multihost_utils.process_allgather(same).all(axis=0)
        if same.all():  # nothing would be left for the other part
            return frozenset()
        return frozenset(name for name, s in zip(names, same, strict=True) if s)

    def _whole(self, step: int) -> bool:
        """Whether a checkpoint that was written is still there, as process 0 sees it."""
        return bool(_first_says(self._path(step).is_dir()))

    def _path(self, step: int) -> Path:
        return self.directory / f"{step:08d}"

    def _steps(self) -> list[int]:
        """Newest first."""
        found = (int(p.name) for p in self.directory.glob("[0-9]*") if p.name.isdigit())
        return sorted(found, reverse=True)

    def _own(self) -> list[int]:
        """Steps whose checkpoints are this run's, newest first."""
        return [s for s in self._steps() if not _foreign(self._path(s), self._fingerprint)]

    def _commit(self, step: int, saving: Path, source: Path | None) -> None:
        """Turns what orbax has written into a checkpoint, and removes old ones.

        Args:
            source: the checkpoint whose part that has not changed is this one's too.
        """
        self._orbax.wait_until_finished()
        if jax.process_index() != 0:
            return
        files = [p for p in saving.rglob("*") if p.is_file()]
        table = {str(p.relative_to(saving)): [p.stat().st_size, _crc(p)] for p in files}
        if source is not None:
            shutil.copytree(source / "still", saving / "still", copy_function=_link)
            theirs = _read(source / "manifest.json")
            table |= {name: v for name, v in theirs.items() if name.startswith("still/")}
        _write(saving / "manifest.json", table)
        self._adopt(step, saving)
        self._rotate(step)

    def _adopt(self, step: int, saving: Path) -> None:
        if self._path(step).exists():
            self._delete(step)
        saving.rename(self._path(step))
        self._refused.discard(step)
        self._verified.add(step)

    def _rotate(self, step: int) -> None:
        own = self._own()
        now = [s for s in own if s <= step]
        scores = {s: _read(self._path(s) / "record.json")["score"] for s in now}
        ranked = [s for s in now if scores[s] is not None]
        ranked.sort(key=lambda s: -self._sign * scores[s])
        kept = {*now[: self._keep], *ranked[: self._keep_best]}
        for old in own:  # later ones that were refused belong to a future that is being rewritten
            if old not in kept and (old <= step or old in self._refused):
                self._delete(old)

    def _delete(self, step: int) -> None:
        # Renamed first: a kill in the middle must not leave half a directory under a good name.
        trash = self.directory / f"deleting-{step:08d}"
        self._path(step).rename(trash)
        shutil.rmtree(trash)

    def _recover(self) -> None:
        """Finishes a save that was killed just before its directory was renamed."""
        for saving in self.directory.glob("saving-*"):
            step = int(saving.name.removeprefix("saving-"))
            mine = self._fingerprint is not None and _foreign(saving, self._fingerprint) is None
            if mine and not self._path(step).exists() and _damage(saving) is None:
                self._adopt(step, saving)

    def _newest(self) -> int | None:
        """The newest step that process 0 finds whole and of this run."""
        found = -1
        if jax.process_index() == 0:
            self._recover()
            for step in self._steps():
                if step in self._refused:
                    continue
                reason = None if step in self._verified else _damage(self._path(step))
                reason = reason or _foreign(self._path(step), self._fingerprint)
                if reason is None:
                    self._verified.add(step)
                    found = step
                    break
                self._refuse(step, reason)
        found = _first_says(found)
        if jax.process_count() > 1:
            self._refused |= {s for s in self._steps() if s > found}
        return None if found < 0 else found

    def _refuse(self, step: int, reason: str) -> None:
        self._refused.add(step)
        self.messages.append(f"checkpoint {self._path(step)} is refused: {reason}.")

    def _load(self, step: int, target: Any) -> Any:
        import orbax.checkpoint as ocp

        table = {name: _placed(x) for name, x in flat(target).items()}
        wanted = {name: x for name, x in table.items() if math.prod(x.shape)}
        args = {
            name: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype)
            for name, x in wanted.items()
        }
        still = set(_read(self._path(step) / "record.json").get("still", ()))
        arrays: dict[str, Array] = {}
        with jax.transfer_guard("allow"):
            for part, names in (("state", wanted.keys() - still), ("still", wanted.keys() & still)):
                if not names:
                    continue
                try:
                    arrays |= self._orbax.restore(
                        self._path(step) / part,
                        args=ocp.args.PyTreeRestore(
                            item={name: wanted[name] for name in names},
                            restore_args={name: args[name] for name in names},
                            partial_restore=True,
                        ),
                    )
                except Exception as error:
                    error.add_note(f"while reading the checkpoint {self._path(step)}")
                    raise
            leaves = [
                _fresh(arrays.pop(name)) if name in wanted else _empty(x)
                for name, x in table.items()
            ]
        return jax.tree.unflatten(jax.tree.structure(target), leaves)


def _first_says(number: int) -> int:
    """Process 0's number."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def _table(state: Any) -> dict[str, Array]:
    table = flat(state)
    for name, leaf in table.items():
        if not isinstance(leaf, jax.Array):
            raise TypeError(f"{name} is a {type(leaf).__name__}; only jax.Arrays can be saved.")
    if not any(x.size for x in table.values()):
        raise ValueError("the state holds no array to save.")
    return table


def _placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = getattr(x, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _fresh(x: Array) -> Array:
    """A copy: restored buffers may alias host memory and can then not be donated (jax#18617)."""
    return _copy(x.sharding)(x)


@functools.cache
def _copy(sharding: jax.sharding.Sharding) -> Callable[[Array], Array]:
    return jax.jit(jnp.copy, out_shardings=sharding)


def _empty(x: jax.ShapeDtypeStruct) -> Array:
    return jax.jit(lambda: jnp.zeros(x.shape, x.dtype), out_shardings=x.sharding)()


def _difference(saved: dict[str, Any], target: Any, partial: bool) -> str | None:
    """How the saved leaves differ from the wanted ones, in words."""
    wanted = {name: [list(x.shape), str(x.dtype)] for name, x in flat(target).items()}
    if missing := sorted(set(wanted) - set(saved)):
        return f"it lacks {_few(missing)}"
    if not partial and (extra := sorted(set(saved) - set(wanted))):
        return f"it holds {_few(extra)}, which this run has no place for"
    for name, (shape, dtype) in wanted.items():
        if saved[name] != [shape, dtype]:
            old_shape, old_dtype = saved[name]
            return f"{name} is {old_dtype}{old_shape} in it and {dtype}{shape} in this run"
    return None


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _foreign(path: Path, fingerprint: str | None) -> str | None:
    """Why the checkpoint is none of this run's, or None."""
    try:
        theirs = _read(path / "record.json")["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return "its record.json cannot be read"
    if fingerprint is not None and theirs != fingerprint:
        return f"it belongs to another run (fingerprint {theirs!r}; this run's is {fingerprint!r})"
    return None


def _damage(path: Path) -> str | None:
    """The first file that doesn't fit the manifest, or None."""
    try:
        table = _read(path / "manifest.json")
        manifest = {name: (int(size), int(crc)) for name, (size, crc) in table.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return "its manifest.json is missing or damaged"
    if "record.json" not in manifest:
        return "its manifest.json names no record.json"
    for name, (size, _) in manifest.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (actual := (path / name).stat().st_size) != size:
            return f"{name} has {actual} bytes and should have {size}"
    with ThreadPoolExecutor(4) as pool:  # crc32 lets go of the interpreter
        sums = pool.map(lambda name: _crc(path / name), manifest)
        for (name, (_, crc)), actual in zip(manifest.items(), sums, strict=True):
            if actual != crc:
                return f"{name} does not match its checksum"
    return None


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def _link(source: str, target: str) -> None:
    """A second name of a file; where the file system has no such thing, a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, allow_nan=False), encoding="utf-8")


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))

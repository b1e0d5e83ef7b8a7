"""The directory of a run: checked to be writable, and locked by one run at a time.

The holder is written to a file, `run.lock`: host, process, and the start times of both. The file is
created exclusively, which also works on file systems shared by several hosts, and touched every few
seconds. The holder is gone if it ran on this host and its process has ended, or if it ran elsewhere
and has not touched the file for a while; the next run then takes over and reports it.

The new run creates `run.lock.NAME`, where NAME is the digest of the dead holder's file, and renames
it over that file: of several runs that find the same dead holder, only one can create it. If that
one dies too, the next one takes over from it in the same way.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import socket
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import logging

from jaxrl_eff import files
from jaxrl_eff.parallel.processes.agreement import first_says

NAME = "run.lock"
BEAT_S = 15.0  # between two touches of the file
STALE_S = 180.0  # without a touch, after which a holder on another host is considered gone
DIRECTORIES = ("checkpoints", "tensorboard", "export", "adapter", "base")
FILES = (
    "config.json", "plan.json", "schedule.json", "calibration.json", "timeline.json", "result.json",
    "metrics.jsonl", "samples.jsonl", "report.html", "delta.safetensors",
)  # fmt: skip
# A URL that was converted to a path has lost a slash.
_URL = re.compile(r"(gs|s3|az|abfss?|hdfs|https?|file|memory):/")
# Length of the names that orbax gives to files below the directory.
_ROOM = len("/checkpoints/deleting-000000000/state.orbax-checkpoint-tmp/ocdbt.process_0000/d/") + 64


class HeldError(OSError):
    """Another run holds the directory."""


@dataclass(frozen=True)
class _Holder:
    """The process that holds a directory.

    Attributes:
        host: its name.
        kernel: distinguishes hosts of the same name, and containers on one host: the boot and the
            process namespace.
        process: its id there.
        began: start time of the process, in the kernel's ticks; process ids can be reused.
        since: time when it took the directory, as text.
        token: unique to this holder.
    """

    host: str
    kernel: str
    process: int
    began: str
    since: str
    token: str


def check_workdir(workdir: Path) -> None:
    """Creates the directory, and checks existing entries under names that a run writes.

    Raises:
        OSError: a path cannot be used; the message names it: a URL, a path that is too long or not
            text, a file in place of a directory or vice versa, a link to a directory.
    """
    if _URL.match(str(workdir)):
        raise OSError(f"--workdir={workdir} is a URL; an object store must be mounted.")
    try:
        str(workdir).encode()
    except UnicodeEncodeError:
        told = os.fsencode(workdir)
        raise OSError(f"--workdir={told!r} is not UTF-8, which documents must be.") from None
    _check_length(workdir)
    _make(workdir)
    for name in DIRECTORIES:
        if os.path.lexists(workdir / name):
            files.directory(workdir / name)
    for name in FILES:
        if (workdir / name).exists() and not (workdir / name).is_file():
            raise OSError(f"--workdir={workdir}: {name} in it is no ordinary file.")


def _check_length(workdir: Path) -> None:
    longest = os.pathconf("/", "PC_PATH_MAX") if hasattr(os, "pathconf") else 4096
    length = len(os.fsencode(workdir.absolute()))
    if length + _ROOM > longest:
        raise OSError(
            f"--workdir={workdir} has {length} bytes; at most {longest - _ROOM} leave room for the "
            "names below it."
        )


def _make(workdir: Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(f"--workdir={workdir}: there is a file of that name.") from None
    if not os.access(workdir, os.W_OK | os.X_OK):
        raise PermissionError(f"--workdir={workdir} cannot be written to.")


@contextlib.contextmanager
def held(workdir: Path) -> Iterator["Lock"]:
    """Context that holds the directory. With several processes, the first one holds it.

    Raises:
        HeldError: another run holds it; the message has its host and process.
        OSError: the directory cannot be written to.
    """
    lock = Lock(workdir)
    try:
        first_says(lock.take, f"--workdir={workdir} is held or cannot be written to, as found")
        yield lock
    finally:
        lock.release()


class Lock:
    """The lock file of a directory. Process 0 takes it; other processes do nothing."""

    def __init__(self, workdir: Path):
        self.path = workdir / NAME
        self._mine: bytes | None = None
        self._seen = 0.0  # time when the file was last found to be this run's
        self._stop = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="lock", daemon=True)

    def take(self) -> int:
        """Takes the directory; returns 0.

        Raises:
            HeldError: another run holds it.
            OSError: the file cannot be written; the message has the path.
        """
        holder = _this()
        mine = json.dumps(vars(holder)).encode()
        if not _create(self.path, mine):
            self._take_over(mine)
        self._mine, self._seen = mine, time.time()
        self._beats.start()
        return 0

    def check(self) -> None:
        """Checks that the directory is still this run's.

        The file is read only if the last check is old: this process may have been suspended so long
        that another run took over the directory.

        Raises:
            HeldError: another run holds it now.
        """
        if self._mine is None or time.time() - self._seen < 2 * BEAT_S:
            return
        if not self._is_mine():
            raise HeldError(
                f"{self.path.parent} was taken over by {_told(_read(self.path))} while this run "
                "did not move; nothing more is written."
            )
        self._seen = time.time()

    def release(self) -> None:
        """Releases the directory. Can be called twice."""
        self._stop.set()
        if self._mine is None:
            return
        self._beats.join()
        with contextlib.suppress(OSError):  # a failing disk must not hide why the run ended
            if _read(self.path) == self._mine:
                self.path.with_name(f"{NAME}.time").unlink(missing_ok=True)
                self.path.unlink()
        self._mine = None

    def _take_over(self, mine: bytes) -> None:
        """Follows the chain of holders and their successors to the last one, and replaces it.

        Raises:
            HeldError: the last one is alive.
        """
        chain, path = [], self.path
        while (content := _read(path)) is not None:
            self._refuse_living(path, content)
            chain.append((path, content))
            path = self.path.with_name(f"{NAME}.{hashlib.sha256(content).hexdigest()[:16]}")
        if not chain:  # it was released in the meantime
            if not _create(self.path, mine):
                raise HeldError(f"{self.path.parent} is being taken by another run just now.")
            return
        if not _create(path, mine) or any(_read(p) != content for p, content in chain):
            if _read(path) == mine:
                path.unlink()
            raise HeldError(f"{self.path.parent} is being taken over by another run just now.")
        os.replace(path, self.path)
        for rest, _ in chain[1:]:
            rest.unlink(missing_ok=True)
        logging.warning(
            "%s was held by %s, which is gone; taken over.",
            self.path.parent, _told(chain[-1][1]),
        )  # fmt: skip

    def _refuse_living(self, path: Path, content: bytes) -> None:
        holder = _parsed(content)
        age = _age(path)
        here = holder is not None and _is_here(holder)
        if _alive(holder) if here else age < STALE_S:
            after = "" if here else f", last heard of {max(age, 0):.0f} s ago"
            wait = "" if here else f"; it is taken for dead after {STALE_S:.0f} s of silence"
            raise HeldError(
                f"--workdir={self.path.parent} is held by another run, {_told(content)}{after}. "
                f"Give this one its own directory, or wait{wait}."
            )

    def _is_mine(self) -> bool:
        """Returns True if the file is this run's; creates it again if it was removed."""
        found = _read(self.path)
        return found == self._mine or (found is None and _create(self.path, self._mine or b""))

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            with contextlib.suppress(OSError):
                if not self._is_mine():
                    return  # `check` raises
                os.utime(self.path)
                self._seen = time.time()


def _this() -> _Holder:
    process = os.getpid()
    return _Holder(
        host=socket.gethostname(),
        kernel=_kernel(),
        process=process,
        began=_began(process) or "",
        since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        token=secrets.token_hex(8),
    )


def _kernel() -> str:
    """Returns the boot id and the process namespace of this host, if the system has them."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _began(process: int) -> str | None:
    """Returns the start time of a process; None if it does not exist or has ended (zombies too)."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]


def _is_here(holder: _Holder) -> bool:
    """Returns True if a holder's process would be visible from here."""
    return holder.host == socket.gethostname() and holder.kernel == _kernel()


def _alive(holder: _Holder) -> bool:
    """Returns True if the process of a holder on this host is alive."""
    if holder.began:
        return _began(holder.process) == holder.began
    try:
        os.kill(holder.process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True


def _age(path: Path) -> float:
    """Returns seconds since a file was touched, by the file system's clock, which can differ."""
    probe = path.with_name(f"{NAME}.time")  # fixed name: a kill can leave it behind
    try:
        files.write(probe, b"")
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _create(path: Path, content: bytes) -> bool:
    """Creates a file with this content; returns False if it exists."""
    try:
        with files.naming(path):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        return False
    try:
        with files.naming(path), os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def _read(path: Path) -> bytes | None:
    """Returns the content of a file; None if it does not exist.

    Raises:
        OSError: it is a link or not a regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OSError(f"{path} is no file of a run ({error.strerror}); remove it.") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is no file of a run; remove it.")
        return os.read(descriptor, 65536)
    finally:
        os.close(descriptor)


def _parsed(content: bytes) -> _Holder | None:
    """Parses a holder; returns None if its file was truncated or is something else."""
    try:
        row: dict[str, Any] = json.loads(content)
        holder = _Holder(**row)
    except (ValueError, TypeError, RecursionError):
        return None
    return holder if isinstance(holder.process, int) and holder.process > 0 else None


def _told(content: bytes | None) -> str:
    holder = _parsed(content or b"")
    if holder is None:
        return "one that does not say who it is"
    return f"process {holder.process} on {holder.host} since {holder.since}"

"""Files and directories under names that are known beforehand, written without following links.

A run writes under names that anybody can foresee, into a directory that others may share. Somebody
may have put a link there, on purpose or not. So a whole file is written beside its name and renamed
over it, which replaces a link and not what the link leads to; a file that grows is opened only if
it is nobody else's too; a directory that is a link is refused by name. The directory of the run
itself may be a link: that is the user's own word.
"""

import contextlib
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

# Libraries take other characters for patterns, escapes or URLs somewhere; all take these.
_PLAIN = re.compile(r"[A-Za-z0-9_./+=,@ -]*")
_LONG = 1000
_PARTIAL = re.compile(r"\.(.+?)(?:\.[0-9a-f]{16})?\.partial")  # as `_new` names them
_LEFT_S = 60.0  # a file that has not been written to for so long was left behind by a kill


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new empty file beside `path` that takes its place when the body ends, and goes if it fails.

    Raises:
        OSError: with the path: the file cannot be written.
    """
    path = Path(path)
    with naming(path):
        partial = _new(path)
    try:
        yield partial
        with naming(path):
            os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write(path: str | os.PathLike[str], content: str | bytes, *, durable: bool = False) -> None:
    """Writes a whole file, which has the old content or the new one at any moment.

    Args:
        path: of the file; the directory must be there.
        content: text is encoded as UTF-8.
        durable: wait until it is on the disk.

    Raises:
        OSError: with the path: the file cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    with replacing(path) as partial, naming(path), partial.open("wb") as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())


class Growing:
    """A file that grows by whole pieces, each handed to the system at once."""

    def __init__(self, path: str | os.PathLike[str]):
        """Opens or creates it.

        Raises:
            OSError: with the path: it is a link, has a second name, is no ordinary file, or cannot
                be opened.
        """
        self.path = Path(path)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        if shared(self.path):
            raise OSError(f"{self.path} is a link or has a second name; it may be another's file.")
        with naming(self.path):
            # Not blocking: nobody may read from a pipe of that name.
            self._fd = os.open(self.path, flags | os.O_NONBLOCK, 0o666)
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            self.close()
            raise OSError(f"{self.path} is no ordinary file.")

    def write(self, content: str | bytes) -> None:
        """Appends all of it.

        Raises:
            OSError: with the path.
        """
        data = memoryview(content.encode() if isinstance(content, str) else content)
        with naming(self.path):
            while data:
                data = data[os.write(self._fd, data) :]

    def close(self) -> None:
        """May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def shared(path: str | os.PathLike[str]) -> bool:
    """True if a file is a symbolic link or has several hard links."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    return stat.S_ISLNK(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_nlink > 1)


def directory(path: str | os.PathLike[str]) -> Path:
    """Makes a directory of a run if need be.

    Raises:
        NotADirectoryError: it is a link or no directory.
        OSError: it cannot be made.
    """
    path = Path(path)
    if path.is_symlink():
        raise NotADirectoryError(
            f"{path} is a link, and nothing is written through links inside of a run's directory. "
            "Put a directory there (the run's directory itself may be a link)."
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(f"{path} is no directory.") from None
    return path


def linked(source: Path, target: Path) -> None:
    """A second directory with the same files; copies where the file system has no hard links."""
    shutil.copytree(source, target, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def remove(path: str | os.PathLike[str]) -> None:
    """Removes a file, a link (not what it leads to) or a whole directory; nothing there is fine."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of the system that happen inside are raised with this path."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def plainly(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to the same directory without characters that a library takes for something else.

    It is the path itself where that is plain and short; else a way through a descriptor of this
    process, or where the system has none, through a link in a temporary directory.
    """
    path = Path(path).absolute()
    if _PLAIN.fullmatch(str(path)) and len(str(path)) < _LONG:
        yield path
    elif os.path.isdir("/proc/self/fd"):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield Path(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
    else:
        plain = [d for d in (tempfile.gettempdir(), "/tmp", "/var/tmp") if _PLAIN.fullmatch(d)]
        with tempfile.TemporaryDirectory(dir=plain[0]) as place:
            link = Path(place) / "way"
            link.symlink_to(path)
            yield link


def left_behind(name: str) -> str | None:
    """The name of the file that one of this name was to replace when its writer was killed."""
    found = _PARTIAL.fullmatch(name)
    return found[1] if found else None


def _new(path: Path) -> Path:
    """Creates the file that will take the place of `path`."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    usual = path.with_name(f".{path.name}.partial")  # the same each time: a kill leaves one behind
    if shared(usual) or _age(usual) > _LEFT_S:
        usual.unlink(missing_ok=True)
    try:
        os.close(os.open(usual, flags, 0o666))
        return usual
    except FileExistsError:  # of another process that may be at it just now
        other = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
        os.close(os.open(other, flags, 0o666))
        return other


def _age(path: Path) -> float:
    """Seconds since a file was written to; 0 if there is none."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0

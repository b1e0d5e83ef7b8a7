"""Writing of files and directories with predictable names, without following links.

A run's file names are predictable, and its directory can be shared with others, who could have
placed a link there. So a whole file is written under a temporary name and renamed, which replaces a
link and not its target; a growing file is opened only if it has no other name; a directory that is
a link is rejected. The run's directory itself can be a link, since the user chose it.
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

# Some library treats each other character as a pattern, escape or URL; all accept these.
_PLAIN = re.compile(r"[A-Za-z0-9_./+=,@ -]*")
_LONG = 1000
_PARTIAL = re.compile(r"\.(.+?)(?:\.[0-9a-f]{16})?\.partial")  # as `_new` names them
_LEFT_S = 60.0  # a partial file not written to for this long was left behind by a kill


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Context with a new empty file that replaces `path` at its end, or is removed on error.

    Raises:
        OSError: the file cannot be written; the message has the path.
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
    """Writes a whole file atomically: it has either the old or the new content at any time.

    Args:
        path: of the file; the directory must exist.
        content: text is encoded as UTF-8.
        durable: True to wait until it is on disk.

    Raises:
        OSError: the file cannot be written; the message has the path.
    """
    data = content.encode() if isinstance(content, str) else content
    with replacing(path) as partial, naming(path), partial.open("wb") as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())


class Growing:
    """A file that grows by whole pieces, each passed to the system immediately."""

    def __init__(self, path: str | os.PathLike[str]):
        """Opens or creates the file.

        Raises:
            OSError: it is a link, has a second name, is not a regular file, or cannot be opened;
                the message has the path.
        """
        self.path = Path(path)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        if shared(self.path):
            raise OSError(f"{self.path} is a link or has a second name; it may be another's file.")
        with naming(self.path):
            # Non-blocking: a pipe of that name could have no reader.
            self._fd = os.open(self.path, flags | os.O_NONBLOCK, 0o666)
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            self.close()
            raise OSError(f"{self.path} is no ordinary file.")

    def write(self, content: str | bytes) -> None:
        """Appends all of the content.

        Raises:
            OSError: it cannot be written; the message has the path.
        """
        data = memoryview(content.encode() if isinstance(content, str) else content)
        with naming(self.path):
            while data:
                data = data[os.write(self._fd, data) :]

    def close(self) -> None:
        """Closes the file. Can be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def shared(path: str | os.PathLike[str]) -> bool:
    """Returns True if a file is a symbolic link or has several hard links."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    return stat.S_ISLNK(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_nlink > 1)


def directory(path: str | os.PathLike[str]) -> Path:
    """Creates a directory of a run if needed.

    Raises:
        NotADirectoryError: it is a link or not a directory.
        OSError: it cannot be created.
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
    """Creates a second directory with hard links to the files; copies where links fail."""
    shutil.copytree(source, target, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def remove(path: str | os.PathLike[str]) -> None:
    """Removes a file, a link (not its target) or a whole directory, if it exists."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Context that adds this path to system errors."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def plainly(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Context with a path to the same directory without characters that some library misreads.

    It is the path itself if that is plain and short; else a path through a descriptor of this
    process, or on systems without such paths, through a link in a temporary directory.
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
    """Returns the name of the file that a partial file of this name was to replace, or None."""
    found = _PARTIAL.fullmatch(name)
    return found[1] if found else None


def _new(path: Path) -> Path:
    """Creates the file that will replace `path`."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    usual = path.with_name(f".{path.name}.partial")  # fixed name: a kill leaves at most one behind
    if shared(usual) or _age(usual) > _LEFT_S:
        usual.unlink(missing_ok=True)
    try:
        os.close(os.open(usual, flags, 0o666))
        return usual
    except FileExistsError:  # another process may be writing it now
        other = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
        os.close(os.open(other, flags, 0o666))
        return other


def _age(path: Path) -> float:
    """Returns seconds since a file was written to; 0 if it does not exist."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0

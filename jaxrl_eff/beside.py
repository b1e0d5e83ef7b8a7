"""A process beside this one for work that may take forever, fill the memory, or crash.

`Beside` is this side: it starts a script when it is first asked, once, ends it with this process,
and starts it anew after a request has made it end. `bound` is the script's side: limits that the
kernel keeps in the middle of one operation, too. Ctrl-C is for this process alone.
"""

import atexit
import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


class Ended(Exception):
    """The process ended before it answered.

    Attributes:
        code: its exit code; -N if signal N ended it.
    """

    def __init__(self, code: int):
        super().__init__(f"exit code {code}")
        self.code = code


class Beside:
    """A script in a process of its own. Requests of several threads come one after the other.

    Attributes:
        process: the process; None before the first request and after it was closed.
    """

    def __init__(self, script: str, begin: Callable[[subprocess.Popen], Any]):
        """Starts nothing yet.

        Args:
            script: path of a file that talks through its standard streams, in bytes. It runs
                without its folder on the path, whose modules would hide others of their names.
            begin: called with the process when it was started, e.g. to send `sys.path`.
        """
        self.process: subprocess.Popen | None = None
        self._script, self._begin = str(Path(script).resolve()), begin
        self._owner, self._lock = -1, threading.Lock()
        atexit.register(self._at_exit)

    def ask(self, request: bytes, read: Callable[[BinaryIO], Any]) -> Any:
        """Sends a request and reads its answer.

        Args:
            request: bytes as the script wants them.
            read: reads one answer from the script's output; EOFError if it is cut off.

        Raises:
            Ended: the process ended instead.
        """
        with self._lock:
            process = self._running()
            try:
                process.stdin.write(request)
                process.stdin.flush()
                return read(process.stdout)
            except (OSError, EOFError):
                self._close()
                raise Ended(process.returncode) from None
            except BaseException:  # an interrupt: what comes next would not be the answer
                self._close(kill=True)
                raise

    def _running(self) -> subprocess.Popen:
        """The process; a new one if there is none, it has ended, or this is a fork."""
        if self.process is not None:
            if self._owner == os.getpid() and self.process.poll() is None:
                return self.process
            self._close()
        self._owner = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, "-P", self._script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            self._begin(self.process)
        except BaseException:
            self._close(kill=True)
            raise
        return self.process

    def _close(self, kill: bool = False) -> None:
        """Waits for the end of the process, which the end of its input brings about."""
        if kill:
            self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # what was not sent cannot be flushed
                stream.close()
        self.process.wait()
        self.process = None

    def _at_exit(self) -> None:
        if self.process is not None and self._owner == os.getpid():
            self._close(kill=True)


def bound(memory: int) -> Callable[[float], None]:
    """Limits the memory of this process from now on; returns a function that sets its clock.

    Args:
        memory: bytes of the whole process.

    Returns:
        `clock(seconds)` ends the process after so much computing, or six times that on the wall,
        which is for one that does not even compute; 0 stops it.
    """
    import resource  # of POSIX systems only, as all that runs in such a process
    import signal

    for kind, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_DATA, memory),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # a lower limit is there, or none can be set
            resource.setrlimit(kind, (most, most))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def clock(seconds: float) -> None:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, 6 * seconds)

    return clock

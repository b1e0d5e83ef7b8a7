"""A helper process for work that can run forever, exhaust memory, or crash.

`Beside` is this process's side: it starts a script on the first request, ends it with this process,
and restarts it if a request made it end. `bound` is the script's side: limits that the kernel
enforces even within one operation. Ctrl-C affects only this process.
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
    """A script in its own process. Requests of several threads run one at a time.

    Attributes:
        process: the process; None before the first request and after it was closed.
    """

    def __init__(self, script: str, begin: Callable[[subprocess.Popen], Any]):
        """Does not start the process yet.

        Args:
            script: path of a file that communicates through its standard streams, in bytes. It runs
                without its folder on the path, whose modules could shadow others.
            begin: called with the process after its start, e.g. to send `sys.path`.
        """
        self.process: subprocess.Popen | None = None
        self._script, self._begin = str(Path(script).resolve()), begin
        self._owner, self._lock = -1, threading.Lock()
        atexit.register(self._at_exit)

    def ask(self, request: bytes, read: Callable[[BinaryIO], Any]) -> Any:
        """Sends a request and reads its answer.

        Args:
            request: bytes in the script's format.
            read: reads one answer from the script's output; raises EOFError if it is truncated.

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
            except BaseException:  # an interrupt: the next output would answer the old request
                self._close(kill=True)
                raise

    def _running(self) -> subprocess.Popen:
        """Returns the process; starts one if there is none, it has ended, or this is a fork."""
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
        """Closes the input of the process, which ends it, and waits for its end."""
        if kill:
            self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # unsent data cannot be flushed
                stream.close()
        self.process.wait()
        self.process = None

    def _at_exit(self) -> None:
        if self.process is not None and self._owner == os.getpid():
            self._close(kill=True)


def bound(memory: int) -> Callable[[float], None]:
    """Limits the memory of this process from now on; returns a function that sets a time limit.

    Args:
        memory: bytes of the whole process.

    Returns:
        `clock(seconds)` ends the process after this much CPU time, or six times that in wall time,
        in case it does not compute at all; 0 disables it.
    """
    import resource  # POSIX only, like everything that runs in such a process
    import signal

    for kind, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_DATA, memory),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # a lower limit exists, or none can be set
            resource.setrlimit(kind, (most, most))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def clock(seconds: float) -> None:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, 6 * seconds)

    return clock

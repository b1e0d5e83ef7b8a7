"""Handling of signals to a run, and of closed output streams.

SIGTERM and SIGINT (Ctrl-C) ask a run to stop. During training, the running step is finished and
saved first; before and after training (assembly, compilation, restoring, export, report) the run
stops at once, since nothing would be lost. A second SIGINT ends the process. SIGHUP and closed
output do not affect training.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from io import TextIOBase
from types import FrameType
from typing import Any


class Stopped(BaseException):
    """The run was asked to stop, and has saved its state.

    Not an `Exception`, so that no handler in between takes it for an error.
    """


class Interrupts:
    """Signals received so far. Made by `listening`.

    Attributes:
        phase: current phase of the run, for messages about a stop.
    """

    def __init__(self):
        self.phase = "assembly"
        self._asked = threading.Event()
        self._training = False

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Context in which signals wait until `asked` is called."""
        self._training = True
        try:
            yield
        finally:
            self._training = False

    def over(self) -> None:
        """Makes signals wait from now on: only closing files remains, which is quick."""
        self._training = True

    def check(self) -> None:
        """Stops if a signal arrived while it had to wait, and `asked` was not called since.

        Raises:
            Stopped: a signal arrived. With several processes only `asked` decides.
        """
        if self._asked.is_set() and _alone():
            raise Stopped(self.phase)

    def asked(self, step: int) -> bool:
        """Returns True if the run must stop after this step; all processes agree.

        Args:
            step: steps taken in the whole run; JAX's agreement needs an increasing number.
        """
        if _alone():
            return self._asked.is_set()
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal."""
        del frame
        if self._asked.is_set():
            if number == signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self._asked.set()
        if not _alone():
            # JAX forwards a SIGTERM to all processes, which then stop after the same step.
            os.kill(os.getpid(), signal.SIGTERM)
        elif not self._training:
            raise Stopped(self.phase)
        if number == signal.SIGINT:
            _tell("stopping after the step under way, which is saved; Ctrl-C again ends at once")


@contextlib.contextmanager
def listening() -> Iterator[Interrupts]:
    """Context that listens to signals; has no effect outside the main thread."""
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    # With several processes JAX handles SIGTERM itself.
    taken = {signal.SIGINT: interrupts.receive}
    if _alone():
        taken[signal.SIGTERM] = interrupts.receive
    if hasattr(signal, "SIGHUP"):
        taken[signal.SIGHUP] = signal.SIG_IGN
    before = {number: signal.signal(number, what) for number, what in taken.items()}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            # None: a handler that was not installed from Python, which cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _alone() -> bool:
    import jax  # imported late: errors in the command are reported before this second of imports

    return jax.process_count() == 1


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):  # unbuffered: the signal can arrive during a print
        os.write(2, f"\n{text}\n".encode())


def outlast_readers() -> None:
    """Replaces standard output and error by streams that never fail: see `Outlasting`."""
    sys.stdout, sys.stderr = (Outlasting(s) for s in (sys.stdout, sys.stderr))


class Outlasting(TextIOBase):
    """A stream that survives its reader (closed pipe or terminal, full disk): the rest is dropped.

    Its file descriptor then points to the null device, so that libraries that write to it, and the
    interpreter at exit, see no error either.
    """

    def __init__(self, stream: Any):
        """Wraps a text stream; None, a closed standard stream, becomes the null device."""
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError:
            self._drop()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def reconfigure(self, **options: Any) -> None:
        """Changes how text is encoded, where the stream allows it."""
        try:
            getattr(self._stream, "reconfigure", lambda **_: None)(**options)
        except OSError:
            self._drop()

    def _drop(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> Any:
        return self._stream.encoding

    @property
    def errors(self) -> Any:
        return self._stream.errors

    @property
    def buffer(self) -> Any:
        """The underlying byte stream, for code that writes bytes."""
        return self._stream.buffer

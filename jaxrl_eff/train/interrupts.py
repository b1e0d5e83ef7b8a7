"""Signals to a run, and readers of its output that go away.

SIGTERM and SIGINT (Ctrl-C) ask a run to stop. While it trains, the step under way is finished and
saved first; before and after that (assembly, compilation, restoring, export, report) it stops at
once, since nothing would be lost. A second SIGINT ends the process. SIGHUP, and output that nobody
takes any more, do not concern the training.
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
    """The run was asked to stop, and has saved what there was to save.

    No `Exception`, so that nothing on the way takes it for a failure of its own.
    """


class Interrupts:
    """Signals seen so far. Made by `listening`.

    Attributes:
        phase: of the run, for messages: where a signal that stops it at once finds it.
    """

    def __init__(self):
        self.phase = "assembly"
        self._asked = threading.Event()
        self._training = False

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """While the body runs, signals wait for `asked` to be called."""
        self._training = True
        try:
            yield
        finally:
            self._training = False

    def over(self) -> None:
        """From now on signals wait: what is left is to close files, which takes a moment."""
        self._training = True

    def check(self) -> None:
        """Stops if a signal came when it had to wait, and nobody asked since.

        Raises:
            Stopped: so it was. With several processes `asked` alone decides.
        """
        if self._asked.is_set() and _alone():
            raise Stopped(self.phase)

    def asked(self, step: int) -> bool:
        """True if the run must stop after this step; all processes get the same answer.

        Args:
            step: steps taken in the whole run: JAX's agreement needs a number that rises.
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
            # JAX tells all processes of a SIGTERM, which then stop after the same step.
            os.kill(os.getpid(), signal.SIGTERM)
        elif not self._training:
            raise Stopped(self.phase)
        if number == signal.SIGINT:
            _tell("stopping after the step under way, which is saved; Ctrl-C again ends at once")


@contextlib.contextmanager
def listening() -> Iterator[Interrupts]:
    """Listens to signals while the body runs; in the main thread only."""
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    # With several processes JAX listens to SIGTERM itself.
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
            # None: a handler that was not installed from Python, which cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _alone() -> bool:
    import jax  # late: the command's mistakes are told before this second of imports

    return jax.process_count() == 1


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):  # straight to the terminal: a signal can come in a print
        os.write(2, f"\n{text}\n".encode())


def outlast_readers() -> None:
    """Makes standard output and error streams that never fail: see `Outlasting`."""
    sys.stdout, sys.stderr = (Outlasting(s) for s in (sys.stdout, sys.stderr))


class Outlasting(TextIOBase):
    """A stream whose reader may go away (closed pipe or terminal, full disk): the rest is dropped.

    Its file descriptor then leads to the null device, so that what libraries write there, and the
    interpreter at its end, meets no error either.
    """

    def __init__(self, stream: Any):
        """Wraps a text stream; None, a closed standard stream, is taken for the null device."""
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
        """The stream's bytes, for those that write them themselves."""
        return self._stream.buffer

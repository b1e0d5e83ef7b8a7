"""Messages and failure detection between the processes of a run."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxrl_eff.parallel.processes.link import Link, PeerLost

GRACE = 2.0  # seconds the main thread has to end by itself after a process is lost
LEAVING = 10.0  # seconds after which a failed process is ended in any case
EXIT = 2


class Group:
    """One process's membership in the group of its run's processes; created by `meet`.

    Process 0 has a link to every other process and relays their messages. The loss of any process
    ends this one, which could otherwise wait forever in a collective.

    Args:
        process, processes: this process's index and the number of processes.
        links: process -> link; process 0 has links to all others, these have one to process 0.
        wait: seconds of silence after which a process counts as lost.
        leave: called with an exit code to end this process.
    """

    def __init__(
        self,
        process: int,
        processes: int,
        links: Mapping[int, Link],
        *,
        wait: float | int = 60.0,
        leave: Callable[[int], Any] = os._exit,
    ):
        self.process, self.processes, self.wait = process, processes, wait
        self._links, self._leave = dict(links), leave
        self._changed = threading.Condition()
        self._board: dict[str, list[str]] = {}
        self._parts: dict[str, dict[int, str]] = {}
        self._offers: dict[str, Callable[[], str]] = {}
        self._asked: set[str] = set()
        self._lost = ""
        self._parted: set[int] = set()
        self._done = self._leaving = False
        for who in self._links:
            self._thread(f"messages of process {who}", self._listen, who)
        self._thread("heartbeats", self._beat)

    # Strings --------------------------------------------------------------------------------------

    def exchange(self, key: str, text: str) -> list[str]:
        """All processes' values under a key, by process index; the key must not have been used yet.

        Raises:
            PeerLost: a process ended before it gave its value.
        """
        self._say(key, text)
        found = self.hear(key)
        assert found is not None  # None only if `stop` returns True
        return found

    def tell(self, key: str, text: str) -> None:
        """Sends a string from process 0 to all others, which `hear` it; does not wait.

        Raises:
            ValueError: this is not process 0.
        """
        if self.process:
            raise ValueError(f"process {self.process} would tell all, but that is process 0's.")
        self._offer({"key": key, "all": [text]})

    def hear(self, key: str, stop: Callable[[], bool] = lambda: False) -> list[str] | None:
        """Waits for the values under a key and removes them.

        Args:
            key: as passed to `exchange` or `tell`.
            stop: polled while waiting; if it returns True, the result is None.

        Raises:
            PeerLost: a process is lost.
        """
        with self._changed:
            return self._board.pop(key) if self._arrived(key, stop) else None

    def offer(self, name: str, answer: Callable[[], str]) -> None:
        """Registers an answer that `everywhere` collects. Every process must offer the same."""
        self._offers[name] = answer

    def everywhere(self, name: str) -> list[str]:
        """Answers of all processes to an offered name, computed once; see `offer`.

        The other processes need not call this: a separate thread computes their answer.

        Raises:
            PeerLost: a process ended before it answered.
        """
        self._ask(name)
        with self._changed:
            self._arrived(f"answer {name}")
            return list(self._board[f"answer {name}"])

    def _arrived(self, key: str, stop: Callable[[], bool] = lambda: False) -> bool:
        """Waits for the values under a key; False if `stop` returned True before."""
        while key not in self._board:
            if self._lost:
                raise PeerLost(self._lost)
            if stop():
                return False
            self._changed.wait(0.1)
        return True

    def _offer(self, message: Mapping[str, Any], *, but: int | None = None) -> None:
        """Sends an object over all links except that of process `but`."""
        for who, link in self._links.items():
            if who != but:
                link.offer(message)

    def _say(self, key: str, text: str) -> None:
        if self.process == 0:
            self._collect(0, key, text)
        else:
            self._links[0].offer({"key": key, "text": text})

    def _collect(self, who: int, key: str, text: str) -> None:
        """On process 0, collects the values under a key and sends them to all when complete."""
        with self._changed:
            parts = self._parts.setdefault(key, {})
            parts[who] = text
            if len(parts) < self.processes:
                return
            every = [parts[i] for i in range(self.processes)]
            del self._parts[key]
        self._offer({"key": key, "all": every})
        self._post(key, every)

    def _post(self, key: str, every: list[str]) -> None:
        with self._changed:
            self._board[key] = every
            self._changed.notify_all()

    def _ask(self, name: str, *, passed_on: bool = False) -> None:
        with self._changed:
            if name in self._asked:
                return
            self._asked.add(name)
        if self.process == 0 or not passed_on:
            self._offer({"ask": name})
        self._thread(f"answer {name}", lambda: self._say(f"answer {name}", self._offers[name]()))

    # Failure and exit -----------------------------------------------------------------------------

    def loss(self, seconds: float | int = 0.0) -> str:
        """Description of a lost process; "" if none is lost within this many seconds."""
        until = time.monotonic() + seconds
        with self._changed:
            while not self._lost and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            return self._lost

    def fail(self, why: str) -> None:
        """Notifies the others that this process ends with an error.

        Process 0 then waits a few seconds for them to end. A watchdog ends this process with exit
        code 2 after `LEAVING` seconds in any case.
        """
        with self._changed:
            self._leaving, already = True, self._lost
            self._done = True
        self._thread("end of a failed process", self._must_leave)
        if not already:
            self._offer({"failed": self.process, "why": why})
        self._let_others_end()

    def finish(self, between: Callable[[], Any] = lambda: None) -> None:
        """Waits until every process has finished.

        Args:
            between: called when all have; a process that dies during it is still detected.

        Raises:
            PeerLost: a process did not finish.
        """
        self.exchange("end", "")
        between()
        self._done = True
        self._offer({"bye": self.process})
        if self.process:
            self._links[0].close()

    def end(self, message: str) -> None:
        """Prints an error and ends this process."""
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        with contextlib.suppress(Exception):
            print(f"error: {message}", file=sys.stderr, flush=True)
        self._leave(EXIT)

    def _listen(self, who: int) -> None:
        link = self._links[who]
        try:
            while True:
                message = link.receive(self.wait)
                if "key" in message and "all" in message:
                    self._post(message["key"], message["all"])
                elif "key" in message:
                    self._collect(who, message["key"], message["text"])
                elif "ask" in message:
                    self._ask(message["ask"], passed_on=True)
                elif "failed" in message:
                    self._lose(message["failed"], message["why"])
                elif "bye" in message:
                    break
        except TimeoutError:
            self._lose(who, f"process {who} was silent for {self.wait:g} s")
        except (OSError, ValueError):
            self._lose(who, f"process {who} ended without a word")
        link.close()
        with self._changed:
            self._parted.add(who)
            self._changed.notify_all()

    def _lose(self, who: int, why: str) -> None:
        with self._changed:
            if self._lost or self._done:
                return
            self._lost = why
            self._changed.notify_all()
        self._offer({"failed": who, "why": why}, but=who)
        self._thread("end after a lost process", self._end_soon)

    def _end_soon(self) -> None:
        time.sleep(GRACE)  # the main thread may hit an error of its own and exit cleanly
        if not self._leaving:
            self._let_others_end()
            self.end(self._lost)

    def _let_others_end(self) -> None:
        """On process 0, waits for the others, which JAX would kill with pages of output."""
        until = time.monotonic() + 2 * GRACE
        with self._changed:
            while not self.process and len(self._parted) < len(self._links):
                if time.monotonic() > until:
                    return
                self._changed.wait(0.1)

    def _must_leave(self) -> None:
        time.sleep(LEAVING)
        self._leave(EXIT)

    def _beat(self) -> None:
        while not self._done:
            self._offer({})
            time.sleep(min(5.0, self.wait / 6))

    def leave_if_failed(self) -> None:
        """Ends this process after `fail`, since JAX's shutdown would wait for the others."""
        if self._leaving:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            self._leave(EXIT)

    @staticmethod
    def _thread(name: str, run: Callable[..., Any], *args: Any) -> None:
        threading.Thread(target=run, args=args, daemon=True, name=name).start()


_group: Group | None = None


def group() -> Group | None:
    """This process's group; None if the run has a single process or did not `meet`."""
    return _group


@contextlib.contextmanager
def joined(here: Group | None) -> Iterator[None]:
    """Makes `group` return this group while the block runs."""
    global _group
    before, _group = _group, here
    try:
        yield
    finally:
        _group = before

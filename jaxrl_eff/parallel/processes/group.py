"""Messages between the processes of a run while it lasts."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxrl_eff.parallel.processes.link import Link, PeerLost

GRACE = 2.0  # seconds in which the main thread may end by itself, once a process is lost
LEAVING = 10.0  # seconds in which it must have ended
EXIT = 2


class Group:
    """This process among those of its run; made by `meet`.

    Process 0 has a link to every other one, and passes on what they say. A process that is lost
    ends this one: what waits for it in a collective would wait for ever.

    Args:
        process, processes: which this is, of how many.
        links: process -> link; of process 0 to all others, else to process 0.
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
            self._thread(self._listen, who)
        self._thread(self._beat)

    # Texts --------------------------------------------------------------------------------------

    def exchange(self, key: str, text: str) -> list[str]:
        """The values that all processes give under a key that none has used yet, in their order.

        Raises:
            PeerLost: a process ended before it said something.
        """
        self._say(key, text)
        found = self.hear(key)
        assert found is not None  # no other way to stop waiting
        return found

    def tell(self, key: str, text: str) -> None:
        """Says something to all others, which `hear` it; of process 0 alone. Does not wait."""
        if self.process:
            raise ValueError(f"process {self.process} would tell all, but that is process 0's.")
        for link in self._links.values():
            link.offer({"key": key, "all": [text]})

    def hear(self, key: str, stop: Callable[[], bool] = lambda: False) -> list[str] | None:
        """Waits for what was said under a key, which is forgotten then.

        Args:
            stop: whether to wait no longer, and return None.

        Raises:
            PeerLost: a process is lost.
        """
        with self._changed:
            while key not in self._board:
                if self._lost:
                    raise PeerLost(self._lost)
                if stop():
                    return None
                self._changed.wait(0.1)
            return self._board.pop(key)

    def offer(self, name: str, answer: Callable[[], str]) -> None:
        """Lets other processes ask what `answer` gives here. Every process must offer the same."""
        self._offers[name] = answer

    def everywhere(self, name: str) -> list[str]:
        """The answers of all processes to a question that was offered, once; see `offer`.

        Others need not ask: their answer comes from a thread of its own.
        """
        self._ask(name)
        with self._changed:
            while f"answer {name}" not in self._board:
                if self._lost:
                    raise PeerLost(self._lost)
                self._changed.wait(0.1)
            return list(self._board[f"answer {name}"])

    def _say(self, key: str, text: str) -> None:
        if self.process == 0:
            self._collect(0, key, text)
        else:
            self._links[0].offer({"key": key, "text": text})

    def _collect(self, who: int, key: str, text: str) -> None:
        """Process 0's: all that was said under a key, once everybody has."""
        with self._changed:
            parts = self._parts.setdefault(key, {})
            parts[who] = text
            if len(parts) < self.processes:
                return
            every = [parts[i] for i in range(self.processes)]
            del self._parts[key]
        for link in self._links.values():
            link.offer({"key": key, "all": every})
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
            for link in self._links.values():
                link.offer({"ask": name})
        self._thread(lambda: self._say(f"answer {name}", self._offers[name]()))

    # Life and death -----------------------------------------------------------------------------

    def loss(self, seconds: float | int = 0.0) -> str:
        """Words about a process that was lost; "" if none was within so many seconds."""
        until = time.monotonic() + seconds
        with self._changed:
            while not self._lost and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            return self._lost

    def fail(self, why: str) -> None:
        """Tells the others that this process ends by an error, and waits until they have heard.

        This process ends in any case within a few seconds, with exit code 2.
        """
        with self._changed:
            self._leaving, already = True, self._lost
            self._done = True
        self._thread(self._must_leave)
        if not already:
            for link in self._links.values():
                link.offer({"failed": self.process, "why": why})
        self._let_others_end()

    def finish(self, between: Callable[[], Any] = lambda: None) -> None:
        """Waits until every process has come to its end.

        Args:
            between: run when all have; a process that dies in it is still noticed.

        Raises:
            PeerLost: one of them did not.
        """
        self.exchange("end", "")
        between()
        self._done = True
        for link in self._links.values():
            link.offer({"bye": self.process})
            if self.process:
                link.close()

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
        for other, link in self._links.items():
            if other != who:
                link.offer({"failed": who, "why": why})
        self._thread(self._end_soon)

    def _end_soon(self) -> None:
        time.sleep(GRACE)  # the main thread may have met an error by this, and end in order
        if not self._leaving:
            self._let_others_end()
            self.end(self._lost)

    def _let_others_end(self) -> None:
        """Process 0's: JAX ends the others with pages of text if it is gone before them."""
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
            for link in self._links.values():
                link.offer({})
            time.sleep(min(5.0, self.wait / 6))

    def leave_if_failed(self) -> None:
        """Ends this process if it is to end by an error: JAX would wait for the others."""
        if self._leaving:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            self._leave(EXIT)

    @staticmethod
    def _thread(run: Callable[..., Any], *args: Any) -> None:
        threading.Thread(target=run, args=args, daemon=True, name="peers").start()


_group: Group | None = None


def group() -> Group | None:
    """That of this process, if it is one of several that met."""
    return _group


@contextlib.contextmanager
def joined(here: Group | None) -> Iterator[None]:
    """`group` returns this one while the block runs."""
    global _group
    before, _group = _group, here
    try:
        yield
    finally:
        _group = before

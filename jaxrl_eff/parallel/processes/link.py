"""A connection between two processes, on which objects go as lines of JSON."""

import contextlib
import json
import socket
import threading
from collections.abc import Mapping
from typing import Any

LONGEST = 1 << 28  # characters of a line


class PeerLost(ConnectionError):
    """A process of this run is missing, has died or has failed."""


class Link:
    """Either end of it; any thread may send, one receives."""

    def __init__(self, sock: socket.socket):
        self._sock, self._writing = sock, threading.Lock()
        self._lines = sock.makefile("r", encoding="utf-8", newline="\n")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, message: Mapping[str, Any]) -> None:
        """Raises OSError if the other end is gone."""
        data = (json.dumps(message) + "\n").encode()
        with self._writing:
            self._sock.sendall(data)

    def receive(self, seconds: float | int) -> dict[str, Any]:
        """The next object.

        Raises:
            OSError: the other end is gone, or silent for so long.
            ValueError: something that is no object.
        """
        self._sock.settimeout(seconds)
        line = self._lines.readline(LONGEST)
        if not line.endswith("\n"):
            raise ConnectionResetError("closed")
        found = json.loads(line)
        if not isinstance(found, dict):
            raise ValueError(f"{line[:60]!r} is no object.")
        return found

    def gone(self) -> bool:
        """True if the other end is known to have closed it."""
        self._sock.settimeout(0)
        try:
            return self._sock.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            self._sock.settimeout(None)

    def offer(self, message: Mapping[str, Any]) -> None:
        """Sends it if somebody is there."""
        with contextlib.suppress(OSError, ValueError):
            self.send(message)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._lines.close()
        self._sock.close()

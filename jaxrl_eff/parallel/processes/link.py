"""Connection between two processes that carries JSON objects, one per line."""

import contextlib
import json
import socket
import threading
from collections.abc import Mapping
from typing import Any

LONGEST = 1 << 28  # characters per line


class PeerLost(ConnectionError):
    """Error for a process of this run that is missing, has died or has failed."""


class Link:
    """One end of a connection; any thread can send, a single one receives."""

    def __init__(self, sock: socket.socket):
        self._sock, self._writing = sock, threading.Lock()
        self._lines = sock.makefile("r", encoding="utf-8", newline="\n")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends an object.

        Raises:
            OSError: the other end is gone.
        """
        data = (json.dumps(message) + "\n").encode()
        with self._writing:
            self._sock.sendall(data)

    def receive(self, seconds: float | int) -> dict[str, Any]:
        """Receives the next object.

        Raises:
            OSError: the other end is gone, or silent for that many seconds.
            ValueError: the line is not a JSON object.
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
        """True if the other end is known to have closed the connection."""
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
        """Sends an object, ignoring errors if the other end is gone."""
        with contextlib.suppress(OSError, ValueError):
            self.send(message)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._lines.close()
        self._sock.close()

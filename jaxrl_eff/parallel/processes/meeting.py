"""Rendezvous of a run's processes, with a check that all were started alike.

Process 0 listens at the coordinator's address until all have connected, and then leaves the port to
JAX.
"""

import dataclasses
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxrl_eff.parallel.processes.group import Group
from jaxrl_eff.parallel.processes.link import Link, PeerLost

GREETING = "jaxrl_eff processes 1"
SHOWN = 60  # characters of a value in a message
QUIET = 2.0  # seconds of waiting before a message
LATE = 3.0  # seconds after an error in which further processes can connect to receive it


@dataclasses.dataclass(frozen=True)
class Place:
    """Address at which processes meet, and the index of this one.

    Attributes:
        coordinator: host:port of process 0.
        processes: number of processes.
        process: index of this one, from 0.
        wait: seconds after which a process that does not connect or answer counts as lost.

    Raises:
        ValueError: a coordinator that is not host:port, a number of processes below 1, an index out
            of range, or a wait that is not positive.
    """

    coordinator: str
    processes: int
    process: int
    wait: float = 60.0

    def __post_init__(self):
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError(
                f"--coordinator={self.coordinator} is not host:port with a port below 65536."
            )
        if self.processes < 1:
            raise ValueError(f"--processes={self.processes}, but there must be at least 1.")
        if not 0 <= self.process < self.processes:
            raise ValueError(
                f"--process={self.process} is not below {self.processes}, and 0 or more."
            )
        if not self.wait > 0:
            raise ValueError(f"--wait={self.wait:g}, but it must be above 0 seconds.")

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.coordinator.rpartition(":")
        return host.removeprefix("[").removesuffix("]"), int(port)


def meet(
    place: Place,
    facts: Mapping[str, str],
    *,
    say: Callable[[str], None] = lambda _: None,
    leave: Callable[[int], Any] = os._exit,
) -> "Group":
    """Waits for all processes and checks that they were started alike.

    Args:
        place: the address and this process's index.
        facts: name -> value, which must be the same on all processes.
        say: called with a message about what is being waited for.
        leave: ends this process with an exit code; see `Group`.

    Raises:
        PeerLost: a process does not connect within `place.wait` seconds.
        ValueError: on every process that connected: facts differ, an index occurs twice, or the
            number of processes differs.
        OSError: process 0 cannot listen at the address.
    """
    if place.process:
        return _come(place, facts, say, leave)
    listener = _listener(place)
    with listener:
        links = _gathered(listener, place, facts, say)
    for link in links.values():
        link.offer({"go": place.wait})
    return Group(0, place.processes, links, wait=place.wait, leave=leave)


def _listener(place: Place) -> socket.socket:
    where = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "")
    host, port = dataclasses.replace(place, coordinator=where).address if where else ("", 0)
    port = port or place.address[1]
    both = socket.has_dualstack_ipv6() and host in ("", "::")
    family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024, dualstack_ipv6=both)
    except OSError as error:
        raise OSError(
            f"--coordinator={place.coordinator}: process 0 cannot listen at port {port} of this "
            f"host: {error.strerror or error}."
        ) from None


def _gathered(
    listener: socket.socket, place: Place, facts: Mapping[str, str], say: Callable[[str], None]
) -> dict[int, Link]:
    """Accepts a link to every other process; on an error, all that connected receive it."""
    links: dict[int, Link] = {}
    every, extra, wrong = {0: facts}, [], ""
    told, until = False, time.monotonic() + place.wait
    while missing := [i for i in range(1, place.processes) if i not in links]:
        left = until - time.monotonic()
        if left <= 0:
            break
        if not told and not wrong and left < place.wait - QUIET:
            say(f"waiting for {_named(missing)} at {place.coordinator}, up to {place.wait:g} s")
            told = True
        found = _greeted(listener, left)
        if found is None:
            continue
        link, who, count, theirs = found
        if who in links and links[who].gone():
            links.pop(who).close()  # it was restarted
        if count != place.processes:
            problem = f"--processes is {place.processes} on process 0 and {count} on process {who}."
        elif who in links or not 0 < who < place.processes:
            problem = f"two processes were started with --process={who}."
        else:
            links[who], every[who], problem = link, theirs, ""
        if problem:
            extra.append(link)
            wrong = wrong or problem
            until = min(until, time.monotonic() + LATE)  # late ones get the error too
    kind: type[Exception] = ValueError
    if not wrong and missing:
        kind, wrong = (
            PeerLost,
            f"no answer from {_named(missing)} after {place.wait:g} s at --coordinator="
            f"{place.coordinator}, where --processes={place.processes} should meet.",
        )
    if wrong := wrong or differences([every[i] for i in range(place.processes)]):
        for link in (*links.values(), *extra):
            link.offer({"refused": wrong, "lost": kind is PeerLost})
            link.close()
        raise kind(wrong)
    return links


def _greeted(
    listener: socket.socket, seconds: float
) -> tuple[Link, int, int, Mapping[str, str]] | None:
    """Accepts the next process: (link, index, number of processes, facts), or None."""
    listener.settimeout(min(seconds, 0.5))
    try:
        link = Link(listener.accept()[0])
    except TimeoutError:
        return None
    try:
        hello = link.receive(min(seconds, 5))
        if hello["greeting"] != GREETING:
            raise ValueError(hello["greeting"])
        return link, int(hello["process"]), int(hello["processes"]), dict(hello["facts"])
    except (OSError, ValueError, KeyError, TypeError):
        link.close()  # not a process of a run
        return None


def _come(
    place: Place,
    facts: Mapping[str, str],
    say: Callable[[str], None],
    leave: Callable[[int], Any],
) -> "Group":
    until, told, why = time.monotonic() + place.wait, False, ""
    hello = {
        "greeting": GREETING,
        "process": place.process,
        "processes": place.processes,
        "facts": dict(facts),
    }
    while (left := until - time.monotonic()) > 0:
        if not told and left < place.wait - QUIET:
            say(f"waiting for --coordinator={place.coordinator}, up to {place.wait:g} s")
            told = True
        try:
            link = Link(socket.create_connection(place.address, timeout=min(left, 5)))
        except OSError as error:
            why = error.strerror or str(error)
            time.sleep(min(left, 0.2))
            continue
        try:
            link.send(hello)
            # Process 0 can have started later, and waits as long for the others.
            answer = link.receive(place.wait + 5)
        except (OSError, ValueError) as error:
            why = f"what listens there is no process 0 of a run that starts ({error})"
            link.close()
            time.sleep(min(left, 0.5))
            continue
        if "go" in answer:
            wait = float(answer["go"])
            return Group(place.process, place.processes, {0: link}, wait=wait, leave=leave)
        link.close()
        kind = PeerLost if answer.get("lost") else ValueError
        raise kind(str(answer.get("refused")))
    raise PeerLost(
        f"no answer from --coordinator={place.coordinator} after {place.wait:g} s: {why}. Is "
        "process 0 running, and are host and port right?"
    )


def _named(processes: Sequence[int]) -> str:
    shown = ", ".join(map(str, processes[:8])) + (", ..." if len(processes) > 8 else "")
    return f"process{'es' if len(processes) > 1 else ''} {shown}"


def differences(every: Sequence[Mapping[str, str]], *, shown: int = 3) -> str:
    """One-line description of the values that differ between processes; "" if none does.

    Args:
        every: the facts of each process, name -> value.
        shown: maximum number of differences to list with their values.
    """
    names = list(dict.fromkeys(name for facts in every for name in facts))
    told = []
    for name in names:
        values: dict[str, list[int]] = {}
        for process, facts in enumerate(every):
            values.setdefault(facts.get(name, "not there"), []).append(process)
        if len(values) > 1:
            each = (f"{_cut(v)} on {_named(where)}" for v, where in values.items())
            told.append(f"{name} is {' and '.join(each)}")
    if not told:
        return ""
    more = f"; and {len(told) - shown} more" if len(told) > shown else ""
    return f"the processes of this run differ: {'; '.join(told[:shown])}{more}."


def _cut(value: str) -> str:
    return value if len(value) <= SHOWN else f"{value[: SHOWN - 3]}..."

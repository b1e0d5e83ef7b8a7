"""Processes that meet, agree and miss each other; here each is a thread with sockets of its own."""

import contextlib
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxrl_eff.parallel import processes as peers
from jaxrl_eff.parallel.attention import kernels
from jaxrl_eff.planner import clusters
from jaxrl_eff.train import startup


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def come(places, facts, left=None):
    """What every process gets of `meet`, in their order: a group or an error."""
    left = [] if left is None else left

    def one(place, mine):
        try:
            return peers.meet(place, mine, leave=lambda code: left.append((place.process, code)))
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(one, places, facts))


def at(port, process, processes=3, wait=20.0):
    return peers.Place(f"localhost:{port}", processes, process, wait)


@pytest.fixture
def left():
    """(process, exit code) of those that ended."""
    return []


@pytest.fixture
def three(left, monkeypatch):
    monkeypatch.setattr(sys.modules["jaxrl_eff.parallel.processes.group"], "GRACE", 0.2)
    port = free_port()
    groups = come([at(port, i, wait=1.5) for i in range(3)], [{"seed": "1"}] * 3, left)
    assert all(isinstance(g, peers.Group) for g in groups), groups
    yield groups
    for g in groups:
        g._done = True
    for g in groups:
        for link in g._links.values():
            link.close()


def everywhere(groups, do):
    with ThreadPoolExecutor(len(groups)) as pool:
        return list(pool.map(do, groups))


def until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_all_hear_what_all_say(three):
    said = everywhere(three, lambda g: g.exchange("a", f"I am {g.process}\n\u00e9"))
    assert said == [[f"I am {i}\n\u00e9" for i in range(3)]] * 3
    for n in range(20):  # in any order, and without waiting
        three[0].tell(f"cost {n}", str(n))
    for g in three[1:]:
        assert [g.hear(f"cost {n}") for n in reversed(range(20))] == [
            [str(n)] for n in reversed(range(20))
        ]
        assert g.hear("never said", lambda: True) is None
    with pytest.raises(ValueError, match="process 1 would tell all"):
        three[1].tell("cost", "")


def test_one_may_ask_what_others_do_not(three):
    for g in three:
        g.offer("size", lambda g=g: str(10 * g.process))
    assert three[2].everywhere("size") == ["0", "10", "20"]
    assert three[0].everywhere("size") == ["0", "10", "20"]


def test_an_end_is_for_all(three, left):
    before = []
    threading.Timer(0.5, lambda: before.append(1) or three[2].finish()).start()
    three[1]._thread("finish", three[1].finish)
    three[0].finish()
    assert before and not left


@pytest.mark.parametrize("who", [0, 2])
def test_a_process_that_dies_ends_the_others(who, three, left):
    three[who]._done = True  # it says no more
    for link in three[who]._links.values():
        link.close()  # as the kernel does
    others = [g for g in three if g.process != who]
    with pytest.raises(peers.PeerLost, match=f"process {who} ended without a word"):
        others[0].exchange("a", "")
    until(lambda: {(g.process, 2) for g in others} <= set(left))


def test_a_silent_process_is_given_up(three, left):
    three[1]._done = True  # beats no more
    assert "process 1 was silent for 1.5 s" in three[2].loss(15)
    until(lambda: {(0, 2), (2, 2)} <= set(left))


def test_the_others_say_why_a_process_failed(three, left, capsys):
    three[1].fail("process 1 stopped: data/x.jsonl is no file")
    assert three[2].loss(5) == three[0].loss(5) == "process 1 stopped: data/x.jsonl is no file"
    until(lambda: {(0, 2), (2, 2)} <= set(left))
    assert "error: process 1 stopped: data/x.jsonl is no file\n" in capsys.readouterr().err


def test_who_differs_is_told_to_all():
    port = free_port()
    facts = [{"config.seed": "1", "config.a": "x"}, {"config.seed": "2", "config.a": "x"}]
    facts.append({"config.seed": "1", "config.a": "x", "config.b": "y" * 99})
    found = come([at(port, i) for i in range(3)], facts)
    assert {str(e) for e in found} == {
        "the processes of this run differ: config.seed is 1 on processes 0, 2 and 2 on process 1; "
        f"config.b is not there on processes 0, 1 and {'y' * 57}... on process 2."
    }
    assert {type(e) for e in found} == {ValueError}


def test_many_differences_are_counted():
    every = [{str(i): "a" for i in range(9)}, {str(i): "b" for i in range(9)}]
    assert peers.differences(every).endswith("2 is a on process 0 and b on process 1; and 6 more.")
    assert peers.differences([every[0]] * 3) == ""


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([(0, 3), (1, 3), (1, 3)], "two processes were started with --process=1"),
        ([(0, 3), (1, 3), (2, 4)], "--processes is 3 on process 0 and 4 on process 2"),
        ([(0, 3), (2, 3)], "no answer from process 1 after 1 s"),
        ([(1, 3)], "no answer from --coordinator=localhost:"),
    ],
)
def test_who_does_not_fit_or_come_is_named(places, message):
    port = free_port()
    began = time.monotonic()
    found = come([at(port, p, n, wait=1.0) for p, n in places], [{}] * len(places))
    assert all(message in str(e) for e in found), found
    assert time.monotonic() - began < 5
    lost = "no answer" in message
    assert {isinstance(e, peers.PeerLost) for e in found} == {lost}


def test_strangers_at_the_door_are_sent_away():
    """Whatever connects before the others, such as a scan of ports, changes nothing."""
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(peers.meet, at(port, 0, 2), {}, leave=lambda _: None)
        for text in (b"GET / HTTP/1.1\r\n\r\n", b"\xfe\xff\n", b"[1]\n", b'{"process": 1}\n', b""):
            with contextlib.closing(connected(port)) as s:
                s.sendall(text)
        second = peers.meet(at(port, 1, 2), {}, leave=lambda _: None)
        both = [first.result(), second]
    assert everywhere(both, lambda g: g.exchange("a", "")) == [["", ""]] * 2
    for g in both:
        g._thread("finish", g.finish)


def connected(port):
    for _ in range(100):
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(("localhost", port))
        time.sleep(0.02)
    raise AssertionError("nobody listens")


def test_a_port_in_use_is_named():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen at port {port} of this host"):
            peers.meet(at(port, 0), {})


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (("localhost", 2, 0, 1.0), "--coordinator=localhost is not host:port"),
        (("localhost:", 2, 0, 1.0), "--coordinator=localhost: is not host:port"),
        ((":1234", 2, 0, 1.0), "--coordinator=:1234 is not host:port"),
        (("a:99999", 2, 0, 1.0), "--coordinator=a:99999 is not host:port"),
        (("a:x", 2, 0, 1.0), "--coordinator=a:x is not host:port"),
        (("a:1", 2, 2, 1.0), "--process=2 is not below 2"),
        (("a:1", 2, -1, 1.0), "--process=-1 is not below 2"),
        (("a:1", 0, 0, 1.0), "--processes=0, but there must be at least 1"),
        (("a:1", 2, 0, 0.0), "--wait=0, but it must be above 0"),
        (("a:1", 2, 0, float("nan")), "--wait=nan, but it must be above 0"),
    ],
)
def test_places_that_are_none_are_refused(where, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        peers.Place(*where)


def test_an_address_may_be_of_any_kind():
    assert peers.Place("[::1]:80", 1, 0).address == ("::1", 80)
    assert peers.Place("host.domain:80", 1, 0).address == ("host.domain", 80)


def test_all_processes_must_see_one_workdir(three, tmp_path, monkeypatch):
    here = {}
    monkeypatch.setattr(peers, "group", lambda: here[threading.get_ident()])

    def check(group, workdir):
        here[threading.get_ident()] = group
        try:
            startup.check_shared(workdir, seconds=0.3)
        except ValueError as error:
            return str(error)

    assert everywhere(three, lambda g: check(g, tmp_path)) == [None] * 3
    assert not list(tmp_path.iterdir())
    other = tmp_path / "other"
    other.mkdir()
    said = everywhere(three, lambda g: check(g, other if g.process == 2 else tmp_path))
    assert all("on process 2 is another directory than on process 0" in text for text in said)
    assert list(tmp_path.iterdir()) == [other] and not list(other.iterdir())


# What the first process decides ---------------------------------------------------------------


def test_rates_are_the_first_process_s_and_memory_the_least(three, monkeypatch):
    mine = {}
    monkeypatch.setattr(clusters, "_here", lambda _: mine[threading.get_ident()])

    def one(group):
        rates = {"flops_per_s": 1e9 + group.process, "memory_bytes": 9e9 - group.process}
        mine[threading.get_ident()] = clusters.gpus("h100").with_(**rates)
        return clusters._local(True, group)

    found = everywhere(three, one)
    assert found[0] == found[1] == found[2]
    assert found[0].flops_per_s == 1e9 and found[0].memory_bytes == 9e9 - 2


@pytest.mark.parametrize("broken", [(), (1,), (0, 2)])
def test_all_processes_use_one_kernel(broken, three, monkeypatch, caplog):
    """It must run on all of them, whoever asks first, and the others need not."""
    import jax

    monkeypatch.setitem(kernels._OF_PLATFORM, jax.default_backend(), kernels.TRITON)
    for g in three:
        reason = f"no compiler {g.process}" if g.process in broken else ""
        g.offer(kernels.TRIAL, lambda reason=reason: reason)
    for g in three[1:]:
        kernels.best.cache_clear()
        with peers.joined(g):
            assert kernels.best().name == ("xla" if broken else "triton")
    kernels.best.cache_clear()
    assert (f"process {broken[0]}: no compiler {broken[0]}" in caplog.text) if broken else True

"""A run's directory is fit to be written to and held by one run at a time."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time

import launch
import pytest

from jaxrl_eff.train import workdir
from jaxrl_eff.train.workdir import NAME, HeldError, held


def lock_of(directory, **changes):
    """Writes the lock of a holder that is this process but for the changes."""
    holder = vars(workdir._this()) | changes
    (directory / NAME).write_text(json.dumps(holder))
    return holder


def silent(path, seconds):
    """As if nobody had touched a file for so long."""
    os.utime(path, (time.time() - seconds,) * 2)


def ended():
    """The id of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_second_run_is_refused_by_host_and_process_and_the_lock_goes_with_the_first(tmp_path):
    with held(tmp_path):
        told = rf"held by another run, process {os.getpid()} on "
        with pytest.raises(HeldError, match=told), held(tmp_path):
            pass
        assert (tmp_path / NAME).is_file()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), held(tmp_path):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []
    with held(tmp_path):
        pass


DEAD = {
    "ended": lambda: {"process": ended()},
    "another with its id": lambda: {"began": "1"},
    "ended, start unknown": lambda: {"process": ended(), "began": ""},
}


@pytest.mark.parametrize("kind", DEAD)
def test_a_dead_process_of_this_host_holds_nothing(kind, tmp_path, caplog):
    lock_of(tmp_path, **DEAD[kind]())
    with held(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["process"] == os.getpid()
    assert "which is gone; taken over" in caplog.text and list(tmp_path.iterdir()) == []


def test_a_process_that_nobody_has_waited_for_is_dead(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    while workdir._began(child.pid) is not None:
        time.sleep(0.01)
    os.kill(child.pid, 0)  # it still has its id
    lock_of(tmp_path, process=child.pid, began="")
    assert workdir._alive(workdir._parsed((tmp_path / NAME).read_bytes()))  # not known to be dead
    lock_of(tmp_path, process=child.pid)
    with held(tmp_path):
        pass
    child.wait()


@pytest.mark.parametrize("change", [{"host": "elsewhere"}, {"kernel": "another boot"}])
def test_a_holder_elsewhere_is_gone_after_a_while_of_silence(change, tmp_path, caplog):
    lock_of(tmp_path, process=ended(), **change)
    for seconds in (0, workdir.STALE_S - 20, -workdir.STALE_S):  # its clock may be ahead
        silent(tmp_path / NAME, seconds)
        told = r"last heard of \d+ s ago.* after 180 s of silence"
        with pytest.raises(HeldError, match=told), held(tmp_path):
            pass
    silent(tmp_path / NAME, workdir.STALE_S + 1)
    with held(tmp_path):
        pass
    assert "taken over" in caplog.text


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "x"}', "null", "[" * 100_000])
def test_a_lock_that_was_cut_short_counts_for_a_while(content, tmp_path):
    (tmp_path / NAME).write_text(content)
    with pytest.raises(HeldError, match="does not say who"), held(tmp_path):
        pass
    silent(tmp_path / NAME, workdir.STALE_S + 1)
    with held(tmp_path):
        pass


def test_the_holder_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir, "BEAT_S", 0.01)
    with held(tmp_path):
        silent(tmp_path / NAME, 1000)
        while time.time() - (tmp_path / NAME).stat().st_mtime > 500:
            time.sleep(0.01)


def test_a_run_that_slept_while_another_took_over_is_told(tmp_path, monkeypatch):
    with held(tmp_path) as lock:
        lock.check()
        theirs = lock_of(tmp_path, host="elsewhere")
        lock.check()  # it has just been looked at
        monkeypatch.setattr(lock, "_seen", 0.0)
        with pytest.raises(HeldError, match=r"taken over by process .* on elsewhere"):
            lock.check()
    assert json.loads((tmp_path / NAME).read_text()) == theirs  # and is left alone


def test_nothing_of_a_start_that_was_killed_stays(tmp_path):
    (tmp_path / f"{NAME}.time").write_text("")
    with held(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_somebody_removed_is_made_again(tmp_path, monkeypatch):
    with held(tmp_path) as lock:
        mine = (tmp_path / NAME).read_text()
        (tmp_path / NAME).unlink()
        monkeypatch.setattr(lock, "_seen", 0.0)
        lock.check()
        assert (tmp_path / NAME).read_text() == mine
    assert list(tmp_path.iterdir()) == []


def test_of_many_that_find_a_dead_holder_one_takes_over(tmp_path):
    """Whatever they do at once, and with the leavings of some that died while taking over."""
    for turn in range(20):
        lock_of(tmp_path, began=f"-{turn}")
        if turn % 2:  # one began to take over and died
            digest = workdir.hashlib.sha256((tmp_path / NAME).read_bytes()).hexdigest()[:16]
            dead = vars(workdir._this()) | {"began": "-1"}
            (tmp_path / f"{NAME}.{digest}").write_text(json.dumps(dead))
        locks = [workdir.Lock(tmp_path) for _ in range(8)]
        together, won = threading.Barrier(8), []

        def start(lock, together=together, won=won):
            together.wait()
            with contextlib.suppress(HeldError):
                won.append(lock.take())

        threads = [threading.Thread(target=start, args=(lock,)) for lock in locks]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert len(won) <= 1
        if not won:  # each saw another at it; the next one gets it
            locks.append(workdir.Lock(tmp_path))
            locks[-1].take()
        for lock in locks:
            lock.release()
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
def test_what_is_no_lock_is_named(kind, tmp_path):
    stranger = tmp_path / "stranger"
    stranger.write_text("theirs")
    path = tmp_path / "run" / NAME
    path.parent.mkdir()
    if kind == "link":
        path.symlink_to(stranger)
    else:
        {"pipe": os.mkfifo, "directory": os.mkdir}[kind](path)
    with pytest.raises(OSError, match=f"{NAME} is no file of a run"), held(path.parent):
        pass
    assert stranger.read_text() == "theirs"


def test_a_disk_that_is_full_leaves_no_lock(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '.*{NAME}'"), held(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_a_directory_of_a_run_is_named_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    for path, reason in (
        (tmp_path / "file", "there is a file of that name"),
        (tmp_path / "file" / "below", "there is a file of that name"),
        (tmp_path / "\udcff", "is not UTF-8"),
        (tmp_path / "/".join(["long" * 40] * 25), "at most .* leave room"),
        (tmp_path / ("n" * 300), "File name too long"),
        (workdir.Path("gs://bucket/run"), "is a URL; an object store must be mounted"),
    ):
        with pytest.raises(OSError, match=reason):
            workdir.check_workdir(path)
    for name in ("[a]", "a\nb", "~"):
        workdir.check_workdir(tmp_path / name)
        assert (tmp_path / name).is_dir()


def test_what_is_in_the_way_inside_is_named_at_the_start(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for name in workdir.DIRECTORIES:
        (tmp_path / name).symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        with pytest.raises(OSError, match=f"{name} is a link, and nothing is written through"):
            workdir.check_workdir(tmp_path)
        (tmp_path / name).unlink()
    for name in workdir.FILES:
        (tmp_path / name).mkdir()
        with pytest.raises(OSError, match=f"{name} in it is no ordinary file"):
            workdir.check_workdir(tmp_path)
        (tmp_path / name).rmdir()
    linked = tmp_path / "linked"
    linked.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    workdir.check_workdir(linked)  # the directory itself may be a link


def test_a_second_run_is_refused_before_it_writes_anything(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("a line\n")
    with held(tmp_path), pytest.raises(HeldError, match="held by another run"):
        launch.train(launch.config("algorithm=sft"), tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == "a line\n"
    assert os.listdir(tmp_path) == ["metrics.jsonl"]

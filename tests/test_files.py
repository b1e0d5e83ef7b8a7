"""Whatever lies under the names that are written to, nothing outside of the directory changes."""

import os
import stat
import threading

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrl_eff import files
from jaxrl_eff.checkpoints import deltas, load_hf, save_hf
from jaxrl_eff.cli import report
from jaxrl_eff.data.tokenizer import CharTokenizer, load_tokenizer
from jaxrl_eff.models import LMConfig, params
from jaxrl_eff.train import writer as metrics

SECRET = "a line of somebody else's\n"


@pytest.fixture
def stranger(tmp_path):
    path = tmp_path / "stranger" / "file"
    path.parent.mkdir()
    path.write_text(SECRET)
    yield path
    assert path.read_text() == SECRET and os.listdir(path.parent) == ["file"]


LINKS = {
    "symbolic": lambda path, to: path.symlink_to(to),
    "hard": lambda path, to: os.link(to, path),
    "to nothing": lambda path, to: path.symlink_to(to.with_name("new")),
}


@pytest.mark.parametrize("kind", LINKS)
def test_a_whole_file_takes_the_place_of_a_link(kind, tmp_path, stranger):
    for name in ("x.json", ".x.json.partial"):
        LINKS[kind](tmp_path / name, stranger)
    files.write(tmp_path / "x.json", "mine")
    assert not (tmp_path / "x.json").is_symlink() and (tmp_path / "x.json").read_text() == "mine"
    assert not os.path.lexists(tmp_path / ".x.json.partial")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "x.json").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("kind", LINKS)
def test_a_file_does_not_grow_through_a_link(kind, tmp_path, stranger):
    LINKS[kind](tmp_path / "x", stranger)
    with pytest.raises(OSError, match="x is a link or has a second name"):
        files.Growing(tmp_path / "x")


def test_a_file_does_not_grow_into_a_pipe_or_a_directory(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    for name in ("pipe", "directory"):
        with pytest.raises(OSError, match=str(tmp_path / name)):
            files.Growing(tmp_path / name)


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    files.write(tmp_path / "x", "old")
    with pytest.raises(ZeroDivisionError), files.replacing(tmp_path / "x") as partial:
        partial.write_text("half")
        _ = 1 / 0
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x").read_text() == "old"
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "no" / "x")):
        files.write(tmp_path / "no" / "x", "")


def test_several_may_write_the_same_file_at_once(tmp_path):
    texts = [str(n) * 50_000 for n in range(8)]

    def work(text):
        for _ in range(20):
            files.write(tmp_path / "x", text)
            assert (tmp_path / "x").read_text() in texts

    failed = []
    threads = [threading.Thread(target=work, args=(text,)) for text in texts]
    hook, threading.excepthook = threading.excepthook, failed.append
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    threading.excepthook = hook
    assert not failed


def test_what_a_kill_left_behind_is_removed_later(tmp_path):
    left = tmp_path / ".x.partial"
    left.write_text("half")
    files.write(tmp_path / "x", "a")
    assert left.read_text() == "half"  # somebody may be at it
    os.utime(left, (0, 0))
    files.write(tmp_path / "x", "b")
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x").read_text() == "b"


def test_removing_does_not_follow(tmp_path, stranger):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "link").symlink_to(stranger.parent, target_is_directory=True)
    (tmp_path / "link").symlink_to(stranger.parent, target_is_directory=True)
    for name in ("a", "link", "nothing"):
        files.remove(tmp_path / name)
        assert not os.path.lexists(tmp_path / name)


@pytest.mark.parametrize("kind", LINKS)
def test_metrics_and_documents_become_the_runs_own(kind, tmp_path, stranger):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("metrics.jsonl", "samples.jsonl", "config.json", "report.html", "wandb_id.txt"):
        LINKS[kind](run / name, stranger)
    writer = metrics.Writer(run, resume_step=0)
    writer.step(1, "sft", {"loss": 1.0})
    writer.samples(1, "sft", [{"prompt": "p", "completion": "c", "reward": 1.0}])
    writer.document("config", {"a": 1}, merge=True)
    writer.close()
    report.write(run)
    assert [r["step"] for r in metrics.read(run / "metrics.jsonl")] == [1]
    assert not (run / "metrics.jsonl").is_symlink() and "<html" in (run / "report.html").read_text()


def test_lines_behind_a_link_are_kept(tmp_path):
    """Somebody may have moved the file to another disk."""
    writer = metrics.Writer(tmp_path / "elsewhere", tensorboard=False)
    writer.step(1, "sft", {"loss": 1.0})
    writer.close()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to(tmp_path / "elsewhere" / "metrics.jsonl")
    writer = metrics.Writer(tmp_path / "run", tensorboard=False)
    writer.step(2, "sft", {"loss": 2.0})
    writer.close()
    found = [[r["step"] for r in metrics.read(tmp_path / d / "metrics.jsonl")]
             for d in ("elsewhere", "run")]  # fmt: skip
    assert found == [[1], [1, 2]]


@pytest.mark.parametrize("name", ["tensorboard", "checkpoints"])
def test_a_directory_that_is_a_link_is_named(name, tmp_path, stranger):
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(stranger.parent, target_is_directory=True)
    with pytest.raises(NotADirectoryError, match=f"{name} is a link, and nothing is written"):
        if name == "tensorboard":
            metrics.Writer(run).step(1, "sft", {"loss": 1.0})
        else:
            from jaxrl_eff.checkpoints.run import Checkpoints

            Checkpoints(run / name, fingerprint="f").save(1, {"x": jax.numpy.ones(3)}, {})


def test_exports_do_not_write_through_links(tmp_path, stranger):
    cfg = LMConfig(
        vocab=13, layers=1, width=8, heads=1, kv_heads=1, head_dim=8, ffn=8, param_dtype="float32"
    )
    weights = params.init(cfg, jax.random.key(0))
    (tmp_path / "export").symlink_to(stranger.parent, target_is_directory=True)
    with pytest.raises(NotADirectoryError, match="export is a link"):
        save_hf(tmp_path / "export", cfg, weights)
    (tmp_path / "export").unlink()
    for name in (".export.partial", ".export.previous"):
        (tmp_path / name).symlink_to(stranger.parent, target_is_directory=True)
    for _ in range(2):
        save_hf(tmp_path / "export", cfg, weights)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "export" / name).symlink_to(stranger)
    CharTokenizer("0123456789").save(tmp_path / "export")
    assert load_tokenizer(tmp_path / "export").vocab == 13
    np.testing.assert_array_equal(
        np.asarray(load_hf(tmp_path / "export", cfg)["embed"]["table"]), weights["embed"]["table"]
    )
    for name in ("d.safetensors", ".d.safetensors.partial"):
        (tmp_path / name).symlink_to(stranger)
    before = {"w": np.zeros(9, np.float32)}
    delta = deltas.diff(before, {"w": np.arange(9, dtype=np.float32)}, method="x")
    deltas.save(delta, tmp_path / "d.safetensors")
    assert len(load_file(tmp_path / "d.safetensors")) == 3


def test_a_disk_that_is_full_is_named_and_mended_by_the_next_start(tmp_path, monkeypatch):
    """Also where the file of TensorBoard is what does not fit any more."""
    writer = metrics.Writer(tmp_path)
    writer.step(1, "sft", {"loss": 1.0})
    write, left = os.write, [30]

    def full(descriptor, data):
        if not left[0]:
            raise OSError(28, "No space left on device")
        done = write(descriptor, bytes(data[: left[0]]))
        left[0] -= done
        return done

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path / 'metrics.jsonl'}'"):
        writer.step(2, "sft", {"loss": 2.0})
    left[0] = 1000
    with pytest.raises(OSError, match=r"No space left on device: '.*tensorboard/events"):
        for step in range(3, 99):
            left[0] = 250
            writer.step(step, "sft", {f"loss{n}": 2.0 for n in range(3)})
    writer.close()
    monkeypatch.undo()
    writer = metrics.Writer(tmp_path, resume_step=1)
    writer.step(2, "sft", {"loss": 2.0})
    writer.close()
    assert [r["step"] for r in metrics.read(tmp_path / "metrics.jsonl")] == [1, 2]

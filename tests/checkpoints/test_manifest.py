"""Only what can be restored becomes a checkpoint; any path works; others' files are left alone."""

import gc
import json
import os
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_eff import files
from jaxrl_eff.checkpoints import manifest, stored
from jaxrl_eff.checkpoints.run import Checkpoints


def state_of(number):
    """One array over two devices, small ones of several dtypes, one too large for an index."""
    mesh = jax.make_mesh((2,), ("a",), devices=jax.devices()[:2])
    spread = NamedSharding(mesh, PartitionSpec("a"))
    return {
        "deep": {"a.b": jax.device_put(jnp.arange(4096.0) + number, spread)},
        "half": jnp.full((3, 2), number, jnp.bfloat16),
        "count": jnp.int32(number),
        "flags": jnp.ones(5, bool),
        "zeros": jnp.zeros((64, 64)),
        "empty": jnp.zeros((0, 4)),
    }


LIKE = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state_of(0))


def saved(directory, *steps, **options):
    run = Checkpoints(directory, fingerprint="f", **options)
    for step in steps:
        run.save(step, state_of(step), {"n": step})
        run.wait()
    return run


def restored(directory):
    """The step and the messages; what was restored is right."""
    run = Checkpoints(directory, fingerprint="f")
    got = run.restore(LIKE)
    run.close()
    if got is None:
        return None, run.messages
    for a, b in zip(jax.tree.leaves(got.state), jax.tree.leaves(state_of(got.step)), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    return got.step, run.messages


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "harm", [os.remove, pytest.param(cut, marks=pytest.mark.slow)], ids=["removed", "cut"]
)
def test_what_lacks_files_when_it_is_sealed_is_no_checkpoint(harm, tmp_path, monkeypatch):
    """Each file of one save in turn: the save fails and says so, or the file was not needed."""
    saved(tmp_path, 1).close()
    orbax = stored.writer()
    monkeypatch.setattr(Checkpoints, "_orbax", orbax)
    wait = orbax.wait_until_finished
    kept, lost, needless, number, count = tmp_path / "kept", set(), 0, 0, 1
    while number < count:
        harmed = []

        def harming(number=number, harmed=harmed):
            """Waits for Orbax, puts the first save's files there (names are random), harms one."""
            nonlocal count
            wait()
            state = tmp_path / "saving-00000002" / "state"
            if not (state / "_METADATA").exists():
                return  # a save waits for the one before it
            if not kept.exists():
                shutil.copytree(state, kept)
                count = len(manifest.marks(kept))
            shutil.rmtree(state)
            shutil.copytree(kept, state)
            harmed.append(sorted(manifest.marks(state))[number])
            harm(state / harmed[0])

        with monkeypatch.context() as m:
            m.setattr(orbax, "wait_until_finished", harming)
            run = Checkpoints(tmp_path, fingerprint="f")
            run.save(2, state_of(2), {})
            try:
                run.wait()
                needless += 1
                assert restored(tmp_path) == (2, [])
                shutil.rmtree(tmp_path / "00000002")
            except OSError as error:
                lost |= {name.rpartition("/d/")[0] or name for name in harmed}
                assert str(error).startswith(f"checkpoint {tmp_path / '00000002'} could not be wri")
                assert restored(tmp_path) == (1, [])
        number += 1
    assert lost >= {"_METADATA", "manifest.ocdbt", "ocdbt.process_0"}
    assert needless < count
    orbax.close()


def reseal(path):
    """A manifest that fits, as of a checkpoint that was incomplete when it was made."""
    found = [p for p in path.rglob("*") if p.is_file() and p.name != "manifest.json"]
    table = {str(p.relative_to(path)): [p.stat().st_size, manifest.crc(p)] for p in found}
    (path / "manifest.json").write_text(json.dumps(table))


def test_a_sealed_one_without_its_arrays_is_refused_by_name(tmp_path):
    saved(tmp_path, 1, 2, 3).close()
    newest, middle = (tmp_path / f"0000000{n}" for n in (3, 2))
    for path in newest.rglob("d/*"):
        path.unlink()
    record = json.loads((middle / "record.json").read_text())
    record["leaves"]["zeros"] = [[64, 63], "float32"]
    (middle / "record.json").write_text(json.dumps(record))
    reseal(newest)
    reseal(middle)
    step, messages = restored(tmp_path)
    assert step == 1
    assert messages[0].startswith(f"checkpoint {newest} is refused: state cannot be read: ")
    assert messages[1] == (
        f"checkpoint {middle} is refused: state holds zeros as <f4[64, 64], not float32[64, 63]."
    )


def test_what_orbax_cannot_restore_is_refused_and_the_one_before_used(tmp_path, monkeypatch):
    saved(tmp_path, 1, 2).close()
    load = stored.load

    def failing(path, *rest):
        if path.name == "00000002":
            raise ValueError("DATA_LOSS: zstd decompression failed\nmore")
        return load(path, *rest)

    monkeypatch.setattr(stored, "load", failing)
    step, (message,) = restored(tmp_path)
    assert step == 1 and message == (
        f"checkpoint {tmp_path / '00000002'} is refused: it cannot be restored: DATA_LOSS: zstd "
        "decompression failed."
    )


@pytest.mark.parametrize(
    "error",
    [MemoryError(), PermissionError(13, "no"), ValueError("RESOURCE_EXHAUSTED: too many files")],
    ids=lambda e: type(e).__name__,
)
def test_a_machine_that_cannot_read_does_not_condemn_a_checkpoint(error, tmp_path, monkeypatch):
    """Else the run would begin anew, and its work would be deleted."""
    saved(tmp_path, 1).close()

    def failing(*_):
        raise error

    monkeypatch.setattr(stored, "load", failing)
    with pytest.raises(type(error)):
        restored(tmp_path)
    monkeypatch.undo()
    assert restored(tmp_path) == (1, [])


def test_an_index_of_several_levels_is_read_whole(tmp_path):
    store = ts.KvStore.open(
        {
            "driver": "ocdbt",
            "base": {"driver": "file", "path": f"{tmp_path}/"},
            "config": {"max_decoded_node_bytes": 200, "max_inline_value_bytes": 20},
        }
    ).result()
    for turn in range(3):
        with ts.Transaction() as together:
            for n in range(0, 40, turn + 1):
                store.with_transaction(together)[f"layer/{n:02d}"] = b"x" * (n + turn)
    found = dict(manifest._entries(tmp_path))
    assert sorted(found) == sorted(k.decode() for k in store.list().result())
    for key, where in found.items():
        if isinstance(where, tuple):
            file, start, size = where
            where = (tmp_path / file).read_bytes()[start : start + size]
        assert where == store[key]


PATHS = (
    "plain", "lr[1e-3]", "[]", "a*b", "a?b", "a{b,c}", "x[", "]", "$HOME", "~", "a%20b", "a\\b",
    "\\", "a:b", "gs:", "s3:", "file:", "#x", "a\nb", "a\tb", " ", "-", "..x", "漢 ü", "'", '"',
    "|;&", "\udcff", "n" * 255,
)  # fmt: skip


@pytest.mark.parametrize("name", PATHS, ids=ascii)
def test_any_path_works(name, tmp_path):
    saved(tmp_path / name / "checkpoints", 1).close()
    assert restored(tmp_path / name / "checkpoints") == (1, [])


def test_a_very_long_path_works(tmp_path):
    directory = tmp_path.joinpath(*["long" * 50] * 17, "checkpoints")
    assert len(str(directory)) > 3400
    saved(directory, 1).close()
    assert restored(directory) == (1, [])


def test_where_descriptors_are_no_paths_a_link_leads_there(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "isdir", lambda path: False)
    place = tmp_path / "a[b]"
    place.mkdir()
    with files.plainly(place) as way:
        (way / "x").write_text("1")
        assert "[" not in str(way)
    assert (place / "x").read_text() == "1" and not os.path.lexists(way)


STRANGE = (
    "saving-notes", "saving-3", "saving-00000003x", "deleting-x", "deleting-", "7", "0012abc", "²",
    "00000002.bak", "000000002", "99999999999", "notes.txt", "٠٠٠٠٠٠٠٣",
)  # fmt: skip


def test_names_that_are_not_ours_are_left_alone(tmp_path):
    def contents():
        return {p: p.read_text() for n in STRANGE for p in (tmp_path / n).rglob("*")}

    for number, name in enumerate(STRANGE):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text(str(number))
    (tmp_path / "00000009").write_text("a file")  # named as a checkpoint
    (tmp_path / "00000008").symlink_to(tmp_path / "7", target_is_directory=True)
    before = contents()
    saved(tmp_path, 1, 2, 3, keep=1).close()
    step, messages = restored(tmp_path)
    assert step == 3 and contents() == before and len(before) == len(STRANGE)
    assert (tmp_path / "00000009").read_text() == "a file" and (tmp_path / "00000008").is_symlink()
    assert [m.split(" is refused")[0][-8:] for m in messages] == ["00000009", "00000008"]


def test_what_stands_under_a_name_that_is_needed_is_moved_and_not_deleted(tmp_path, caplog):
    for name in ("00000002", "saving-00000002", "deleting-00000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text(name)
    saved(tmp_path, 1, 2, keep=1, keep_best=0).close()
    assert restored(tmp_path) == (2, [])
    for name in ("00000002", "saving-00000002", "deleting-00000001"):
        assert (tmp_path / f"{name}.aside-1" / "mine").read_text() == name
        assert f"{name} was no checkpoint and stood in the way" in caplog.text


def test_what_cannot_be_written_is_one_line_and_loses_nothing(tmp_path, capfd):
    """A bound on the size of files stands for a disk that is full; many writes fail at once."""

    def many(step):
        rng = np.random.default_rng(step)
        return {f"x{n}": jnp.asarray(rng.normal(size=2000).astype(np.float32)) for n in range(40)}

    run = Checkpoints(tmp_path, fingerprint="f")
    run.save(1, many(1), {})
    run.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            run.save(2, many(2), {})
            run.wait()
        run.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value) == (
        f"checkpoint {tmp_path / '00000002'} could not be written: File too large. Those before it "
        "stand; the same command continues from there."
    )
    assert sorted(os.listdir(tmp_path)) == ["00000001"]
    gc.collect()
    assert "Traceback" not in "".join(capfd.readouterr())
    run = Checkpoints(tmp_path, fingerprint="f")
    run.save(2, many(2), {})
    like = {name: jax.ShapeDtypeStruct((2000,), jnp.float32) for name in many(2)}
    got = run.restore(like)
    assert got.step == 2
    np.testing.assert_array_equal(got.state["x7"], many(2)["x7"])
    run.close()


def still_of(path):
    return max((path / "still").rglob("d/*"), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("harm", ["cut", "written", "removed"])
def test_a_harmed_part_that_does_not_change_is_written_again(harm, tmp_path):
    """By the run that wrote it; older checkpoints that share it are lost."""
    run, frozen = Checkpoints(tmp_path, fingerprint="f", keep=9), jnp.arange(999.0)
    for step in (1, 2, 3, 4):
        if step == 4:
            path = still_of(tmp_path / "00000003")
            if harm == "removed":
                path.unlink()
            else:
                data = path.read_bytes()
                path.write_bytes(data[:-1] + (b"" if harm == "cut" else bytes([data[-1] ^ 1])))
        run.save(step, {"frozen": frozen, "x": jnp.full(9, float(step))}, {})
        run.wait()
    like = {"frozen": jax.ShapeDtypeStruct((999,), jnp.float32)}
    shutil.copytree(tmp_path, tmp_path / "again")
    before = 2 if harm == "removed" else 1  # what is removed from one is still in the others
    for directory, lost, step in ((tmp_path, (), 4), (tmp_path / "again", ("00000004",), before)):
        for name in lost:
            shutil.rmtree(directory / name)
        found = Checkpoints(directory, fingerprint="f")
        got = found.restore(like, partial=True)
        assert got.step == step
        np.testing.assert_array_equal(got.state["frozen"], np.arange(999.0))
        if lost:  # with the part that they share, those after the first are refused
            assert len(found.messages) == 3 - before
        found.close()
    run.close()

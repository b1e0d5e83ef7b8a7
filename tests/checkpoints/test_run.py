"""Checkpoints: exact, onto other meshes, safe from donation, damage and kills."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_eff.checkpoints.run import Checkpoints


def mesh(*shape):
    auto = (jax.sharding.AxisType.Auto,) * 2
    count = int(np.prod(shape))
    return jax.make_mesh(shape, ("a", "b"), axis_types=auto, devices=jax.devices()[:count])


def state_of(key, shape=(4, 2), scale=1.0):
    """Two models with optimizer states, on a mesh of `shape` and on one other device."""
    table = NamedSharding(mesh(*shape), PartitionSpec("a", "b"))
    params = {
        "layers/odd.name": jax.device_put(scale * jax.random.normal(key, (8, 4)), table),
        "half": jax.device_put(jnp.full((8, 2), scale, jnp.bfloat16), table),
        "empty": jax.device_put(jnp.zeros((0, 4)), NamedSharding(table.mesh, PartitionSpec())),
    }
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(optax.adamw(1e-3), {"layers/odd.name": True, "half": True, "empty": False}),
    )
    frozen = {"w": jax.device_put(jnp.arange(3), jax.devices()[1])}
    return {"actor": (params, tx.init(params)), "reward": (frozen, ()), "none": None}


def abstract_of(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture
def open_run(tmp_path):
    opened = []

    def open_(**kw):
        opened.append(Checkpoints(tmp_path / "run", **{"fingerprint": "f", **kw}))
        return opened[-1]

    yield open_
    for c in opened:
        c.close()


def steps_in(directory):
    return sorted(p.name for p in directory.iterdir())


def test_restores_what_was_saved_exactly(open_run, key):
    state = state_of(key)
    first = open_run()
    first.save(3, state, {"stage": "sft", "data": {"epoch": 1}})
    first.wait()
    run = open_run()
    got = run.restore(abstract_of(state))
    assert (got.step, got.record) == (3, {"stage": "sft", "data": {"epoch": 1}})
    assert_same(got.state, state)
    assert [x.sharding for x in jax.tree.leaves(got.state)] == [
        x.sharding for x in jax.tree.leaves(state)
    ]
    assert run.messages == []


def test_nothing_saved_is_none(open_run):
    assert open_run().peek() is None
    assert open_run().restore({"x": jax.ShapeDtypeStruct((1,), jnp.float32)}) is None


def test_restores_onto_another_mesh_chosen_by_the_record(open_run, key):
    run, state = open_run(), state_of(key)
    run.save(1, state, {"stage": "ppo"})
    other = state_of(jax.random.key(9), shape=(1, 2))
    got = run.restore(lambda record: {"ppo": abstract_of(other)}[record["stage"]])
    assert_same(got.state, state)
    assert jax.tree.leaves(got.state)[-2].sharding == jax.tree.leaves(other)[-2].sharding


def test_restores_a_part(open_run, key):
    run, state = open_run(), state_of(key)
    run.save(1, state, {})
    abstract = abstract_of({"actor": (state["actor"][0],)})
    assert_same(run.restore(abstract, partial=True).state, {"actor": (state["actor"][0],)})
    assert run.restore(abstract) is None
    assert "no place for" in run.messages[0]


def test_a_donated_buffer_is_saved_as_it_was(open_run):
    update = jax.jit(lambda x: x * 2.0, donate_argnums=0)
    x = jax.device_put(jax.random.normal(jax.random.key(1), (2048, 1024)), jax.devices()[0])
    before, run = np.array(x), open_run()
    run.save(1, {"x": x}, {})
    for _ in range(3):
        x = update(x)
    np.testing.assert_array_equal(run.restore(abstract_of({"x": x})).state["x"], before)


def test_restored_arrays_can_be_donated(open_run):
    run, x = open_run(), jnp.ones((1024, 256))
    run.save(1, {"x": x}, {})
    x = run.restore(abstract_of({"x": x})).state["x"]
    pointer = x.unsafe_buffer_pointer()
    y = jax.jit(lambda x: x + 1.0, donate_argnums=0)(x)
    assert x.is_deleted()
    assert y.unsafe_buffer_pointer() == pointer


def test_keeps_the_newest_and_the_best(open_run):
    run = open_run(keep=2, keep_best=1, mode="min")
    for step, score in [(1, 5.0), (2, 1.0), (3, float("nan")), (4, None), (5, 3.0)]:
        run.save(step, {"x": jnp.full(3, float(step))}, {}, score=score)
    run.wait()
    assert steps_in(run.directory) == ["00000002", "00000004", "00000005"]


def files(checkpoint, part):
    return {p.name: p for p in (checkpoint / part).rglob("*") if p.is_file()}


def test_what_training_leaves_alone_lies_on_the_disk_once(open_run, key):
    """Apart from the second save on; each checkpoint is whole, also when the others are gone."""
    run, state = open_run(keep=2), state_of(key)
    for step in (1, 2, 3, 4):
        params, opt = state["actor"]
        opt = jax.tree.map(lambda x: x + 1, opt)
        state["actor"] = ({**params, "half": params["half"] * 2}, opt)
        run.save(step, state, {})
        run.wait()
    third, fourth = (run.directory / f"{step:08d}" for step in (3, 4))
    assert steps_in(run.directory) == [third.name, fourth.name]
    shared, again = files(third, "still"), files(fourth, "still")
    assert shared.keys() == again.keys() and sum(p.stat().st_size for p in shared.values()) > 100
    assert all(again[name].samefile(p) for name, p in shared.items())
    changed, newer = files(third, "state"), files(fourth, "state")
    assert not any(newer[k].samefile(p) for k, p in changed.items() if k in newer)
    shutil.rmtree(third)
    assert_same(open_run().restore(abstract_of(state)).state, state)


def test_what_changes_after_all_is_written_again(open_run, key):
    """An equal array is not the same one: only identity tells without reading it."""
    run, state = open_run(), state_of(key)
    for step in (1, 2, 3):
        state["actor"] = jax.tree.map(lambda x: x + 1, state["actor"])
        run.save(step, state, {})
    state["actor"] = jax.tree.map(lambda x: x + 1, state["actor"])
    frozen, rest = state["reward"]
    state["reward"] = {"w": frozen["w"] + 5}, rest
    run.save(4, state, {})
    for step in (4, 3):
        run.wait()
        got = open_run().restore(abstract_of(state)).state["reward"][0]["w"]
        np.testing.assert_array_equal(got, np.arange(3) + (5 if step == 4 else 0))
        shutil.rmtree(run.directory / f"{step:08d}", ignore_errors=True)


def test_where_files_cannot_be_linked_they_are_copied(open_run, key, monkeypatch):
    def refuse(source, target):
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    run, state = open_run(), state_of(key)
    for step in (1, 2, 3):
        state["actor"] = jax.tree.map(lambda x: x + 1, state["actor"])
        run.save(step, state, {})
    run.wait()
    second, third = (files(run.directory / f"{s:08d}", "still") for s in (2, 3))
    assert second and not any(third[name].samefile(p) for name, p in second.items())
    assert_same(open_run().restore(abstract_of(state)).state, state)


def test_the_same_step_can_be_saved_again_but_not_an_earlier_one(open_run):
    run = open_run()
    run.save(2, {"x": jnp.zeros(3)}, {"try": 1})
    run.save(2, {"x": jnp.ones(3)}, {"try": 2})
    assert run.peek() == {"try": 2}
    with pytest.raises(ValueError, match="which holds step 2 of the same run"):
        run.save(1, {"x": jnp.zeros(3)}, {})


DAMAGES = {
    "truncated": (lambda f: f.write_bytes(f.read_bytes()[:-7]), r"d/\w+ has \d+ bytes and should"),
    "flipped": (lambda f: f.write_bytes(bytes([f.read_bytes()[0] ^ 1]) + f.read_bytes()[1:]),
                "does not match its checksum"),
    "missing": (lambda f: f.unlink(), "is missing"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(open_run, kind):
    damage, message = DAMAGES[kind]
    run = open_run()
    for step in (1, 2):
        run.save(step, {"x": jnp.full(4000, float(step))}, {"step": step})
    run.wait()
    damage(max((run.directory / "00000002").rglob("d/*"), key=lambda f: f.stat().st_size))
    again = open_run()
    assert again.peek() == {"step": 1}
    got = again.restore({"x": jax.ShapeDtypeStruct((4000,), jnp.float32)})
    assert got.step == 1 and float(got.state["x"][0]) == 1.0
    (line,) = again.messages
    assert line.startswith(f"checkpoint {run.directory / '00000002'} is refused: ")
    assert re.search(message, line)
    again.save(2, {"x": jnp.full(4000, 7.0)}, {"step": 2})  # the refused one makes room
    assert again.peek() == {"step": 2}


@pytest.mark.parametrize("name", ["manifest.json", "record.json"])
def test_a_damaged_manifest_or_record_is_refused(open_run, name):
    run = open_run()
    for step in (1, 2):
        run.save(step, {"x": jnp.zeros(3)}, {"step": step})
    run.wait()
    file = run.directory / "00000002" / name
    file.write_text(file.read_text()[:-3])
    again = open_run()
    assert again.peek() == {"step": 1}
    assert name in again.messages[0]


def test_foreign_and_misshapen_checkpoints_are_refused_by_name(open_run):
    other = open_run(fingerprint="theirs")
    other.save(5, {"x": jnp.zeros(3)}, {})
    other.wait()
    run = open_run(fingerprint="mine")
    assert run.restore({"x": jax.ShapeDtypeStruct((3,), jnp.float32)}) is None
    assert "another run (fingerprint 'theirs'; this run's is 'mine')" in run.messages[0]
    assert open_run(fingerprint=None).peek() == {}
    assert other.restore({"x": jax.ShapeDtypeStruct((4,), jnp.float32)}) is None
    assert "x is float32[3] in it and float32[4] in this run" in other.messages[0]
    assert "lacks y" in _reason(open_run(fingerprint=None), {"y": jnp.zeros(3)})


def _reason(run, tree):
    assert run.restore(abstract_of(tree)) is None
    return run.messages[-1]


def test_what_a_kill_leaves_behind_is_ignored_then_removed(open_run):
    run = open_run()
    for step in (1, 2):
        run.save(step, {"x": jnp.full(3, float(step))}, {"step": step})
    run.wait()
    home = run.directory
    shutil.copytree(home / "00000002", home / "saving-00000003")
    (home / "saving-00000003" / "manifest.json").unlink()  # killed while writing
    shutil.copytree(home / "00000001", home / "deleting-00000000")
    shutil.rmtree(home / "deleting-00000000" / "state")  # killed while deleting
    again = open_run()
    assert again.peek() == {"step": 2} and again.messages == []
    # There may be no further save, so a deletion is finished at once.
    assert steps_in(home) == ["00000001", "00000002", "saving-00000003"]
    again.save(3, {"x": jnp.zeros(3)}, {"step": 3})
    again.wait()
    assert steps_in(home) == ["00000001", "00000002", "00000003"]


def test_a_kill_just_before_the_rename_loses_nothing(open_run):
    run = open_run(keep=1)
    run.save(4, {"x": jnp.zeros(3)}, {"step": 4})
    run.wait()
    (run.directory / "00000004").rename(run.directory / "saving-00000004")
    assert open_run().peek() == {"step": 4}


def test_errors_name_what_is_wrong(open_run, tmp_path):
    with pytest.raises(TypeError, match="a/b is a float"):
        open_run().save(1, {"a": {"b": 1.0}}, {})
    with pytest.raises(ValueError, match="no array"):
        open_run().save(1, {"a": ()}, {})
    with pytest.raises(ValueError, match="unknown mode 'best'"):
        Checkpoints(tmp_path, mode="best", fingerprint="")
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, keep=0, fingerprint="")


def test_orbax_is_imported_only_when_needed():
    code = "import sys, jaxrl_eff.checkpoints.run; assert 'orbax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


LOOP = """
import sys, jax, jax.numpy as jnp
from jaxrl_eff.checkpoints.run import Checkpoints
run = Checkpoints(sys.argv[1], fingerprint="f", keep=1, keep_best=0)
x, step = jnp.zeros(300_000), jax.jit(lambda x: x + 1.0, donate_argnums=0)
for i in range(1, 10_000):
    x = step(x)
    run.save(i, {"x": x}, {"step": i})
    print(i, flush=True)
"""


def test_killed_while_saving_the_last_good_checkpoint_stays(tmp_path):
    run = tmp_path / "run"
    child = subprocess.Popen(
        [sys.executable, "-c", LOOP, str(run)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    for line in child.stdout:
        if int(line) == 6:
            break
    time.sleep(0.017)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    found = Checkpoints(run, fingerprint="f")
    record = found.peek()
    got = found.restore({"x": jax.ShapeDtypeStruct((300_000,), jnp.float32)})
    found.close()
    assert record["step"] >= 5
    assert found.messages == []
    np.testing.assert_array_equal(got.state["x"], np.full(300_000, got.step, np.float32))


def test_what_was_noted_belongs_to_the_record_and_ranks(open_run):
    run = open_run(keep=1)
    for step, score in ((1, 0.9), (2, 0.1), (3, float("nan"))):
        run.save(step, {"x": jnp.zeros(3)}, {"step": step, "results": {}})
        run.note({"results": {"a": score}} if score == score else {"late": True}, score=score)
    assert steps_in(run.directory) == ["00000001", "00000003"]  # the newest and the best
    assert open_run().peek() == {"step": 3, "results": {}, "late": True}
    again = open_run()
    again.restore({"x": jax.ShapeDtypeStruct((3,), jnp.float32)})
    again.note({"late": False})
    assert open_run().peek() == {"step": 3, "results": {}, "late": False}
    (run.directory / "00000003" / "noted.json").write_text("{")
    assert open_run().peek() == {"step": 3, "results": {}}


def test_checkpoints_from_before_accepted_changes_are_the_runs(open_run):
    before = open_run(fingerprint="old")
    before.save(1, {"x": jnp.ones(3)}, {})
    before.wait()
    assert open_run(fingerprint="new").peek() is None
    run = open_run(fingerprint="new", accepted=("old",), keep=1)
    assert run.peek() == {}
    run.save(2, {"x": jnp.ones(3)}, {})
    run.wait()
    assert steps_in(run.directory) == ["00000002"]

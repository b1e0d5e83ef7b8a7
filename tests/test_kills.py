"""The study of killed runs: its places are there, its comparison notices, and it finds nothing."""

import importlib.util
import json
import shutil
import subprocess
import sys

import jax.numpy as jnp
import pytest
from launch import ROOT

from jaxrl_eff.checkpoints.run import Checkpoints
from jaxrl_eff.train import writer as metrics

SCRIPT = ROOT / "experiments" / "reliability" / "kills.py"


@pytest.fixture(scope="module")
def kills():
    spec = importlib.util.spec_from_file_location("kills", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["kills"] = module  # for its dataclass
    spec.loader.exec_module(module)
    yield module
    del sys.modules["kills"]


def test_every_place_at_which_runs_are_killed_is_there(kills):
    for place in (*kills.PLACES, *kills.EARLY):
        module, name = place.split(":")
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        assert callable(found), place


def finished(workdir, loss=1.0, number=3.0):
    """What a run leaves behind, as far as it is compared."""
    writer = metrics.Writer(workdir, tensorboard=False)
    writer.step(1, "sft", {"loss": loss})
    for name in ("config", "plan"):
        writer.document(name, {})
    writer.document("result", {"results": {}, "passed": True})
    writer.close()
    (workdir / "export").mkdir()
    (workdir / "export" / "model.safetensors").write_bytes(b"weights")
    checkpoints = Checkpoints(workdir / "checkpoints", fingerprint="f")
    checkpoints.save(1, {"x": jnp.full(999, number)}, {"stage": "sft"})
    checkpoints.close()
    return workdir


def test_the_comparison_notices_every_kind_of_difference(kills, tmp_path):
    whole = finished(tmp_path / "whole")
    before = kills.outcome(whole)

    def different(workdir):
        after = kills.outcome(workdir)
        return {name for name in before | after if before.get(name) != after.get(name)}

    assert different(finished(tmp_path / "same")) == set()
    assert different(finished(tmp_path / "metrics", loss=1.0000001)) == {"metrics"}
    assert different(finished(tmp_path / "arrays", number=4.0)) == {"arrays"}
    shutil.copytree(whole, tmp_path / "copy")
    (tmp_path / "copy" / "export" / "model.safetensors").write_bytes(b"weightz")
    (tmp_path / "copy" / "checkpoints" / "saving-00000002").mkdir()
    assert different(tmp_path / "copy") == {"export/model.safetensors", "strangers"}


@pytest.mark.slow
def test_200_kills_change_no_bit(tmp_path):
    flags = ("--kills=200", "--minutes=600", f"--out={tmp_path}")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "kills.jsonl").read_text().splitlines()]
    assert len(rows) == 200 and all(row["good"] for row in rows)
    assert {row["kind"] for row in rows} == {"planted", "random", "again"}
    assert {row["processes"] for row in rows} == {1, 2}

"""Reallocation among meshes of several processes: disjoint, overlapping, splitting hosts."""

import subprocess
import sys

import launch
import pytest
from launch import cache  # noqa: F401 (fixture)
from test_processes import free_port

WORKER = launch.ROOT / "tests" / "parallel" / "reshard" / "processes.py"


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_values_survive_between_processes(count, cache):  # noqa: F811
    port = free_port()
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(port), str(count), str(i)],
            cwd=launch.ROOT,
            env=launch.environment(cache) | {"PYTHONPATH": str(launch.ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]
    try:
        outs = [w.communicate(timeout=150)[0] for w in workers]
    finally:
        for w in workers:
            w.kill()
    for w, out in zip(workers, outs, strict=True):
        assert w.returncode == 0 and "done" in out, out

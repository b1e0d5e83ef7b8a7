"""Every test runs on eight simulated devices, strictly typed, with warnings as errors."""

import gc
import os
import sys
from pathlib import Path

import programs

# Helpers of one folder serve others, whichever is collected first.
HERE = Path(__file__).parent
sys.path[:0] = [str(p) for p in HERE.rglob("*") if p.is_dir() and p.name != "__pycache__"]

# JAX 0.10.2 sizes the thread pool of simulated devices by the cores, and programs with collectives
# then deadlock on small machines; NPROC, read when jax is imported, sizes it instead.
os.environ.setdefault("NPROC", "32")
FLAGS = (
    " --xla_force_host_platform_device_count=8"
    " --xla_cpu_enable_concurrency_optimized_scheduler=false"  # see jaxrl_eff/parallel/host.py
    + programs.QUICKLY
)
# Workers inherit them; said twice they would be another key of the cache.
if FLAGS not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + FLAGS
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# JAX reads these here and in commands that tests start. Small programs are kept, too: each takes
# longer to compile than to read.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(programs.directory()))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import checked
import jax
import jaxtyping
import pytest

jaxtyping.jaxtyped = checked.decorate  # before anything of the package is imported
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_threefry_partitionable", True)
programs.write_whole_files()


def pytest_sessionstart(session):
    if not hasattr(session.config, "workerinput"):  # once, and not by every worker
        programs.make_room(programs.directory())


def pytest_collection_finish():
    """Tracing makes many objects; a collector that visits all modules for them takes a sixth."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def pytest_runtest_setup():
    """Another cache lasts for one test."""
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])


@pytest.fixture
def key():
    return jax.random.key(0)

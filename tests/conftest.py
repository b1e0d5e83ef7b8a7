"""Every test runs on eight simulated devices, strictly typed, with warnings as errors."""

import os

import programs

# JAX 0.10.2 sizes the thread pool of simulated devices by the cores, and programs with collectives
# then deadlock on small machines; NPROC, read when jax is imported, sizes it instead.
os.environ.setdefault("NPROC", "32")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_cpu_enable_concurrency_optimized_scheduler=false"  # see jaxrl_eff/host.py
    + programs.QUICKLY
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Read by JAX here, and by the commands that tests start.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(programs.directory()))

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


def pytest_runtest_setup():
    """Runs in this process set these as a user wants them."""
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    # Small programs, too: each takes longer to compile than to read.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture
def key():
    return jax.random.key(0)

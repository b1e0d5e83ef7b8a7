"""Every test runs on eight simulated devices, strictly typed, with warnings as errors."""

import os

# JAX 0.10.2 sizes the thread pool of simulated devices by the cores, and programs with collectives
# then deadlock on small machines; NPROC, read when jax is imported, sizes it instead.
os.environ.setdefault("NPROC", "32")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_cpu_enable_concurrency_optimized_scheduler=false"  # see jaxrl_eff/host.py
    # The compiler takes most of the tests' time.
    + " --xla_backend_optimization_level=0"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_threefry_partitionable", True)


@pytest.fixture
def key():
    return jax.random.key(0)

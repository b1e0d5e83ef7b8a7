"""Starting JAX for a run: devices, processes, compilation cache."""

import os
from pathlib import Path
from typing import NamedTuple

from jaxrl_eff import host, settings


class Processes(NamedTuple):
    """The processes of a run as its command names them; None where the command does not.

    Attributes:
        coordinator: host:port of process 0.
        processes: how many there are.
        process: which one this is, from 0.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


ALONE = Processes()


def prepare(run: settings.Run, given: Processes = ALONE) -> None:
    """Sets what must be set before JAX starts: devices, processes, compilation cache.

    Raises:
        ValueError: flags of several processes that do not fit together, or JAX_PLATFORMS names a
            platform that is not here.
    """
    if run.simulate_devices:
        host.simulate(run.simulate_devices)
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # between processes
    if any(v is not None for v in given):
        if missing := [f"--{name}" for name, v in given._asdict().items() if v is None]:
            raise ValueError(
                f"--coordinator, --processes, --process belong together; no {missing}."
            )
        if not 0 <= given.process < given.processes:
            raise ValueError(f"--process={given.process} is not below {given.processes}.")
        jax.distributed.initialize(*given)
    elif on_cluster():
        jax.distributed.initialize()
    host.devices()
    cache()


def on_cluster() -> bool:
    """Whether a scheduler that JAX can ask started several processes."""
    several = int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return several or len(hosts.split(",")) > 1 or "OMPI_COMM_WORLD_SIZE" in os.environ


def cache() -> Path | None:
    """Turns the persistent compilation cache on, if there is a place for it."""
    import jax

    from jaxrl_eff.hardware import cache_directory

    where = cache_directory()
    jax.config.update("jax_compilation_cache_dir", str(where) if where else None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return where

"""Initialization of JAX for a run: devices, processes, compilation cache."""

import atexit
import contextlib
import ctypes
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxrl_eff.parallel import host
from jaxrl_eff.parallel import processes as peers
from jaxrl_eff.train import config_file, identity, settings

WAIT = 60  # seconds
# Environment variables that change JAX's results.
_NUMERIC = (
    "JAX_ENABLE_X64", "JAX_DEFAULT_DTYPE_BITS", "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_DEFAULT_PRNG_IMPL", "JAX_THREEFRY_PARTITIONABLE", "JAX_NUMPY_DTYPE_PROMOTION",
)  # fmt: skip
_VERSIONS = ("jaxrl_eff", "jax", "jaxlib")


class Processes(NamedTuple):
    """The processes of a run as given on the command line; None where not given.

    Attributes:
        coordinator: host:port of process 0.
        processes: number of processes.
        process: index of this process, from 0.
        wait: timeout in seconds for a process that does not start or respond.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    wait: float | int = WAIT


ALONE = Processes()


@contextlib.contextmanager
def started(
    run: settings.Run, given: Processes = ALONE, alike: Mapping[str, str] = MappingProxyType({})
) -> Iterator[None]:
    """Context that prepares JAX; the loss of any process, or an error in it, ends all of them.

    Args:
        alike: additional facts that must be equal on all processes.

    Raises:
        See `prepare`; and `peers.PeerLost` when another process ends during the block.
    """
    group = prepare(run, given, alike)
    if group is None:
        yield
        return
    with peers.joined(group):
        try:
            yield
        except BaseException as error:
            # The loss of another process appears here as a runtime error.
            runtime = isinstance(error, RuntimeError)
            lost = group.loss(peers.GRACE if runtime else 0.0)
            group.fail(_why(group, error))
            if lost and runtime:
                raise peers.PeerLost(lost) from None
            raise
        import jax

        group.finish(jax.distributed.shutdown)


def _why(group: peers.Group, error: BaseException) -> str:
    said = "it was interrupted" if isinstance(error, KeyboardInterrupt) else config_file.said(error)
    return f"process {group.process} stopped: {said}"


def prepare(
    run: settings.Run, given: Processes = ALONE, alike: Mapping[str, str] = MappingProxyType({})
) -> peers.Group | None:
    """Configures what must be set before JAX starts: devices, processes, compilation cache.

    Returns:
        The group of the run's processes, if there are several.

    Raises:
        ValueError: flags of several processes are inconsistent, processes were started with
            different values, or JAX_PLATFORMS names a platform that is not available.
        peers.PeerLost: a process does not start.
        OSError: process 0 cannot listen at the coordinator's address.
    """
    if run.simulate_devices:
        host.simulate(run.simulate_devices)
    place, group = _place(given), None
    if place is not None and place.processes > 1:
        group = peers.meet(place, facts(run) | alike, say=_say)
    try:
        import jax

        jax.config.update("jax_cpu_collectives_implementation", "gloo")  # between processes
        if group is not None:
            _initialize(place, group)
        host.devices()
        cache()
        if group is not None:
            from jaxrl_eff.parallel.attention import kernels

            group.offer(kernels.TRIAL, kernels.trouble)
    except BaseException as error:
        if group is not None:
            group.fail(_why(group, error))
        raise
    return group


def _place(given: Processes) -> peers.Place | None:
    """Returns the address at which processes meet, from the command line or the cluster."""
    named = given._replace(wait=None)
    if any(v is not None for v in named):
        if missing := [f"--{n}" for n, v in named._asdict().items() if v is None and n != "wait"]:
            raise ValueError(
                f"--coordinator, --processes, --process belong together; no {missing}."
            )
        return peers.Place(*given)
    if not on_cluster():
        return None
    from jax._src.clusters import ClusterEnv  # used by `jax.distributed.initialize`

    found = ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, int(given.wait)
    )[:3]
    if None in found:
        raise ValueError(
            "the environment is that of a cluster, but JAX does not find its processes there "
            f"(coordinator, processes, process: {found}); give --coordinator, --processes, "
            "--process, or unset SLURM_NTASKS, TPU_WORKER_HOSTNAMES, OMPI_COMM_WORLD_SIZE."
        )
    return peers.Place(*found, given.wait)


def _initialize(place: peers.Place, group: peers.Group) -> None:
    """Starts JAX's own distributed service, after the processes have met.

    Its timeouts are longer than ours, since it can only abort.
    """
    import jax

    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.process,
        initialization_timeout=int(group.wait) + 60,
        heartbeat_timeout_seconds=2 * int(group.wait) + 60,
        shutdown_timeout_seconds=int(group.wait) + 60,
    )
    atexit.register(group.leave_if_failed)  # runs before JAX's own handler, which waits
    _catch_aborts(group)


def _catch_aborts(group: peers.Group) -> None:
    """Turns an abort due to a lost process into the usual exit.

    When process 0 is lost, JAX's client aborts at once, from a C++ thread. Other aborts pass.
    """
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)

    def handler(_: int) -> None:
        if lost := group.loss(peers.GRACE):
            group.end(lost)

    _kept.append(kind(handler))
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _kept[-1])


_kept: list[Any] = []  # handlers that C can call during the process's lifetime


def facts(run: settings.Run) -> dict[str, str]:
    """Returns config, files, versions and environment, by name; must be equal on all processes."""
    values = dataclasses.asdict(run)
    values |= values.pop("stage")
    out = dict(line.split(" = ", 1) for line in config_file.flat(values))
    for name in [n for n in out if n.startswith("config.wandb.")]:  # can be secret
        out[name] = f"(hidden, {hashlib.sha256(out[name].encode()).hexdigest()[:8]})"
    contents = identity.contents_of(run)
    out |= {f"the contents of {path}": digest for path, digest in contents.items()}
    for package in _VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            out[f"the version of {package}"] = importlib.metadata.version(package)
    return out | {name: os.environ.get(name, "unset") for name in _NUMERIC}


def agree(name: str, mine: dict[str, str]) -> None:
    """Checks that all processes have the same facts; every process must call.

    Args:
        name: of the comparison, unique for every call.
        mine: fact -> value.

    Raises:
        ValueError: facts differ, on every process; the message names them.
        peers.PeerLost: a process ended.
    """
    group = peers.group()
    if group is None:
        return
    every = [json.loads(text) for text in group.exchange(f"agree {name}", json.dumps(mine))]
    if message := peers.differences(every):
        raise ValueError(message)


def check_shared(workdir: Path, *, seconds: float | int = 20) -> None:
    """Checks that all processes see the same workdir; every process must call.

    Args:
        seconds: timeout for a file of one host to appear on the others.

    Raises:
        ValueError: a process has another workdir, on every process; the message names it.
        peers.PeerLost: a process ended.
    """
    group = peers.group()
    if group is None:
        return
    mark = workdir / f".{secrets.token_hex(8)}"
    if group.process == 0:
        mark.touch(exist_ok=False)
    mark = workdir / group.exchange("workdir mark", mark.name)[0]
    until = time.monotonic() + seconds
    while not mark.exists() and time.monotonic() < until:
        os.listdir(workdir)  # makes network file systems refresh
        time.sleep(0.2)
    every = group.exchange("workdir seen", "seen" if mark.exists() else "")
    if group.process == 0:
        mark.unlink(missing_ok=True)
    if "" in every:
        raise ValueError(
            f"--workdir={workdir} on process {every.index('')} is another directory than on "
            "process 0; all processes must see one."
        )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def on_cluster() -> bool:
    """Returns True if a scheduler that JAX supports started several processes."""
    several = int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return several or len(hosts.split(",")) > 1 or "OMPI_COMM_WORLD_SIZE" in os.environ


def cache() -> Path | None:
    """Enables the persistent compilation cache, if there is a directory for it."""
    import jax

    from jaxrl_eff.parallel.devices import cache_directory

    where = cache_directory()
    jax.config.update("jax_compilation_cache_dir", str(where) if where else None)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return where

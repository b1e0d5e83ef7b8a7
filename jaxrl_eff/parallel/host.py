"""Settings of the host process that must be made before JAX starts."""

import os
import sys
from typing import Any

# XLA's CPU runtime runs independent collectives concurrently and distinguishes them by channel, but
# JAX gives all collectives written in a `shard_map` the same channel: data of one can end up in
# another, which gives wrong numbers or deadlocks. With this scheduler they run one at a time.
IN_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"


def simulate(devices: int) -> None:
    """Simulates several devices on the CPU. Must be called before JAX is imported."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # JAX 0.10.2 sizes its thread pool by the cores, and collectives over more simulated devices
    # than cores then deadlock; NPROC, read when jax is imported, sizes the pool instead.
    os.environ.setdefault("NPROC", str(max(32, 4 * devices)))
    known = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in known:
        known = f"{known} --xla_force_host_platform_device_count={devices}"
    os.environ["XLA_FLAGS"] = known if IN_ORDER in known else f"{known} {IN_ORDER}"


def in_order() -> bool:
    """True if simulated devices run collectives one at a time."""
    return IN_ORDER in os.environ.get("XLA_FLAGS", "")


def use_huge_pages() -> None:
    """Restarts this command with huge pages for its heap. Call it before anything else.

    XLA on a CPU frees its temporary buffers, hundreds of megabytes, after every program, and glibc
    returns them to the kernel. Allocating them again in pages of 4 KiB takes a fifth of a training
    step. glibc reads the setting only when a process starts, hence the restart. Does nothing with
    glibc before 2.35 or another C library, or if GLIBC_TUNABLES is already set.
    """
    version = os.confstr("CS_GNU_LIBC_VERSION") if sys.platform.startswith("linux") else None
    if version is None or "GLIBC_TUNABLES" in os.environ:
        return
    if tuple(int(n) for n in version.split()[-1].split(".")[:2]) < (2, 35):
        return
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


class PlatformError(ValueError):
    """Error for a platform in JAX_PLATFORMS that does not start on this machine."""


def devices() -> list[Any]:
    """JAX's devices; starts JAX.

    Raises:
        PlatformError: JAX does not start and JAX_PLATFORMS is set.
    """
    import jax

    try:
        return jax.devices()
    except Exception as error:
        asked = os.environ.get("JAX_PLATFORMS")
        if not asked:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PlatformError(
            f"JAX_PLATFORMS={asked}: that platform does not start here ({reason:.300}). Unset the "
            "variable, or set it to a platform of this machine, such as cpu."
        ) from None

"""What the host must be told before JAX starts."""

import os
import sys
from typing import Any

# XLA's CPU runtime starts collectives that do not depend on each other side by side. It tells them
# apart by a channel, and JAX gives all that are written in a `shard_map` the same: parts of one get
# into another, numbers are wrong or all wait for ever. With this scheduler they go one by one.
IN_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"


def simulate(devices: int) -> None:
    """Makes the CPU look like several devices. Works only before JAX is imported."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # JAX 0.10.2 sizes its thread pool by the cores, and collectives over more simulated devices
    # than cores then deadlock; NPROC, read when jax is imported, sizes the pool instead.
    os.environ.setdefault("NPROC", str(max(32, 4 * devices)))
    known = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in known:
        known = f"{known} --xla_force_host_platform_device_count={devices}"
    os.environ["XLA_FLAGS"] = known if IN_ORDER in known else f"{known} {IN_ORDER}"


def in_order() -> bool:
    """Whether simulated devices send one message at a time."""
    return IN_ORDER in os.environ.get("XLA_FLAGS", "")


def use_huge_pages() -> None:
    """Restarts this command so that its memory comes in huge pages. Call it before anything else.

    XLA on a CPU frees its temporary buffers after every program, hundreds of megabytes at once, and
    the GNU C library gives them back to the kernel. In pages of 4 KiB getting as many again takes a
    fifth of a training step. What helps is read once, when a process starts. Does nothing with
    another C library, or where GLIBC_TUNABLES is set already.
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
    """JAX_PLATFORMS asks for a platform that does not start here."""


def devices() -> list[Any]:
    """JAX's devices; starts JAX.

    Raises:
        PlatformError: JAX does not start, and the environment says what it must run on.
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

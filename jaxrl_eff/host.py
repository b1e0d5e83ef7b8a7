"""What the host must be told before JAX starts, or once it is known to compute on the CPU."""

import ctypes
import os
import sys


def simulate(devices: int) -> None:
    """Makes the CPU look like several devices. Works only before JAX is imported."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # JAX 0.10.2 sizes its thread pool by the cores, and collectives over more simulated devices
    # than cores then deadlock; NPROC, read when jax is imported, sizes the pool instead.
    os.environ.setdefault("NPROC", str(max(32, 4 * devices)))
    known = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in known:
        os.environ["XLA_FLAGS"] = f"{known} --xla_force_host_platform_device_count={devices}"


def keep_memory() -> None:
    """Keeps freed memory in the process, for runs that compute on the CPU.

    XLA frees its temporary buffers after every program, hundreds of megabytes at once. The GNU C
    library gives them back to the kernel and then waits for fresh, zeroed pages in the next step:
    a tenth to a quarter of a training step. Does nothing with another C library.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    m_mmap_max, m_trim_threshold = -4, -1  # malloc.h
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)

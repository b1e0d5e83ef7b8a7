"""What the host must be told before JAX starts, or once it is known to compute on the CPU."""

import ctypes
import os
import sys

# For programs on a CPU, where compiling often takes longer than the run: a third less work for the
# compiler, steps within 2 % (experiments/peers). Matrix products are library calls either way.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 1, "xla_cpu_parallel_codegen_split_count": 1}


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
    """Keeps freed memory in the process and asks for huge pages; for runs that compute on the CPU.

    XLA frees its temporary buffers after every program, hundreds of megabytes at once. The GNU C
    library gives them back to the kernel and then waits for fresh, zeroed pages in the next step:
    a fifth of a training step. Reserves half of the machine's memory as addresses, none of it as
    memory. Does nothing with another C library. Call it before JAX starts its threads.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8  # malloc.h
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, -1)  # never
    # A thread's own arena is at most 64 MiB, and maps and unmaps whatever is larger.
    libc.mallopt(m_arena_max, 1)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page, huge = os.sysconf("SC_PAGE_SIZE"), 14  # MADV_HUGEPAGE
    room = os.sysconf("SC_PHYS_PAGES") * page // 2
    # The advice stays with the addresses, which later allocations take from the heap's top.
    if start := libc.malloc(room):
        aligned = -(-start // page) * page
        libc.madvise(aligned, (start + room - aligned) // page * page, huge)
        libc.free(start)

"""Capabilities of devices: published peak FLOP/s, measured rates, memory.

MFU is relative to a peak. For accelerators it is the published one; for other devices, and to see
what a machine achieves, matrix-product and copy rates are measured.
"""

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

# Dense (without sparsity) TFLOP/s by a substring of `device.device_kind`; the first match counts.
# "float32" is JAX's default precision for float32: TF32 on these GPUs, one bf16 pass on TPUs.
#   A100: NVIDIA A100 datasheet, 2021. H100, H200: NVIDIA H100/H200 datasheets (given with
#   sparsity, halved here). B200: NVIDIA DGX B200 datasheet, an eighth of the system, halved.
#   TPU: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, "peak compute per chip". JAX shows one device
#   per chip from v4 on, and calls v5e "TPU v5 lite", v5p "TPU v5" and v6e "TPU v6 lite".
_PEAK_TFLOPS = {
    "A100": {"bfloat16": 312, "float16": 312, "float32": 156},
    "H100 PCIe": {"bfloat16": 756, "float16": 756, "float32": 378},
    "H100 NVL": {"bfloat16": 835, "float16": 835, "float32": 417},
    "H100": {"bfloat16": 989, "float16": 989, "float32": 494},
    "H200": {"bfloat16": 989, "float16": 989, "float32": 494},
    "B200": {"bfloat16": 2250, "float16": 2250, "float32": 1125},
    "TPU v4": {"bfloat16": 275, "float32": 275},
    "TPU v5 lite": {"bfloat16": 197, "float32": 197},
    "TPU v5e": {"bfloat16": 197, "float32": 197},
    "TPU v5": {"bfloat16": 459, "float32": 459},
    "TPU v6": {"bfloat16": 918, "float32": 918},
}
CORE_FLOPS_PER_S = 5e10  # typical of a CPU core; used where nothing is measured


def peak_flops_per_s(device_kind: str, dtype: Any) -> float | None:
    """Published dense peak of one device, in FLOP/s; None if it isn't in the table."""
    for kind, rates in _PEAK_TFLOPS.items():
        if kind.lower() in device_kind.lower():
            rate = rates.get(jnp.dtype(dtype).name)
            return None if rate is None else rate * 1e12
    return None


def cache_directory() -> Path | None:
    """Directory of the compilation cache: JAX_COMPILATION_CACHE_DIR, or in the user's cache.

    None (no cache) if the directory is not writable or the user's home is unknown.
    """
    where = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        if not where:
            return None
        home = Path()
    directory = Path(where or home / "jaxrl_eff" / "xla")
    there = next((p for p in (directory, *directory.parents) if p.exists()), Path())
    usable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    return directory if usable else None


def memory_bytes(device: jax.Device) -> int | None:
    """Bytes that programs can use on a device; on a CPU, host memory, shared by its devices."""
    limit = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
    return limit if limit or device.platform != "cpu" else host_memory_bytes()


def host_memory_bytes() -> int | None:
    """Memory of this machine, or the container's limit if lower, in bytes; None if unknown."""
    try:
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # container limit (cgroup 2, 1)
        file = Path("/sys/fs/cgroup") / name
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            return min(physical, int(text))
    return physical


def measure_matmul(
    dtype: Any = "float32",
    *,
    size: int | None = None,
    seconds: float | int = 0.25,
    device: jax.Device | None = None,
) -> float:
    """Best measured FLOP/s of a square matrix product on one device.

    Args:
        dtype: of both factors and of the product.
        size: rows; None: 1,024 on a CPU, 8,192 elsewhere.
        seconds: approximate duration, excluding compilation.
    """
    device = device or jax.local_devices()[0]
    size = size or (1024 if device.platform == "cpu" else 8192)
    inner = 1 if device.platform == "cpu" else 8  # amortizes dispatch
    # Random, because constant matrices draw less power and on some GPUs multiply an eighth faster.
    # The scale keeps repeated products near 1.
    scale = jnp.asarray(size**-0.5, dtype)
    x, y = (
        jax.device_put(jax.random.normal(jax.random.key(i), (size, size), dtype) * s, device)
        for i, s in enumerate((scale, jnp.ones((), dtype)))
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def multiply(y: Any, x: Any) -> Any:
        return jax.lax.fori_loop(0, inner, lambda _, y: y @ x, y)

    return 2.0 * size**3 * inner / _best_seconds(lambda y: multiply(y, x), y, seconds)


def measure_copy(
    *, nbytes: int | None = None, seconds: float | int = 0.25, device: jax.Device | None = None
) -> float:
    """Best measured memory bandwidth of a device in bytes/s, reads plus writes.

    Args:
        nbytes: size of the array; None: 256 MiB on a CPU (beyond its caches), 1 GiB elsewhere.
        seconds: approximate duration, excluding compilation.
    """
    device = device or jax.local_devices()[0]
    nbytes = nbytes or (1 << 28 if device.platform == "cpu" else 1 << 30)
    inner = 1 if device.platform == "cpu" else 8
    x = jax.device_put(jnp.zeros(nbytes // 4, jnp.float32), device)
    step = jax.jit(lambda x: jax.lax.fori_loop(0, inner, lambda _, x: x + 1.0, x), donate_argnums=0)
    return 2.0 * (nbytes // 4 * 4) * inner / _best_seconds(step, x, seconds)


def _best_seconds(step: Callable[[Any], Any], x: Any, seconds: float | int) -> float:
    x = jax.block_until_ready(step(x))
    best, stop = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < stop:
        start = time.perf_counter()
        x = jax.block_until_ready(step(x))
        best = min(best, time.perf_counter() - start)
    return best

"""Compiled programs of the tests: how they are compiled, and the cache that keeps them.

The compiler takes most of the tests' time. The cache is kept between runs, and shared by the
workers of a run and by the commands that tests start. CONTRIBUTING.md says how to empty it.
"""

import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path

LIMIT_BYTES = 2 * 2**30

# What is tested does not depend on how fast a program is.
QUICKLY = " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# `compiler_options` of jax.jit for programs that are compared bit for bit with another way of
# computing the same: the cheaper emitters contract products and sums by other rules.
AS_SHIPPED = {}
if version("jaxlib").startswith("0.10."):  # later compilers end on a flag that they do not know
    QUICKLY += " --xla_cpu_use_fusion_emitters=false"
    AS_SHIPPED = {"xla_cpu_use_fusion_emitters": True}


def directory():
    """The cache of this processor: a program may use instructions that another one lacks."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else platform.processor()
    flags = next(
        (line for line in text.splitlines() if line.startswith(("flags", "Features"))), text
    )
    return home / "jaxrl_eff" / "tests" / hashlib.sha256(flags.encode()).hexdigest()[:8]


def make_room(where):
    """Removes the programs that were written first where they take more than LIMIT_BYTES."""
    files = [(p.stat().st_mtime, p.stat().st_size, p) for p in where.glob("*")]
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= LIMIT_BYTES:
            break
        path.unlink(missing_ok=True)
        total -= size


def write_whole_files():
    """Makes JAX's cache safe for several writers: another worker never reads half a file."""
    from jax._src.lru_cache import LRUCache

    def put(cache, key, value):
        path = cache.path / f"{key}-cache"
        if not path.exists():
            part = path.with_name(f"{key}.{os.getpid()}")
            part.write_bytes(value)
            os.replace(part, path)

    LRUCache.put = put

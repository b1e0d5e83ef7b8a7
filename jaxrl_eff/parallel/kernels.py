"""Which kernel computes a device's share of attention: chunks in XLA, Triton or Mosaic.

All three compute what `hops` defines, on arrays as `hops.fold` lays them out.
"""

import functools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_eff.parallel import flash_gpu, flash_tpu, hops

CHUNK = 512  # tokens


class Kernel(NamedTuple):
    """How a device meets the keys at hand.

    Attributes:
        name: what to log.
        forward, backward: as those of `hops`.
        chunk: tokens -> how many a chunk has, at most.
        exact: whether every chunk must have as many, so that rows are padded.
        fits: (head dim, dtype) -> whether it takes them; otherwise `xla` is used.
    """

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    chunk: Callable[[int], int]
    exact: bool = True
    fits: Callable[[int, Any], bool] = lambda head_dim, dtype: True


@functools.lru_cache(maxsize=32)
def xla(chunk: int = CHUNK) -> Kernel:
    """Chunks of at most so many tokens, compiled by XLA: any device, any dtype."""
    return Kernel("xla", hops.forward, hops.backward, lambda _: chunk, exact=False)


def _powers(length: int) -> int:
    return min(flash_gpu.CHUNK, max(16, 1 << (length - 1).bit_length()))


def _lanes(length: int) -> int:
    return min(flash_tpu.CHUNK, -(-length // flash_tpu.LANES) * flash_tpu.LANES)


TRITON = Kernel(
    "triton", flash_gpu.forward, flash_gpu.backward, _powers, fits=flash_gpu.fits
)  # fmt: skip
MOSAIC = Kernel(
    "mosaic", flash_tpu.forward, flash_tpu.backward, _lanes, fits=flash_tpu.fits
)  # fmt: skip
_OF_PLATFORM = {"gpu": TRITON, "cuda": TRITON, "tpu": MOSAIC}


def interpreted(kernel: Kernel) -> Kernel:
    """The kernel run step by step by JAX on any device: slow, and what tests compare."""
    ways = (functools.partial(f, interpret=True) for f in (kernel.forward, kernel.backward))
    return kernel._replace(**dict(zip(("forward", "backward"), ways, strict=True)))


@functools.lru_cache(maxsize=1)
def best(chunk: int = CHUNK) -> Kernel:
    """The kernel of the default device, once it has computed there what `hops` computes.

    Otherwise, with a warning that says why, XLA's: a compiler too old or new for a kernel costs
    time, not a run.

    Args:
        chunk: of XLA's.
    """
    kernel = _OF_PLATFORM.get(jax.default_backend())
    if kernel is None:
        return xla(chunk)
    try:
        with ThreadPoolExecutor(1) as apart:  # whatever this thread is tracing
            wrong = apart.submit(error_of, kernel).result()
    except Exception as broken:
        reason = f"it does not run here ({type(broken).__name__}: {broken})"
    else:
        if wrong < 2e-2:
            return kernel
        reason = f"its results here are wrong by {wrong:.2g} of their size"
    logging.warning("attention over a mesh uses XLA and not %s: %s", kernel.name, reason)
    return xla(chunk)


def error_of(kernel: Kernel, length: int = 256, head_dim: int = 64) -> float:
    """How far results and gradients on a small packed row are from those of `hops` in float32.

    Of bfloat16 operands, over the largest result each; 0.01 is usual.
    """
    rng = np.random.default_rng(0)
    heads, chunk = 2, kernel.chunk(length)
    segment = np.repeat([1, 2, 3, 0], [length // 2, length // 4, length // 8, length // 8])[None]
    position = np.concatenate([np.arange(n) for n in np.bincount(segment[0])[[1, 2, 3, 0]]])[None]
    where = hops.fold_where(jnp.asarray(position), jnp.asarray(segment), chunk)
    numbers = (rng.normal(size=(1, length, n, head_dim)) for n in (4, 4, 2, 2))
    q, dout, k, v = (
        hops.fold(jnp.asarray(x, jnp.bfloat16), heads, chunk)
        for x in numbers
    )  # fmt: skip
    kv, start = jnp.stack([k, v], axis=1), hops.nothing(q)
    found = []
    for way, wide in ((kernel, False), (xla(), True)):
        cast = (lambda x: x.astype(jnp.float32)) if wide else (lambda x: x)
        out, lse = way.forward(*start, cast(q), cast(kv), where, where, None, None)
        delta = (out * dout.astype(jnp.float32)).sum(axis=-1)
        gradients = way.backward(
            jnp.zeros_like(out), cast(q), cast(dout), lse, delta, cast(kv), where, where, None, None
        )  # fmt: skip
        found.append((out, *gradients))
    apart = (jnp.abs(x - y).max() / jnp.abs(y).max() for x, y in zip(*found, strict=True))
    return float(max(apart))

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

from jaxrl_eff.parallel import processes
from jaxrl_eff.parallel.attention import blockwise, flash_gpu, flash_tpu

CHUNK = 512  # tokens
TRIAL = "attention kernel"  # by this name processes offer each other their `trouble`


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
    return Kernel("xla", blockwise.forward, blockwise.backward, lambda _: chunk, exact=False)


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
    """The kernel of the default device, once it has computed a small case there.

    Otherwise, with a warning that says why, XLA's: a compiler too old or new for a kernel costs
    time, not a run. Processes that met use one that works on all of them.

    Args:
        chunk: of XLA's.

    Raises:
        peers.PeerLost: another process ended before it had tried.
    """
    kernel = _OF_PLATFORM.get(jax.default_backend())
    if kernel is None:
        return xla(chunk)
    group = processes.group()
    every = [trouble()] if group is None else group.everywhere(TRIAL)
    for process, reason in enumerate(every):
        if reason:
            where = "" if group is None else f"process {process}: "
            logging.warning(
                "attention over a mesh uses XLA and not %s: %s%s", kernel.name, where, reason
            )
            return xla(chunk)
    return kernel


def trouble() -> str:
    """Why the kernel of the default device cannot be used here; "" if it can, or there is none."""
    kernel = _OF_PLATFORM.get(jax.default_backend())
    if kernel is None:
        return ""
    try:
        with ThreadPoolExecutor(1) as apart:  # whatever this thread is tracing
            wrong = apart.submit(error_of, kernel).result()
    except Exception as broken:
        return f"it does not run here ({type(broken).__name__}: {broken})"
    return "" if wrong < 2e-2 else f"its results here are wrong by {wrong:.2g} of their size"


def error_of(kernel: Kernel, length: int = 256, head_dim: int = 64) -> float:
    """How far results and gradients on a small packed row are from the formula in float32.

    Of bfloat16 operands, over the largest result each; 0.003 is usual.
    """
    rng = np.random.default_rng(0)
    q, dout, k, v = (rng.normal(size=(length, n, head_dim)) for n in (4, 4, 2, 2))
    q, dout, k, v = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (q, dout, k, v))
    segment = np.repeat([1, 2, 3, 0], [length // 2, length // 4, length // 8, length // 8])
    position = np.concatenate([np.arange(n) for n in np.bincount(segment)[[1, 2, 3, 0]]])
    got = jax.jit(functools.partial(_by, kernel))(q, dout, k, v, position, segment)
    want = _by_formula(q, dout, k, v, position, segment)
    apart = (np.abs(x - y).max() / np.abs(y).max() for x, y in zip(got, want, strict=True))
    return float(max(apart))


def _by(kernel, q, dout, k, v, position, segment):
    """(out, dq, dk, dv) of a row's attention to itself, in bfloat16."""
    length, heads = q.shape[0], k.shape[1]
    chunk = kernel.chunk(length)
    where = blockwise.fold_where(position[None], segment[None], chunk)
    q, dout, k, v = (
        blockwise.fold(x[None].astype(jnp.bfloat16), heads, chunk) for x in (q, dout, k, v)
    )  # fmt: skip
    kv = jnp.stack([k, v], axis=1)
    out, lse = kernel.forward(*blockwise.nothing(q), q, kv, where, where, None, None)
    delta, zero = (out * dout.astype(jnp.float32)).sum(axis=-1), jnp.zeros_like(out)
    dq, dkv = kernel.backward(zero, q, dout, lse, delta, kv, where, where, None, None)
    return [blockwise.unfold(x, length, chunk)[0] for x in (out, dq, dkv[:, 0], dkv[:, 1])]


def _by_formula(q, dout, k, v, position, segment):
    """The same in NumPy: nothing is compiled, so that it takes no time."""
    group = q.shape[1] // k.shape[1]
    keys, values = (np.repeat(x, group, axis=1) for x in (k, v))
    seen = (segment[:, None] == segment) & (segment > 0) & (position[:, None] >= position)
    weight = np.exp(np.einsum("tnh,snh->nts", q, keys)) * seen
    weight /= np.maximum(weight.sum(-1, keepdims=True), 1e-30)
    dweight = np.einsum("tnh,snh->nts", dout, values)
    dscore = weight * (dweight - (weight * dweight).sum(-1, keepdims=True))
    dk, dv = np.einsum("nts,tnh->snh", dscore, q), np.einsum("nts,tnh->snh", weight, dout)
    of_group = [x.reshape(*k.shape[:2], group, -1).sum(2) for x in (dk, dv)]
    out, dq = (np.einsum("nts,snh->tnh", x, y) for x, y in ((weight, values), (dscore, keys)))
    return [out, dq, *of_group]

"""Selection of the kernel for a device's share of attention: XLA, Triton or Mosaic.

All three implement `blockwise.forward` and `blockwise.backward`, on arrays in the layout of
`blockwise.fold`.
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
from jaxrl_eff.parallel.attention import blockwise, flash, flash_gpu, flash_tpu
from jaxrl_eff.parallel.attention.blockwise import Queries, Where

CHUNK = 512  # tokens
TRIAL = "attention kernel"  # name under which processes exchange their `trouble`


class Kernel(NamedTuple):
    """Implementation of a device's attention to one shard of the keys.

    Attributes:
        name: for logging.
        forward, backward: as those of `blockwise`.
        chunk: tokens -> maximum chunk size.
        exact: every chunk must have that size, so rows are padded.
        fits: (head dim, dtype) -> True if supported; otherwise `xla` is used.
    """

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    chunk: Callable[[int], int]
    exact: bool = True
    fits: Callable[[int, Any], bool] = lambda head_dim, dtype: True


@functools.lru_cache(maxsize=32)
def xla(chunk: int = CHUNK) -> Kernel:
    """Kernel in plain XLA with chunks of at most `chunk` tokens; any device, any dtype."""
    return Kernel("xla", blockwise.forward, blockwise.backward, lambda _: chunk, exact=False)


def _powers(length: int) -> int:
    return min(flash_gpu.CHUNK, max(16, 1 << (length - 1).bit_length()))


def _lanes(length: int) -> int:
    return min(flash_tpu.CHUNK, -(-length // flash_tpu.LANES) * flash_tpu.LANES)


def _pallas(name: str, device: flash.Device, **how: Any) -> Kernel:
    ways = (functools.partial(f, device) for f in (flash.forward, flash.backward))
    return Kernel(name, *ways, **how)


TRITON = _pallas("triton", flash_gpu.DEVICE, chunk=_powers, fits=flash_gpu.fits)
MOSAIC = _pallas("mosaic", flash_tpu.DEVICE, chunk=_lanes, fits=flash_tpu.fits)
_OF_PLATFORM = {"gpu": TRITON, "cuda": TRITON, "tpu": MOSAIC}


@functools.lru_cache(maxsize=1)
def best(chunk: int = CHUNK) -> Kernel:
    """Kernel for the default device if it passes a small test there, otherwise XLA's.

    The fallback logs a warning with the reason: a compiler that does not support the kernel makes a
    run slower but does not stop it. All processes of a group use the same kernel.

    Args:
        chunk: chunk size of the XLA kernel.

    Raises:
        processes.PeerLost: another process ended before it had tested its kernel.
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
    """Reason why the default device's kernel is unusable here; "" if it works or there is none."""
    kernel = _OF_PLATFORM.get(jax.default_backend())
    if kernel is None:
        return ""
    try:
        with ThreadPoolExecutor(1) as apart:  # independent of this thread's trace
            wrong = apart.submit(error_of, kernel).result()
    except Exception as broken:
        return f"it does not run here ({type(broken).__name__}: {broken})"
    return "" if wrong < 2e-2 else f"its results here are wrong by {wrong:.2g} of their size"


def error_of(kernel: Kernel, length: int = 256, head_dim: int = 64) -> float:
    """Largest relative error of outputs and gradients on a small packed row.

    Compares bfloat16 operands with a float32 reference; each error is relative to the largest
    element of its result. 0.003 is typical.
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
    """(out, dq, dk, dv) of self-attention on one row, computed by the kernel in bfloat16."""
    length, heads = q.shape[0], k.shape[1]
    chunk = kernel.chunk(length)
    where = Where(*[blockwise.fold_where(position[None], segment[None], chunk)] * 2)
    q, dout, k, v = (
        blockwise.fold(x[None].astype(jnp.bfloat16), heads, chunk) for x in (q, dout, k, v)
    )  # fmt: skip
    kv = jnp.stack([k, v], axis=1)
    out, lse = kernel.forward(blockwise.nothing(q), q, kv, where, None)
    queries = Queries(q, dout, lse, (out * dout.astype(jnp.float32)).sum(axis=-1))
    dq, dkv = kernel.backward(jnp.zeros_like(out), queries, kv, where, None)
    return [blockwise.unfold(x, length, chunk)[0] for x in (out, dq, dkv[:, 0], dkv[:, 1])]


def _by_formula(q, dout, k, v, position, segment):
    """The same in NumPy, which needs no compilation."""
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

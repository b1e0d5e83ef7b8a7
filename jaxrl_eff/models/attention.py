"""Attention over packed rows.

`plain` is the definition that every other attention (fused kernels, ring attention) is tested
against; all share its signature, so a model takes any of them as its `attend`. A `Mask` says which
keys a query sees.
"""

import jax
import jax.numpy as jnp

from jaxrl_eff.models.config import LMConfig
from jaxrl_eff.parallel.attention.context import Attend, Mask
from jaxrl_eff.types import Array, Float

BLOCK = 64  # queries; smaller matrix products cost more than the work they save
FEW = 16  # queries; below this the flash kernel does not pay off
KERNEL = "cudnn"


def plain(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Computes softmax(c tanh(scale q.k / c)) v over allowed keys; 0 for a query without keys.

    Scores and softmax are float32. Query head n reads key/value head n // (N/K).

    Args:
        scale: factor on q.k.
        softcap: c; None: scores are not capped.
    """
    rows, length, heads, dim = q.shape
    groups = heads // k.shape[2]
    # Heads move before time, so that every matrix product is over contiguous matrices; the
    # queries that share a key head become rows of one product.
    q = jnp.swapaxes(q * jnp.asarray(scale, q.dtype), 1, 2)
    q = q.reshape(rows, k.shape[2], groups * length, dim)
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    score = jnp.einsum("bkth,bksh->bkts", q, k, preferred_element_type=jnp.float32)
    if softcap is not None:
        score = softcap * jnp.tanh(score / softcap)
    seen = mask.seen()[:, None, None, :, :]
    score = jnp.where(seen, score.reshape(rows, k.shape[1], groups, length, -1), -1e30)
    # With this floor all weights of a query without keys vanish, instead of being equal.
    top = jax.lax.stop_gradient(jnp.maximum(score.max(axis=-1, keepdims=True), -1e29))
    weight = jnp.exp(score - top)
    total = jnp.maximum(weight.sum(axis=-1, keepdims=True), 1e-30)
    weight = weight.reshape(rows, k.shape[1], groups * length, -1).astype(v.dtype)
    out = jnp.einsum("bkts,bksh->bkth", weight, v, preferred_element_type=jnp.float32)
    out = out / total.reshape(rows, k.shape[1], groups * length, 1)
    return jnp.swapaxes(out.reshape(rows, heads, length, dim), 1, 2).astype(v.dtype)


def blocked(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Computes `plain` in blocks of queries, skipping the keys after each block in the row.

    This saves up to half the work. If there are as many keys as queries, they must be the same
    tokens, with those of a sequence in order, as in every packed row. If there are more keys (a
    cache), this is `plain`.
    """
    length = q.shape[1]
    blocks = next((n for n in (8, 4, 2) if length % n == 0 and length // n >= BLOCK), 1)
    if blocks == 1 or k.shape[1] != length:
        return plain(q, k, v, mask, scale=scale, softcap=softcap)
    outs = []
    for start in range(0, length, length // blocks):
        end = start + length // blocks
        part = mask.each(lambda x, a=start, b=end: x[:, a:b], lambda x, b=end: x[:, :b])
        keys = k[:, :end], v[:, :end]
        outs.append(plain(q[:, start:end], *keys, part, scale=scale, softcap=softcap))
    return jnp.concatenate(outs, axis=1)


def fused(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Computes `plain` by cuDNN's flash attention: scores never reach memory. GPU, half precision.

    As in `blocked`, as many keys as queries must be the same tokens in order, so that the kernel
    skips later keys. A few queries over a cache use `plain`: its scores are small, and the kernel
    needs the cache in another layout, which would copy it at every token.

    Raises:
        ValueError: `softcap` is set, which the kernel does not support.
    """
    if softcap is not None:
        raise ValueError(f"fused attention has no soft-cap, but softcap={softcap}; use plain.")
    if q.shape[1] < FEW:
        return plain(q, k, v, mask, scale=scale, softcap=softcap)
    # Padding sees padding, so that every query has a key; the result is dropped.
    seen = mask.q_segment[:, :, None] == mask.k_segment[:, None, :]
    in_order = q.shape[1] == k.shape[1]
    if not in_order:
        seen &= mask.seen() | (mask.q_segment == 0)[:, :, None]
    elif mask.window is not None:
        seen &= mask.q_position[:, :, None] - mask.k_position[:, None, :] < mask.window
    out = jax.nn.dot_product_attention(
        q, k, v, mask=seen[:, None, :, :], scale=scale, is_causal=in_order,
        implementation=KERNEL,
    )  # fmt: skip
    return jnp.where((mask.q_segment > 0)[:, :, None, None], out, jnp.zeros((), out.dtype))


def choose(cfg: LMConfig, platform: str | None = None) -> Attend:
    """Returns the fastest attention for this model on this platform.

    `fused` on GPUs where it applies, `blocked` on CPUs, otherwise `plain`.

    Its `__name__` identifies it in logs. `platform` is "cpu", "gpu" or "tpu"; None: that of the
    default device.
    """
    platform = platform or jax.default_backend()
    half = cfg.dtype in ("bfloat16", "float16")
    fits = cfg.attn_softcap is None and half and cfg.head_dim <= 128 and cfg.head_dim % 8 == 0
    if platform in ("gpu", "cuda") and fits:
        return fused
    return blocked if platform == "cpu" else plain

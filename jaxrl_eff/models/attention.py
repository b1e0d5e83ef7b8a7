"""Attention over packed rows.

A query sees a key iff both belong to the same packed sequence, the key is not later, and it is
within the layer's window. `plain` is the definition that every other attention (fused kernels, ring
attention) is tested against; all share its signature, so a model takes any of them as its `attend`.
"""

import jax
import jax.numpy as jnp

from jaxrl_eff.models.config import LMConfig
from jaxrl_eff.parallel.attention.context import Attend
from jaxrl_eff.types import Array, Bool, Float, Int

BLOCK = 64  # queries; smaller matrix products cost more than the work they save
FEW = 16  # queries; below this the flash kernel does not pay off
KERNEL = "cudnn"


def allowed(
    q_position: Int[Array, "B T"],
    k_position: Int[Array, "B S"],
    q_segment: Int[Array, "B T"],
    k_segment: Int[Array, "B S"],
    window: int | Int[Array, ""] | None = None,
) -> Bool[Array, "B T S"]:
    """Returns a mask of the keys each query sees. Padding (segment 0) neither sees nor is seen."""
    behind = q_position[:, :, None] - k_position[:, None, :]
    same = (q_segment[:, :, None] == k_segment[:, None, :]) & (k_segment > 0)[:, None, :]
    seen = same & (behind >= 0)
    return seen if window is None else seen & (behind < window)


def plain(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    q_position: Int[Array, "B T"],
    k_position: Int[Array, "B S"],
    q_segment: Int[Array, "B T"],
    k_segment: Int[Array, "B S"],
    window: int | Int[Array, ""] | None = None,
    softcap: float | None = None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Computes softmax(c tanh(scale q.k / c)) v over allowed keys; 0 for a query without keys.

    Scores and softmax are float32. Query head n reads key/value head n // (N/K).

    Args:
        window: keys at least this many positions back are not seen; None: no limit.
        softcap: c; None: scores are not capped.
        scale: factor on q.k.
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
    seen = allowed(q_position, k_position, q_segment, k_segment, window)[:, None, None, :, :]
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
    *,
    q_position: Int[Array, "B T"],
    k_position: Int[Array, "B S"],
    q_segment: Int[Array, "B T"],
    k_segment: Int[Array, "B S"],
    window: int | Int[Array, ""] | None = None,
    softcap: float | None = None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Computes `plain` in blocks of queries, skipping the keys after each block in the row.

    This saves up to half the work. If there are as many keys as queries, they must be the same
    tokens, with those of a sequence in order, as in every packed row. If there are more keys (a
    cache), this is `plain`.
    """
    length = q.shape[1]
    blocks = next((n for n in (8, 4, 2) if length % n == 0 and length // n >= BLOCK), 1)
    common = {"window": window, "softcap": softcap, "scale": scale}
    if blocks == 1 or k.shape[1] != length:
        return plain(
            q, k, v, q_position=q_position, k_position=k_position,
            q_segment=q_segment, k_segment=k_segment, **common,
        )  # fmt: skip
    outs = []
    for start in range(0, length, length // blocks):
        end = start + length // blocks
        out = plain(
            q[:, start:end], k[:, :end], v[:, :end],
            q_position=q_position[:, start:end], k_position=k_position[:, :end],
            q_segment=q_segment[:, start:end], k_segment=k_segment[:, :end], **common,
        )  # fmt: skip
        outs.append(out)
    return jnp.concatenate(outs, axis=1)


def fused(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    q_position: Int[Array, "B T"],
    k_position: Int[Array, "B S"],
    q_segment: Int[Array, "B T"],
    k_segment: Int[Array, "B S"],
    window: int | Int[Array, ""] | None = None,
    softcap: float | None = None,
    scale: float,
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
    where = {
        "q_position": q_position, "k_position": k_position, "q_segment": q_segment,
        "k_segment": k_segment, "window": window,
    }  # fmt: skip
    if q.shape[1] < FEW:
        return plain(q, k, v, **where, softcap=softcap, scale=scale)
    # Padding sees padding, so that every query has a key; the result is dropped.
    seen = q_segment[:, :, None] == k_segment[:, None, :]
    in_order = q.shape[1] == k.shape[1]
    if not in_order:
        seen &= allowed(**where) | (q_segment == 0)[:, :, None]
    elif window is not None:
        seen &= q_position[:, :, None] - k_position[:, None, :] < window
    out = jax.nn.dot_product_attention(
        q, k, v, mask=seen[:, None, :, :], scale=scale, is_causal=in_order,
        implementation=KERNEL,
    )  # fmt: skip
    return jnp.where((q_segment > 0)[:, :, None, None], out, jnp.zeros((), out.dtype))


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

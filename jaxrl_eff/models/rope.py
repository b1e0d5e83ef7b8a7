"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its context extensions.

Pair i of a head, dimensions i and i + H/2, is rotated by the angle position * w_i. The scalings
change only w_i, and yarn also the length of the vectors; the formulas are those that checkpoints in
the Hugging Face format were trained with.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_eff.models.config import Rope
from jaxrl_eff.types import Array, Float, Int


def frequencies(rope: Rope, head_dim: int) -> tuple[Float[np.ndarray, "half"], float]:
    """Returns angular frequencies w [H/2] in radians per token, and the factor on cos and sin."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = (1.0 / np.float32(rope.theta) ** exponent).astype(np.float32)
    if rope.kind == "linear":
        return plain / np.float32(rope.factor), 1.0
    if rope.kind == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, plain, head_dim), _yarn_length(rope)
    return plain, 1.0


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """Divides the frequencies of long wavelengths by `factor`; short ones are unchanged."""
    turns = rope.original_length * plain / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return ((1 - blend) * plain / rope.factor + blend * plain).astype(np.float32)


def _yarn(rope: Rope, plain: np.ndarray, head_dim: int) -> np.ndarray:
    """Ramps over the dimensions from w (high frequencies) to w / factor (low frequencies)."""

    def dimension(rotations: float) -> float:
        ratio = math.log(rope.original_length / (rotations * 2 * math.pi))
        return head_dim * ratio / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0.0, 1.0)
    return (ramp * plain / rope.factor + (1 - ramp) * plain).astype(np.float32)


def _yarn_length(rope: Rope) -> float:
    def length(scale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * scale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return length(rope.mscale) / length(rope.mscale_all_dim)
    return length(1.0)


def table(
    rope: Rope, head_dim: int, position: Int[Array, "B T"]
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Returns cos and sin of every position's angles, float32."""
    w, length = frequencies(rope, head_dim)
    angle = position.astype(jnp.float32)[:, :, None] * jnp.asarray(w)[None, None, :]
    # A loop of two, because XLA for CPUs fuses a plain cosine into every use and would recompute it
    # for each head of each layer.
    both = jax.lax.map(lambda i: jnp.where(i == 0, jnp.cos(angle), jnp.sin(angle)), jnp.arange(2))
    return both[0] * length, both[1] * length


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T N H"]:
    """Rotates every pair (i, i + H/2) of every head. Computed in float32, returned in x's dtype."""
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)

"""Multi-component floats: a number as the exact unevaluated sum of two narrow ones.

Collage (Yu et al. 2024, arXiv:2405.03637) stores a weight as hi + lo, both bfloat16, where hi is
the sum rounded to bfloat16 and lo the rounding error. The operations are those of Dekker (1971) and
Knuth: they return a rounded result and its exact error.

They stay exact under a compiler that can omit rounding (XLA computes bfloat16 in float32, and
drops a rounding whose result is widened again) because

    a value is rounded once, explicitly, in float32, by `lax.reduce_precision`, and is cast only
    when it is already a narrow value. No rewriting of casts can then change a result.

Numbers below 2^-126, which devices can flush to 0, are lost.

So all functions here take and return float32 arrays whose values are representable in a narrow
dtype ("narrow values"), and only `round_to` rounds. They are elementwise and pure.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Scalar = float | int | jax.Array
_TINY16 = 2.0**-14  # below it float16 is subnormal
LARGEST = 2.0**63  # its square is finite in float32, and so are averages of such squares


def round_to(x: Array, dtype: Any) -> Array:
    """Rounds to the nearest value of a narrow dtype, ties to even, still as float32.

    Args:
        x: float32.
        dtype: bfloat16, float16, or float32 (which changes nothing).
    """
    dtype = jnp.dtype(dtype)
    if dtype == jnp.float32:
        return x
    info = jnp.finfo(dtype)
    y = jax.lax.reduce_precision(x, info.nexp, info.nmant)
    if dtype == jnp.float16:
        # reduce_precision flushes float16's subnormal numbers, which are multiples of 2^-24.
        y = jnp.where(jnp.abs(x) < _TINY16, jnp.round(x * 2.0**24) * 2.0**-24, y)
    return y


def store(x: Array, dtype: Any) -> Array:
    """Rounds x and casts it: the only way from float32 to a narrow array."""
    return round_to(x, dtype).astype(dtype)


def load(x: Array) -> Array:
    """Casts a stored array to float32."""
    return x.astype(jnp.float32)


def wide(tree: Any) -> Any:
    """Casts a tree's arrays to float32; float64 ones stay."""
    return jax.tree.map(lambda x: x.astype(wide_dtype(x.dtype)), tree)


def wide_dtype(dtype: Any) -> Any:
    """float64 for float64, else float32."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def gradients(tree: Any) -> Any:
    """Casts gradients to float32 (float64 ones stay), clipped to +-2^63 for finite squares.

    Beyond 1.8e19 a square overflows, and the second moment would stay infinite. Adam does not
    depend on the scale of an entry's gradients: a single one clipped to 2^63 moves its weight as it
    would in float64. Infinite entries are clipped as well (checks of finiteness go before the
    optimizer); NaNs stay NaN.
    """
    return jax.tree.map(lambda x: jnp.clip(x, -LARGEST, LARGEST), wide(tree))


def fast_two_sum(a: Array, b: Array, dtype: Any = jnp.bfloat16) -> tuple[Array, Array]:
    """(s, e) with s = RN(a + b) and s + e = a + b exactly, if |a| >= |b| (Dekker).

    The intermediate steps stay in float32, where they are exact if the exponents of the narrow a
    and b differ by at most 16; up to that difference the order of a and b does not matter.
    """
    s = round_to(a + b, dtype)
    return s, round_to(b - (s - a), dtype)


def two_sum(a: Array, b: Array, dtype: Any = jnp.bfloat16) -> tuple[Array, Array]:
    """(s, e) with s = RN(a + b) and s + e = a + b exactly, in any order of a and b (Knuth)."""
    a, b = jnp.where(jnp.abs(a) >= jnp.abs(b), a, b), jnp.where(jnp.abs(a) >= jnp.abs(b), b, a)
    return fast_two_sum(a, b, dtype)


def two_prod(a: Array, b: Array, dtype: Any = jnp.bfloat16) -> tuple[Array, Array]:
    """(x, e) with x = RN(a b) and x + e = a b exactly, unless e underflows.

    The product of two significands of 8 or of 11 bits fits into float32's 24, so neither Veltkamp's
    split nor a fused multiply-add is needed.
    """
    product = a * b
    x = round_to(product, dtype)
    return x, round_to(product - x, dtype)


def grow(x: Array, y: Array, c: Array, dtype: Any = jnp.bfloat16) -> tuple[Array, Array]:
    """The expansion (x, y) plus the narrow c, as an expansion (Collage's "Grow")."""
    u, v = fast_two_sum(x, c, dtype)
    return fast_two_sum(u, round_to(y + v, dtype), dtype)


def scale(x: Array, y: Array, a: Array, b: Array, dtype: Any = jnp.bfloat16) -> tuple[Array, Array]:
    """The expansion (x, y) times the expansion (a, b); y b is below the last bit and left out."""
    p, e = two_prod(x, a, dtype)
    cross = round_to(round_to(x * b, dtype) + round_to(y * a, dtype), dtype)
    return fast_two_sum(p, round_to(e + cross, dtype), dtype)


def constant(value: Scalar, dtype: Any = jnp.bfloat16) -> tuple[Array, Array]:
    """A number as an expansion; 0.999 is 1.0 - 0.00099945 in bfloat16."""
    if isinstance(value, jax.Array):
        value = value.astype(jnp.float32)
        hi = round_to(value, dtype)
        return hi, round_to(value - hi, dtype)
    hi = np.asarray(value, jnp.dtype(dtype))
    lo = np.asarray(value - float(hi), jnp.dtype(dtype))
    return jnp.float32(hi), jnp.float32(lo)


def split(x: Array, dtype: Any = jnp.bfloat16) -> tuple[Array, Array]:
    """float32 as (hi, lo) in a narrow dtype: hi = RN(x), lo = RN(x - hi). Relative error 2^-17."""
    hi = round_to(x, dtype)
    return hi.astype(dtype), store(x - hi, dtype)


def join(hi: Array, lo: Array) -> Array:
    """hi + lo in float32."""
    return load(hi) + load(lo)


def split_bits(x: Array) -> tuple[Array, Array]:
    """float32 as (hi, rest), bfloat16 and int16, with bits(x) = bits(hi) + rest as integers.

    hi is the nearest bfloat16, with halves rounded away from 0, so that rest fits: -32768 to 32767
    units in the last place of float32. All steps are on integers, so nothing is flushed or rounded.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    high = (bits + 0x8000) >> 16
    hi = jax.lax.bitcast_convert_type(high.astype(jnp.uint16), jnp.bfloat16)
    return hi, (bits - (high << 16)).astype(jnp.int16)


def join_bits(hi: Array, rest: Array) -> Array:
    """The float32 that `split_bits` decomposed."""
    high = jax.lax.bitcast_convert_type(hi, jnp.uint16).astype(jnp.int32) << 16
    return jax.lax.bitcast_convert_type(high + rest.astype(jnp.int32), jnp.float32)


def stochastic(x: Array, noise: Array) -> Array:
    """x rounded to one of its two bfloat16 neighbors, with mean x; still float32.

    Args:
        x: float32.
        noise: uint32 with uniform upper 16 bits.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    up = (bits + (noise >> 16)) & jnp.uint32(0xFFFF0000)
    return jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(up, jnp.float32), x)


def noise(shape: tuple[int, ...], *words: int | Array) -> Array:
    """Uniform uint32 that depends only on the words and on an entry's index in the global array.

    A hash instead of `jax.random`, since it fuses into its consumer: nothing is stored, and the
    sharding of the array cannot change a bit. The finalizer is that of murmur3.
    """
    h = jnp.uint32(0x9E3779B9)
    for word in words:
        word = jnp.uint32(word) if isinstance(word, int) else word.astype(jnp.uint32)
        h = _mixed(h ^ word)
    h = jnp.broadcast_to(h, shape)
    for axis in range(len(shape)):
        h = _mixed(h + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(0x9E3779B1))
    return h


def _mixed(h: Array) -> Array:
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def one_minus_power(b: Scalar, t: Array) -> Array:
    """1 - b^t, the bias correction of a moment, without cancellation.

    `1 - b**t` in float32 is off by 1e-5 for b = 0.999 and small t.

    Args:
        b: a Python number, whose logarithm is then taken in double precision, or an array.
        t: number of updates, int32.
    """
    log = math.log(b) if isinstance(b, float | int) and b > 0 else None
    if log is None:
        b = jnp.asarray(b, jnp.float32)
        return 1 - b ** t.astype(jnp.float32)
    return -jnp.expm1(t.astype(jnp.float32) * jnp.float32(log))

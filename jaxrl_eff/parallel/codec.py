"""Numbers in blocks that share a scale, and the one buffer of bytes they travel as.

A vector is cut into blocks; a block is rotated if wanted, divided by its scale and rounded to codes
of 8 or 4 bits. Codes and scales lie in one `uint8` array, so a collective moves both, and no
backend widens them on their way. Vectors that stay exact travel as the bytes of their numbers, so
that whoever sends need not know which they are.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

EXACT = {16: jnp.bfloat16, 32: jnp.float32}
SCALE_BYTES = 2  # bfloat16


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a vector is written as bytes.

    Attributes:
        bits: of a code, 8 or 4; or of a number that stays one: 16 (bfloat16) or 32 (float32).
        size: elements that share a scale, at most. A vector that does not divide is cut into blocks
            of equal size below it; what little is missing is filled with zeros.
        hadamard: whether a block is multiplied by a Hadamard matrix first, which spreads an outlier
            over all its elements.
        shrink: factors of the largest scale to choose from, by the least squared error of each
            block. (1.0,) clips nothing.
        stochastic: whether codes are rounded up with the probability that makes them right on
            average; otherwise to the nearest.

    Raises:
        ValueError: unknown bits, a size that is odd (or no power of two, for Hadamard), or factors
            outside (0, 1].
    """

    bits: int = 8
    size: int = 256
    hadamard: bool = False
    shrink: tuple[float, ...] = (1.0,)
    stochastic: bool = False

    def __post_init__(self):
        if self.bits not in (4, 8, 16, 32):
            raise ValueError(f"bits is {self.bits}; it must be 4, 8, 16 or 32.")
        if self.size < 2 or self.size % 2:
            raise ValueError(f"size is {self.size}; it must be even and at least 2.")
        if self.hadamard and self.size & (self.size - 1):
            raise ValueError(f"size is {self.size}; with hadamard it must be a power of two.")
        if not self.shrink or not all(0 < f <= 1 for f in self.shrink):
            raise ValueError(f"shrink is {self.shrink}; it must hold factors in (0, 1].")

    @property
    def exact(self) -> bool:
        """Whether numbers travel rather than codes."""
        return self.bits in EXACT

    def layout(self, n: int) -> tuple[int, int]:
        """(blocks, elements of a block) of a vector of n.

        Raises:
            ValueError: the vector is empty.
        """
        if n < 1:
            raise ValueError(f"a vector of {n} elements has no blocks; it must have at least 1.")
        count = -(-n // self.size)
        if self.hadamard:
            return count, self.size if count > 1 else max(2, 1 << (n - 1).bit_length())
        width = -(-n // count)
        return count, width + width % 2

    def nbytes(self, n: int) -> int:
        """Bytes of a vector of n elements, scales included."""
        if self.exact:
            return n * self.bits // 8
        count, width = self.layout(n)
        return count * (width * self.bits // 8 + SCALE_BYTES)


def encode(x: jax.Array, blocks: Blocks, salt: int | jax.Array = 0) -> jax.Array:
    """The bytes of vectors.

    A block with a NaN or an infinity has the scale NaN, and decodes to NaN everywhere.

    Args:
        x: [..., n] floats.
        blocks: how.
        salt: of stochastic rounding; another one rounds the same numbers another way.

    Returns:
        [..., blocks.nbytes(n)] uint8.
    """
    if blocks.exact:
        return _bytes(x.astype(EXACT[blocks.bits]))
    count, width = blocks.layout(x.shape[-1])
    x = x.astype(jnp.float32)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count * width - x.shape[-1])])
    x = x.reshape(*x.shape[:-1], count, width)
    if blocks.hadamard:
        x = rotate(x)
    scale = _scale(x, blocks)
    draw = _uniform(x, salt) if blocks.stochastic else None
    codes = _codes(x, scale.astype(jnp.float32), blocks, draw)
    packed = _pack(codes) if blocks.bits == 4 else lax.bitcast_convert_type(codes, jnp.uint8)
    packed = packed.reshape(*packed.shape[:-2], -1)
    return jnp.concatenate([packed, _bytes(scale)], axis=-1)


def decode(payload: jax.Array, n: int, blocks: Blocks, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The vectors of n elements that these bytes are.

    Args:
        payload: [..., blocks.nbytes(n)] uint8.

    Returns:
        [..., n] of dtype.

    Raises:
        ValueError: the bytes are not those of n elements.
    """
    if payload.shape[-1] != blocks.nbytes(n):
        raise ValueError(
            f"{payload.shape[-1]} bytes are not {n} elements of {blocks}, which take "
            f"{blocks.nbytes(n)}."
        )
    if blocks.exact:
        return _numbers(payload, EXACT[blocks.bits]).astype(dtype)
    count, width = blocks.layout(n)
    packed, scale = jnp.split(payload, [count * width * blocks.bits // 8], axis=-1)
    packed = packed.reshape(*packed.shape[:-1], count, -1)
    codes = _unpack(packed) if blocks.bits == 4 else lax.bitcast_convert_type(packed, jnp.int8)
    scale = _numbers(scale, jnp.bfloat16).astype(jnp.float32)
    x = codes.astype(jnp.float32) * scale[..., None]
    if blocks.hadamard:
        x = rotate(x)
    return x.reshape(*x.shape[:-2], -1)[..., :n].astype(dtype)


def rotate(x: jax.Array) -> jax.Array:
    """The last axis, a power of two, times H/sqrt(n): orthogonal, and its own inverse.

    H of n = a b is the Kronecker product of H of a and H of b, so two small products do.
    """
    n = x.shape[-1]
    a = 1 << (n.bit_length() // 2)
    left, right = (jnp.asarray(_hadamard(k)) for k in (a, n // a))
    y = x.reshape(*x.shape[:-1], a, n // a)
    # A device's default precision would round the numbers to ten bits or fewer.
    y = jnp.einsum("ij,...jk,kl->...il", left, y, right, precision=lax.Precision.HIGHEST)
    return y.reshape(x.shape)


def _hadamard(n: int) -> np.ndarray:
    h = np.ones((1, 1), np.float32)
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    if len(h) != n:
        raise ValueError(f"a Hadamard matrix of size {n}: it must be a power of two.")
    return h / np.float32(np.sqrt(n))


def _top(blocks: Blocks) -> int:
    """The largest code; the smallest is its negative."""
    return 2 ** (blocks.bits - 1) - 1


def _scale(x: jax.Array, blocks: Blocks) -> jax.Array:
    """[..., blocks] bfloat16: what code 1 is worth, rounded up so that nothing clips unasked."""
    largest = jnp.max(jnp.abs(x), axis=-1) / _top(blocks)
    largest = jnp.where(jnp.all(jnp.isfinite(x), axis=-1), largest, jnp.nan)
    best = error = None
    for factor in blocks.shrink:
        scale = _up(largest * jnp.float32(factor))
        if len(blocks.shrink) == 1:
            return scale
        wide = scale.astype(jnp.float32)
        wrong = jnp.sum(
            (_codes(x, wide, blocks).astype(jnp.float32) * wide[..., None] - x) ** 2, axis=-1
        )
        better = True if error is None else wrong < error
        best = scale if best is None else jnp.where(better, scale, best)
        error = wrong if error is None else jnp.where(better, wrong, error)
    return best


def _up(x: jax.Array) -> jax.Array:
    """The least bfloat16 that is not below a float32 of at least zero."""
    kept = (lax.bitcast_convert_type(x, jnp.uint32) + jnp.uint32(0xFFFF)) >> jnp.uint32(16)
    up = lax.bitcast_convert_type(kept.astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isnan(x), jnp.bfloat16(jnp.nan), up)


def _codes(
    x: jax.Array, scale: jax.Array, blocks: Blocks, draw: jax.Array | None = None
) -> jax.Array:
    """[..., blocks, width] int8; zeros where the scale is zero or NaN."""
    good = (scale > 0)[..., None]
    x = x / jnp.where(good, scale[..., None], 1)
    x = jnp.round(x) if draw is None else jnp.floor(x + draw)
    x = jnp.clip(x, -_top(blocks), _top(blocks))
    return jnp.where(good, x, 0).astype(jnp.int8)


def _uniform(x: jax.Array, salt: int | jax.Array) -> jax.Array:
    """Numbers in [0, 1) from the bits of x, their places and the salt (murmur3's last steps)."""
    h = lax.bitcast_convert_type(x, jnp.uint32)
    place = lax.iota(jnp.uint32, x.size).reshape(x.shape)
    h = h ^ (place * jnp.uint32(0x9E3779B9)) ^ (jnp.asarray(salt, jnp.uint32) * jnp.uint32(0x85EB))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        h = (h ^ (h >> jnp.uint32(shift))) * jnp.uint32(factor)
    return (h >> jnp.uint32(8)).astype(jnp.float32) * jnp.float32(2**-24)


def _pack(codes: jax.Array) -> jax.Array:
    """Two codes a byte: the first half of a block in the low bits, the second in the high."""
    low, high = jnp.split(lax.bitcast_convert_type(codes, jnp.uint8), 2, axis=-1)
    return (low & jnp.uint8(15)) | (high << jnp.uint8(4))


def _unpack(packed: jax.Array) -> jax.Array:
    nibbles = jnp.concatenate([packed & jnp.uint8(15), packed >> jnp.uint8(4)], axis=-1)
    return lax.bitcast_convert_type(nibbles ^ jnp.uint8(8), jnp.int8) - jnp.int8(8)


def _bytes(x: jax.Array) -> jax.Array:
    raw = lax.bitcast_convert_type(x, jnp.uint8)
    return raw.reshape(*x.shape[:-1], -1)


def _numbers(raw: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    size = jnp.dtype(dtype).itemsize
    return lax.bitcast_convert_type(raw.reshape(*raw.shape[:-1], -1, size), dtype)

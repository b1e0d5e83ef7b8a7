"""Block quantization of vectors, encoded into a single buffer of bytes.

A vector is cut into blocks; each block is optionally rotated by a Hadamard matrix, divided by its
scale and rounded to codes of 8 or 4 bits. Codes and scales share one `uint8` array, so a single
collective moves both, and no backend widens them in transit. Unquantized vectors are encoded as
their raw bytes, so collectives handle both kinds alike.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

EXACT = {16: jnp.bfloat16, 32: jnp.float32}
SCALE_BYTES = 2  # bfloat16
BITS = {"int8": 8, "int4": 4}  # precisions of weights, by name


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Encoding of a vector as bytes.

    Attributes:
        bits: bits per code, 8 or 4; or bits per unquantized number, 16 (bfloat16) or 32 (float32).
        size: maximum number of elements that share a scale. A vector that is not a multiple of it
            is cut into equal blocks of at most this size and padded with zeros; with Hadamard,
            blocks have this size, and a vector that fits in one has a block of a power of two.
        hadamard: multiply each block by a Hadamard matrix first, which spreads an outlier over all
            elements of the block.
        shrink: candidate factors of the full-range scale; each block uses the one with the least
            squared error. (1.0,) clips nothing.

    Raises:
        ValueError: unknown bits, an odd size (or, with Hadamard, one that is not a power of two),
            or factors outside (0, 1].
    """

    bits: int = 8
    size: int = 256
    hadamard: bool = False
    shrink: tuple[float, ...] = (1.0,)

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
        """True if numbers are sent unquantized."""
        return self.bits in EXACT

    def layout(self, n: int) -> tuple[int, int]:
        """(number of blocks, elements per block) for a vector of n elements.

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
        """Encoded bytes of a vector of n elements, including scales."""
        if self.exact:
            return n * self.bits // 8
        count, width = self.layout(n)
        return count * (width * self.bits // 8 + SCALE_BYTES)


def encode(x: jax.Array, blocks: Blocks) -> jax.Array:
    """Encodes vectors as bytes: [..., n] floats -> [..., blocks.nbytes(n)] uint8.

    A block that contains a NaN or an infinity gets a NaN scale and decodes to NaN everywhere.
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
    codes = _codes(x, scale.astype(jnp.float32), blocks)
    packed = _pack(codes) if blocks.bits == 4 else lax.bitcast_convert_type(codes, jnp.uint8)
    packed = packed.reshape(*packed.shape[:-2], -1)
    return jnp.concatenate([packed, _bytes(scale)], axis=-1)


def decode(payload: jax.Array, n: int, blocks: Blocks, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Decodes the bytes of vectors: [..., blocks.nbytes(n)] uint8 -> [..., n] of dtype.

    Raises:
        ValueError: the number of bytes does not match n elements.
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
    """Multiplies the last axis, of length n = 2^k, by H/sqrt(n), which is its own inverse.

    H of size n = a b is the Kronecker product of those of sizes a and b, so two small matrix
    products suffice.
    """
    from scipy.linalg import hadamard  # late: it takes a tenth of a second

    n = x.shape[-1]
    a = 1 << (n.bit_length() // 2)
    left, right = (
        jnp.asarray(hadamard(k, np.float32) / np.float32(np.sqrt(k))) for k in (a, n // a)
    )
    y = x.reshape(*x.shape[:-1], a, n // a)
    # The default precision of accelerators rounds operands to ten mantissa bits or fewer.
    y = jnp.einsum("ij,...jk,kl->...il", left, y, right, precision=lax.Precision.HIGHEST)
    return y.reshape(x.shape)


def _top(blocks: Blocks) -> int:
    """Largest code; the smallest is its negative."""
    return 2 ** (blocks.bits - 1) - 1


def _scale(x: jax.Array, blocks: Blocks) -> jax.Array:
    """[..., blocks] bfloat16 scales, rounded up so that a factor of 1 never clips."""
    largest = jnp.max(jnp.abs(x), axis=-1) * jnp.float32(1 / _top(blocks))
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
    """Rounds a nonnegative float32 up to bfloat16."""
    kept = (lax.bitcast_convert_type(x, jnp.uint32) + jnp.uint32(0xFFFF)) >> jnp.uint32(16)
    up = lax.bitcast_convert_type(kept.astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isnan(x), jnp.bfloat16(jnp.nan), up)


def _codes(x: jax.Array, scale: jax.Array, blocks: Blocks) -> jax.Array:
    """[..., blocks, width] int8 codes; zeros where the scale is zero or NaN."""
    good = (scale > 0)[..., None]
    # XLA turns some divisions into this product and others not; codes must not depend on that.
    x = jnp.round(x * (1 / jnp.where(good, scale[..., None], 1)))
    x = jnp.clip(x, -_top(blocks), _top(blocks))
    return jnp.where(good, x, 0).astype(jnp.int8)


def _pack(codes: jax.Array) -> jax.Array:
    """Packs two codes per byte: a block's first half in the low bits, its second in the high."""
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

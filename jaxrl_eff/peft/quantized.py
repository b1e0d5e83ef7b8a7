"""Frozen kernels in 8 or 4 bits: codes, and one scale per block of numbers.

    w ~ scale * table[code]        scale = max |w| of the block, float32

    int8    table[code] = code / 127, rounded to nearest
    nf4     16 quantiles of a normal distribution, two codes per byte: NormalFloat of QLoRA
            (arXiv:2305.14314, Sec. 3 and App. E); as blocks gathered over devices, the quantized
            weights of ZeRO++ (arXiv:2306.10209, Sec. 3.1) and the frozen ones of its MixZ++

Both represent 0 and +-scale exactly, so that quantizing twice changes nothing. `kernel_codes` and
`kernel_scales` are stored in place of `kernel` and have its axes, so that scanning, sharding and
moving work on them as on any leaf. A block runs along `head_dim` or along `ffn`: no plan shards the
first and only tensor parallelism the second, whose tiles no block crosses.

qwix is not used: its arrays are objects that replace a module's parameters by intercepting its
operations, with a 4-bit code in each byte or in `int4`, which CPUs widen to a byte.

Not supported: double quantization of the scales (it would save 0.37 bits per parameter).
"""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_eff import tree
from jaxrl_eff.models import products, weights
from jaxrl_eff.types import Array, Float, PyTree

KINDS = ("int8", "nf4")
LEAVES = ("kernel_codes", "kernel_scales")  # in storage
BLOCK = 64
SMALLEST = 8
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip


class Block(NamedTuple):
    """A number of elements, along one axis of the kernel, that share a scale."""

    axis: int
    size: int


def block_of(kind: str, axes: tuple[str | None, ...], shape: tuple[int, ...], tiles: int) -> Block:
    """Returns the largest block of at most 64 that divides a kernel's axis; even for nf4.

    Args:
        axes: logical names of the kernel's axes, `layers` included.
        tiles: number of tiles of `ffn` that no block crosses; reduced to a divisor of `ffn`.

    Raises:
        ValueError: an unknown kind, or no such block of at least 8.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown base {kind!r}; expected one of {['', *KINDS]}.")
    name = "head_dim" if "head_dim" in axes else "ffn"
    axis = axes.index(name)
    part = shape[axis] // math.gcd(shape[axis], tiles if name == "ffn" else 1)
    step = 2 if kind == "nf4" else 1
    sizes = [n for n in range(SMALLEST, BLOCK + 1) if part % n == 0 and n % step == 0]
    if not sizes:
        even = "even " if step == 2 else ""
        raise ValueError(
            f"base is {kind!r}, but no {even}block of {SMALLEST} to {BLOCK} divides the {part} "
            f"numbers along {name}."
        )
    return Block(axis, sizes[-1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A kernel in 8 or 4 bits. The shapes and dtypes determine the block and the kind.

    Attributes:
        codes: int8 of the kernel's shape, or for nf4 uint8 with half of the block's axis, neighbors
            in the low and the high half of a byte.
        scales: float32, with one number per block along that axis.
        axes: logical axes of the kernel of one layer; () if they do not matter.
    """

    codes: Any
    scales: Any
    axes: tuple[str | None, ...] = dataclasses.field(default=(), metadata={"static": True})
    transient: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        shape = self.codes.shape
        return (*shape[: self._axis], self._length, *shape[self._axis + 1 :])

    @property
    def _axis(self) -> int:
        # A block has 8 or more numbers, so only its axis differs.
        pairs = zip(self.codes.shape, self.scales.shape, strict=True)
        return next(i for i, (n, blocks) in enumerate(pairs) if n != blocks)

    @property
    def _length(self) -> int:
        return self.codes.shape[self._axis] * (2 if self.codes.dtype == jnp.uint8 else 1)

    def dequantize(self, dtype: Any) -> Float[Array, "..."]:
        """Returns the kernel, of one layer or of all."""
        codes, axis = self.codes, self._axis
        if codes.dtype == jnp.uint8:
            low, high = codes & 15, codes >> 4
            codes = jnp.stack([low, high], axis + 1).reshape(self.shape)
            y = jnp.take(jnp.asarray(NF4), codes.astype(jnp.int32), mode="clip")
        else:
            y = codes.astype(jnp.float32) / 127
        each = self._length // self.scales.shape[axis]
        return (y * jnp.repeat(self.scales, each, axis)).astype(dtype)

    def materialize(self) -> Array:
        """Returns the kernel of one layer in float32."""
        # Gathered over the fsdp axis as codes, in a fraction of the bytes.
        axes = tuple(None if axis == "embed" else axis for axis in self.axes)
        kept = (weights.array(x) for x in (self.codes, self.scales))
        if axes:
            kept = (nn.with_logical_constraint(x, axes) for x in kept)
        return Quantized(*kept).dequantize(jnp.float32)

    def matmul(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        return products.product(x, weights.matrix(self, x.shape[-1], x.dtype))

    def prepared(self, dtype: Any) -> "Quantized":
        """Returns itself: dequantized, all layers would take the memory that codes save."""
        del dtype
        return self


def quantize(kernel: Float[Array, "..."], kind: str, block: Block) -> Quantized:
    """Quantizes a kernel into codes and scales."""
    x = jnp.moveaxis(kernel.astype(jnp.float32), block.axis, -1)
    x = x.reshape(*x.shape[:-1], -1, block.size)
    scale = jnp.max(jnp.abs(x), axis=-1)
    y = x / jnp.where(scale > 0, scale, 1)[..., None]
    if kind == "int8":
        codes = jnp.round(y * 127).astype(jnp.int8).reshape(*scale.shape[:-1], -1)
    else:
        between = (NF4[1:] + NF4[:-1]) / 2
        codes = sum((y > edge).astype(jnp.uint8) for edge in between)
        codes = codes.reshape(*scale.shape[:-1], -1, 2)
        codes = codes[..., 0] | codes[..., 1] << 4
    back = lambda a: jnp.moveaxis(a, -1, block.axis)  # noqa: E731
    return Quantized(back(codes), back(scale))


def is_quantized(x: Any) -> bool:
    return isinstance(x, Quantized)


def inside(params: PyTree) -> bool:
    """Returns True if parameters have quantized kernels."""
    return any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized)))


def dequantized(params: PyTree, dtype: Any) -> PyTree:
    """Returns parameters with dequantized kernels; under jit, only of those that are read."""

    def one(x: Any) -> Any:
        return x.dequantize(dtype) if is_quantized(x) else x

    return jax.tree.map(one, params, is_leaf=is_quantized)


def layout(where: PyTree) -> PyTree:
    """Returns the shardings of dequantized parameters: kernels as their codes."""
    return jax.tree.map(lambda x: x.codes if is_quantized(x) else x, where, is_leaf=is_quantized)


class BaseFormat(NamedTuple):
    """The quantized kernels of a model, and their format.

    Attributes:
        kind: "int8" or "nf4".
        blocks: name of a kernel -> its blocks.
    """

    kind: str
    blocks: dict[str, Block]

    def names(self, name: str) -> list[str]:
        """Returns the names of the leaves that are stored in place of a kernel."""
        return [name.removesuffix("kernel") + leaf for leaf in LEAVES]

    def leaves(self, name: str, x: Array) -> dict[str, Array]:
        """Returns the stored leaves of a parameter, by name: codes and scales, or itself."""
        if name not in self.blocks:
            return {name: x}
        found = quantize(x, self.kind, self.blocks[name])
        return dict(zip(self.names(name), (found.codes, found.scales), strict=True))

    def params(self, plain: PyTree) -> PyTree:
        """Quantizes plain parameters."""
        found: dict[str, Array] = {}
        for name, x in tree.flat(plain).items():
            found |= self.leaves(name, x)
        return tree.with_leaves({}, found)

    def shapes(self, shapes: PyTree, axes: PyTree) -> tuple[PyTree, PyTree]:
        """Returns shapes and logical axes of the parameters, given those of the plain ones."""
        names = tree.flat(axes, is_leaf=lambda x: isinstance(x, tuple))
        found: dict[str, Any] = {}
        where: dict[str, Any] = {}
        for name, x in tree.flat(shapes).items():
            made = jax.eval_shape(lambda x, name=name: self.leaves(name, x), x)
            found |= made
            where |= dict.fromkeys(made, names[name])
        return tree.with_leaves({}, found), tree.with_leaves({}, where)

"""Frozen kernels in 8 or 4 bits: codes, and one scale per block of numbers.

    w ~ scale * table[code]        scale = max |w| of the block, float32

    int8    table[code] = code / 127, rounded to nearest
    nf4     16 quantiles of a normal distribution, two codes per byte: NormalFloat of QLoRA
            (arXiv:2305.14314, Sec. 3 and App. E); as blocks gathered over devices, the quantized
            weights of ZeRO++ (arXiv:2306.10209, Sec. 3.1) and the frozen ones of its MixZ++

Both represent 0 and +-scale exactly, so that quantizing twice changes nothing. `kernel_codes` and
`kernel_scales` replace `kernel` and have its axes, so that scanning, sharding and moving work on
them as on any leaf. A block runs along `head_dim` or along `ffn`: no plan shards the first and only
tensor parallelism the second, whose tiles no block crosses.

qwix is not used: its arrays are objects that replace a module's parameters by intercepting its
operations, with a 4-bit code in each byte or in `int4`, which CPUs widen to a byte.

Not supported: double quantization of the scales (it would save 0.37 bits per parameter).
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_eff import tree
from jaxrl_eff.types import Array, Float, PyTree

KINDS = ("int8", "nf4")
LEAVES = ("kernel_codes", "kernel_scales")
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
        raise ValueError(f"base is {kind!r}; there are {['', *KINDS]}.")
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


def quantize(kernel: Float[Array, "..."], kind: str, block: Block) -> dict[str, Array]:
    """Quantizes a kernel into codes and scales.

    Returns:
        `kernel_codes`: int8 of the kernel's shape, or for nf4 uint8 with half of the block's axis,
        neighbors in the low and the high half of a byte; `kernel_scales`: float32, with one number
        per block along that axis.
    """
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
    return {"kernel_codes": back(codes), "kernel_scales": back(scale)}


def dequantize(leaves: Mapping[str, Array], dtype: Any) -> Float[Array, "..."]:
    """Dequantizes codes and scales; their shapes and dtypes determine the block and the kind."""
    codes, scale = (leaves[k] for k in LEAVES)
    axis, size = _axis(codes, scale), _length(codes, scale)
    if codes.dtype == jnp.uint8:
        low, high = codes & 15, codes >> 4
        codes = jnp.stack([low, high], axis + 1).reshape(_shape(codes, scale))
        y = jnp.take(jnp.asarray(NF4), codes.astype(jnp.int32), mode="clip")
    else:
        y = codes.astype(jnp.float32) / 127
    return (y * jnp.repeat(scale, size // scale.shape[axis], axis)).astype(dtype)


def _axis(codes: Any, scale: Any) -> int:
    """Returns the axis of the blocks. A block has 8 or more numbers, so only its axis differs."""
    return next(i for i, n in enumerate(codes.shape) if n != scale.shape[i])


def _length(codes: Any, scale: Any) -> int:
    return codes.shape[_axis(codes, scale)] * (2 if codes.dtype == jnp.uint8 else 1)


def _shape(codes: Any, scale: Any) -> tuple[int, ...]:
    """Returns the shape of the kernel."""
    axis = _axis(codes, scale)
    return (*codes.shape[:axis], _length(codes, scale), *codes.shape[axis + 1 :])


def inside(params: PyTree) -> bool:
    """Returns True if the parameters have quantized kernels."""
    return any(f"/{LEAVES[0]}" in f"/{name}" for name in tree.names(params))


def kernels(params: PyTree) -> dict[str, dict[str, Any]]:
    """Returns name of a quantized kernel -> its codes and scales."""
    flat = tree.flat(params)
    names = [k.removesuffix("_codes") for k in flat if k.endswith(f"/{LEAVES[0]}")]
    return {k: {leaf: flat[k.removesuffix("kernel") + leaf] for leaf in LEAVES} for k in names}


def plain(params: PyTree, dtype: Any) -> PyTree:
    """Returns the parameters with all kernels dequantized; under jit, only those that are read."""
    wide = {k: dequantize(leaves, dtype) for k, leaves in kernels(params).items()}
    return tree.with_leaves(_rest(params), wide)


def plain_shapes(params: PyTree, dtype: Any) -> PyTree:
    """Returns shapes and dtypes of `plain`, for arrays or `jax.ShapeDtypeStruct`s."""
    wide = {
        k: jax.ShapeDtypeStruct(_shape(*(leaves[x] for x in LEAVES)), dtype)
        for k, leaves in kernels(params).items()
    }
    return tree.with_leaves(_rest(params), wide)


def plain_layout(where: PyTree) -> PyTree:
    """Returns the shardings of `plain`, given those of the parameters: kernels as their codes."""
    wide = {k: leaves[LEAVES[0]] for k, leaves in kernels(where).items()}
    return tree.with_leaves(_rest(where), wide)


def _rest(params: PyTree) -> PyTree:
    return tree.without(params, lambda name: name.rpartition("/")[2] in LEAVES)


class Quantized(NamedTuple):
    """The quantized kernels of a model, and their format.

    Attributes:
        kind: "int8" or "nf4".
        blocks: name of a kernel -> its blocks.
    """

    kind: str
    blocks: dict[str, Block]

    def names(self, name: str) -> list[str]:
        """Returns the names of the leaves that replace a kernel."""
        return [name.removesuffix("kernel") + leaf for leaf in LEAVES]

    def leaves(self, name: str, x: Array) -> dict[str, Array]:
        """Returns the stored leaves of a parameter, by name: codes and scales, or itself."""
        if name not in self.blocks:
            return {name: x}
        found = quantize(x, self.kind, self.blocks[name])
        return dict(zip(self.names(name), found.values(), strict=True))

    def params(self, plain_: PyTree) -> PyTree:
        """Quantizes plain parameters."""
        flat, found = tree.flat(plain_), {}
        for name, x in flat.items():
            found |= self.leaves(name, x)
        return tree.with_leaves({}, found)

    def shapes(self, shapes: PyTree, axes: PyTree) -> tuple[PyTree, PyTree]:
        """Returns shapes and logical axes of the parameters, given those of the plain ones."""
        flat, found, names = tree.flat(shapes), {}, {}
        for name in self.blocks:
            made = jax.eval_shape(lambda x, name=name: self.leaves(name, x), flat[name])
            found |= made
            names |= dict.fromkeys(made, _at(axes, name))
        without = lambda t: _without(t, self.blocks)  # noqa: E731
        return tree.with_leaves(without(shapes), found), tree.with_leaves(without(axes), names)


def _at(axes: PyTree, name: str) -> Any:
    for key in name.split("/"):
        axes = axes[key]
    return axes


def _without(nested: Any, names: Any, path: str = "") -> Any:
    """Returns nested dicts without some leaves; leaves can be tuples."""
    if not isinstance(nested, dict):
        return nested
    kept = {k: v for k, v in nested.items() if path + k not in names}
    return {k: _without(v, names, f"{path}{k}/") for k, v in kept.items()}

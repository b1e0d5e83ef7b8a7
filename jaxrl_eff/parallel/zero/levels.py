"""Precision levels for the communication of sharded weights and gradients, as plain data."""

import dataclasses

from jaxrl_eff.parallel.codec import Blocks

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ZeroLevel:
    """Settings of one level.

    Attributes:
        name: of the level.
        weight_bits: of gathered weights: 8 or 4, quantized in blocks; 16, bfloat16; 32, exact.
        grad_bits: of gradients on the slow axis, likewise.
        slow_only: sum gradients over the fast axis in `ZeroConfig.fast_bits`, exactly by default,
            so that they are quantized once; otherwise they are quantized before both exchanges.
        hadamard: rotate blocks of gradients by a Hadamard matrix.
        feedback: error feedback: add the quantization residual to the next gradient.
        secondary: keep a secondary copy of the weights, sharded over the fast axis, from the
            forward to the backward pass, whose gather then sends nothing over the slow axis.
        delta_bits: if not 0, send weights on the slow axis as differences, in this many bits, from
            a copy that every node keeps between steps; 0: no persistent copy. The copy has the
            precision of `weight_bits`, 16 or 32, which then applies to the fast axis only.
    """

    name: str
    weight_bits: int
    grad_bits: int
    slow_only: bool = True
    hadamard: bool = False
    feedback: bool = False
    secondary: bool = False
    delta_bits: int = 0


# In order of decreasing bytes on the slow axis, then on the fast one.
LADDER = (
    ZeroLevel("exact", 16, 16),
    ZeroLevel("int8", 8, 8, secondary=True),
    ZeroLevel("int4", 8, 4, hadamard=True, feedback=True, secondary=True),
    ZeroLevel("qgz", 8, 4, slow_only=False, secondary=True),
    ZeroLevel("int4_delta", 16, 4, hadamard=True, feedback=True, secondary=True, delta_bits=4),
)


@dataclasses.dataclass(frozen=True)
class ZeroConfig:
    """A level applied to a mesh with a slow and a fast axis.

    Attributes:
        rung: the level.
        slow: name of the outer mesh axis, across nodes or slices, with slow links.
        fast: name of the inner mesh axis, over the devices of a node.
        block: maximum number of elements that share a scale.
        shrink: as in `Blocks`, for gradients.
        fast_bits: of gradients on the fast axis if the level quantizes on the slow axis only.
        dtype: of gathered weights.
        copies: name of a mesh axis over which weights are replicated and rows are sharded;
            gradients are summed over it exactly before they cross the slow axis. "": none.
        nodes: requested size of the slow axis; 0: any.

    Raises:
        ValueError: one name for both axes, bits or a block that `Blocks` rejects, another dtype,
            or differences from a copy that is quantized in blocks.
    """

    rung: ZeroLevel = LADDER[0]
    slow: str = "dcn"
    fast: str = "ici"
    block: int = 256
    shrink: tuple[float, ...] = (1.0,)
    fast_bits: int = 32
    dtype: str = "float32"
    copies: str = ""
    nodes: int = 0

    def __post_init__(self):
        if self.slow == self.fast:
            raise ValueError(f"slow and fast are both {self.slow!r}; they must be two mesh axes.")
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}; expected one of {[*DTYPES]}.")
        assert self.weights and self.gradients and self.fast_gradients
        if self.deltas is not None and not self.weights.exact:
            raise ValueError(
                f"delta_bits is {self.rung.delta_bits} with weight_bits={self.rung.weight_bits}, "
                "but differences are from a copy in 16 or 32 bits."
            )

    @property
    def weights(self) -> Blocks:
        """Encoding of weights on both axes, or with `deltas` on the fast one only."""
        return Blocks(self.rung.weight_bits, self.block)

    @property
    def deltas(self) -> Blocks | None:
        """Encoding of weight differences on the slow axis; None: weights are sent in full."""
        return Blocks(self.rung.delta_bits, self.block) if self.rung.delta_bits else None

    @property
    def gradients(self) -> Blocks:
        """Encoding of gradients on the slow axis."""
        return Blocks(self.rung.grad_bits, self.block, self.rung.hadamard, self.shrink)

    @property
    def fast_gradients(self) -> Blocks:
        """Encoding of gradients on the fast axis."""
        return Blocks(self.fast_bits, self.block) if self.rung.slow_only else self.gradients


def zero_level(name: str) -> ZeroLevel:
    """Level with this name.

    Raises:
        ValueError: the name is unknown.
    """
    for one in LADDER:
        if one.name == name:
            return one
    raise ValueError(f"unknown level {name!r}; expected one of {[level.name for level in LADDER]}.")

"""How roughly sharded weights and gradients travel: a ladder of choices, as plain data."""

import dataclasses

from jaxrl_eff.parallel.codec import Blocks

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ZeroLevel:
    """One choice of what is sent.

    Attributes:
        name: of the rung.
        weight_bits: of gathered weights: 8 or 4 in blocks, 16 as bfloat16, 32 as they are.
        grad_bits: of gradients on the slow axis, likewise.
        slow_only: whether gradients are first summed exactly over the fast axis, so that they are
            rounded once; otherwise they are rounded before both exchanges.
        hadamard: whether blocks of gradients are rotated.
        feedback: whether what rounding left over is added to the next gradient.
        secondary: whether a copy of the weights stays within the fast axis from the forward to the
            backward pass, which then sends nothing over the slow axis to gather.
        delta_bits: of weights on the slow axis, likewise, if their differences from a copy that
            every node keeps from step to step are sent; 0: no copy lasts. The copy has the
            precision of `weight_bits`, 16 or 32, which is then that of the fast axis alone.
    """

    name: str
    weight_bits: int
    grad_bits: int
    slow_only: bool = True
    hadamard: bool = False
    feedback: bool = False
    secondary: bool = False
    delta_bits: int = 0


# By bytes on the slow axis, and on the fast one, the most first.
LADDER = (
    ZeroLevel("exact", 16, 16),
    ZeroLevel("int8", 8, 8, secondary=True),
    ZeroLevel("int4", 8, 4, hadamard=True, feedback=True, secondary=True),
    ZeroLevel("qgz", 8, 4, slow_only=False, secondary=True),
    ZeroLevel("int4_delta", 16, 4, hadamard=True, feedback=True, secondary=True, delta_bits=4),
)


@dataclasses.dataclass(frozen=True)
class ZeroConfig:
    """A rung on a mesh of two axes.

    Attributes:
        rung: what is sent.
        slow: name of the mesh axis with the slow links, the outer one: of nodes or slices.
        fast: name of the inner one, of the devices of a node.
        block: elements that share a scale, at most.
        shrink: as of `Blocks`, for gradients.
        fast_bits: of gradients on the fast axis where the rung rounds on the slow one only.
        dtype: of gathered weights.
        copies: name of a mesh axis along which weights are repeated and rows are not; gradients
            are summed over it exactly, before they cross the slow axis. "": there is none.
        nodes: devices of the slow axis that are wanted; 0: any.

    Raises:
        ValueError: one name for both axes, bits or a block that `Blocks` refuses, another dtype,
            or differences from a copy in blocks.
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
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of {list(DTYPES)}.")
        assert self.weights and self.gradients and self.fast_gradients
        if self.deltas is not None and not self.weights.exact:
            raise ValueError(
                f"delta_bits is {self.rung.delta_bits} with weight_bits={self.rung.weight_bits}, "
                "but differences are from a copy in 16 or 32 bits."
            )

    @property
    def weights(self) -> Blocks:
        """How weights travel, on both axes; with `deltas` on the fast one."""
        return Blocks(self.rung.weight_bits, self.block)

    @property
    def deltas(self) -> Blocks | None:
        """How differences of weights travel on the slow axis; None: weights themselves do."""
        return Blocks(self.rung.delta_bits, self.block) if self.rung.delta_bits else None

    @property
    def gradients(self) -> Blocks:
        """How gradients travel on the slow axis."""
        return Blocks(self.rung.grad_bits, self.block, self.rung.hadamard, self.shrink)

    @property
    def fast_gradients(self) -> Blocks:
        """How gradients travel on the fast axis."""
        return Blocks(self.fast_bits, self.block) if self.rung.slow_only else self.gradients


def zero_level(name: str) -> ZeroLevel:
    """The rung of this name.

    Raises:
        ValueError: there is none.
    """
    for one in LADDER:
        if one.name == name:
            return one
    raise ValueError(f"there is no rung {name!r}; there are {[r.name for r in LADDER]}.")

"""Transfer of weights in 8 or 4 bits: block codes and scales are sent instead of weights.

A `RoundedRoute` gives every receiver `decode(encode(x))`, whether or not anything has to move, so
that a call which reads rounded weights computes the same numbers on any devices. For that,

- blocks depend on a tensor's shape alone: each is consecutive numbers in row-major order;
- nothing is kept between calls: no residuals, no earlier values;
- a scale is the largest magnitude of its block over the largest code, rounded up to bfloat16. There
  is no rotation or search for a better scale, whose sums depend on how they are compiled, and no
  division that compilers replace by a product;
- a code times its scale has at most 15 bits of mantissa, so that decoding is exact in float32.

Encoded tensors are sharded like the tensors, except along a dimension whose blocks do not divide.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_eff.parallel import global_arrays
from jaxrl_eff.parallel.codec import BITS, SCALE_BYTES, Blocks, decode, encode
from jaxrl_eff.parallel.reshard.layout import Network
from jaxrl_eff.parallel.reshard.route import Report, Route

LEAST, MOST = 64, 128  # numbers that share a scale; fewer in small tensors
WAYS = 64  # shards that blocks should divide by


def sent_bytes(precision: str) -> float:
    """Bytes that a rounded number takes when it is sent, with its share of a scale, at most."""
    return BITS[precision] / 8 + SCALE_BYTES / LEAST


class Pieces(NamedTuple):
    """A tensor as vectors that are encoded one by one: [*leading, count, length].

    Attributes:
        axis: number of leading dimensions; `count` vectors divide the next one.
        count, length: vectors, and numbers of each, which include all later dimensions.
    """

    axis: int
    count: int
    length: int

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> "Pieces":
        """Cuts a dimension into 64 to 128 numbers, the last one unless it is smaller.

        Of the sizes that divide it, the one whose count divides by the most shards, up to 64, and
        then the largest. Where none divides it, vectors are not cut, and the codec makes blocks.
        """
        axis, inner = len(shape) - 1, 1
        while axis > 0 and shape[axis] * inner < LEAST:
            inner *= shape[axis]
            axis -= 1
        n = shape[axis]
        fits = [m for m in range(1, n + 1) if n % m == 0 and LEAST <= m * inner <= MOST]
        size = max(fits, key=lambda m: (math.gcd(n // m, WAYS), m), default=n)
        return cls(axis, n // size, size * inner)

    def encoded(self, x: jax.Array, blocks: Blocks) -> jax.Array:
        """Encodes a tensor: uint8 [*leading, count, bytes of a vector]."""
        return encode(x.reshape(*x.shape[: self.axis], self.count, self.length), blocks)

    def placed(self, x: Any, sharding: NamedSharding, blocks: Blocks) -> jax.ShapeDtypeStruct:
        """Shape and sharding of an encoded tensor, in the devices' default memory."""
        spec = (*sharding.spec, *[None] * len(x.shape))[: self.axis + 1]
        names = spec[-1] if isinstance(spec[-1], tuple) else (spec[-1],) if spec[-1] else ()
        if self.count % math.prod(sharding.mesh.shape[a] for a in names):
            spec = (*spec[:-1], None)
        shape = (*x.shape[: self.axis], self.count, blocks.nbytes(self.length))
        return jax.ShapeDtypeStruct(
            shape, "uint8", sharding=NamedSharding(sharding.mesh, PartitionSpec(*spec))
        )


class RoundedRoute:
    """`Route` of a tree whose large tensors are rounded.

    Args:
        source: tree of arrays or `jax.ShapeDtypeStruct`s with `NamedSharding`s.
        target: tree of `NamedSharding`s.
        rounded: tree of bools; other arrays are sent as they are.
        precision: "int8" or "int4".
        network: as for `Route`.

    Attributes:
        alias: False, since the result is never the source itself.
    """

    alias = False

    def __init__(
        self,
        source: Any,
        target: Any,
        *,
        rounded: Any,
        precision: str,
        network: Network | None = None,
    ):
        leaves, self._treedef = jax.tree.flatten(source)
        targets = self._treedef.flatten_up_to(target)
        self._rounded = self._treedef.flatten_up_to(rounded)
        blocks = Blocks(BITS[precision], MOST)
        cuts = [Pieces.of(x.shape) for x in self._picked(leaves)]
        ends = [self._picked([x.sharding for x in leaves]), self._picked(targets)]
        codes, there = (
            [
                c.placed(x, s, blocks)
                for c, x, s in zip(cuts, self._picked(leaves), end, strict=True)
            ]
            for end in ends
        )
        self._source, self._codes = self._picked(leaves), codes
        self._sent = there
        self._target = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
            for x, s in zip(self._picked(leaves), ends[1], strict=True)
        ]
        self._route = Route(
            self._with(leaves, codes), self._with(targets, [x.sharding for x in there]),
            network=network,
        )  # fmt: skip
        self._encode = jax.jit(
            functools.partial(_encode, cuts, blocks), out_shardings=[x.sharding for x in codes]
        )
        self._decode = jax.jit(
            functools.partial(_decode, cuts, blocks, self._target), out_shardings=ends[1]
        )

    def report(self) -> Report:
        """Report on what is sent: codes, scales, and the other arrays."""
        return self._route.report()

    def compile(self) -> "RoundedRoute":
        """Compiles the programs of a call in advance."""
        self._route.compile()
        if _here(self._source):
            self._encode = self._encode.lower(self._source).compile()
        if _here(self._sent):
            self._decode = self._decode.lower(self._sent).compile()
        return self

    def __call__(self, tree: Any) -> Any:
        """Moves and rounds the tree; returns without blocking, as `Route` does."""
        leaves, codes = self._treedef.flatten_up_to(tree), self._codes
        if _here(self._source):
            codes = self._encode(self._picked(leaves))
        moved = self._route(self._with(leaves, codes))
        if _here(self._sent):
            weights = self._decode(self._picked(moved))
        else:
            weights = [global_arrays.placeholder(x) for x in self._target]
        return self._treedef.unflatten(self._with(moved, weights))

    def _picked(self, leaves: Sequence[Any]) -> list[Any]:
        return [x for x, r in zip(leaves, self._rounded, strict=True) if r]

    def _with(self, leaves: Sequence[Any], picked: Sequence[Any]) -> list[Any]:
        """Returns the leaves with those that are rounded replaced."""
        new = iter(picked)
        return [next(new) if r else x for x, r in zip(leaves, self._rounded, strict=True)]


def _encode(cuts: list[Pieces], blocks: Blocks, leaves: list[jax.Array]) -> list[jax.Array]:
    leaves = jax.device_put(leaves, jax.memory.Space.Device)  # from the host's, if offloaded
    return [c.encoded(x, blocks) for c, x in zip(cuts, leaves, strict=True)]


def _decode(
    cuts: list[Pieces], blocks: Blocks, like: list[Any], codes: list[jax.Array]
) -> list[jax.Array]:
    return [
        decode(x, c.length, blocks, y.dtype).reshape(y.shape)
        for c, x, y in zip(cuts, codes, like, strict=True)
    ]


def _here(arrays: list[Any]) -> bool:
    """Returns True if this process has a device of the arrays."""
    return bool(arrays) and global_arrays.here(arrays[0].sharding)

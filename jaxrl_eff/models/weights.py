"""Weights, which may stand where a parameter stands: arrays that are made when they are used.

A `Weight` is a registered pytree in a parameter tree, in place of an array: a shard that is
all-gathered (`parallel.zero.weights`), an array in host memory (`parallel.offload`). A `Kernel`
stands in place of a projection's kernel and defines the product with it: codes and scales, low-rank
and sparse changes (`peft.weights`). Kernels are built around arrays or other weights, so that every
combination of these works without the model knowing any.

Layers are the first axis of their arrays, so scanning, slicing and moving them work as for any
parameter. `materialize` and `matmul` are of one layer.
"""

from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax

from jaxrl_eff.models.products import product
from jaxrl_eff.types import Array, Float, PyTree


@runtime_checkable
class Weight(Protocol):
    """A stand-in for an array of parameters.

    One that makes a copy at every use, by communication or from codes, has an attribute `transient`
    that is True: a backward pass should make the copy again instead of keeping it.
    """

    def materialize(self) -> Array:
        """Returns the array."""


@runtime_checkable
class Kernel(Weight, Protocol):
    """A stand-in for the kernel `[*inputs, *outputs]` of a projection."""

    def matmul(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        """Multiplies activations, with inputs and outputs flattened to D and F."""

    def prepared(self, dtype: Any) -> Any:
        """Returns an equal weight, or array, for many products with activations of this dtype.

        Of all layers at once.
        """


def array(x: Any, dtype: Any = None) -> Array:
    """Returns a parameter or the array that a weight stands for."""
    x = x.materialize() if isinstance(x, Weight) else x
    return x if dtype is None else x.astype(dtype)


def matrix(x: Any, rows: int, dtype: Any = None) -> Float[Array, "D F"]:
    """Returns a kernel with `rows` inputs as a matrix."""
    return array(x, dtype).reshape(rows, -1)


def matmul(x: Float[Array, "... D"], kernel: Any) -> Float[Array, "... F"]:
    """Multiplies activations by a kernel: an array or a weight."""
    if isinstance(kernel, Kernel):
        return kernel.matmul(x)
    return product(x, matrix(kernel, x.shape[-1], x.dtype))


def prepared(x: Any, dtype: Any) -> Any:
    """Returns a parameter for many products; casts arrays, does not fetch from elsewhere."""
    if isinstance(x, Kernel):
        return x.prepared(dtype)
    return x if isinstance(x, Weight) else x.astype(dtype)


def transient(params: PyTree) -> bool:
    """Returns True if parameters, or one of them, have a part that each use makes a copy of."""
    return any(map(_copies, jax.tree.leaves(params, is_leaf=_copies)))


def sharded(params: PyTree) -> bool:
    """Returns True if `gathered` would communicate."""
    remote = (x for x in jax.tree.leaves(params, is_leaf=_remote) if _remote(x))
    return any(map(_copies, remote))


def _copies(x: Any) -> bool:
    return getattr(x, "transient", False)


def _remote(x: Any) -> bool:
    return isinstance(x, Weight) and not isinstance(x, Kernel)


def gathered(params: PyTree) -> PyTree:
    """Returns parameters, or one of them, with all arrays on this device; codes stay codes."""
    return jax.tree.map(array, params, is_leaf=_remote)


def parameter(module: nn.Module, name: str, init: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Returns a module's parameter: a weight as it is, an array checked against `shape`."""
    value = module.get_variable("params", name)
    return value if isinstance(value, Weight) else module.param(name, init, shape, dtype)

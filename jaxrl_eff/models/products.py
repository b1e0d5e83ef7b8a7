"""Matrix products of activations with kernels."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrl_eff.types import Array, Float


def product(x: Float[Array, "... D"], matrix: Float[Array, "D F"], dtype=None) -> Array:
    """Computes x @ matrix, merging rows and time into one axis where possible.

    With two axes to sum over, the gradient of the matrix would first transpose both operands (50 %
    slower on CPUs). But a sharded axis must not be merged.
    """
    lead = x.shape[:-1]
    if not _is_sharded("length"):
        x = x.reshape(-1, x.shape[-1])
    widened = dtype is not None and dtype != x.dtype
    y = _widened(x, matrix, dtype) if widened else jnp.einsum("...d,df->...f", x, matrix)
    return y.reshape(*lead, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _widened(x: Float[Array, "... D"], matrix: Float[Array, "D F"], dtype) -> Array:
    """Computes x @ matrix, summed and returned in a wider dtype.

    Its gradient is rounded to the dtype of x before the products of the backward pass. These would
    otherwise have a wide and a narrow operand and run in the wide dtype, several times slower on
    matrix units.
    """
    return jnp.einsum("...d,df->...f", x, matrix, preferred_element_type=dtype)


def _widened_forward(x: Array, matrix: Array, dtype):
    return _widened(x, matrix, dtype), (x, matrix)


def _widened_backward(dtype, saved, g: Array):
    del dtype
    _, back = jax.vjp(functools.partial(jnp.einsum, "...d,df->...f"), *saved)
    return back(g.astype(saved[0].dtype))


_widened.defvjp(_widened_forward, _widened_backward)


def _is_sharded(name: str) -> bool:
    """Returns True if the current rules shard this logical axis over several devices."""
    axes = next((axes for key, axes in nn.get_logical_axis_rules() if key == name), None)
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return any(sizes.get(axis, 2) > 1 for axis in axes)

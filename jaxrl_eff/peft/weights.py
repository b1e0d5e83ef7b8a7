"""Kernels with adapters, and the leaves that store them.

    low rank     y = x W + s (x A) B                            LoRA, arXiv:2106.09685
                 s = alpha / r, or alpha / sqrt(r)              rsLoRA, arXiv:2312.03732
                 y = m (x W + s x A B) / |W + s A B|            DoRA, arXiv:2402.09353
    tapped       gradients of selected entries of W; or changes of these, added to W
    in turn      gradients of the layers that are being trained in full

A checkpoint, an optimizer and a plan know plain arrays: a projection's leaves, side by side in a
nested dict. `assembled` makes the weights that a model reads of them, around `kernel`, or around
the `Quantized` of `kernel_codes` and `kernel_scales`:

    lora_a, lora_b, lora_scale; dora                            LowRank
    tap, tap_index; delta, delta_index; probe_<score>           Tapped
    turn, whole                                                 InTurn
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_eff.models import LMConfig, logical_axes, weights
from jaxrl_eff.models.products import product
from jaxrl_eff.peft import gradient_taps, quantized
from jaxrl_eff.peft.lora import inputs_of
from jaxrl_eff.types import Array, Float, PyTree

PROBES = ("gradient", "fisher", "snip", "gallop")
_static = functools.partial(dataclasses.field, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """A kernel and the product of two low-rank matrices, added to it.

    Attributes:
        base: the kernel.
        a, b: `[*inputs, r]`, `[r, *outputs]`.
        scale: factor on their product.
        magnitude: DoRA's m, `[*outputs]`; None: LoRA.
        norm: |W + s A B| of every column if computed ahead, which is valid until W, A or B change.
    """

    base: Any
    a: Any
    b: Any
    scale: Any
    magnitude: Any = None
    norm: Any = None

    def matmul(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        base = self.base if self.magnitude is None else weights.gathered(self.base)  # used twice
        a, b = self._matrices(x.dtype)
        y = weights.matmul(x, base)
        y = y + weights.array(self.scale, x.dtype) * product(product(x, a), b)
        if self.magnitude is None:
            return y
        norm = self.norm
        if norm is None:
            norm = self._column_norm(weights.matrix(base, x.shape[-1], x.dtype))
        scaled = weights.array(self.magnitude).reshape(-1) / weights.array(norm)
        return y * scaled.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))

    def materialize(self) -> Array:
        """Returns the merged kernel, summed in float32 and rounded to the base's dtype once."""
        base = weights.array(self.base)
        a, b = self._matrices(jnp.float32)
        matrix = base.reshape(a.shape[0], b.shape[1])
        whole = matrix.astype(jnp.float32) + weights.array(self.scale) * (a @ b)
        if self.magnitude is not None:
            size = weights.array(self.magnitude).reshape(-1) / self._column_norm(matrix)
            whole = whole * size[None]
        return whole.astype(base.dtype).reshape(base.shape)

    def prepared(self, dtype: Any) -> "LowRank":
        """Computes DoRA's norms; small matrices are as fast beside the kernel."""
        ready = dataclasses.replace(self, base=weights.prepared(self.base, dtype))
        if self.magnitude is None:
            return ready

        def norm(layer: LowRank) -> Array:
            return layer._column_norm(weights.matrix(layer.base, layer._rows, dtype))

        return dataclasses.replace(ready, norm=jax.lax.map(norm, ready))

    @property
    def _rows(self) -> int:
        return math.prod(weights.array(self.a).shape[:-1])

    def _matrices(self, dtype: Any) -> tuple[Float[Array, "D r"], Float[Array, "r F"]]:
        a, b = weights.array(self.a, dtype), weights.array(self.b, dtype)
        return a.reshape(-1, a.shape[-1]), b.reshape(b.shape[0], -1)

    def _column_norm(self, matrix: Float[Array, "D F"]) -> Float[Array, "F"]:
        """Computes |W + s A B| of every column, float32, without a gradient (DoRA, Sec. 4.3)."""
        a, b = self._matrices(jnp.float32)
        whole = matrix.astype(jnp.float32) + weights.array(self.scale) * (a @ b)
        return jax.lax.stop_gradient(jnp.sqrt(jnp.sum(jnp.square(whole), axis=0)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tapped:
    """A kernel whose gradient is that of selected entries, see `gradient_taps`.

    Attributes:
        base: the kernel.
        values: what receives the gradient, with one number per entry; zeros, or with `overlay`
            changes that are added to the kernel.
        index: the entries.
        probes: a selector of gradients -> zeros that receive its result; at most one.
        axes: logical axes of the kernel of one layer.
        overlay: see `values`.
    """

    base: Any
    values: Any
    index: Any
    probes: dict[str, Any]
    axes: tuple[str | None, ...] = _static()
    overlay: bool = _static()

    def matmul(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        values, index = weights.array(self.values), weights.array(self.index)
        rows, length = x.shape[:2] if x.ndim == 3 else (x.shape[0], 1)
        columns = self.axes[inputs_of(self.axes)]
        return gradient_taps.tapped(
            x, weights.matrix(self.base, x.shape[-1], x.dtype), values, index,
            place=gradient_taps.place_of(rows, length, self.axes[0], columns, index.shape[:2]),
            overlay=self.overlay, probe=next(iter(self.probes.items()), None),
        )  # fmt: skip

    def materialize(self) -> Array:
        """Returns the kernel with the changes of an overlay, added in float32."""
        kernel = weights.array(self.base)
        if self.overlay:
            values, index = weights.array(self.values), weights.array(self.index)
            matrix = kernel.reshape(math.prod(kernel.shape[: inputs_of(self.axes)]), -1)
            t = gradient_taps.tiling_of(matrix.shape, values, index)
            kernel = gradient_taps.with_delta(t, matrix, values, index).reshape(kernel.shape)
        return kernel

    def prepared(self, dtype: Any) -> Any:
        """Adds an overlay to an array once; codes and arrays in host memory keep it beside them."""
        ready = dataclasses.replace(self, base=weights.prepared(self.base, dtype))
        if not self.overlay or isinstance(ready.base, weights.Weight):
            return ready
        return jax.lax.map(Tapped.materialize, ready)


class Shared:
    """An array that loops over layers close over, in a weight whose other arrays they slice.

    A pytree without leaves.
    """

    def __init__(self, value: Array):
        self.value = value


jax.tree_util.register_pytree_node(Shared, lambda x: ((), x), lambda x, _: x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InTurn:
    """A kernel of layers of which a few are being trained in full.

    Attributes:
        base: the kernel.
        turn: index among the trained layers; their number if the layer is not one of them.
        whole: what receives the gradients of the trained layers, `[n, *inputs, *outputs]`.
    """

    base: Any
    turn: Any
    whole: Shared

    def matmul(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        matrix = weights.matrix(self.base, x.shape[-1], x.dtype)
        whole = self.whole.value.reshape(-1, *matrix.shape)
        return gradient_taps.in_turn(x, matrix, whole, weights.array(self.turn))

    def materialize(self) -> Array:
        return weights.array(self.base)

    def prepared(self, dtype: Any) -> Any:
        return weights.prepared(self.base, dtype)


ADAPTERS = (LowRank, Tapped, InTurn)


def assembled(cfg: LMConfig, params: PyTree) -> PyTree:
    """Returns stored parameters, stacked, as the model reads them: with weights as kernels.

    Leaves can also be shapes or shardings.
    """
    return _assembled(params, logical_axes(cfg))


def _assembled(node: PyTree, axes: PyTree) -> PyTree:
    if isinstance(axes.get("kernel"), tuple):
        return _projection(node, axes["kernel"][1:]) if {*node} - {*axes} else node
    inner = {k: _assembled(v, axes[k]) for k, v in node.items() if isinstance(axes.get(k), dict)}
    return {**node, **inner}


def _projection(leaves: dict[str, Any], axes: tuple[str | None, ...]) -> dict[str, Any]:
    rest = dict(leaves)
    if "kernel_codes" in rest:
        kernel = quantized.Quantized(*(rest.pop(k) for k in quantized.LEAVES), axes)
    else:
        kernel = rest.pop("kernel")
    for name in ("tap", "delta"):
        if name in rest:
            probes = {k: rest.pop(f"probe_{k}") for k in PROBES if f"probe_{k}" in rest}
            values, index = rest.pop(name), rest.pop(f"{name}_index")
            kernel = Tapped(kernel, values, index, probes, axes, overlay=name == "delta")
    if "turn" in rest:
        kernel = InTurn(kernel, rest.pop("turn"), Shared(rest.pop("whole")))
    if "lora_a" in rest:
        factors = (rest.pop(f"lora_{k}") for k in ("a", "b", "scale"))
        kernel = LowRank(kernel, *factors, magnitude=rest.pop("dora", None))
    return {"kernel": kernel, **rest}


def base(params: PyTree) -> PyTree:
    """Returns assembled parameters without adapters: the model before training, if kernels stay.

    This is the reference policy of a model with LoRA or an overlay, using the same arrays.
    """

    def one(x: Any) -> Any:
        while isinstance(x, ADAPTERS):
            x = x.base
        return x

    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, weights.Weight))


def merged(cfg: LMConfig, params: PyTree) -> PyTree:
    """Merges the adapters of stored parameters into the kernels and returns plain parameters.

    Sums are float32 and rounded once. Quantized kernels are dequantized, since the adapters were
    trained with these and not with the original kernels.
    """

    def one(x: Any) -> Any:
        if not isinstance(x, weights.Kernel):
            return x
        return jax.lax.map(lambda layer: weights.array(layer, jnp.dtype(cfg.param_dtype)), x)

    is_weight = lambda x: isinstance(x, weights.Weight)  # noqa: E731
    return jax.tree.map(one, assembled(cfg, params), is_leaf=is_weight)

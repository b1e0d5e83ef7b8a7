"""Adapters in a model's parameter tree: their shapes, initial values, merging and removal."""

import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_eff import tree
from jaxrl_eff.models.config import LMConfig
from jaxrl_eff.models.params import abstract, logical_axes
from jaxrl_eff.peft import gradient_taps, products, quantized
from jaxrl_eff.types import Array, Key, PyTree

TARGETS = ("layers/attn/[qkvo]/kernel", "layers/mlp/(gate|up|down)/kernel")
METHODS = ("lora", "rslora", "dora")


def inputs_of(axes: tuple[str | None, ...]) -> int:
    """Returns the number of contracted axes of a layer's kernel: up to, or all but, `embed`."""
    return 1 if axes[0] == "embed" else axes.index("embed")


def targets(cfg: LMConfig, patterns: Iterable[str] = TARGETS) -> dict[str, tuple[str | None, ...]]:
    """Returns the kernels of the layers' projections with matching names: name -> logical axes.

    Raises:
        ValueError: a pattern matches no projection.
    """
    leaf = lambda x: isinstance(x, tuple)  # noqa: E731
    able = {
        tree.path_name(path): axes
        for path, axes in jax.tree_util.tree_leaves_with_path(logical_axes(cfg), is_leaf=leaf)
        if axes[0] == "layers" and tree.path_name(path).endswith("/kernel")
    }
    chosen = {}
    for pattern in patterns:
        found = {k: v for k, v in able.items() if re.fullmatch(pattern, k)}
        if not found:
            raise ValueError(f"target {pattern!r} matches no projection; there are {sorted(able)}.")
        chosen |= found
    return {k: chosen[k] for k in able if k in chosen}


def lora_shapes(
    cfg: LMConfig, rank: int, patterns: Iterable[str] = TARGETS, *, dora: bool = False
) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, tuple[str | None, ...]]]:
    """Returns shapes (float32) and logical axes of LoRA's leaves, by name.

    Raises:
        ValueError: the rank is below 1 or above a kernel's smaller side.
    """
    flat = tree.flat(abstract(cfg))
    found: dict[str, jax.ShapeDtypeStruct] = {}
    names: dict[str, tuple[str | None, ...]] = {}

    def add(name: str, shape: tuple[int, ...], logical: tuple[str | None, ...]) -> None:
        found[name], names[name] = jax.ShapeDtypeStruct(shape, jnp.float32), logical

    for name, logical in targets(cfg, patterns).items():
        base, n = name.removesuffix("kernel"), inputs_of(logical[1:])
        (layers, *shape), logical = flat[name].shape, logical[1:]
        smaller = min(math.prod(shape[:n]), math.prod(shape[n:]))
        if not 1 <= rank <= smaller:
            raise ValueError(f"rank is {rank}, but for {name!r} it must be within 1 and {smaller}.")
        add(f"{base}lora_a", (layers, *shape[:n], rank), ("layers", *logical[:n], None))
        add(f"{base}lora_b", (layers, rank, *shape[n:]), ("layers", None, *logical[n:]))
        add(f"{base}lora_scale", (layers,), ("layers",))
        if dora:
            add(f"{base}dora", (layers, *shape[n:]), ("layers", *logical[n:]))
    return found, names


def lora_scale(method: str, alpha: float, rank: int) -> float:
    """Returns the factor on A B: alpha / r, and for "rslora" alpha / sqrt(r)."""
    if method not in METHODS:
        raise ValueError(f"the method is {method!r}; there are {list(METHODS)}.")
    return alpha / (rank**0.5 if method == "rslora" else rank)


def lora_init(
    params: PyTree, like: Mapping[str, Any], key: Key[Array, ""], scale: float
) -> dict[str, Array]:
    """Initializes LoRA's leaves: A uniform as in PEFT, B zero, DoRA's magnitude |W|.

    A is uniform within +-1/sqrt(D), where D is its number of rows (Kaiming with a = sqrt(5)).
    """
    out, kernels = {}, tree.flat(params)
    for i, (name, shape) in enumerate(like.items()):
        last = name.rpartition("/")[2]
        if last == "lora_a":
            bound = math.prod(shape.shape[1:-1]) ** -0.5
            this = jax.random.fold_in(key, i)
            out[name] = jax.random.uniform(this, shape.shape, jnp.float32, -bound, bound)
        elif last == "lora_scale":
            out[name] = jnp.full(shape.shape, scale, jnp.float32)
        elif last == "dora":
            kernel = kernels[name.removesuffix(last) + "kernel"].astype(jnp.float32)
            inner = tuple(range(1, 1 + kernel.ndim - len(shape.shape)))
            out[name] = jnp.sqrt(jnp.sum(jnp.square(kernel), axis=inner))
        else:
            out[name] = jnp.zeros(shape.shape, jnp.float32)
    return out


def base(params: PyTree) -> PyTree:
    """Returns the parameters without adapters: the model before training, if kernels are frozen.

    This is the reference policy of a model with LoRA or an overlay, using the same arrays.
    """
    return tree.without(params, lambda name: name.rpartition("/")[2] in products.LEAVES)


def merge(cfg: LMConfig, params: PyTree, *, low_rank: bool = True) -> PyTree:
    """Merges the adapters into the kernels and returns plain parameters.

    Sums are float32 and rounded once to the kernel's dtype. Gradient taps are not part of a model
    and must be absent. Quantized kernels are dequantized, since the adapters were trained with
    these and not with the original kernels.

    Args:
        low_rank: False keeps LoRA beside the kernels and merges only sparse overlays; quantized
            kernels then keep both beside them.
    """
    flat, merged, gone = tree.flat(params), {}, set()
    few_bits = quantized.kernels(params)
    for name, axes in targets(cfg, (".*",)).items():
        parent = name.removesuffix("kernel")
        wanted = products.LEAVES if low_rank else ("delta", "delta_index")
        leaves = {k: flat[parent + k] for k in wanted if parent + k in flat}
        if name in few_bits:
            if not low_rank:
                continue
            gone |= {parent + k for k in quantized.LEAVES}
        gone |= {parent + k for k in leaves}
        if leaves or name in few_bits:
            n, dtype = inputs_of(axes[1:]), jnp.dtype(cfg.param_dtype)
            run = functools.partial(_merged, n, dtype)
            merged[name] = jax.lax.map(run, (few_bits.get(name, flat.get(name)), leaves))
    return tree.with_leaves(tree.without(params, gone.__contains__), merged)


def with_norms(cfg: LMConfig, params: PyTree) -> PyTree:
    """Returns the parameters with DoRA's norms beside the kernels, computed once for many products.

    They become invalid when a kernel or an adapter changes, so they are only for models that are
    not being trained: `dora_norm`, float32 `[L, F]`.
    """
    flat, few_bits, norms = tree.flat(params), quantized.kernels(params), {}
    for name, axes in targets(cfg, (".*",)).items():
        parent = name.removesuffix("kernel")
        if parent + "dora" in flat:
            leaves = {k: flat[parent + k] for k in ("lora_a", "lora_b", "lora_scale")}
            run = functools.partial(_norm, inputs_of(axes[1:]), jnp.dtype(cfg.dtype))
            kept = few_bits.get(name, flat.get(name))
            norms[parent + "dora_norm"] = jax.lax.map(run, (kept, leaves))
    return tree.with_leaves(params, norms)


def _norm(inputs: int, dtype: jnp.dtype, pair: tuple[Any, Mapping[str, Array]]) -> Array:
    """Computes the norm of one layer's kernel as used in products, in the compute dtype."""
    kernel, leaves = pair
    kernel = quantized.dequantize(kernel, dtype) if isinstance(kernel, dict) else kernel
    matrix = kernel.astype(dtype).reshape(math.prod(kernel.shape[:inputs]), -1)
    return products.column_norm(leaves, matrix)


def _merged(inputs: int, dtype: jnp.dtype, pair: tuple[Any, Mapping[str, Array]]) -> Array:
    """Merges one layer's kernel, with `inputs` contracted axes, and its adapters.

    `dtype` is the result's dtype if the kernel is quantized.
    """
    kernel, leaves = pair
    if isinstance(kernel, dict):
        kernel = quantized.dequantize(kernel, jnp.float32)
    else:
        dtype = kernel.dtype
    matrix = kernel.reshape(math.prod(kernel.shape[:inputs]), -1)
    if "delta" in leaves:
        index = leaves["delta_index"]
        t = gradient_taps.tiling_of(matrix.shape, leaves["delta"], index)
        matrix = gradient_taps.with_delta(t, matrix, leaves["delta"], index)
    if "lora_a" in leaves:
        whole = matrix.astype(jnp.float32) + products.change(leaves, matrix)
        if "dora" in leaves:
            size = leaves["dora"].reshape(-1) / products.column_norm(leaves, matrix)
            whole = whole * size[None]
        matrix = whole
    return matrix.astype(dtype).reshape(kernel.shape)

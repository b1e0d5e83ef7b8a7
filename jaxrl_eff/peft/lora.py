"""LoRA of a model's projections: which, with which leaves, and their initial values."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_eff import tree
from jaxrl_eff.models.config import LMConfig
from jaxrl_eff.models.params import abstract, logical_axes
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
            raise ValueError(
                f"unknown target {pattern!r}; expected one of {sorted(able)}, or a pattern."
            )
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
        raise ValueError(f"unknown method {method!r}; expected one of {list(METHODS)}.")
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

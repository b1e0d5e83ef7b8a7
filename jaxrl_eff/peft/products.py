"""Leaves stored beside a projection's kernel, and the products that they define.

    tap, tap_index        gradients of selected entries of the kernel    `gradient_taps`
    turn                  index among the layers trained in full         `gradient_taps.in_turn`
    probe_<score>         entries preferred by a score of the gradient
    delta, delta_index    sparse changes that are added to the kernel
    lora_a, lora_b,       y = x W + s (x A) B                            LoRA, arXiv:2106.09685
    lora_scale            s = alpha / r, or alpha / sqrt(r)              rsLoRA, arXiv:2312.03732
    dora                  y = m (x W + s x A B) / |W + s A B|            DoRA, arXiv:2402.09353
    dora_norm             |W + s A B|, precomputed for many products

A projection checks which leaves exist, so scanning, unstacking, moving between devices and saving
work on such trees as on any other; a kernel without such leaves is multiplied as usual.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxrl_eff.peft import gradient_taps
from jaxrl_eff.types import Array, Float

PROBES = ("probe_gradient", "probe_fisher", "probe_snip", "probe_gallop")
LEAVES = (
    "tap", "tap_index", "turn", *PROBES, "delta", "delta_index",
    "lora_a", "lora_b", "lora_scale", "dora", "dora_norm",
)  # fmt: skip


def product(
    leaves: Mapping[str, Array],
    x: Float[Array, "B T D"],
    matrix: Float[Array, "D F"],
    axes: tuple[str | None, str | None],
    plain: Callable[[Array, Array], Array],
    whole: Array | None = None,
) -> Float[Array, "B T F"]:
    """Multiplies x by a matrix and applies the leaves beside it.

    Args:
        axes: logical names of the matrix's rows and columns.
        plain: the product without leaves.
        whole: receives the gradients of layers trained in turn, `[n, ...]`.
    """
    found = next((k for k in ("tap", "delta") if k in leaves), None)
    if whole is not None:
        y = gradient_taps.in_turn(x, matrix, whole.reshape(-1, *matrix.shape), leaves["turn"])
    elif found is None:
        y = plain(x, matrix)
    else:
        index = leaves[f"{found}_index"]
        probes = [(k.removeprefix("probe_"), leaves[k]) for k in PROBES if k in leaves]
        rows, length = x.shape[:2] if x.ndim == 3 else (x.shape[0], 1)
        y = gradient_taps.tapped(
            x, matrix, leaves[found], index, overlay=found == "delta",
            place=gradient_taps.place_of(rows, length, *axes, index.shape[:2]),
            probe=probes[0] if probes else None,
        )  # fmt: skip
    if "lora_a" not in leaves:
        return y
    a, b = low_rank(leaves, matrix)
    scale = leaves["lora_scale"].astype(x.dtype)
    y = y + scale * plain(plain(x, a.astype(x.dtype)), b.astype(x.dtype))
    if "dora" in leaves:
        norm = leaves.get("dora_norm")
        norm = column_norm(leaves, matrix) if norm is None else norm
        scaled = leaves["dora"].reshape(-1) / norm
        y = y * scaled.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
    return y


def low_rank(leaves: Mapping[str, Array], matrix: Array) -> tuple[Array, Array]:
    """Returns A `[D, r]` and B `[r, F]`."""
    rank = leaves["lora_b"].shape[0]
    return leaves["lora_a"].reshape(matrix.shape[0], rank), leaves["lora_b"].reshape(rank, -1)


def column_norm(leaves: Mapping[str, Array], matrix: Array) -> Float[Array, "F"]:
    """Computes |W + s A B| of every column, float32, without a gradient (DoRA, Sec. 4.3)."""
    whole = matrix.astype(jnp.float32) + change(leaves, matrix)
    return jax.lax.stop_gradient(jnp.sqrt(jnp.sum(jnp.square(whole), axis=0)))


def change(leaves: Mapping[str, Array], matrix: Array) -> Float[Array, "D F"]:
    """Computes s A B in float32."""
    a, b = (x.astype(jnp.float32) for x in low_rank(leaves, matrix))
    return leaves["lora_scale"] * (a @ b)

"""Sparse training for loops with dense gradients: it saves optimizer state, but not gradients."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrl_eff.optim.paths import path_name
from jaxrl_eff.optim.sparse.adapt import SparseAdapt, SparseState
from jaxrl_eff.optim.sparse.masks import Layout
from jaxrl_eff.optim.sparse.tiling import gather, per_shard


def dense_to_sparse(grads: Any, state: SparseState, layout: Layout) -> dict[str, jax.Array]:
    """The active entries of dense gradients, by name, as a tap would return them."""
    out = {}
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        name = path_name(path)
        if name in state.active:
            t = layout(name, g)
            out[name] = per_shard(partial(gather, t=t), t, "pt", "t")(g, state.active[name].index)
    return out


def from_dense(adapt: SparseAdapt) -> optax.GradientTransformation:
    """Wraps `adapt` as an ordinary optax transform from dense gradients to dense updates.

    It saves the memory of optimizer state, not of gradients; other entries get updates of 0. The
    updates are float32 differences to the new value. `optax.apply_updates` gives exactly that
    value, except that float32 parameters can differ by the rounding of the difference.
    """

    def update(grads: Any, state: SparseState, params: Any = None):
        if params is None:
            raise ValueError("sparse_adapt needs the parameters: update(grads, state, params).")
        taps = dense_to_sparse(grads, state, adapt.layout)
        updates, state = adapt.update(taps, state, params)
        new = adapt.apply(params, updates)
        wide = lambda x: x.astype(jnp.float32)  # noqa: E731
        return jax.tree.map(lambda a, b: wide(a) - wide(b), new, params), state

    return optax.GradientTransformation(adapt.init, update)

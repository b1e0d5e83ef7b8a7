"""Elementwise optax optimizers with separate state, counters included, for every unit.

Optax counts updates once for a whole tree. A unit that becomes active later has been updated less
often, and needs the bias correction of its own age: with Adam's b2 = 0.999 its first step would
otherwise be 3.2 times too long. `jax.vmap` over the units of an unchanged optimizer gives each a
counter, for every elementwise optimizer.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax


def per_entry(inner: optax.GradientTransformation, unit: int = 0) -> optax.GradientTransformation:
    """Applies `inner` separately per unit: per index of all axes except the last `unit` ones.

    See `check_elementwise` for the optimizers that this does not change.
    """

    def each(fn: Callable, like: jax.Array) -> Callable:
        for _ in range(like.ndim - unit):
            fn = jax.vmap(fn)
        return fn

    def init(params):
        return jax.tree.map(lambda x: each(inner.init, x)(x), params)

    def update(updates, state, params=None):
        leaves, structure = jax.tree.flatten(updates)
        states = structure.flatten_up_to(state)
        values = structure.flatten_up_to(params) if params is not None else [None] * len(leaves)
        out = []
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
            for g, s, p in zip(leaves, states, values, strict=True):
                if p is None:
                    out.append(each(lambda g, s: inner.update(g, s), g)(g, s))
                else:
                    out.append(each(inner.update, g)(g, s, p))
        new, after = zip(*out, strict=True) if out else ((), ())
        return jax.tree.unflatten(structure, new), jax.tree.unflatten(structure, after)

    return optax.GradientTransformation(init, update)


def check_elementwise(inner: optax.GradientTransformation) -> None:
    """Checks that three entries together are updated as each alone is.

    Raises:
        ValueError: the update of one entry depends on others.
    """
    g, p = np.array([1.0, -3.0, 0.1], np.float32), np.array([0.5, 2.0, -1.0], np.float32)

    @jax.jit
    def together(g, p):
        return inner.update(g, inner.init(p), p)[0]

    with jax.numpy_dtype_promotion("standard"), jax.ensure_compile_time_eval():
        whole = together(jnp.asarray(g), jnp.asarray(p))
        alone = jax.vmap(together)(jnp.asarray(g), jnp.asarray(p))
    if not np.allclose(whole, alone, rtol=1e-5, atol=1e-7):
        raise ValueError(
            "the inner optimizer is not elementwise: it updates three entries together by "
            f"{np.asarray(whole)} and each alone by {np.asarray(alone)}. Use e.g. adam, adamw, "
            "lion, rmsprop or sgd; clip by norm outside."
        )

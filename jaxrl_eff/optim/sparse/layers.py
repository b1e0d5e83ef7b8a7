"""Training of a few layers at a time: LISA (arXiv:2403.17919) with state for these layers only.

Every `every` steps other layers are drawn, uniformly. Moments of layers that are no longer trained
are not kept: the paper's runs restarted them at each interval, and keeping them would grow to the
state of all layers. A layer keeps its trained weights.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrl_eff.optim import mcf
from jaxrl_eff.optim.sparse.adapt import exact_value, rounded
from jaxrl_eff.optim.store import apart


class LayersState(NamedTuple):
    """State of `sampled_layers`."""

    count: Any  # int32[], updates done
    layers: Any  # int32[n], the layers being trained, ascending
    inner: Any  # the inner optimizer's state, for parameters [n, ...]
    remainder: Any  # name -> int16[n, ...] for bfloat16 parameters, () for float32


class SampledLayers(NamedTuple):
    """Functions that `sampled_layers` returns.

    Attributes:
        init: parameters `[L, ...]` by name -> state.
        update: (gradients `[n, ...]` of the trained layers by name, state, parameters) ->
            (new values `[n, ...]` by name, state).
        reselect: state -> state with newly drawn layers and without state of the old ones.
        read: (parameters, state) -> the trained layers' values `[n, ...]` by name.
        write: (parameters, state, values) -> parameters, in place where they are donated.
        due: step -> True if `reselect` is due before it.
    """

    init: Callable[[Mapping[str, Any]], LayersState]
    update: Callable[..., tuple[dict[str, Any], LayersState]]
    reselect: Callable[[LayersState], LayersState]
    read: Callable[[Mapping[str, Any], LayersState], dict[str, Any]]
    write: Callable[..., dict[str, Any]]
    due: Callable[[int], bool]


def sampled_layers(
    inner: optax.GradientTransformation,
    *,
    total: int,
    active: int,
    every: int,
    learning_rate: float | optax.Schedule = 1.0,
    seed: int = 0,
) -> SampledLayers:
    """Trains `active` of `total` layers by any optax optimizer, redrawn after `every` steps.

    Args:
        inner: receives float32 parameters `[n, ...]` by name.
        learning_rate: multiplies the inner updates, by count of all updates.

    Raises:
        ValueError: `active` is not within 1 and `total`, or `every` is below 1.
    """
    if not 1 <= active <= total:
        raise ValueError(f"{active} layers are trained at a time, but there are {total}.")
    if every < 1:
        raise ValueError(f"every is {every}, but must be at least 1.")

    def drawn(count: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), count)
        return jnp.sort(jax.random.permutation(key, total)[:active]).astype(jnp.int32)

    def fresh(values: Mapping[str, Any], count: jax.Array) -> LayersState:
        wide = {k: jnp.zeros(x.shape, jnp.float32) for k, x in values.items()}
        left = {k: rounded(wide[k], x.dtype)[1] for k, x in values.items()}
        return LayersState(count, drawn(count), inner.init(wide), left)

    def init(params: Mapping[str, Any]) -> LayersState:
        return apart(fresh({k: x[:active] for k, x in params.items()}, jnp.int32(0)), params)

    def read(params: Mapping[str, Any], state: LayersState) -> dict[str, Any]:
        return {k: x.at[state.layers].get(mode="clip") for k, x in params.items()}

    def update(grads: Mapping[str, Any], state: LayersState, params: Mapping[str, Any]):
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        seen = read(params, state)
        exact = {k: exact_value(x, state.remainder[k]) for k, x in seen.items()}
        wide = mcf.gradients({k: grads[k] for k in exact})
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
            changes, after = inner.update(wide, state.inner, exact)
        pairs = {
            k: rounded(exact[k] + jnp.float32(rate) * changes[k], x.dtype) for k, x in seen.items()
        }
        left = {k: r for k, (_, r) in pairs.items()}
        new = LayersState(state.count + 1, state.layers, after, left)
        return {k: v for k, (v, _) in pairs.items()}, new

    def reselect(state: LayersState) -> LayersState:
        start = jax.tree.map(jnp.zeros_like, (state.inner, state.remainder))
        return LayersState(state.count, drawn(state.count), *start)

    def write(params: Mapping[str, Any], state: LayersState, values: Mapping[str, Any]):
        at = {"unique_indices": True, "indices_are_sorted": True, "mode": "promise_in_bounds"}
        return {k: x.at[state.layers].set(values[k], **at) for k, x in params.items()}

    def due(step: int) -> bool:
        return step > 0 and step % every == 0

    return SampledLayers(init, update, reselect, read, write, due)

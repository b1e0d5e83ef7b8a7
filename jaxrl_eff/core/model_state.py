"""The state of models at home: made from parameters, and refreshed when these are replaced."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_eff import tree
from jaxrl_eff.core.shardings import Shardings
from jaxrl_eff.core.specs import Model
from jaxrl_eff.core.weight_sources import WeightSources
from jaxrl_eff.parallel import global_arrays


def initial(shardings: Shardings, weights: WeightSources, model: str, params: Any) -> Model:
    """Makes a model at home from its parameters: adds a fresh optimizer state.

    Args:
        params: arrays with the shardings of `Shardings.home(model).params`.
    """
    abstract, home = shardings.home(model), shardings.graph.home(model)
    if not shardings.trained(model):
        return Model(params, ())
    if shardings.here(home):
        where = jax.tree.map(lambda x: x.sharding, abstract.opt)
        with shardings.context(home):
            opt = jax.jit(shardings.specs[model].tx.init, out_shardings=where)(params)
        feedback = jax.tree.map(_zeros, abstract.error_feedback)
    else:
        absent = abstract.opt, abstract.error_feedback
        opt, feedback = jax.tree.map(global_arrays.placeholder, absent)
    stale = {
        c.name: tuple(copied(weights.route(c)(params)) for _ in range(c.staleness))
        for c in shardings.graph.stale(model)
    }
    return Model(params, opt, stale or (), feedback, node_copy(shardings, model, params))


def node_copy(shardings: Shardings, model: str, params: Any) -> Any:
    """Returns the nodes' copies of a model at home: its weights in a copy's precision."""
    abstract, home = shardings.home(model).node_copy, shardings.graph.home(model)
    if not abstract:
        return ()
    if not shardings.here(home):
        return jax.tree.map(global_arrays.placeholder, abstract)
    where = {name: x.sharding for name, x in abstract.items()}

    def cast(flat: Any) -> Any:
        return {k: flat[k].reshape(x.shape).astype(x.dtype) for k, x in abstract.items()}

    flat = tree.flat(params)
    return jax.jit(cast, out_shardings=where)({k: flat[k] for k in abstract})


def _zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(like.shape, like.dtype), out_shardings=like.sharding)()


@jax.jit
def copied(params: Any) -> Any:
    """Copies arrays, so that donation of the originals does not affect them."""
    return jax.tree.map(jnp.copy, params)

"""Conversion of float32 weights and moments to and from stored forms; sharded optimizer states.

An export, an evaluation or an average of weights needs what is stored, not what is visible; a
bfloat16 run can start from a float32 master, and return to one.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_eff.optim import codecs, mcf
from jaxrl_eff.optim.collage import VARIANTS, FaithfulState
from jaxrl_eff.optim.moments import (
    LowPrecisionAdamState,
    decode_moment,
    encode_moment,
    finite_moments,
)
from jaxrl_eff.optim.paths import path_name
from jaxrl_eff.optim.store import StoreState, apart, found, joined


class Master(NamedTuple):
    """An optimizer in float32: weights, Adam's moments, and the number of updates."""

    params: Any
    mu: Any
    nu: Any
    count: jax.Array


def full_precision_params(params: Any, opt_state: Any) -> Any:
    """float32 weights, from the visible ones and the parts that the optimizer's state keeps.

    Args:
        params: as the model sees them.
        opt_state: of `lowp_chain` or `collage_adamw`, alone or inside other optax transforms.

    Raises:
        ValueError: the state stores no weights, or stores them more than once.

    Example:
        >>> from jaxrl_eff import full_precision_params, lowp_chain
        >>> params, tx = jnp.ones(2, jnp.bfloat16), lowp_chain(optax.sgd(1e-4), store="int16")
        >>> updates, state = tx.update(jnp.ones_like(params), tx.init(params), params)
        >>> params = optax.apply_updates(params, updates)
        >>> float(params[0]), round(float(full_precision_params(params, state)[0]), 5)
        (1.0, 0.9999)
    """
    return joined(params, _store(opt_state).low)


def set_full_precision_params(
    params: Any, opt_state: Any, dtype: Any = jnp.bfloat16, *, like: Any = None
) -> tuple[Any, Any]:
    """Converts float32 weights to `(visible weights, state with the kept parts)`.

    Args:
        params: float32.
        opt_state: a state whose kept parts are replaced.
        dtype: of the visible weights that have a kept part.
        like: tree with the dtypes of the visible weights, used instead of `dtype`; without it,
            weights that have no kept part are unchanged.
    """
    state = _store(opt_state)
    leaves, treedef = jax.tree.flatten(params)
    lows = treedef.flatten_up_to(state.low)
    visible, kept = [], []
    likes = [None] * len(leaves) if like is None else treedef.flatten_up_to(like)
    for w, low, model in zip(leaves, lows, likes, strict=True):
        if isinstance(low, optax.MaskedNode):
            visible.append(w if model is None else mcf.store(mcf.load(w), model.dtype))
            kept.append(low)
            continue
        narrow = jnp.dtype(dtype if model is None else model.dtype)
        hi, rest = codecs.weight(codecs.kept_as(low.dtype)).start(mcf.load(w), narrow)
        visible.append(hi.astype(narrow))
        kept.append(rest)
    new = state._replace(low=treedef.unflatten(kept))

    def replaced(x: Any) -> Any:
        return new if _is_store(x) else x

    return treedef.unflatten(visible), jax.tree.map(replaced, opt_state, is_leaf=_is_store)


def from_master(
    tx: optax.GradientTransformation,
    master: Master,
    *,
    variant: str,
    dtype: Any = jnp.bfloat16,
    seed: int = 0,
) -> tuple[Any, Any]:
    """A float32 training state as `(params, opt_state)` of `tx`, a `collage_adamw` of this variant.

    Every number is as close to the master's as its codec allows; with "exact" equal.
    """
    _, mu, nu = VARIANTS[variant]
    params = jax.tree.map(lambda w: mcf.store(w, dtype), master.params)
    params, state = set_full_precision_params(master.params, tx.init(params), dtype)
    first, second = finite_moments(master.mu, master.nu)
    moments = LowPrecisionAdamState(
        jnp.asarray(master.count, jnp.int32),
        encode_moment(mu, "mu", first, master.count, seed),
        encode_moment(nu, "nu", second, master.count, seed),
    )

    def replaced(x: Any) -> Any:
        if isinstance(x, LowPrecisionAdamState):
            return moments
        if isinstance(x, StoreState):
            return x._replace(count=moments.count)
        if isinstance(x, optax.ScaleByScheduleState):
            return x._replace(count=moments.count)
        return x

    kinds = LowPrecisionAdamState | StoreState | optax.ScaleByScheduleState
    state = jax.tree.map(replaced, state, is_leaf=lambda x: isinstance(x, kinds))
    return params, apart(state, (params, master))


def to_master(params: Any, opt_state: Any, *, variant: str) -> Master:
    """The float32 training state that a `collage_adamw` state of this variant represents."""
    _, mu, nu = VARIANTS[variant]
    full = full_precision_params(params, opt_state)
    states = found(opt_state, LowPrecisionAdamState)
    if len(states) != 1:
        raise ValueError(f"the state has {len(states)} moments with codecs; there must be one.")
    (state,) = states
    return Master(
        full, decode_moment(mu, "mu", state.mu, full), decode_moment(nu, "nu", state.nu, full),
        state.count,
    )  # fmt: skip


def visible_change_mask(params: Any, updates: Any) -> Any:
    """Tree of booleans: True where `optax.apply_updates(params, updates)` will change a bit.

    These are exactly the weights to send to a remote sampler.
    """
    return jax.tree.map(lambda p, u: codecs.applied(p, u) != mcf.load(p), params, updates)


def state_shardings(state: Any, params: Any, *, otherwise: Any) -> Any:
    """Shardings for every array of an optimizer's state: that of the parameter it belongs to.

    The parameter's path is the end of the array's path in the state. Scales of groups have its
    sharding as well, if their shape divides.

    Args:
        state: tree of arrays or of `jax.ShapeDtypeStruct`.
        params: the same with shardings.
        otherwise: the sharding of all else, such as counts.
    """
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    place = {path_name(path): p for path, p in paths}

    def find(path: tuple, leaf: Any) -> Any:
        parts = path_name(path).split("/")
        for i in range(len(parts)):
            p = place.get("/".join(parts[i:]))
            if p is not None and _fits(p, leaf):
                return p.sharding
        return otherwise

    return jax.tree_util.tree_map_with_path(find, state)


def init_sharded(tx: optax.GradientTransformation, params: Any) -> Any:
    """Computes `tx.init(params)` as one program, with the state sharded like its parameters.

    `jax.jit(tx.init)(params)` would put all zeros on one device.
    """
    abstract = jax.eval_shape(tx.init, params)
    sharding = next(p.sharding for p in jax.tree.leaves(params))
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.jit(tx.init, out_shardings=state_shardings(abstract, params, otherwise=sharding))(
        params
    )


def _fits(p: Any, leaf: Any) -> bool:
    if p.shape == leaf.shape:
        return True
    if len(p.shape) != len(leaf.shape) or p.shape[:-1] != leaf.shape[:-1]:
        return False
    parts = np.asarray(p.shape) // np.maximum(p.sharding.shard_shape(p.shape), 1)
    return bool(leaf.shape[-1]) and all(n % k == 0 for n, k in zip(leaf.shape, parts, strict=True))


def _is_store(x: Any) -> bool:
    return isinstance(x, StoreState | FaithfulState)


def _store(opt_state: Any) -> Any:
    stores = found(opt_state, StoreState | FaithfulState)
    if len(stores) != 1:
        raise ValueError(f"the optimizer's state stores weights {len(stores)} times, not once.")
    return stores[0]

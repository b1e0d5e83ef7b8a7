"""Stores of 16-bit weights: the last link of an optimizer keeps changes below their rounding.

Any optimizer becomes one for low precision by the link after it:

    tx = optim.lowp_chain(optax.adamw(1e-5), store="int16")     # float32 inside, exact weights
    tx = optim.lowp_chain(optax.lion(1e-5), store="bf16x2")

`optax.apply_updates` computes `(p + u).astype(p.dtype)`, which loses a change below half a unit in
the last place of p: at a learning rate of 1e-6, 98 % of the changes. The store emits an update
whose effect it knows bit for bit, and keeps the rounding error in its state. So it must be last:
after a further link (a clip, a mask, a second optimizer) its state would no longer match the
weights. `lowp_chain` puts it last and accepts no links after it.

Pitfalls of optax with 16-bit parameters, and alternatives:

- moments take the parameters' dtype, and the second one stops moving: `lowp_chain` runs all links
  on float32 weights and gradients, so their state is float32;
- `optax.inject_hyperparams` casts numbers to the parameters' dtype: b2 = 0.999 becomes 1.0, and the
  first update NaN. Use `optim.inject_hyperparams`;
- `optax.apply_if_finite` requires updates of the gradients' dtype, while some stores need float32
  ones: use `optim.apply_if_finite`;
- `jax.jit(tx.init)(params)` puts all state on one device. Use `optim.init_sharded`.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrl_eff.optim import codecs, mcf
from jaxrl_eff.optim.moments import leaf_id

_MEASURED = 2.0**40  # changes are clipped to this for metrics, so that sums of squares are finite
inject_hyperparams = functools.partial(optax.inject_hyperparams, hyperparam_dtype=jnp.float32)


def apply_if_finite(
    tx: optax.GradientTransformation, max_consecutive_errors: int
) -> optax.GradientTransformation:
    """optax.apply_if_finite for transforms whose updates differ in dtype from the gradients."""

    def update(updates, state, params=None, **extra):
        updates, state = inner.update(updates, state, params, **extra)
        return mcf.wide(updates), state

    inner = optax.with_extra_args_support(tx)
    inner_wide = optax.GradientTransformationExtraArgs(inner.init, update)
    careful = optax.apply_if_finite(inner_wide, max_consecutive_errors)
    return optax.GradientTransformationExtraArgs(
        careful.init,
        lambda updates, state, params=None, **extra: careful.update(
            mcf.wide(updates), state, params, **extra
        ),
    )


class Descent(NamedTuple):
    """Collage's effective descent quality: the share of the wanted update that reached the weights.

    With d the optimizer's wanted change and d^ the actual one, over all parameters:

    Attributes:
        visible: <d, d^> / <d, d>, with d^ the change of the visible weights. 1 on average.
        stored: the same for the stored weights, kept parts included. 1 if nothing is lost.
        lost: share of the entries with d != 0 whose stored weight did not change.
    """

    visible: jax.Array
    stored: jax.Array
    lost: jax.Array


class StoreState(NamedTuple):
    """State of `store_weights`.

    Attributes:
        count: updates so far, int32.
        low: tree of the parts kept in addition to visible weights; `optax.MaskedNode` where none.
        descent: of the last update, if requested.
    """

    count: jax.Array
    low: Any
    descent: Descent | tuple = ()


class LowPrecisionState(NamedTuple):
    """State of `lowp_chain`: of its links, and of the store after them."""

    inner: Any
    store: StoreState


class LowPrecisionTransformation(optax.GradientTransformationExtraArgs):
    """A transform that ends in a store; no further link can follow it."""


class _Sums(NamedTuple):
    wanted: jax.Array
    visible: jax.Array
    stored: jax.Array
    lost: jax.Array
    moved: jax.Array


def store_weights(
    codec: str = "bf16x2", *, seed: int | jax.Array = 0, metrics: bool = False
) -> LowPrecisionTransformation:
    """Turns wanted changes into updates of 16-bit weights without loss. Must be last.

    Leaves that are not 16-bit floats pass through. The state matches the result of
    `optax.apply_updates` bit for bit, compiled together or not.

    Args:
        codec: "bf16x2" (Collage, Kahan: 16 bits), "int16" (a float32 master, bit for bit), "int8"
            (24 bits; float16 too), "sr" (stochastic rounding, nothing kept), "none".
        seed: of the stochastic rounding.
        metrics: True keeps the `Descent` of each update; costs a few sums.

    Raises:
        ValueError: an unknown codec; in `update`: no params; in `init`: a dtype that the codec does
            not support.

    Example:
        >>> from jaxrl_eff import optim
        >>> params = jnp.ones(2, jnp.bfloat16)
        >>> tx = optax.chain(optax.sgd(1e-4), optim.store_weights("int16"))
        >>> updates, state = tx.update(jnp.ones(2), tx.init(params), params)
        >>> params = optax.apply_updates(params, updates)
        >>> round(float(optim.full_precision_params(params, state)[0]), 5)
        0.9999
    """
    how = codecs.weight(codec)

    def kept(p: Any) -> bool:
        if p.dtype not in (jnp.bfloat16, jnp.float16):
            return False
        if str(p.dtype) not in how.dtypes:
            fits = [k for k, w in codecs.WEIGHTS.items() if str(p.dtype) in w.dtypes]
            raise ValueError(
                f"weights are {p.dtype}, which {codec!r} is not for; these are: {fits}."
            )
        return True

    def init(params: Any) -> StoreState:
        def low(p):
            if not kept(p) or how.dtype is None:
                return optax.MaskedNode()
            return jnp.zeros(p.shape, how.dtype)

        nothing = _undescended() if metrics else ()
        return StoreState(jnp.zeros((), jnp.int32), jax.tree.map(low, params), nothing)

    def update(updates, state, params=None, **extra):
        del extra
        if params is None:
            raise ValueError("store_weights needs params: call update(grads, state, params).")
        count = optax.safe_increment(state.count)
        paths, treedef = jax.tree_util.tree_flatten_with_path(params)
        changes, lows = treedef.flatten_up_to(updates), treedef.flatten_up_to(state.low)
        out, new, sums = [], [], []
        for (path, p), change, low in zip(paths, changes, lows, strict=True):
            if not kept(p):
                out.append(change)
                new.append(low)
                continue
            low = None if isinstance(low, optax.MaskedNode) else low
            noise = mcf.noise(p.shape, seed, count, leaf_id(path, "w")) if how.noisy else None
            change = mcf.load(change)
            u, low_ = how.step(p, low, change, noise)
            if metrics:
                h = codecs.applied(p, u)
                after = how.join(h.astype(p.dtype), low_)
                sums.append(_sums(change, h - mcf.load(p), after - how.join(p, low)))
            out.append(u)
            new.append(optax.MaskedNode() if low_ is None else low_)
        descent = _descent(sums) if metrics else ()
        state = StoreState(count, treedef.unflatten(new), descent)
        return treedef.unflatten(out), state

    return LowPrecisionTransformation(init, update)


def lowp_chain(
    *links: optax.GradientTransformation,
    store: str = "bf16x2",
    seed: int | jax.Array = 0,
    metrics: bool = False,
) -> LowPrecisionTransformation:
    """Chains the links in float32, on full-precision weights, followed by `store_weights`.

    Args:
        links: any optax transforms or optimizers.
        store, seed, metrics: see `store_weights`.

    Raises:
        ValueError: a link ends in a store already.

    Example:
        >>> from jaxrl_eff import lowp_chain
        >>> params, tx = jnp.ones(2, jnp.bfloat16), lowp_chain(optax.lion(1e-3), store="bf16x2")
        >>> state = tx.init(params)
        >>> for _ in range(4):  # 1 - 1e-3 is 1 in bfloat16, 1 - 4e-3 is not
        ...     updates, state = tx.update(jnp.ones_like(params), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> float(params[0])
        0.99609375
    """
    for i, link in enumerate(links):
        if isinstance(link, LowPrecisionTransformation):
            raise ValueError(f"link {i} stores weights already, and nothing may follow that.")
    inner = optax.with_extra_args_support(optax.chain(*links))
    last = store_weights(store, seed=seed, metrics=metrics)

    def init(params: Any) -> LowPrecisionState:
        start = apart(inner.init(mcf.wide(params)), params)
        return LowPrecisionState(start, last.init(params))

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError("lowp_chain needs params: call update(grads, state, params).")
        full = joined(params, state.store.low)
        changes, inner_state = inner.update(mcf.gradients(updates), state.inner, full, **extra)
        out, store_state = last.update(changes, state.store, params)
        return out, LowPrecisionState(inner_state, store_state)

    return LowPrecisionTransformation(init, update)


def joined(params: Any, low: Any) -> Any:
    """Full-precision weights, at least float32, from the visible and the kept parts."""

    def one(p: jax.Array, low: Any) -> jax.Array:
        if isinstance(low, optax.MaskedNode):
            return mcf.wide(p)
        return codecs.weight(codecs.kept_as(low.dtype)).join(p, low)

    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten(map(one, leaves, treedef.flatten_up_to(low)))


def watch_descent(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Adds to any transform the `Descent` of its updates under `optax.apply_updates`.

    For transforms that do not store weights: it shows what bfloat16 parameters lose. The new
    weights are computed by explicit rounding: `p_new.astype(float32) - p` in the same program would
    use the sum before rounding, and show no loss.

    Example:
        >>> from jaxrl_eff import precision_metrics, watch_descent
        >>> params, tx = jnp.ones(2, jnp.bfloat16), watch_descent(optax.sgd(1e-4))
        >>> _, state = tx.update(jnp.ones_like(params), tx.init(params), params)
        >>> float(precision_metrics(state)["lost"])  # 1 - 1e-4 is 1 in bfloat16
        1.0
    """
    tx = optax.with_extra_args_support(tx)

    def init(params):
        return _Watched(apart(tx.init(params), params), _undescended())

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError("watch_descent needs params: call update(grads, state, params).")
        updates, inner = tx.update(updates, state.inner, params, **extra)
        sums = []
        for p, u in zip(jax.tree.leaves(params), jax.tree.leaves(updates), strict=True):
            change = codecs.applied(p, u) - mcf.load(p)
            sums.append(_sums(mcf.load(u), change, change))
        return updates, _Watched(inner, _descent(sums))

    return optax.GradientTransformationExtraArgs(init, update)


def _undescended() -> Descent:
    """Zeros before the first update, each in a separate buffer."""
    return Descent(*(jnp.zeros((), jnp.float32) for _ in Descent._fields))


class _Watched(NamedTuple):
    inner: Any
    descent: Descent


def precision_metrics(opt_state: Any) -> Mapping[str, jax.Array]:
    """The `Descent` in an optimizer's state as `{visible, stored, lost}`; empty if none.

    Example:
        >>> from jaxrl_eff import lowp_chain, precision_metrics
        >>> params, tx = jnp.ones(2, jnp.bfloat16), lowp_chain(optax.sgd(2**-12), metrics=True)
        >>> _, state = tx.update(jnp.ones_like(params), tx.init(params), params)
        >>> {name: round(float(x), 3) for name, x in precision_metrics(state).items()}
        {'visible': 0.0, 'stored': 1.0, 'lost': 0.0}
    """
    kept = found(opt_state, Descent)
    return dict(kept[0]._asdict()) if kept else {}


def found(opt_state: Any, kind: Any) -> list[Any]:
    """Finds all parts of a type in an optimizer's state, at any depth."""
    every = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kind))
    return [x for x in every if isinstance(x, kind)]


def apart(state: Any, params: Any) -> Any:
    """The same state with every array in a separate buffer, none shared with a parameter.

    Some optax transforms start with one array in two places, or with the parameters themselves; a
    step that donates state and parameters would then donate one buffer twice.
    """
    taken = {id(x) for x in jax.tree.leaves(params)}

    def own(x: Any) -> Any:
        if id(x) in taken:
            return jnp.copy(x)
        taken.add(id(x))
        return x

    return jax.tree.map(own, state)


def _sums(wanted: jax.Array, visible: jax.Array, stored: jax.Array) -> _Sums:
    wanted, visible, stored = (
        jnp.clip(x, -_MEASURED, _MEASURED) for x in (wanted, visible, stored)
    )
    moved = wanted != 0
    lost = moved & (stored == 0)
    return _Sums(
        jnp.sum(wanted * wanted),
        jnp.sum(wanted * visible),
        jnp.sum(wanted * stored),
        jnp.sum(lost.astype(jnp.float32)),
        jnp.sum(moved.astype(jnp.float32)),
    )


def _descent(sums: list[_Sums]) -> Descent:
    zero = jnp.zeros((), jnp.float32)
    nothing = _Sums(zero, zero, zero, zero, zero)
    total = jax.tree.map(lambda *xs: sum(xs), nothing, *sums)
    size, moved = (jnp.maximum(x, jnp.finfo(jnp.float32).tiny) for x in (total.wanted, total.moved))
    return Descent(total.visible / size, total.stored / size, total.lost / moved)

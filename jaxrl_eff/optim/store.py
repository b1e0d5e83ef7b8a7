"""The last link: how weights of 16 bits take up a change that is smaller than their own rounding.

Any optimizer becomes one for low precision by what stands behind it:

    tx = optim.lowp_chain(optax.adamw(1e-5), store="int16")     # float32 inside, exact weights
    tx = optim.lowp_chain(optax.lion(1e-5), store="bf16x2")

`optax.apply_updates` computes `(p + u).astype(p.dtype)`; a change below half a unit in the last
place of p is lost there, which at a learning rate of 1e-6 is 98 % of them. The link sees to it that
what is lost is kept: it emits an update whose effect it knows bit for bit, and stores the rest.
So it must be last. A link behind it (a clip, a mask, a second optimizer) would make what is stored
a fiction; `lowp_chain` puts it there and can be given no further links.

Traps of optax with 16-bit parameters, and what to do instead:

- moments take the parameters' dtype, and the second one stops moving: `lowp_chain` runs all links
  on float32 weights and gradients, so their state is float32;
- `optax.inject_hyperparams` casts numbers to the parameters' dtype: b2 = 0.999 becomes 1.0, and the
  first update NaN. Use `optim.inject_hyperparams`;
- `optax.apply_if_finite` wants updates of the gradients' dtype, while some stores need float32
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

_MEASURED = 2.0**40  # changes beyond it count as this much: sums of their squares are finite
inject_hyperparams = functools.partial(optax.inject_hyperparams, hyperparam_dtype=jnp.float32)


def apply_if_finite(
    tx: optax.GradientTransformation, max_consecutive_errors: int
) -> optax.GradientTransformation:
    """optax.apply_if_finite for transforms whose updates are not of the gradients' dtype."""

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
    """How much of the wanted update reached the weights: Collage's effective descent quality.

    With d what the optimizer wants and d^ what became of it, over all parameters:

    Attributes:
        visible: <d, d^> / <d, d>, d^ the change of the visible weights. 1 on average.
        stored: the same of the stored weights, kept parts included. 1 if nothing is lost.
        lost: share of the entries with d != 0 whose stored weight did not change.
    """

    visible: jax.Array
    stored: jax.Array
    lost: jax.Array


class StoreState(NamedTuple):
    """Attributes:
    count: updates so far, int32.
    low: tree of what is kept beside the visible weights; `optax.MaskedNode` where nothing is.
    descent: of the last update, if asked for.
    """

    count: jax.Array
    low: Any
    descent: Descent | tuple = ()


class LowPrecisionState(NamedTuple):
    """State of `lowp_chain`: of its links, and of the store behind them."""

    inner: Any
    store: StoreState


class LowPrecisionTransformation(optax.GradientTransformationExtraArgs):
    """A transform that ends in a store, which nothing may follow."""


class _Sums(NamedTuple):
    wanted: jax.Array
    visible: jax.Array
    stored: jax.Array
    lost: jax.Array
    moved: jax.Array


def store_weights(
    codec: str = "bf16x2", *, seed: int | jax.Array = 0, metrics: bool = False
) -> LowPrecisionTransformation:
    """Turns wanted changes into updates of 16-bit weights that lose nothing. Must be last.

    Args:
        codec: "bf16x2" (Collage, Kahan: 16 bits), "int16" (a float32 master, bit for bit), "int8"
            (24 bits; float16 too), "sr" (stochastic rounding, nothing kept), "none".
        seed: of the stochastic rounding.
        metrics: whether to keep `Descent` of each update; costs a few sums.

    Leaves that are not 16-bit floats pass through. What `optax.apply_updates` makes of the update
    is what the state assumes, bit for bit, compiled together or not.

    Raises:
        ValueError: an unknown codec; in `update`: no params; in `init`: a dtype not of the codec.
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
    """The links in float32, on weights of full precision, and `store_weights` behind them.

    Args:
        links: any optax transforms or optimizers.
        store, seed, metrics: see `store_weights`.

    Raises:
        ValueError: a link ends in a store already.
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
    """Weights of full precision, at least float32, from the visible and the kept parts."""

    def one(p: jax.Array, low: Any) -> jax.Array:
        if isinstance(low, optax.MaskedNode):
            return mcf.wide(p)
        return codecs.weight(codecs.kept_as(low.dtype)).join(p, low)

    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten(map(one, leaves, treedef.flatten_up_to(low)))


def watch_descent(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Any transform, with the `Descent` that its updates have under `optax.apply_updates`.

    For transforms that do not store weights: what bfloat16 parameters lose with them. It computes
    what is stored by explicit rounding: `p_new.astype(float32) - p` in the same program would read
    the sum before it was rounded, and say that nothing is lost.
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
    """Zeros before the first update, each a buffer of its own."""
    return Descent(*(jnp.zeros((), jnp.float32) for _ in Descent._fields))


class _Watched(NamedTuple):
    inner: Any
    descent: Descent


def precision_metrics(opt_state: Any) -> Mapping[str, jax.Array]:
    """The `Descent` in an optimizer's state as `{visible, stored, lost}`; else empty."""
    kept = found(opt_state, Descent)
    return dict(kept[0]._asdict()) if kept else {}


def found(opt_state: Any, kind: Any) -> list[Any]:
    """The parts of an optimizer's state that are of a type, wherever optax put them."""
    every = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kind))
    return [x for x in every if isinstance(x, kind)]


def apart(state: Any, params: Any) -> Any:
    """The same state with every array in a buffer of its own, none of them a parameter's.

    Some optax transforms start with one array in two places, or with the parameters themselves; a
    step that donates state and parameters would then give one buffer away twice.
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

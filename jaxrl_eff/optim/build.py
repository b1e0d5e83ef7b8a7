"""Optimizers by name, with clipping, frozen parameters, and stores of 16-bit weights."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrl_eff.optim import mcf
from jaxrl_eff.optim.codecs import WEIGHTS
from jaxrl_eff.optim.collage import collage_adamw
from jaxrl_eff.optim.paths import path_name
from jaxrl_eff.optim.store import apart, lowp_chain, watch_descent

OWN = {"collage_adamw": collage_adamw}


def optimizer_names() -> list[str]:
    """Names of the optimizers here and in optax that need no argument except a learning rate."""
    names = [*OWN]
    for name in sorted(set(dir(optax))):
        fn = getattr(optax, name)
        if not inspect.isfunction(fn) or name.startswith("scale_by"):
            continue
        parameters = inspect.signature(fn).parameters
        needed = {p for p, v in parameters.items() if v.default is inspect.Parameter.empty}
        if "learning_rate" in parameters and needed <= {"learning_rate"}:
            names.append(name)
    return names


def optimizer(
    name: str,
    learning_rate: float | optax.Schedule,
    *,
    clip_norm: float = 0.0,
    weight_decay: float = 0.0,
    frozen: Sequence[str] = (),
    no_decay: Sequence[str] = (".*scale", ".*bias"),
    store: str = "",
    descent: bool = False,
    options: Mapping[str, Any] | None = None,
) -> optax.GradientTransformation:
    """Builds an optimizer by name, with the usual additions for fine-tuning.

    Args:
        name: of a function in optax, e.g. "adamw", "lion", "sgd"; or "collage_adamw".
        learning_rate: a number or a schedule.
        clip_norm: gradients are scaled down to this global norm; 0 does not clip.
        weight_decay: decoupled decay, for optimizers that have it.
        frozen: regular expressions of parameter names (`layers/attn/q/kernel`) that never change;
            they have no optimizer state.
        no_decay: regular expressions of parameter names that are not decayed.
        store: how 16-bit weights keep changes below their rounding, as in `store_weights`:
            "bf16x2", "int16", "int8", "sr"; "" rounds each change to the nearest. For
            collage_adamw it is set by the variant.
        descent: True keeps the `Descent` of each update, for `precision_metrics`.
        options: further arguments of the function.

    Returns:
        A transform with float32 state for every dtype of the parameters; for collage_adamw the
        variant decides.

    Raises:
        ValueError: an unknown optimizer, option or store.

    Example:
        >>> from jaxrl_eff import optimizer
        >>> params = {"embed": jnp.ones(2), "head": jnp.ones(2)}
        >>> tx = optimizer("adamw", 0.1, clip_norm=1.0, frozen=["embed"])
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["embed"].tolist()
        [1.0, 1.0]
    """
    if name not in optimizer_names():
        raise ValueError(f"unknown optimizer {name!r}; expected one of {optimizer_names()}.")
    fn, options = OWN.get(name) or getattr(optax, name), dict(options or {})
    known = inspect.signature(fn).parameters
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"{name}: unknown option {unknown[0]!r}; expected one of {sorted(known)}.")
    if weight_decay and "weight_decay" not in known:
        raise ValueError(f"{name} has no weight decay, but weight_decay is {weight_decay}.")
    if store and (name in OWN or store not in WEIGHTS):
        if name in OWN:
            raise ValueError(f"store is {store!r}; for {name} it must be set by its variant.")
        raise ValueError(f"unknown store {store!r}; expected one of {['', *WEIGHTS]}.")
    if "weight_decay" in known:
        options.setdefault("weight_decay", weight_decay)
        if "mask" in known:
            options.setdefault("mask", lambda tree: _unnamed(tree, no_decay))
    if descent and name in OWN:
        options["metrics"] = True
    tx = fn(learning_rate, **options)
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    if name in OWN:
        tx = optax.chain(upcast(), *clip, tx)
    elif store:
        tx = lowp_chain(*clip, tx, store=store, metrics=descent)
    else:
        tx = in_float32(optax.chain(*clip, tx) if clip else tx)
        tx = watch_descent(tx) if descent else tx
    if frozen:
        tx = optax.chain(
            optax.masked(tx, lambda tree: _unnamed(tree, frozen)),
            optax.masked(_stay(), lambda tree: _named(tree, frozen)),
        )
    return tx


def _stay() -> optax.GradientTransformation:
    """Updates that change no bit of a parameter: -0.0, since -0.0 + 0.0 would be 0.0."""
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda u: jnp.full_like(u, -0.0), updates)
    )


def upcast() -> optax.GradientTransformation:
    """Casts gradients to float32. First in a chain, since optax sums norms in their dtype."""
    return optax.stateless(lambda updates, _: mcf.wide(updates))


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs a transform on float32 copies, so that its state is float32 for bfloat16 parameters.

    optax keeps moments in the parameters' dtype, and in bfloat16 the second one stops moving:
    0.999 v + 0.001 g^2 rounds back to v. The updates stay float32; `optax.apply_updates` rounds the
    sum to the parameters' dtype.
    """

    def init(params: Any) -> Any:
        return apart(tx.init(mcf.wide(params)), params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return tx.update(
            mcf.gradients(updates), state, None if params is None else mcf.wide(params)
        )

    return optax.GradientTransformation(init, update)


def _named(tree: Any, patterns: Sequence[str]) -> Any:
    """A tree that is True where the leaf's whole name matches one of the patterns."""
    return jax.tree_util.tree_map_with_path(_matcher(patterns), tree)


def _unnamed(tree: Any, patterns: Sequence[str]) -> Any:
    matches = _matcher(patterns)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: not matches(path, leaf), tree)


def _matcher(patterns: Sequence[str]) -> Callable[[Any, Any], bool]:
    def matches(path: Any, leaf: Any) -> bool:
        del leaf
        return any(re.fullmatch(p, path_name(path)) for p in patterns)

    return matches

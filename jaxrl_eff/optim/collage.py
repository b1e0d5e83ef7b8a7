"""Collage: AdamW with 16-bit weights, gradients and moments (Yu et al. 2024, arXiv:2405.03637).

Bytes per parameter, gradient included, against 16 for float32 moments and a float32 master:

    variant     weights  mu       nu       bytes
    light       bf16x2   bf16     bf16     10     as float32 for b2 <= 0.98
    plus        bf16x2   bf16     bf16x2   12     as float32 for b2 = 0.999 too
    light_sr    bf16x2   bf16     bf16_sr  10     the same in 10: nu rounded stochastically
    exact       int16    float32  float32  14     a float32 master, bit for bit
    flash8      int8     int8     int8     7.1    the layout of FlashOptim (arXiv:2602.23349)
    int16_8bit  int16    int8     int8     8.1    exact weights, 8-bit moments

Light fails at b2 = 0.999 because a step changes nu by at most a thousandth, below half a unit in
the last place of bfloat16, so nu never decays. Compensating the weights cannot repair that.

Arithmetic is float32: it stays in registers, and a step is bound by memory traffic. The paper's
own, bfloat16 after every operation, is `faithful=True`; it is no faster and slightly less exact.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrl_eff.optim import codecs, mcf
from jaxrl_eff.optim.mcf import Scalar
from jaxrl_eff.optim.moments import scale_by_adam
from jaxrl_eff.optim.paths import path_name
from jaxrl_eff.optim.store import LowPrecisionTransformation, lowp_chain

VARIANTS: Mapping[str, tuple[str, str, str]] = {  # weights, mu, nu
    "light": ("bf16x2", "bf16", "bf16"),
    "plus": ("bf16x2", "bf16", "bf16x2"),
    "light_sr": ("bf16x2", "bf16", "bf16_sr"),
    "exact": ("int16", "float32", "float32"),
    "flash8": ("int8", "int8", "int8"),
    "int16_8bit": ("int16", "int8", "int8"),
}
Mask = Any | Callable[[Any], Any] | None


def collage_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    mask: Mask = None,
    *,
    variant: str = "plus",
    faithful: bool = False,
    metrics: bool = False,
    seed: int | jax.Array = 0,
) -> LowPrecisionTransformation:
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) for 16-bit weights.

    Args:
        learning_rate, b1, b2, eps, weight_decay: as in `optax.adamw`.
        mask: tree of booleans, or a function from the parameters to one: the parameters to decay.
        variant: one of the table above.
        faithful: the paper's arithmetic, rounded to the parameters' dtype after every operation;
            for "light" and "plus".
        metrics: True keeps the `Descent` of each update; not with faithful.
        seed: of stochastic rounding.

    Raises:
        ValueError: the variant is unknown; faithful is combined with another variant or with
            metrics; in `init`: the variant does not support the parameters' dtype.

    Example:
        >>> from jaxrl_eff import collage_adamw, full_precision_params
        >>> params = jnp.ones(2, jnp.bfloat16)
        >>> tx = collage_adamw(1e-4)
        >>> updates, state = tx.update(jnp.ones_like(params), tx.init(params), params)
        >>> params = optax.apply_updates(params, updates)
        >>> float(params[0]), round(float(full_precision_params(params, state)[0]), 5)
        (1.0, 0.9999)
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; expected one of {[*VARIANTS]}.")
    if faithful:
        if variant not in ("light", "plus"):
            raise ValueError(f"faithful arithmetic is for 'light' and 'plus', not {variant!r}.")
        if metrics:
            raise ValueError("metrics are not kept with faithful=True; use `watch_descent`.")
        plus = variant == "plus"
        return _faithful(learning_rate, b1, b2, eps, weight_decay, mask, plus=plus)
    weights, mu, nu = VARIANTS[variant]
    return lowp_chain(
        scale_by_adam(b1, b2, eps, mu=mu, nu=nu, seed=seed),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
        store=weights, seed=seed, metrics=metrics,
    )  # fmt: skip


class FaithfulState(NamedTuple):
    """State of the faithful optimizer.

    Attributes:
        count: updates so far, int32.
        mu, nu, low: trees in the parameters' dtype; low is the weights' second component.
        nu_low: nu's second component (plus).
    """

    count: jax.Array
    mu: Any
    nu: Any
    nu_low: Any
    low: Any


def _faithful(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    weight_decay: Scalar,
    mask: Mask,
    *,
    plus: bool,
) -> LowPrecisionTransformation:
    """The paper's AdamW, with every operation rounded to the parameters' dtype.

        m = b1 m + (1 - b1) g
        light:  v = b2 v + (1 - b2) g^2
        plus:   (v, v') = Grow(Mul((v, v'), b2), (1 - b2) g^2)
        d = -(lr / (1 - b1^t)) m / (sqrt(v) / sqrt(1 - b2^t) + eps) - lr wd p
        (p, p') = Grow((p, p'), d)

    b2 is an expansion of two numbers, the quotient uses the first components alone, and decay is
    part of d, where it is not lost.
    """

    def init(params: Any) -> FaithfulState:
        def zeros():
            return jax.tree.map(jnp.zeros_like, params)

        for path, p in jax.tree_util.tree_leaves_with_path(params):
            if p.dtype == jnp.float16:  # eps = 1e-8 would be 0 in it, and 0 / 0 NaN
                raise ValueError(f"{path_name(path)!r} is float16, which faithful=True is not for.")

        return FaithfulState(
            jnp.zeros((), jnp.int32), zeros(), zeros(), zeros() if plus else (), zeros()
        )

    def update(updates, state, params=None, **extra):
        del extra
        if params is None:
            raise ValueError("collage_adamw needs params: call update(grads, state, params).")
        count = optax.safe_increment(state.count)
        lr = learning_rate(state.count) if callable(learning_rate) else learning_rate
        first, second = mcf.one_minus_power(b1, count), mcf.one_minus_power(b2, count)
        decayed = mask(params) if callable(mask) else mask
        treedef = jax.tree.structure(params)
        columns = [params, updates, state.mu, state.nu, state.nu_low if plus else state.nu]
        columns += [state.low, jax.tree.map(lambda _: True, params) if decayed is None else decayed]

        def one(p, g, m, v, v_low, low, decay):
            def rn(x):
                return mcf.round_to(x, p.dtype)

            wide, m, v, v_low, low = (mcf.load(x) for x in (p, m, v, v_low, low))
            g = rn(mcf.gradients(mcf.load(g)))
            m = rn(rn(b1 * m) + (1 - b1) * g)
            if plus:
                v, v_low = mcf.scale(v, v_low, *mcf.constant(b2, p.dtype), p.dtype)
                v, v_low = mcf.grow(v, v_low, rn((1 - b2) * g * g), p.dtype)
            else:
                v = rn(rn(b2 * v) + (1 - b2) * g * g)
            root = rn(rn(rn(jnp.sqrt(v)) / jnp.sqrt(second)) + eps)
            change = rn(-(lr / first) * rn(m / root))
            if decay:
                change = rn(change - rn(lr * weight_decay * wide))
            h, new_low = mcf.grow(wide, low, change, p.dtype)
            u = codecs.still(h - wide)
            # Exact unless a weight shrinks by 2^16 at once; this keeps the error of that case too.
            new_low = rn(new_low + (h - codecs.applied(p, u)))
            kept = [x.astype(p.dtype) for x in (m, v, v_low, new_low)]
            return (u, *kept)

        rows = [one(*row) for row in zip(*(treedef.flatten_up_to(c) for c in columns), strict=True)]
        u, m, v, v_low, low = (
            treedef.unflatten(c) for c in (zip(*rows, strict=True) if rows else ((),) * 5)
        )
        return u, FaithfulState(count, m, v, v_low if plus else (), low)

    return LowPrecisionTransformation(init, update)

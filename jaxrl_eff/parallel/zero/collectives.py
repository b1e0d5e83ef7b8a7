"""Sharded weights over a slow and a fast mesh axis, gathered and reduced with few bytes (ZeRO++).

For use inside `jax.shard_map` over two mesh axes with N and A devices (Wang et al. 2023,
arXiv:2306.10209). A weight is a flat vector of N A m elements, device (d, i) holding the m
elements from (d A + i) m on: the sharding `P((slow, fast))`. Leading dimensions of a shard, for
instance layers, are carried along.

Weights are gathered over the slow axis first and over the fast one second. A device then receives
(N-1) m elements over the slow axis, A times fewer than the other way round, where it would receive
what its whole node had already put together. The first stage's result is named `STAGE`, so what
the paper calls hpZ, a second copy within every node, is a rematerialization policy that keeps this
name: nothing lives on from step to step that could be stale.

Reductions undo this: over the fast axis first, so that the slow one carries sums. The order in
which pieces lie comes from the order of axes of a reshape; no permutation is needed.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxrl_eff.parallel.codec import Blocks, decode, encode
from jaxrl_eff.parallel.zero.levels import ZeroConfig

STAGE = "zero_stage1"


def gather_slow(shard: jax.Array, plan: ZeroConfig) -> jax.Array:
    """The first stage: this device's part of all nodes' shards, as bytes.

    Args:
        shard: [..., m] floats.

    Returns:
        [N, ..., plan.weights.nbytes(m)] uint8, the same on every node.
    """
    return lax.all_gather(encode(shard, plan.weights), plan.slow)


def gather_fast(stage: jax.Array, m: int, plan: ZeroConfig) -> jax.Array:
    """The second stage: the whole weight.

    Args:
        stage: [N, ..., bytes] uint8 of `gather_slow`.
        m: elements of a shard.

    Returns:
        [..., N A m] of the plan's dtype, the same on every device.
    """
    every = lax.all_gather(stage, plan.fast, axis=1)  # [N, A, ..., bytes]
    parts = decode(every, m, plan.weights, plan.dtype)
    parts = jnp.moveaxis(parts, (0, 1), (-3, -2))
    return parts.reshape(*parts.shape[:-3], -1)


def reduce_fast(gradient: jax.Array, plan: ZeroConfig) -> jax.Array:
    """Gradients of the whole weight, summed over the fast axis.

    Args:
        gradient: [..., N A m], every device's own.

    Returns:
        [..., N, m] float32: what this device will pass on to each node.
    """
    nodes, devices = lax.axis_size(plan.slow), lax.axis_size(plan.fast)
    parts = gradient.reshape(*gradient.shape[:-1], nodes, devices, -1).astype(jnp.float32)
    parts = jnp.moveaxis(parts, -2, 0)
    return _exchange(parts, plan.fast, plan.fast_gradients)[0]


def reduce_slow(
    gradient: jax.Array, feedback: jax.Array | None, plan: ZeroConfig
) -> tuple[jax.Array, jax.Array | None]:
    """Gradients summed over the slow axis.

    Error feedback: e' = (g + e) - sent(g + e), for each node that was sent to. Only this exchange
    has it; before the one over the fast axis it would take a whole model a device.

    Args:
        gradient: [..., N, m] of `reduce_fast`, or a sum of several.
        feedback: e [..., N, m], zeros at first; None for none.

    Returns:
        [..., m] float32, the sum for this device's shard; and e', of e's dtype. Where the gradient
        is not finite e' is zero: the step is lost, and not those after it.
    """
    gradient = gradient.astype(jnp.float32)
    if plan.copies:  # once for all micro-batches, and before anything is rounded
        gradient = lax.psum(gradient, plan.copies)
    parts = jnp.moveaxis(gradient, -2, 0)
    if feedback is None:
        return _exchange(parts, plan.slow, plan.gradients)[0], None
    parts += jnp.moveaxis(feedback.astype(jnp.float32), -2, 0)
    total, arrived = _exchange(parts, plan.slow, plan.gradients)
    left = parts - arrived
    left = jnp.where(jnp.isfinite(left), left, 0).astype(feedback.dtype)
    return total, jnp.moveaxis(left, 0, -2)


def reduce_gradients(
    gradient: jax.Array, feedback: jax.Array | None, plan: ZeroConfig
) -> tuple[jax.Array, jax.Array | None]:
    """Both reductions: [..., N A m] of every device -> [..., m] float32, and the feedback."""
    return reduce_slow(reduce_fast(gradient, plan), feedback, plan)


def _exchange(parts: jax.Array, axis: str, blocks: Blocks) -> tuple[jax.Array, jax.Array]:
    """Part k to device k of the axis; the sum of what arrives.

    Args:
        parts: [n, ..., m] float32.

    Returns:
        the sum [..., m] in float32, and what arrives of this device's parts, [n, ..., m]. Its part
        for itself is not sent and stays exact.
    """
    if blocks.bits == 32:
        return lax.psum_scatter(parts, axis), parts
    payload = encode(parts, blocks)
    got = lax.all_to_all(payload, axis, 0, 0, tiled=True)
    m, n = parts.shape[-1], parts.shape[0]
    mine = (lax.iota(jnp.int32, n) == lax.axis_index(axis)).reshape(n, *[1] * (parts.ndim - 1))
    own = jnp.sum(jnp.where(mine, parts, 0), axis=0)
    others = jnp.where(mine, 0, decode(got, m, blocks, jnp.float32))
    return own + jnp.sum(others, axis=0), jnp.where(
        mine, parts, decode(payload, m, blocks, jnp.float32)
    )


def gather_frozen(shard: jax.Array, plan: ZeroConfig) -> jax.Array:
    """As `gather_weights`, of a weight that is not trained: nothing is reduced.

    A policy of recomputation looks into functions with gradients of their own only where these are
    differentiated, so the name of the first stage would not be found in `gather_weights`.
    """
    stage = gather_slow(shard, plan)
    if plan.rung.secondary:
        stage = checkpoint_name(stage, STAGE)
    return gather_fast(stage, shard.shape[-1], plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def gather_weights(shard: jax.Array, feedback: jax.Array | None, plan: ZeroConfig) -> jax.Array:
    """The whole weight, whose gradient is reduced as the plan says.

    The gradient passes straight through the rounding: that of `round` is zero almost everywhere,
    and would reach no element but the largest of each block, through its scale.

    Args:
        shard: [..., m] floats.
        feedback: [..., N, m] or None. The "gradient" with respect to it is the next step's
            feedback, so a weight with feedback is gathered once in a differentiated function.
        plan: how.

    Returns:
        [..., N A m] of the plan's dtype.
    """
    del feedback
    return gather_frozen(shard, plan)


def _gather_forward(shard, feedback, plan):
    # A residual of no elements tells the backward pass the dtype.
    return gather_frozen(shard, plan), (feedback, jnp.zeros((0,), shard.dtype))


def _gather_backward(plan, residual, gradient):
    feedback, like = residual
    total, feedback = reduce_gradients(gradient, feedback, plan)
    return total.astype(like.dtype), feedback


gather_weights.defvjp(_gather_forward, _gather_backward)


def sharded_apply(
    fn: Callable[[jax.Array, Any], Any],
    shard: jax.Array,
    x: Any,
    plan: ZeroConfig,
    *,
    feedback: jax.Array | None = None,
    keep: tuple[str, ...] = (),
) -> Any:
    """fn(weight, x) of a sharded weight: gather, compute; and backward gather, compute, scatter.

    No device holds the whole weight longer than fn runs, so this belongs around one layer, for
    instance inside `lax.scan` over the shards of all.

    Args:
        fn: `(weight [N A m], x) -> y`; computed again in the backward pass.
        shard: [m], of this device.
        x: anything differentiable.
        plan: what is sent; its rung's `secondary` keeps the first stage of the gather.
        feedback: as for `gather_weights`.
        keep: names, given by `checkpoint_name` in fn, of what is kept and not computed again.

    Returns:
        y.
    """

    def run(shard, feedback, x):
        return fn(gather_weights(shard, feedback, plan), x)

    policy = jax.checkpoint_policies.save_only_these_names(*keep, STAGE)
    return jax.checkpoint(run, policy=policy)(shard, feedback, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def gather_held(stage: jax.Array, slot: jax.Array, plan: ZeroConfig) -> jax.Array:
    """The whole weight from a first stage that was gathered before, with fast traffic alone.

    For several micro-batches between one `gather_slow` and one `reduce_slow`.

    Args:
        stage: [N, ..., bytes] uint8.
        slot: [..., N, m] float32 zeros, whose gradient is that of `reduce_fast`. Where
            `shard_map` checks what varies, they must vary over both axes.

    Returns:
        [..., N A m] of the plan's dtype.
    """
    return gather_fast(stage, slot.shape[-1], plan)


def _held_forward(stage, slot, plan):
    return gather_fast(stage, slot.shape[-1], plan), None


def _held_backward(plan, residual, gradient):
    del residual
    return None, reduce_fast(gradient, plan)


gather_held.defvjp(_held_forward, _held_backward)


def held_apply(
    fn: Callable[[jax.Array, Any], Any], stage: jax.Array, slot: jax.Array, x: Any, plan: ZeroConfig
) -> Any:
    """As `sharded_apply`, of a stage held by this device: nothing crosses the slow axis."""

    def run(stage, slot, x):
        return fn(gather_held(stage, slot, plan), x)

    return jax.checkpoint(run)(stage, slot, x)


def refresh(shard: jax.Array, plan: ZeroConfig, dtype: str = "float32") -> jax.Array:
    """What every node holds of the weights, sent in full: [N, ..., m] of dtype."""
    return decode(gather_slow(shard, plan), shard.shape[-1], plan.weights, dtype)


def send_deltas(shard: jax.Array, held: jax.Array, plan: ZeroConfig, blocks: Blocks) -> jax.Array:
    """What every node holds after its difference from the weights was sent, roughly.

    R' = R + sent(W - R): the loop is closed, so what rounding leaves over is sent next time. The
    sender decodes its own message too, so all nodes hold R' to the last bit.

    Args:
        shard: W [..., m] floats.
        held: R [N, ..., m], of `refresh` or of the step before; bfloat16 or float32.
        plan: whose slow axis is meant.
        blocks: how differences travel.

    Returns:
        R' of R's shape and dtype; `encode(R', Blocks(16 or 32))` is a stage for `held_apply`.
    """
    wide = held.astype(jnp.float32)
    mine = lax.dynamic_index_in_dim(wide, lax.axis_index(plan.slow), 0, keepdims=False)
    message = encode(shard.astype(jnp.float32) - mine, blocks)
    every = lax.all_gather(message, plan.slow)
    return (wide + decode(every, shard.shape[-1], blocks, jnp.float32)).astype(held.dtype)

"""Quantized collectives (ZeRO++) for weights sharded over a slow and a fast mesh axis.

For use inside `jax.shard_map` over two mesh axes of N and A devices (Wang et al. 2023,
arXiv:2306.10209). A weight is a flat vector of N A m elements; device (d, i) holds the m elements
that start at (d A + i) m, which is the sharding `P((slow, fast))`. A shard can have leading
dimensions, such as layers.

Weights are gathered over the slow axis first and over the fast axis second, so a device receives
(N-1) m elements over the slow axis. In the opposite order it would receive A times as many, since
it would gather its whole node's part. The result of the first stage is named `STAGE`: the paper's
hpZ, a secondary copy within every node, is a rematerialization policy that saves this name, so no
copy persists between steps that could become stale.

Reductions go in the opposite order, fast axis first, so that the slow axis carries sums. A reshape
puts the parts in order; no permutation is needed.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxrl_eff.parallel.codec import Blocks, decode, encode
from jaxrl_eff.parallel.zero.levels import ZeroConfig

STAGE = "zero_stage1"


def gather_slow(shard: jax.Array, plan: ZeroConfig) -> jax.Array:
    """First stage: gathers the corresponding shards of all nodes, encoded.

    [..., m] floats -> [N, ..., plan.weights.nbytes(m)] uint8, the same on every node.
    """
    return lax.all_gather(encode(shard, plan.weights), plan.slow)


def gather_fast(stage: jax.Array, m: int, plan: ZeroConfig) -> jax.Array:
    """Second stage: gathers the full weight over the fast axis and decodes it.

    [N, ..., bytes] of `gather_slow` -> [..., N A m] of the plan's dtype, the same on every device.
    """
    every = lax.all_gather(stage, plan.fast, axis=1)  # [N, A, ..., bytes]
    parts = decode(every, m, plan.weights, plan.dtype)
    parts = jnp.moveaxis(parts, (0, 1), (-3, -2))
    return parts.reshape(*parts.shape[:-3], -1)


def reduce_fast(gradient: jax.Array, plan: ZeroConfig) -> jax.Array:
    """Reduce-scatters gradients of the full weight over the fast axis.

    [..., N A m], local to each device -> [..., N, m] float32, its partial sums for each node.
    """
    nodes, devices = lax.axis_size(plan.slow), lax.axis_size(plan.fast)
    parts = gradient.reshape(*gradient.shape[:-1], nodes, devices, -1).astype(jnp.float32)
    parts = jnp.moveaxis(parts, -2, 0)
    return _exchange(parts, plan.fast, plan.fast_gradients)[0]


def reduce_slow(
    gradient: jax.Array, feedback: jax.Array | None, plan: ZeroConfig
) -> tuple[jax.Array, jax.Array | None]:
    """Reduce-scatters gradients over the slow axis.

    Error feedback: e' = (g + e) - sent(g + e), for each receiving node. Only this exchange has it;
    for the one over the fast axis, e would have the size of the full model on every device.

    Args:
        gradient: [..., N, m] of `reduce_fast`, or a sum of several.
        feedback: e [..., N, m], initially zeros; None for no error feedback.

    Returns:
        [..., m] float32, the sum for this device's shard; and e', of e's dtype. Where the gradient
        is not finite, e' is zero, so that only this step is lost.
    """
    gradient = gradient.astype(jnp.float32)
    if plan.copies:  # once for all microbatches and before quantization
        gradient = lax.psum(gradient, plan.copies)
    parts = jnp.moveaxis(gradient, -2, 0)
    if feedback is None:
        return _exchange(parts, plan.slow, plan.gradients)[0], None
    parts += jnp.moveaxis(feedback.astype(jnp.float32), -2, 0)
    total, arrived = _exchange(parts, plan.slow, plan.gradients)
    left = jnp.where(jnp.isfinite(parts - arrived), parts - arrived, 0).astype(feedback.dtype)
    return total, jnp.moveaxis(left, 0, -2)


def reduce_gradients(
    gradient: jax.Array, feedback: jax.Array | None, plan: ZeroConfig
) -> tuple[jax.Array, jax.Array | None]:
    """Applies both reductions: [..., N A m] -> [..., m] float32, and the new feedback."""
    return reduce_slow(reduce_fast(gradient, plan), feedback, plan)


def _exchange(parts: jax.Array, axis: str, blocks: Blocks) -> tuple[jax.Array, jax.Array]:
    """Sends part k to device k of the axis and sums the received parts.

    Args:
        parts: [n, ..., m] float32.

    Returns:
        the sum [..., m] in float32, and this device's parts as decoded by their receivers,
        [n, ..., m]. Its part for itself is not sent and stays exact.
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
    """Gathers a weight that is not trained; no gradient is reduced.

    A rematerialization policy sees names inside a `custom_vjp` function only if it is
    differentiated, so it would not find `STAGE` in `gather_weights` here.
    """
    stage = gather_slow(shard, plan)
    if plan.rung.secondary:
        stage = checkpoint_name(stage, STAGE)
    return gather_fast(stage, shard.shape[-1], plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def gather_weights(shard: jax.Array, feedback: jax.Array | None, plan: ZeroConfig) -> jax.Array:
    """Gathers the full weight; the backward pass reduces its gradient according to the plan.

    The gradient is a straight-through estimate: that of `round` is zero almost everywhere, and
    would reach only the largest element of each block, through its scale.

    Args:
        shard: [..., m] floats.
        feedback: [..., N, m] or None. The "gradient" with respect to it is the next step's
            feedback, so a differentiated function must gather a weight with feedback only once.
    """
    del feedback
    return gather_frozen(shard, plan)


def _gather_forward(shard, feedback, plan):
    # An empty residual carries the dtype to the backward pass.
    return gather_frozen(shard, plan), (feedback, jnp.zeros((0,), shard.dtype))


def _gather_backward(plan, residual, gradient):
    feedback, like = residual
    total, feedback = reduce_gradients(gradient, feedback, plan)
    return total.astype(like.dtype), feedback


gather_weights.defvjp(_gather_forward, _gather_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def gather_held(stage: jax.Array, slot: jax.Array, plan: ZeroConfig) -> jax.Array:
    """Gathers the full weight from a first stage gathered before, over the fast axis only.

    For several microbatches between one `gather_slow` and one `reduce_slow`.

    Args:
        stage: [N, ..., bytes] uint8.
        slot: [..., N, m] float32 zeros, whose gradient is the result of `reduce_fast`. Under
            `shard_map` with `check_vma`, they must vary over both axes.
    """
    return gather_fast(stage, slot.shape[-1], plan)


def _held_forward(stage, slot, plan):
    return gather_fast(stage, slot.shape[-1], plan), None


def _held_backward(plan, residual, gradient):
    del residual
    return None, reduce_fast(gradient, plan)


gather_held.defvjp(_held_forward, _held_backward)


def send_deltas(shard: jax.Array, copy: jax.Array, plan: ZeroConfig, blocks: Blocks) -> jax.Array:
    """Updates every node's copy of the weights by sending quantized differences.

    R' = R + sent(W - R): the loop is closed, so the quantization residual is sent with the next
    difference. The sender decodes its own message too, so R' is bitwise equal on all nodes.

    Args:
        shard: W [..., m] floats.
        copy: R [N, ..., m], the copy of the previous step; bfloat16 or float32.
        blocks: encoding of the differences.

    Returns:
        R' of R's shape and dtype; `encode(R', Blocks(16 or 32))` is a stage for `gather_held`.
    """
    wide = copy.astype(jnp.float32)
    mine = lax.dynamic_index_in_dim(wide, lax.axis_index(plan.slow), 0, keepdims=False)
    message = encode(shard.astype(jnp.float32) - mine, blocks)
    every = lax.all_gather(message, plan.slow)
    return (wide + decode(every, shard.shape[-1], blocks, jnp.float32)).astype(copy.dtype)

"""A layer applied to a sharded weight, and the bytes of a step of such layers in closed form."""

import jax

from jaxrl_eff.parallel.codec import decode
from jaxrl_eff.parallel.zero.collectives import STAGE, gather_held, gather_slow, gather_weights


def sharded_apply(fn, shard, x, plan, *, feedback=None):
    """Gathers a weight and applies fn; backward gathers, recomputes and reduces."""

    def run(shard, feedback, x):
        return fn(gather_weights(shard, feedback, plan), x)

    policy = jax.checkpoint_policies.save_only_these_names(STAGE)
    return jax.checkpoint(run, policy=policy)(shard, feedback, x)


def held_apply(fn, stage, slot, x, plan):
    """`sharded_apply` with a stage gathered before; nothing is sent over the slow axis."""

    def run(stage, slot, x):
        return fn(gather_held(stage, slot, plan), x)

    return jax.checkpoint(run)(stage, slot, x)


def refresh(shard, plan, dtype="float32"):
    """Every node's copy of the weights, sent in full: [N, ..., m] of `dtype`."""
    return decode(gather_slow(shard, plan), shard.shape[-1], plan.weights, dtype)


def expected(plan, m, nodes, devices, *, weights=1, batches=1, hoisted=False, deltas=None):
    """Traffic of a training step, as `jaxpr_bytes.count` returns it.

    With N nodes of A devices, and w and g the bytes of m weights and gradients including scales, a
    weight needs (N-1)(2w + g) bytes on the slow axis: gathered twice, reduced once. A secondary
    copy makes it (N-1)(w + g). On the fast axis it needs (A-1) N (2w + h), where h is the bytes of
    m gradients there.

    Args:
        weights: number of such weights.
        batches: microbatches per step.
        hoisted: slow traffic occurs once per step, not once per microbatch.
        deltas: encoding of weight differences if they are sent in place of weights, once a step.
    """
    w, g = plan.weights.nbytes(m), plan.gradients.nbytes(m)
    gathers = 1 if plan.rung.secondary or hoisted else 2
    first = w if deltas is None else deltas.nbytes(m)
    slow = (nodes - 1) * (gathers * first + g) * (1 if hoisted else batches)
    fast = (devices - 1) * nodes * (2 * w + plan.fast_gradients.nbytes(m)) * batches
    return {plan.slow: float(weights * slow), plan.fast: float(weights * fast)}

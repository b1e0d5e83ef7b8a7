"""Sharded weights of any shape, as leaves of a parameter tree.

`collectives` sends flat vectors. `ShardLayout` converts shards of arrays to and from these. Two
types can replace an array in a parameter tree: `ShardedWeight`, which is gathered over both axes
when a layer uses it, and `NodeWeight`, already gathered over the slow axis. Both are pytrees with
layers as their leading axis, so a scan over layers slices them.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxrl_eff.parallel.codec import Blocks, encode
from jaxrl_eff.parallel.zero import collectives
from jaxrl_eff.parallel.zero.levels import ZeroConfig, ZeroLevel


@dataclasses.dataclass(frozen=True)
class ShardLayout:
    """Sharding of a weight and the encoding of its transfers.

    A device's shard of shape `[..., d, ...]` is flattened to `[*apart, m]`: the axes sharded over
    other mesh axes, then everything else with the sharded axis first, so that the concatenated
    shards are the full weight.

    Attributes:
        shape: of a shard, without layers.
        axis: axis of `shape` that is sharded over nodes and over the devices of each.
        plan: the encodings and the mesh axes.
        apart: axes sharded over mesh axes other than the plan's; no block crosses them.
        raw: send the weight unencoded regardless of the plan; for integer codes and small weights.
        local: the weight is replicated across nodes and sharded over the devices of each; nothing
            crosses the slow axis, as if there were one node.
    """

    shape: tuple[int, ...]
    axis: int
    plan: ZeroConfig
    apart: tuple[int, ...] = ()
    raw: bool = False
    local: bool = False

    @property
    def m(self) -> int:
        """Number of elements in the last axis of a flat shard."""
        return math.prod(n for i, n in enumerate(self.shape) if i not in self.apart)

    @property
    def rows(self) -> int:
        """Number of flat vectors of `m` elements in a shard."""
        return math.prod(self.shape[i] for i in self.apart)

    def sent(self, blocks: Blocks) -> int:
        """Bytes of a shard in this encoding."""
        return self.rows * blocks.nbytes(self.m)

    def _order(self) -> list[int]:
        rest = [i for i in range(len(self.shape)) if i != self.axis and i not in self.apart]
        return [*self.apart, self.axis, *rest]

    def flat(self, x: jax.Array) -> jax.Array:
        """`[*lead, *shape]`, with any length of the sharded axis, -> `[*lead, *apart, -1]`."""
        lead = x.ndim - len(self.shape)
        order = [*range(lead), *(lead + i for i in self._order())]
        kept = lead + len(self.apart)
        x = x.transpose(order)
        return x.reshape(*x.shape[:kept], -1)

    def shaped(self, x: jax.Array) -> jax.Array:
        """Inverse of `flat`, for any number of concatenated shards."""
        order, lead = self._order(), x.ndim - 1 - len(self.apart)
        sizes = [self.shape[i] for i in order]
        sizes[len(self.apart)] *= x.shape[-1] // self.m
        x = x.reshape(*x.shape[:lead], *sizes)
        back = sorted(range(len(order)), key=order.__getitem__)
        return x.transpose(*range(lead), *(lead + i for i in back))

    def flat_by_node(self, x: jax.Array) -> jax.Array:
        """`[*lead, ..., N, d, ...]`, nodes before the sharded axis, -> `[*lead, *apart, N, m]`."""
        lead = x.ndim - 1 - len(self.shape)
        x = jnp.moveaxis(x, lead + self.axis, lead)  # [*lead, N, *shape]
        return jnp.moveaxis(self.flat(x), lead, -2)

    def shaped_by_node(self, x: jax.Array) -> jax.Array:
        """Inverse of `flat_by_node`."""
        lead = x.ndim - 2 - len(self.apart)
        x = self.shaped(jnp.moveaxis(x, -2, lead))
        return jnp.moveaxis(x, lead, lead + self.axis)

    # Collectives on a device's shard

    def renewed(self, x: jax.Array, copy: jax.Array) -> jax.Array:
        """Every node's copy of a weight, updated by differences; see `send_deltas`.

        Args:
            x: this device's current shard, with leading axes.
            copy: the copy so far, `[*lead, ..., N, d, ...]`.
        """
        copy = jnp.moveaxis(self.flat_by_node(copy), -2, 0)
        new = collectives.send_deltas(self.flat(x), copy, self.plan, self.plan.deltas)
        return self.shaped_by_node(jnp.moveaxis(new, 0, -2))

    def _stage(self, x: jax.Array, copy: jax.Array | None) -> jax.Array:
        """`[N, *lead, *apart, bytes]`, gathered or encoded from the node's copy."""
        if self.local:
            return encode(self.flat(x), self.plan.weights)[None]
        if copy is None:
            return collectives.gather_slow(self.flat(x), self.plan)
        return encode(jnp.moveaxis(self.flat_by_node(copy), -2, 0), self.plan.weights)

    def near(self, x: jax.Array, copy: jax.Array | None = None) -> jax.Array:
        """Gathers a shard with leading axes over the slow axis: `[*lead, N, ...]`.

        Args:
            x: this device's shard.
            copy: the node's copy of `renewed`, used in place of the gather; None: gather.
        """
        lead = x.ndim - len(self.shape)
        if self.raw and self.local:
            return jnp.expand_dims(x, lead)
        if self.raw:
            return lax.all_gather(x, self.plan.slow, axis=lead)
        return jnp.moveaxis(self._stage(x, copy), 0, lead)

    def joined(self, near: jax.Array) -> jax.Array:
        """Gathers the full weight from the result of `near` without leading axes."""
        if not self.raw:
            return self.shaped(collectives.gather_fast(near, self.m, self.plan))
        every = lax.all_gather(near, self.plan.fast, axis=1)  # [N, A, *shape]
        every = jnp.moveaxis(every, (0, 1), (self.axis, self.axis + 1))
        n = math.prod(every.shape[self.axis : self.axis + 3])
        return every.reshape(*self.shape[: self.axis], n, *self.shape[self.axis + 1 :])

    def gathered(self, x: jax.Array, copy: jax.Array | None = None) -> jax.Array:
        """Gathers the full weight from a shard with leading axes; `copy` as for `near`."""
        lead = x.ndim - len(self.shape)
        if self.raw:
            return _over(self._gathered_raw, lead)(x)
        return self.shaped(collectives.gather_fast(self._stage(x, copy), self.m, self.plan))

    def _gathered_raw(self, x: jax.Array) -> jax.Array:
        return self.joined(self.near(x))

    def reduced(
        self, gradient: jax.Array, feedback: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Reduces all devices' gradients of the full weight to this device's shard, in float32.

        Args:
            gradient: of the full weight, with leading axes.
            feedback: quantization residual of the last reduction, `[*lead, ..., N, d, ...]`, or
                None.

        Returns:
            the sum, and the new residual.
        """
        feedback = None if feedback is None else self.flat_by_node(feedback)
        total, feedback = collectives.reduce_gradients(self.flat(gradient), feedback, self.plan)
        return self.shaped(total), None if feedback is None else self.shaped_by_node(feedback)

    def reduced_slow(
        self, slot: jax.Array, feedback: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """`reduced` for `[*lead, *apart, N, m]` already summed over the fast axis."""
        feedback = None if feedback is None else self.flat_by_node(feedback)
        total, feedback = collectives.reduce_slow(slot, feedback, self.plan)
        return self.shaped(total), None if feedback is None else self.shaped_by_node(feedback)


def _over(fn: Callable, lead: int) -> Callable:
    """Applies `jax.vmap` to fn once per leading axis."""
    for _ in range(lead):
        fn = jax.vmap(fn)
    return fn


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ShardedWeight:
    """Device's shard of a weight, as a leaf of the parameters.

    Its gradient is the reduced gradient of the full weight; the "gradient" of `error_feedback` is
    the new quantization residual.

    Attributes:
        part: `[(layers,) *cut.shape]`.
        error_feedback: quantization residual of the last reduction,
            `[(layers,) ..., N, d, ...]`; None: no error feedback.
        cut: how the weight is sharded and sent.
        trained: True if the weight gets a gradient.
    """

    part: Any  # like any tree leaf, sometimes a shape or a sharding
    error_feedback: Any
    cut: ShardLayout = dataclasses.field(metadata={"static": True})
    trained: bool = dataclasses.field(metadata={"static": True})
    transient: ClassVar[bool] = True

    def materialize(self) -> jax.Array:
        """Gathers the full weight of one layer, in the plan's dtype."""
        cut = self.cut
        if cut.local:  # its first stage needs no transfer, so it is recomputed rather than saved
            return cut.joined(cut.near(self.part))
        if cut.raw:
            stage = cut.near(self.part)
            if cut.plan.rung.secondary:
                stage = checkpoint_name(stage, collectives.STAGE)
            return cut.joined(stage)
        if not self.trained:
            return cut.shaped(collectives.gather_frozen(cut.flat(self.part), cut.plan))
        feedback = None if self.error_feedback is None else cut.flat_by_node(self.error_feedback)
        return cut.shaped(collectives.gather_weights(cut.flat(self.part), feedback, cut.plan))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NodeWeight:
    """Weight gathered over the slow axis once for several microbatches.

    Attributes:
        stage: `[(layers,) N, ...]` of `ShardLayout.near`; N is 1 for weights replicated across
            nodes.
        slot: `[(layers,) *apart, N, m]` float32 zeros, whose gradient is that of the weight, summed
            over the fast axis; None if the weight is not trained.
        cut: how the weight is sharded and sent.
    """

    stage: Any
    slot: Any
    cut: ShardLayout = dataclasses.field(metadata={"static": True})
    transient: ClassVar[bool] = True

    def materialize(self) -> jax.Array:
        """Gathers the full weight of one layer, in the plan's dtype."""
        if self.slot is None:
            return self.cut.joined(self.stage)
        return self.cut.shaped(collectives.gather_held(self.stage, self.slot, self.cut.plan))


def exact(plan: ZeroConfig) -> ZeroConfig:
    """The plan with exact float32 communication on the same axes."""
    return dataclasses.replace(plan, rung=ZeroLevel("exact", 32, 32), fast_bits=32)

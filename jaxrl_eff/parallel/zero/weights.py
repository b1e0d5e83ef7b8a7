"""Weights of any shape of which every device has a shard, as a model meets them.

`quantized` sends flat vectors. Here is how a shard of a matrix becomes one, and two things that may
stand in a tree of parameters instead of an array: a `ShardedWeight`, which is gathered over both
axes when a layer uses it, and a `NodeWeight`, which is one after the slow axis has been crossed.
Both are trees with layers as their first axis, so a loop over layers hands each its own.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxrl_eff.parallel.codec import Blocks, encode
from jaxrl_eff.parallel.zero import collectives
from jaxrl_eff.parallel.zero.levels import ZeroConfig, ZeroLevel


@dataclasses.dataclass(frozen=True)
class ShardLayout:
    """How a weight is split, and how it travels.

    A device's shard of shape `[..., d, ...]` becomes `[*apart, m]`: the axes that other devices
    have parts of, and everything else with the split axis first, so that shards one after the other
    are the whole weight.

    Attributes:
        shape: of a shard, without layers.
        axis: of `shape`, which is split over nodes and over the devices of each.
        plan: how numbers are sent.
        apart: axes that a mesh axis splits which is not the plan's; no block crosses them.
        raw: the weight travels as it is, whatever the plan says of weights: codes, or what is
            small.
        local: every node has the whole weight, split over its devices: nothing crosses the slow
            axis, as if there were one node.
    """

    shape: tuple[int, ...]
    axis: int
    plan: ZeroConfig
    apart: tuple[int, ...] = ()
    raw: bool = False
    local: bool = False

    @property
    def m(self) -> int:
        """Elements of the last axis of a flat shard."""
        return math.prod(n for i, n in enumerate(self.shape) if i not in self.apart)

    @property
    def rows(self) -> int:
        """Flat vectors of `m` elements in a shard."""
        return math.prod(self.shape[i] for i in self.apart)

    def sent(self, blocks: Blocks) -> int:
        """Bytes of a shard."""
        return self.rows * blocks.nbytes(self.m)

    def _order(self) -> list[int]:
        rest = [i for i in range(len(self.shape)) if i != self.axis and i not in self.apart]
        return [*self.apart, self.axis, *rest]

    def flat(self, x: jax.Array) -> jax.Array:
        """`[*lead, *shape]`, its split axis as long as it likes -> `[*lead, *apart, -1]`."""
        lead = x.ndim - len(self.shape)
        order = [*range(lead), *(lead + i for i in self._order())]
        kept = lead + len(self.apart)
        x = x.transpose(order)
        return x.reshape(*x.shape[:kept], -1)

    def shaped(self, x: jax.Array) -> jax.Array:
        """`flat` undone, for as many shards as there are."""
        order, lead = self._order(), x.ndim - 1 - len(self.apart)
        sizes = [self.shape[i] for i in order]
        sizes[len(self.apart)] *= x.shape[-1] // self.m
        x = x.reshape(*x.shape[:lead], *sizes)
        back = sorted(range(len(order)), key=order.__getitem__)
        return x.transpose(*range(lead), *(lead + i for i in back))

    def flat_left(self, left: jax.Array) -> jax.Array:
        """`[*lead, ..., N, d, ...]`, nodes before the split axis -> `[*lead, *apart, N, m]`."""
        lead = left.ndim - 1 - len(self.shape)
        left = jnp.moveaxis(left, lead + self.axis, lead)  # [*lead, N, *shape]
        return jnp.moveaxis(self.flat(left), lead, -2)

    def shaped_left(self, left: jax.Array) -> jax.Array:
        """`flat_left` undone."""
        lead = left.ndim - 2 - len(self.apart)
        left = self.shaped(jnp.moveaxis(left, -2, lead))
        return jnp.moveaxis(left, lead, lead + self.axis)

    # What a device does with its shard

    def renewed(self, x: jax.Array, held: jax.Array) -> jax.Array:
        """What every node holds of a weight once differences were sent, see `send_deltas`.

        Args:
            x: this device's shard now, with leading axes.
            held: so far, `[*lead, ..., N, d, ...]`.
        """
        held = jnp.moveaxis(self.flat_left(held), -2, 0)
        new = collectives.send_deltas(self.flat(x), held, self.plan, self.plan.deltas)
        return self.shaped_left(jnp.moveaxis(new, 0, -2))

    def _stage(self, x: jax.Array, held: jax.Array | None) -> jax.Array:
        """`[N, *lead, *apart, bytes]`: sent, or what the node holds already."""
        if self.local:
            return encode(self.flat(x), self.plan.weights)[None]
        if held is None:
            return collectives.gather_slow(self.flat(x), self.plan)
        return encode(jnp.moveaxis(self.flat_left(held), -2, 0), self.plan.weights)

    def near(self, x: jax.Array, held: jax.Array | None = None) -> jax.Array:
        """A shard, with leading axes, after the slow axis was crossed: `[*lead, N, ...]`.

        Args:
            held: of `renewed`, instead of what would be sent.
        """
        lead = x.ndim - len(self.shape)
        if self.raw and self.local:
            return jnp.expand_dims(x, lead)
        if self.raw:
            return lax.all_gather(x, self.plan.slow, axis=lead)
        return jnp.moveaxis(self._stage(x, held), 0, lead)

    def joined(self, near: jax.Array) -> jax.Array:
        """The whole weight, from what `near` made without leading axes."""
        if not self.raw:
            return self.shaped(collectives.gather_fast(near, self.m, self.plan))
        every = lax.all_gather(near, self.plan.fast, axis=1)  # [N, A, *shape]
        every = jnp.moveaxis(every, (0, 1), (self.axis, self.axis + 1))
        n = math.prod(every.shape[self.axis : self.axis + 3])
        return every.reshape(*self.shape[: self.axis], n, *self.shape[self.axis + 1 :])

    def gathered(self, x: jax.Array, held: jax.Array | None = None) -> jax.Array:
        """The whole weight of a shard, with leading axes; `held` as for `near`."""
        lead = x.ndim - len(self.shape)
        if self.raw:
            return _over(self._gathered_raw, lead)(x)
        return self.shaped(collectives.gather_fast(self._stage(x, held), self.m, self.plan))

    def _gathered_raw(self, x: jax.Array) -> jax.Array:
        return self.joined(self.near(x))

    def reduced(
        self, gradient: jax.Array, left: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """The sum for this device's shard, float32, of all devices' gradients of the whole weight.

        Args:
            left: over from the last reduction, `[*lead, ..., N, d, ...]`.

        Returns:
            the sum, and what is left over now.
        """
        left = None if left is None else self.flat_left(left)
        total, left = collectives.reduce_gradients(self.flat(gradient), left, self.plan)
        return self.shaped(total), None if left is None else self.shaped_left(left)

    def reduced_slow(
        self, slot: jax.Array, left: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """As `reduced`, of `[*lead, *apart, N, m]` that was summed over the fast axis."""
        left = None if left is None else self.flat_left(left)
        total, left = collectives.reduce_slow(slot, left, self.plan)
        return self.shaped(total), None if left is None else self.shaped_left(left)


def _over(fn: Callable, lead: int) -> Callable:
    """The function of an array without its leading axes, over all of these at once."""
    for _ in range(lead):
        fn = jax.vmap(fn)
    return fn


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ShardedWeight:
    """A device's shard of a weight, in its place among the parameters.

    Its gradient is that of the whole weight, reduced; the "gradient" of `left` is what rounding
    leaves over this time.

    Attributes:
        part: `[(layers,) *cut.shape]`.
        left: over from the last reduction, `[(layers,) ..., N, d, ...]`; None: nothing is kept.
        trained: whether there will be a gradient.
    """

    part: Any  # as all of a tree's leaves, sometimes a shape or a layout
    left: Any
    cut: ShardLayout = dataclasses.field(metadata={"static": True})
    trained: bool = dataclasses.field(metadata={"static": True})

    def whole(self) -> jax.Array:
        """The weight of one layer, in the plan's dtype."""
        cut = self.cut
        if cut.local:  # its first stage is made again, and not kept
            return cut.joined(cut.near(self.part))
        if cut.raw:
            stage = cut.near(self.part)
            if cut.plan.rung.secondary:
                stage = checkpoint_name(stage, collectives.STAGE)
            return cut.joined(stage)
        if not self.trained:
            return cut.shaped(collectives.gather_frozen(cut.flat(self.part), cut.plan))
        left = None if self.left is None else cut.flat_left(self.left)
        return cut.shaped(collectives.gather_weights(cut.flat(self.part), left, cut.plan))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NodeWeight:
    """What a node holds of a weight, for several micro-batches: nothing crosses the slow axis.

    Attributes:
        stage: `[(layers,) N, ...]` of `ShardLayout.near`; N is 1 of what every node has whole.
        slot: `[(layers,) *apart, N, m]` float32 zeros, whose gradient is that of the weight, summed
            over the fast axis; None if the weight is not trained.
    """

    stage: Any
    slot: Any
    cut: ShardLayout = dataclasses.field(metadata={"static": True})

    def whole(self) -> jax.Array:
        """The weight of one layer, in the plan's dtype."""
        if self.slot is None:
            return self.cut.joined(self.stage)
        return self.cut.shaped(collectives.gather_held(self.stage, self.slot, self.cut.plan))


def exact(plan: ZeroConfig) -> ZeroConfig:
    """The plan's axes with sums in float32."""
    return dataclasses.replace(plan, rung=ZeroLevel("exact", 32, 32), fast_bits=32)

"""Parameter reallocation: moving a tree of arrays from one placement's layout to another's.

`jax.device_put` bounces an array through the host whenever a destination slice does not exist as a
whole source shard, and also for a mere change of layout on the same devices. A `Route` never does:

- same layout: the arrays themselves, no byte moves;
- same devices in the same order: one jitted identity, which XLA turns into collectives;
- other devices: a jitted identity brings the source to a layout whose shards are those of the
  destination, the shards are copied device to device, and a second identity finishes there.

Sources: ReaL (Mei et al. 2024, arXiv:2406.14088, parameter reallocation); jax's own transfer rules.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

REPLICA = "replica"


def _identity(tree: Any) -> Any:
    return tree


def _devices(sharding: NamedSharding) -> tuple[jax.Device, ...]:
    return tuple(sharding.mesh.devices.flat)


def _with_replicas(devices: tuple[jax.Device, ...], like: NamedSharding) -> NamedSharding:
    """`like`'s layout on other devices, repeated over a leading replica axis if these are more."""
    shape = like.mesh.devices.shape
    copies = len(devices) // like.mesh.devices.size
    grid = np.array(devices).reshape((copies, *shape))
    return NamedSharding(Mesh(grid, (REPLICA, *like.mesh.axis_names)), like.spec)


class Route:
    """A tree's way from one set of shardings to another, compiled on first use and replayed.

    Args:
        source, target: trees of `NamedSharding`, each over one mesh.
        donate: whether the source arrays may be consumed (same-device routes only).
    """

    def __init__(self, source: Any, target: Any, *, donate: bool = False):
        self.source, self.target = source, target
        pairs = list(zip(jax.tree.leaves(source), jax.tree.leaves(target), strict=True))
        a, b = (_devices(pairs[0][i]) for i in (0, 1)) if pairs else ((), ())
        self.alias = all(
            s.mesh.devices.tolist() == t.mesh.devices.tolist() and s.spec == t.spec
            for s, t in pairs
        )
        self._before = self._after = None
        self._between = target
        if self.alias:
            return
        if a == b:
            self._between = None
            self._after = jax.jit(
                _identity, out_shardings=target, donate_argnums=0 if donate else ()
            )
            return
        if len(a) % len(b) == 0:  # shards of the destination, made at the source
            staged = jax.tree.map(lambda t: _with_replicas(a, t), target)
            self._before = jax.jit(_identity, out_shardings=staged)
        elif len(b) % len(a) == 0:  # shards of the source, copied, and re-cut at the destination
            self._between = jax.tree.map(lambda s: _with_replicas(b, s), source)
            self._after = jax.jit(_identity, out_shardings=target)
        else:  # no common shape: whole copies on both sides
            whole = [
                jax.tree.map(lambda s, mesh=m: NamedSharding(mesh, PartitionSpec()), source)
                for m in (pairs[0][0].mesh, pairs[0][1].mesh)
            ]
            self._before = jax.jit(_identity, out_shardings=whole[0])
            self._between = whole[1]
            self._after = jax.jit(_identity, out_shardings=target)

    def __call__(self, tree: Any) -> Any:
        """Moves the tree. Returns at once; the copies run in the background."""
        if self.alias:
            return tree
        if self._before is not None:
            tree = self._before(tree)
        if self._between is not None:
            tree = jax.device_put(tree, self._between)
        return tree if self._after is None else self._after(tree)

"""Weight sync that sends only changed elements.

After one RL step at a small learning rate few bfloat16 weights change, since most updates are
smaller than half a unit in the last place. For every message of a dense transfer (`messages`),
`ChangedElements` sends (index, value) of the elements that differ from the last sent values, in
buffers of fixed capacity. If more have changed than fit, the tensor is sent in full: devices agree
on this by taking the maximum of their overflow flags on the device, so no host waits for a value.
Periodically everything is sent in full, with a checksum of what receivers should have had.

The receivers' copy is updated in place; the senders keep what they sent, in the copy's dtype. The
buckets of a `Route` are not used, so devices that belong to only one of the meshes hold stand-ins
as large as a shard.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_eff.parallel.reshard import bucket_run, buckets, changes_leaf, programs
from jaxrl_eff.parallel.reshard.layout import Network
from jaxrl_eff.parallel.reshard.messages import exchange
from jaxrl_eff.parallel.reshard.route import Route

DENSE_BELOW = 4096  # elements per message; for smaller ones indices cost more than they save


@dataclasses.dataclass(frozen=True)
class SyncConfig:
    """Settings for sending changes.

    Attributes:
        capacity: maximum fraction of a message's elements that can have changed; a tensor with more
            changes is sent in full.
        every: interval, in syncs, of full transfers that also check the copy.
        dense_below: tensors whose messages have fewer elements are always sent in full.

    Raises:
        ValueError: a value out of range.
    """

    capacity: float = 0.05
    every: int = 100
    dense_below: int = DENSE_BELOW

    def __post_init__(self):
        if not 0 < self.capacity <= 1:
            raise ValueError(f"capacity is {self.capacity}, but must be above 0, at most 1.")
        if self.every < 1:
            raise ValueError(f"every is {self.every}, but must be at least 1.")


@dataclasses.dataclass(frozen=True)
class Synced:
    """Statistics of one sync: scalars on the devices of both meshes.

    Attributes:
        changed: fraction of the elements in messages that differed from the last sent values.
        received: bytes that all devices received.
        whole: bytes that a dense sync receives.
        dense: number of tensors that exceeded the capacity and were sent in full (0 in a dense
            sync).
        drifted: number of messages whose checksum did not match the receiver's copy; -1 if not
            checked.
    """

    changed: jax.Array
    received: jax.Array
    whole: float
    dense: jax.Array
    drifted: jax.Array

    def numbers(self) -> dict[str, jax.Array]:
        """Values that vary between syncs, by name."""
        names = ("changed", "received", "dense", "drifted")
        return {name: getattr(self, name) for name in names}


class ChangedElements:
    """Incremental sync of a tree's copy on another mesh.

    Args:
        source: tree of arrays or `jax.ShapeDtypeStruct`s with shardings.
        target: tree of shardings.
        config: how changes are sent.
        dtype: of the copy; None keeps that of every array.
        network: as for `Route`.

    Raises:
        ValueError: the source or the target is not in the devices' default memory.
    """

    def __init__(
        self,
        source: Any,
        target: Any,
        config: SyncConfig = SyncConfig(),
        *,
        dtype: Any = jnp.bfloat16,
        network: Network | None = None,
    ):
        self._network = network or Network.local()
        self._config = config
        dtype = None if dtype is None else jnp.dtype(dtype)
        leaves, self._treedef = jax.tree.flatten(source)
        targets = self._treedef.flatten_up_to(target)
        # fresh, since the source can be donated later.
        self._dense = Route(source, target, dtype=dtype, fresh=True, network=self._network)
        self._kept = Route(source, self._dense.source, dtype=dtype, network=self._network)
        self._copy = jax.jit(lambda t: jax.tree.map(jnp.copy, t), out_shardings=self._dense.source)
        self._moves = []
        for x, t in zip(leaves, targets, strict=True):
            m = buckets.Move.of(x.shape, x.dtype, x.sharding, t, dtype)
            if m.fetched is not None or m.stored is not None:
                raise ValueError("a delta sync is between arrays in the devices' own memory.")
            self._moves.append(m)
        ends = {d for m in self._moves for d in (*m.source.devices, *m.target.devices)}
        self._devices = tuple(sorted(ends))
        self._plans = [exchange(m.source, m.target, self._network) for m in self._moves]
        self._whole = math.fsum(
            p.total * m.nbytes for p, m in zip(self._plans, self._moves, strict=True)
        )

    def compile(self) -> "ChangedElements":
        """Compiles the programs of `start` and of calls."""
        for route in (self._dense, self._kept):
            route.compile()
        if self._moves and self._mine(self._devices):
            for dense in (False, True):
                self._program(dense)
        return self

    def start(self, tree: Any) -> tuple[Any, Any]:
        """Sends the first copy in full; returns (copy, sent), where `sent` stays on the source."""
        sent = self._kept(tree)
        if self._kept.alias and self._mine(self._source_devices):
            sent = self._copy(sent)  # the source can be donated later
        return self._dense(tree), sent

    def __call__(
        self, tree: Any, copy: Any, sent: Any, step: int
    ) -> tuple[Any, Any, Synced | None]:
        """Updates the copy.

        Args:
            tree: the source's arrays.
            copy, sent: of the last sync; donated.
            step: index of this sync, equal in all processes; determines whether it is dense.

        Returns:
            copy, sent, and statistics (None in a process that owns no device of either mesh).
        """
        if not self._moves or not self._mine(self._devices):
            return copy, sent, None
        trees = [self._treedef.flatten_up_to(t) for t in (tree, sent, copy)]
        views = [self._views(leaves, k) for k, leaves in enumerate(trees)]
        program = self._program(dense=step % self._config.every == 0)
        out = program(*views[0], *views[1], *views[2])
        n = len(self._moves)
        new = [
            bucket_run.assembled(m, bucket_run.held(x), m.source, like.sharding)
            for x, m, like in zip(out[:n], self._moves, trees[1], strict=True)
        ]
        now = [
            bucket_run.finish(m, bucket_run.held(x))
            for x, m in zip(out[n : 2 * n], self._moves, strict=True)
        ]
        changed, received, dense, drifted = out[2 * n :]
        done = Synced(changed, received, self._whole, dense, drifted)
        return self._treedef.unflatten(now), self._treedef.unflatten(new), done

    @property
    def _source_devices(self) -> tuple[int, ...]:
        return tuple(sorted({d for m in self._moves for d in m.source.devices}))

    def _mine(self, devices: tuple[int, ...]) -> bool:
        return bool(programs.local_devices(devices))

    def _shapes(self, which: int) -> list[tuple[tuple[int, ...], Any]]:
        """(shape, dtype) of the shards of the source (0), the sent values (1) or the copy (2)."""
        return [
            (
                buckets.shard(m.shape, m.target if which == 2 else m.source),
                m.dtype if not which else m.out,
            )
            for m in self._moves
        ]

    def _views(self, leaves: list[Any], which: int) -> list[Any]:
        """Stacks shards over the devices of both meshes, with zeros where a device has none."""
        mine = programs.local_devices(self._devices)
        out = []
        for x, m, (shape, dtype) in zip(leaves, self._moves, self._shapes(which), strict=True):
            layout = m.target if which == 2 else m.source
            parts = bucket_run.held(x) if self._mine(layout.devices) else {}
            lacking = tuple(d for d in mine if d not in parts)
            if lacking:
                (zeros,) = programs.zeros(lacking, ((shape, dtype),))()
                parts = parts | bucket_run.held(zeros)
            out.append(programs.view(self._devices, shape, dtype, [parts[d] for d in mine]))
        return out

    def _program(self, dense: bool) -> Any:
        n = len(self._moves)
        inputs = [s for which in range(3) for s in self._shapes(which)]
        ranks = [len(s) for s, _ in (*self._shapes(1), *self._shapes(2))] + [0] * 4
        plans = tuple(self._plans)

        def fn(*operands: Any) -> tuple[Any, ...]:
            # Copied, since jit can forward an input buffer as the output, and training donates it.
            news = [
                jnp.copy(x.astype(m.out)) for x, m in zip(operands[:n], self._moves, strict=True)
            ]
            leaves = [
                changes_leaf.ChangedLeaf(plan, self._devices, *values, self._config)
                for plan, *values in zip(
                    plans, news, operands[n : 2 * n], operands[2 * n :], strict=True
                )
            ]
            return changes_leaf.update(leaves, news, dense, self._whole)

        key = ("delta", plans, self._config, dense)
        return programs.compiled(key, self._devices, inputs, ranks, fn, tuple(range(n, 3 * n)))

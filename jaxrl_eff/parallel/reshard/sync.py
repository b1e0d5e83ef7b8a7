"""Weights that follow a model from mesh to mesh and remember what they were.

A `Route` sends a tree whole every time. A `WeightSync` keeps the copy that it made: tensors that
training leaves as they are (the frozen base of an adapter) go once, and of the others only the
elements that have changed (`delta`). What arrives is the same, bit for bit; the price is memory
between two calls: the copy where it is used, and what was sent last where it comes from. Where that
would still be too much, differences go in 8 or 4 bits, and what arrives is rounded."""

import dataclasses
from typing import Any

import jax

from jaxrl_eff.parallel.reshard.changes import DENSE_BELOW, ChangedElements, Synced
from jaxrl_eff.parallel.reshard.layout import Network
from jaxrl_eff.parallel.reshard.route import Report, Route


@dataclasses.dataclass(frozen=True)
class SyncConfig:
    """How changes are sent.

    Attributes:
        capacity: share of a message's elements that may have changed; a tensor with more goes as
            a whole.
        bits: 0; or 8 or 4: the differences of all elements are sent, rounded, in a closed loop.
        block: elements that share a scale then, at most.
        every: syncs between two in which all goes as a whole and the copy is checked.
        dense_below: tensors whose messages have fewer elements always go as a whole.
    """

    capacity: float = 0.05
    bits: int = 0
    block: int = 256
    every: int = 100
    dense_below: int = DENSE_BELOW

    def __post_init__(self):
        if not 0 < self.capacity <= 1:
            raise ValueError(f"capacity is {self.capacity}, but must be above 0, at most 1.")
        if self.bits not in (0, 4, 8):
            raise ValueError(f"bits is {self.bits}, but must be 0, 4 or 8.")
        if self.every < 1:
            raise ValueError(f"every is {self.every}, but must be at least 1.")


class WeightSync:
    """Like a `Route`, for one tree that is moved again and again.

    Args:
        source, target: as for `Route`; the source's leaves have shapes and dtypes.
        still: tree of bools: leaves that are sent again only if they are other arrays.
        changes: how the rest goes.
        network: as for `Route`.

    Attributes:
        done: what the last call sent of changes; None after the first one, and in processes that
            have no part in it.

    Raises:
        ValueError: an array waits in host memory.
    """

    def __init__(
        self,
        source: Any,
        target: Any,
        *,
        still: Any,
        changes: SyncConfig,
        network: Network | None = None,
    ):
        leaves, self._treedef = jax.tree.flatten(source)
        targets = self._treedef.flatten_up_to(target)
        self._is_still = self._treedef.flatten_up_to(still)
        self._whole = Route(source, target, network=network)
        self._once = Route(*map(self._still, (leaves, targets)), network=network)
        self._delta = ChangedElements(
            *map(self._moving, (leaves, targets)), dtype=None, network=network,
            **dataclasses.asdict(changes),
        )  # fmt: skip
        self._seen: list[Any] = []  # the still leaves that were sent
        self._copies: tuple[list[Any], list[Any], list[Any]] | None = None
        self._calls = 0
        self.done: Synced | None = None

    @property
    def alias(self) -> bool:
        """As of `Route`."""
        return self._whole.alias

    def report(self) -> Report:
        """Of what a call moves at most, which the first one does."""
        return self._whole.report()

    def compile(self) -> "WeightSync":
        """Compiles what calls will run."""
        self._once.compile()
        self._delta.compile()
        return self

    def __call__(self, tree: Any) -> Any:
        """Brings the copy up to date.

        Returns:
            the copy. The next call consumes the part of it that changes.
        """
        leaves = self._treedef.flatten_up_to(tree)
        still, moving = self._still(leaves), self._moving(leaves)
        known = self._copies is not None
        if not known or any(a is not b for a, b in zip(still, self._seen, strict=True)):
            self._seen, kept = still, self._once(still)
        else:
            kept = self._copies[0]
        if not known:
            copy, sent = self._delta.start(moving)
        else:
            self._calls += 1
            copy, sent, self.done = self._delta(moving, *self._copies[1:], self._calls)
        self._copies = kept, copy, sent
        ours, theirs = iter(kept), iter(copy)
        return self._treedef.unflatten([next(ours if s else theirs) for s in self._is_still])

    def restart(self) -> None:
        """The next call sends everything, as the first one did."""
        self._copies, self._calls = None, 0

    def _still(self, leaves: list[Any]) -> list[Any]:
        return [x for x, s in zip(leaves, self._is_still, strict=True) if s]

    def _moving(self, leaves: list[Any]) -> list[Any]:
        return [x for x, s in zip(leaves, self._is_still, strict=True) if not s]

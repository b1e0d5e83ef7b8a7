"""Incremental weight sync between meshes.

A `Route` sends the full tree on every call. A `WeightSync` keeps the copy on the target mesh: it
sends tensors that training does not change (the frozen base of an adapter) once, and of the others
only the changed elements (`changes`). The result is bitwise equal to a full transfer, but memory is
held between calls: the copy on the target and the last sent values on the source.
"""

from typing import Any

import jax

from jaxrl_eff.parallel.reshard.changes import ChangedElements, SyncConfig, Synced
from jaxrl_eff.parallel.reshard.layout import Network
from jaxrl_eff.parallel.reshard.route import Report, Route


class WeightSync:
    """`Route` for a tree that is transferred repeatedly.

    Args:
        source, target: as for `Route`; the source's leaves have shapes and dtypes.
        still: tree of bools; True marks frozen leaves, sent again only if the array objects change.
        changes: settings for the other leaves.
        network: as for `Route`.

    Attributes:
        done: statistics of the last call's changes; None after the first call, which sent
            everything, and in processes that own no device of either mesh.

    Raises:
        ValueError: an array is in host memory.
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
        moving = map(self._moving, (leaves, targets))
        self._delta = ChangedElements(*moving, changes, dtype=None, network=network)
        self._seen: list[Any] = []  # the frozen leaves sent last
        self._copies: tuple[list[Any], list[Any], list[Any]] | None = None
        self._calls = 0
        self.done: Synced | None = None

    @property
    def alias(self) -> bool:
        """True if the result is the source itself, as for `Route`."""
        return self._whole.alias

    def report(self) -> Report:
        """Report on a full transfer, such as the first call: an upper bound for later ones."""
        return self._whole.report()

    def compile(self) -> "WeightSync":
        """Compiles the programs of later calls."""
        self._once.compile()
        self._delta.compile()
        return self

    def __call__(self, tree: Any) -> Any:
        """Updates the copy.

        Args:
            tree: the source's arrays.

        Returns:
            the copy. The next call donates the part of it that changes.
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

    def _still(self, leaves: list[Any]) -> list[Any]:
        return [x for x, s in zip(leaves, self._is_still, strict=True) if s]

    def _moving(self, leaves: list[Any]) -> list[Any]:
        return [x for x, s in zip(leaves, self._is_still, strict=True) if not s]

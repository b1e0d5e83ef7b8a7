"""Sync of changed elements of one tensor, in code that runs on every device of a program."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxrl_eff.parallel.reshard import exchange
from jaxrl_eff.parallel.reshard.collectives import Exchange, Round


def update(
    leaves: list["ChangedLeaf"], news: list[Any], dense: bool, whole: float
) -> tuple[Any, ...]:
    """Updates all copies.

    Args:
        leaves: the tensors.
        news: their current values.
        dense: send everything, and check the copies first.
        whole: bytes that all devices receive if everything is sent.

    Returns:
        values to keep on the source, copies, and the numbers of `changes.Synced`.
    """
    zero = jnp.float32(0)
    changed = lax.psum(sum((leaf.changed() for leaf in leaves), start=zero), exchange.AXIS)
    elements = max(1, sum(leaf.elements for leaf in leaves))
    drifted = jnp.int32(-1)
    if dense:
        drifted = lax.psum(
            sum((leaf.drifted() for leaf in leaves), start=jnp.int32(0)), exchange.AXIS
        )
        out = [leaf.dense() for leaf in leaves]
        full = [jnp.int32(0)] * len(leaves)
        received = jnp.float32(whole)
    else:
        over = [leaf.overflows() for leaf in leaves]
        full = lax.pmax(jnp.stack(over), exchange.AXIS) if over else jnp.zeros(0, jnp.int32)
        out = [leaf.updated(full[i] > 0) for i, leaf in enumerate(leaves)]
        received = sum(
            (
                jnp.where(full[i] > 0, leaf.dense_bytes, leaf.sparse_bytes)
                for i, leaf in enumerate(leaves)
            ),
            start=zero,
        )
    count = sum((full[i] for i in range(len(leaves))), start=jnp.int32(0))
    return (*news, *out, changed / jnp.float32(elements), received, count, drifted)


class ChangedLeaf:
    """State of one tensor while the program is traced; `config` is a `changes.SyncConfig`."""

    def __init__(
        self, plan: Exchange, devices: tuple[int, ...], new: Any, sent: Any, copy: Any, config: Any
    ):
        self._plan, self._devices = plan, devices
        self._new, self._sent, self._copy = new, sent, copy
        self._units = exchange.ratios(new.shape, plan.units)
        sizes = [math.prod(r.size) * math.prod(self._units) for r in plan.rounds]
        self._capacity = [max(1, math.ceil(config.capacity * n)) for n in sizes]
        item = new.dtype.itemsize
        self.elements = sum(len(r.boxes) * n for r, n in zip(plan.rounds, sizes, strict=True))
        self.dense_bytes = jnp.float32(self.elements * item)
        self._always_dense = item not in (2, 4) or min(sizes, default=0) < config.dense_below
        self.sparse_bytes = self.dense_bytes
        if not self._always_dense:
            rows = zip(plan.rounds, self._capacity, strict=True)
            self.sparse_bytes = jnp.float32(sum(len(r.boxes) * k for r, k in rows) * (4 + item))

    def _cut(self, r: Round, x: Any) -> Any:
        return exchange.taken(r, self._devices, [self._units], [x])[0]

    def _put(self, r: Round, whole: Any, part: Any) -> Any:
        return exchange.placed(self._plan, r, self._devices, [self._units], [whole], [part])[0]

    def _sends(self, r: Round) -> Any:
        return exchange.mine(self._devices, {b.source: 1 for b in r.boxes}, 0)

    def _send(self, r: Round, message: Any) -> Any:
        return exchange.together([exchange.sent(r.pairs, self._devices, [message])])[0][0]

    def _differs(self, r: Round) -> Any:
        """Mask of the elements of a message that have changed, by bitwise comparison."""
        new, sent = (_bits(self._cut(r, x)) for x in (self._new, self._sent))
        return (new != sent).reshape(-1)

    def changed(self) -> Any:
        counts = [
            self._differs(r).sum(dtype=jnp.float32) * self._sends(r).astype(jnp.float32)
            for r in self._plan.rounds
        ]
        return sum(counts, start=jnp.float32(0))

    def overflows(self) -> Any:
        """1 if a message of this device has more changes than its capacity, otherwise 0."""
        if self._always_dense:
            return jnp.int32(0)
        over = jnp.int32(0)
        for r, k in zip(self._plan.rounds, self._capacity, strict=True):
            count = self._differs(r).sum(dtype=jnp.int32)
            over = jnp.maximum(over, (count > k).astype(jnp.int32) * self._sends(r))
        return over

    def updated(self, full: Any) -> Any:
        if self._always_dense:
            return self.dense()
        return lax.cond(full, self.dense, self._sparse)

    def _received(self, message: Callable[[int, Round, Any], Any]) -> Any:
        """The copy, updated with the parts that this device holds itself and with messages.

        Args:
            message: (number of a round, the round, the copy) -> the received part.
        """
        copy = self._copy
        for r in self._plan.kept:
            copy = self._put(r, copy, self._cut(r, self._new))
        for i, r in enumerate(self._plan.rounds):
            copy = self._put(r, copy, message(i, r, copy))
        return copy

    def dense(self) -> Any:
        """The copy, with every message sent in full."""

        def message(_: int, r: Round, copy: Any) -> Any:
            return self._send(r, _bits(self._cut(r, self._new))).view(copy.dtype)

        return self._received(message)

    def _sparse(self) -> Any:
        """The copy, with only changes sent: indices and values in one message."""

        def message(i: int, r: Round, copy: Any) -> Any:
            new, k = _bits(self._cut(r, self._new)), self._capacity[i]
            (at,) = jnp.nonzero(self._differs(r), size=k, fill_value=new.size)
            values = new.reshape(-1).at[at].get(mode="fill", fill_value=0)
            got = self._send(r, jnp.concatenate([at.astype(jnp.uint32).view(new.dtype), values]))
            at, values = got[:-k].view(jnp.uint32).astype(jnp.int32), got[-k:]
            old = self._cut_of_copy(r, copy)
            part = _bits(old).reshape(-1).at[at].set(values, mode="drop")
            return part.reshape(old.shape).view(copy.dtype)

        return self._received(message)

    def _cut_of_copy(self, r: Round, copy: Any) -> Any:
        return exchange.received(r, self._devices, [self._units], [copy])[0]

    def drifted(self) -> Any:
        """Number of messages for which this device's copy differs from the last sent values."""
        wrong = jnp.int32(0)
        for r in self._plan.rounds:
            told = self._send(r, _checksum(self._cut(r, self._sent)))
            bad = (told != _checksum(self._cut_of_copy(r, self._copy))).astype(jnp.int32)
            gets = exchange.mine(self._devices, {b.target: 1 for b in r.boxes}, 0)
            wrong = wrong + bad[0] * gets
        return wrong


def _bits(x: Any) -> Any:
    return x.view({1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])


def _checksum(x: Any) -> Any:
    """32-bit checksum that depends on every bit and its position."""
    bits = _bits(x).reshape(-1).astype(jnp.uint32)
    place = jnp.arange(bits.size, dtype=jnp.uint32)
    mixed = (bits + jnp.uint32(1)) * (place * jnp.uint32(2654435761) | jnp.uint32(1))
    return (mixed ^ (mixed >> jnp.uint32(15))).sum(dtype=jnp.uint32)[None]

"""Weight sync that sends only what changed.

After one RL step at a small learning rate few bfloat16 weights have changed, since most updates are
smaller than half a unit in the last place. Of every message of the dense way (`rounds`) a
`ChangedElements` sends (index, value) of the elements that differ from what was sent last, in
buffers of a fixed capacity. Where more have changed than fit, the tensor goes as a whole: all
devices know, because they take the maximum of their overflow flags first, so no process waits for a
number. Now and then everything goes as a whole, with a checksum of what the receivers should have
had.

The receivers' copy is updated in place; the senders keep what they sent in its dtype. Left out: the
buckets of a `Route`, so a stand-in as large as a shard exists on devices outside of either mesh.

With `bits` a message has the differences of all its elements instead, rounded. Then the senders
keep what receivers have after that, and the next difference is to it: what rounding left over is
sent later, and errors do not add up. All receivers have the same bits, whatever their shards:
blocks that share a scale lie within the smallest piece that any message can have, and a code times
its scale, which has 8 bits of mantissa, is exact in float32.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxrl_eff.parallel.codec import Blocks, decode, encode
from jaxrl_eff.parallel.reshard import buckets, spmd
from jaxrl_eff.parallel.reshard.collectives import Exchange
from jaxrl_eff.parallel.reshard.layout import Network
from jaxrl_eff.parallel.reshard.messages import exchange
from jaxrl_eff.parallel.reshard.route import Route

DENSE_BELOW = 4096  # elements of a message; indices would cost more than they save


@dataclasses.dataclass(frozen=True)
class Synced:
    """What one sync did: numbers on the devices of both meshes.

    Attributes:
        changed: share of the sent elements that differed from the last ones.
        received: bytes that all devices received; `whole` is what a dense sync receives.
        dense: how many tensors did not fit and went as a whole (0 in a dense sync).
        drifted: messages whose checksum did not fit the receiver's copy; -1 if not checked.
    """

    changed: jax.Array
    received: jax.Array
    whole: float
    dense: jax.Array
    drifted: jax.Array

    def numbers(self) -> dict[str, jax.Array]:
        """What can differ from sync to sync, by name."""
        names = ("changed", "received", "dense", "drifted")
        return {name: getattr(self, name) for name in names}


class ChangedElements:
    """Keeps a copy of a tree on another mesh up to date.

    Args:
        source: tree of arrays or `jax.ShapeDtypeStruct`s with shardings.
        target: tree of shardings.
        dtype: of the copy; None keeps that of every array.
        capacity: share of a message's elements that may have changed.
        bits: 0, or 8 or 4: of a difference, for all elements.
        block: elements that share a scale then, at most.
        every: all goes as a whole, and is checked, in steps that are multiples of this.
        dense_below: tensors whose messages have fewer elements always go as a whole.
        network: as for `Route`.

    Raises:
        ValueError: the source or the target is not in the devices' own memory.
    """

    def __init__(
        self,
        source: Any,
        target: Any,
        *,
        dtype: Any = jnp.bfloat16,
        capacity: float = 0.05,
        bits: int = 0,
        block: int = 256,
        every: int = 100,
        dense_below: int = DENSE_BELOW,
        network: Network | None = None,
    ):
        self._network = network or Network.local()
        self._every = every
        self._way = _Way(capacity, Blocks(bits, block) if bits else None, dense_below)
        dtype = None if dtype is None else jnp.dtype(dtype)
        leaves, self._treedef = jax.tree.flatten(source)
        targets = self._treedef.flatten_up_to(target)
        # The source may be donated later.
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
        """Compiles what `start` and calls will run."""
        for route in (self._dense, self._kept):
            route.compile()
        if self._moves and self._mine(self._devices):
            for dense in (False, True):
                self._program(dense)
        return self

    def start(self, tree: Any) -> tuple[Any, Any]:
        """The first copy, sent as a whole, and what was sent: (copy, sent)."""
        sent = self._kept(tree)
        if self._kept.alias and self._mine(self._source_devices):
            sent = self._copy(sent)  # the source may be donated later
        return self._dense(tree), sent

    def __call__(
        self, tree: Any, copy: Any, sent: Any, step: int
    ) -> tuple[Any, Any, Synced | None]:
        """Brings the copy up to date.

        Args:
            tree: the source's arrays.
            copy, sent: of the last sync. Consumed.
            step: which sync this is; decides, alike in all processes, whether it is a dense one.

        Returns:
            copy, sent, and what was done (None in a process that owns no device of either mesh).
        """
        if not self._moves or not self._mine(self._devices):
            return copy, sent, None
        trees = [self._treedef.flatten_up_to(t) for t in (tree, sent, copy)]
        views = [self._views(leaves, k) for k, leaves in enumerate(trees)]
        program = self._program(dense=step % self._every == 0)
        out = program(*views[0], *views[1], *views[2])
        n = len(self._moves)
        new = [
            buckets.wrap(x, m, m.source, like.sharding)
            for x, m, like in zip(out[:n], self._moves, trees[1], strict=True)
        ]
        now = [
            buckets.wrap(x, m, m.target, m.sharding)
            for x, m in zip(out[n : 2 * n], self._moves, strict=True)
        ]
        changed, received, dense, drifted = out[2 * n :]
        done = Synced(changed, received, self._whole, dense, drifted)
        return self._treedef.unflatten(now), self._treedef.unflatten(new), done

    @property
    def _source_devices(self) -> tuple[int, ...]:
        return tuple(sorted({d for m in self._moves for d in m.source.devices}))

    def _mine(self, devices: tuple[int, ...]) -> bool:
        return bool(spmd.local_devices(devices))

    def _shapes(self, which: int) -> list[tuple[tuple[int, ...], Any]]:
        """(shape, dtype) of the shards of the source, of what was sent, of the copy."""
        return [
            (
                buckets.shard(m.shape, m.target if which == 2 else m.source),
                m.dtype if not which else m.out,
            )
            for m in self._moves
        ]

    def _views(self, leaves: list[Any], which: int) -> list[Any]:
        """Stacked over the devices of both meshes, with zeros where there is nothing."""
        mine = spmd.local_devices(self._devices)
        out = []
        for x, m, (shape, dtype) in zip(leaves, self._moves, self._shapes(which), strict=True):
            layout = m.target if which == 2 else m.source
            parts = buckets.held(x) if self._mine(layout.devices) else {}
            lacking = tuple(d for d in mine if d not in parts)
            if lacking:
                (zeros,) = spmd.zeros(lacking, ((shape, dtype),))()
                parts = parts | buckets.held(zeros)
            out.append(spmd.view(self._devices, shape, dtype, [parts[d] for d in mine]))
        return out

    def _program(self, dense: bool) -> Any:
        n = len(self._moves)
        inputs = [s for which in range(3) for s in self._shapes(which)]
        ranks = [len(s) for s, _ in (*self._shapes(1), *self._shapes(2))] + [0] * 4
        plans = tuple(self._plans)

        def fn(*operands: Any) -> tuple[Any, ...]:
            # A copy, since jit hands on the very array that it is given, and training consumes it.
            news = [
                jnp.copy(x.astype(m.out)) for x, m in zip(operands[:n], self._moves, strict=True)
            ]
            return self._run(news, list(operands[n : 2 * n]), list(operands[2 * n :]), dense)

        key = ("delta", plans, self._way, dense)
        return spmd.compiled(key, self._devices, inputs, ranks, fn, tuple(range(n, 3 * n)))

    # On every device

    def _run(
        self, news: list[Any], sents: list[Any], copies: list[Any], dense: bool
    ) -> tuple[Any, ...]:
        leaves = [
            _Leaf(plan, self._devices, new, sent, copy, self._way)
            for plan, new, sent, copy in zip(self._plans, news, sents, copies, strict=True)
        ]
        zero = jnp.float32(0)
        changed = lax.psum(sum((leaf.changed() for leaf in leaves), start=zero), spmd.AXIS)
        elements = max(1, sum(leaf.elements for leaf in leaves))
        drifted = jnp.int32(-1)
        if dense:
            drifted = lax.psum(
                sum((leaf.drifted() for leaf in leaves), start=jnp.int32(0)), spmd.AXIS
            )
            out = [leaf.dense() for leaf in leaves]
            full = [jnp.int32(0)] * len(leaves)
            received = jnp.float32(self._whole)
        else:
            over = [leaf.overflows() for leaf in leaves]
            full = lax.pmax(jnp.stack(over), spmd.AXIS) if over else jnp.zeros(0, jnp.int32)
            out = [leaf.updated(full[i] > 0) for i, leaf in enumerate(leaves)]
            received = sum(
                (
                    jnp.where(full[i] > 0, leaf.dense_bytes, leaf.sparse_bytes)
                    for i, leaf in enumerate(leaves)
                ),
                start=zero,
            )
            news = [leaf.held() for leaf in leaves]
        count = sum((full[i] for i in range(len(leaves))), start=jnp.int32(0))
        return (*news, *out, changed / jnp.float32(elements), received, count, drifted)


@dataclasses.dataclass(frozen=True)
class _Way:
    capacity: float
    blocks: Blocks | None
    dense_below: int


class _Leaf:
    """One tensor while the program is traced."""

    def __init__(
        self,
        plan: Exchange,
        devices: tuple[int, ...],
        new: Any,
        sent: Any,
        copy: Any,
        way: _Way,
    ):
        self._plan, self._devices = plan, devices
        self._new, self._sent, self._copy = new, sent, copy
        self._units = spmd.ratios(new.shape, plan.units)
        sizes = [self._size(r) for r in plan.rounds]
        self._capacity = [max(1, math.ceil(way.capacity * n)) for n in sizes]
        item = new.dtype.itemsize
        self.elements = sum(len(r.boxes) * n for r, n in zip(plan.rounds, sizes, strict=True))
        self.dense_bytes = jnp.float32(self.elements * item)
        self._always_dense = item not in (2, 4) or min(sizes, default=0) < way.dense_below
        self.sparse_bytes = self.dense_bytes
        self._codes = None
        if way.blocks is not None and new.ndim and not self._always_dense:
            self._code(way.blocks)
        elif not self._always_dense:
            rows = zip(plan.rounds, self._capacity, strict=True)
            self.sparse_bytes = jnp.float32(sum(len(r.boxes) * k for r, k in rows) * (4 + item))

    def _code(self, blocks: Blocks) -> None:
        """Codes of the shard's differences, those of a unit together, if they are fewer bytes."""
        self._blocks, self._unit = blocks, math.prod(self._units)
        size = blocks.nbytes(self._unit)
        self._always_dense = size >= self._unit * self._new.dtype.itemsize
        if self._always_dense:
            return
        apart = self._new.astype(jnp.float32) - self._sent.astype(jnp.float32)
        codes = encode(_units(apart, self._units), blocks)
        grid = [n // u for n, u in zip(self._new.shape, self._units, strict=True)]
        self._codes = codes.reshape(*grid[:-1], grid[-1] * size)
        self._code_units = (1,) * (len(grid) - 1) + (size,)
        self._held = self._moved(self._sent, self._codes)
        self.sparse_bytes = self.dense_bytes * (size / (self._unit * self._new.dtype.itemsize))

    def _moved(self, old: Any, codes: Any) -> Any:
        """`old` and the differences that are coded."""
        apart = decode(
            codes.reshape(-1, self._code_units[-1]), self._unit, self._blocks, jnp.float32
        )
        apart = _from_units(apart, old.shape, self._units)
        return (old.astype(jnp.float32) + apart).astype(old.dtype)

    def held(self) -> Any:
        """What receivers have after `updated`, of this device's shard."""
        return self._new if self._codes is None else self._held

    def _size(self, r: Any) -> int:
        return math.prod(n * u for n, u in zip(r.size, self._units, strict=True))

    def _cut(self, r: Any, x: Any) -> Any:
        return spmd.taken(r, self._devices, [self._units], [x])[0]

    def _put(self, r: Any, whole: Any, part: Any) -> Any:
        return spmd.placed(self._plan, r, self._devices, [self._units], [whole], [part])[0]

    def _sends(self, r: Any) -> Any:
        return spmd.mine(self._devices, {b.source: 1 for b in r.boxes}, 0)

    def _send(self, r: Any, message: Any) -> Any:
        pairs = [(b.source, b.target) for b in r.boxes]
        return spmd.together([spmd.sent(pairs, self._devices, [message])])[0][0]

    def _differs(self, r: Any) -> Any:
        """Which elements of a message have changed, compared as bits."""
        new, sent = (_bits(self._cut(r, x)) for x in (self._new, self._sent))
        return (new != sent).reshape(-1)

    def changed(self) -> Any:
        counts = [
            self._differs(r).sum(dtype=jnp.float32) * self._sends(r).astype(jnp.float32)
            for r in self._plan.rounds
        ]
        return sum(counts, start=jnp.float32(0))

    def overflows(self) -> Any:
        """1 if a message of this device has more changes than it can carry."""
        if self._always_dense or self._codes is not None:
            return jnp.int32(0)
        over = jnp.int32(0)
        for r, k in zip(self._plan.rounds, self._capacity, strict=True):
            count = self._differs(r).sum(dtype=jnp.int32)
            over = jnp.maximum(over, (count > k).astype(jnp.int32) * self._sends(r))
        return over

    def updated(self, full: Any) -> Any:
        if self._always_dense:
            return self.dense()
        if self._codes is not None:
            return self._coded()
        return lax.cond(full, self.dense, self._sparse)

    def _kept(self, mine: Any) -> Any:
        """The copy with what this device has of the source itself."""
        copy = self._copy
        for r in self._plan.kept:
            copy = self._put(r, copy, self._cut(r, mine))
        return copy

    def dense(self) -> Any:
        """The copy with every message sent as a whole."""
        copy = self._kept(self._new)
        for r in self._plan.rounds:
            part = self._send(r, _bits(self._cut(r, self._new)))
            copy = self._put(r, copy, part.view(copy.dtype))
        return copy

    def _sparse(self) -> Any:
        """The copy with changes alone sent: indices and values in one message."""
        copy = self._kept(self._new)
        for r, k in zip(self._plan.rounds, self._capacity, strict=True):
            new = _bits(self._cut(r, self._new))
            (at,) = jnp.nonzero(self._differs(r), size=k, fill_value=new.size)
            values = new.reshape(-1).at[at].get(mode="fill", fill_value=0)
            message = jnp.concatenate([at.astype(jnp.uint32).view(new.dtype), values])
            got = self._send(r, message)
            at, values = got[:-k].view(jnp.uint32).astype(jnp.int32), got[-k:]
            old = self._cut_of_copy(r, copy)
            part = _bits(old).reshape(-1).at[at].set(values, mode="drop")
            copy = self._put(r, copy, part.reshape(old.shape).view(copy.dtype))
        return copy

    def _coded(self) -> Any:
        """The copy with the differences of all elements sent as codes."""
        copy = self._kept(self._held)
        for r in self._plan.rounds:
            part = spmd.taken(r, self._devices, [self._code_units], [self._codes])[0]
            old = self._cut_of_copy(r, copy)
            copy = self._put(r, copy, self._moved(old, self._send(r, part)))
        return copy

    def _cut_of_copy(self, r: Any, copy: Any) -> Any:
        at = spmd.put_at(r, self._devices)
        size = tuple(n * u for n, u in zip(r.size, self._units, strict=True))
        return lax.dynamic_slice(copy, [a * u for a, u in zip(at, self._units, strict=True)], size)

    def drifted(self) -> Any:
        """Messages of which this device's copy is not what was sent last."""
        wrong = jnp.int32(0)
        for r in self._plan.rounds:
            told = self._send(r, _checksum(self._cut(r, self._sent)))
            bad = (told != _checksum(self._cut_of_copy(r, self._copy))).astype(jnp.int32)
            gets = spmd.mine(self._devices, {b.target: 1 for b in r.boxes}, 0)
            wrong = wrong + bad[0] * gets
        return wrong


def _units(x: Any, units: tuple[int, ...]) -> Any:
    """[units, elements of one]."""
    sizes = [n for pair in zip(x.shape, units, strict=True) for n in (pair[0] // pair[1], pair[1])]
    first, second = range(0, len(sizes), 2), range(1, len(sizes), 2)
    return x.reshape(sizes).transpose(*first, *second).reshape(-1, math.prod(units))


def _from_units(x: Any, shape: tuple[int, ...], units: tuple[int, ...]) -> Any:
    """The converse of `_units`."""
    grid = [n // u for n, u in zip(shape, units, strict=True)]
    k = len(grid)
    order = [i for pair in zip(range(k), range(k, 2 * k), strict=True) for i in pair]
    return x.reshape(*grid, *units).transpose(order).reshape(shape)


def _bits(x: Any) -> Any:
    return x.view({1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])


def _checksum(x: Any) -> Any:
    """A number of 32 bits that depends on every bit and its place."""
    bits = _bits(x).reshape(-1).astype(jnp.uint32)
    place = jnp.arange(bits.size, dtype=jnp.uint32)
    mixed = (bits + jnp.uint32(1)) * (place * jnp.uint32(2654435761) | jnp.uint32(1))
    return (mixed ^ (mixed >> jnp.uint32(15))).sum(dtype=jnp.uint32)[None]

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

With `bits`, a message has the quantized differences of all its elements instead. Senders keep the
receivers' resulting values, and the next difference is relative to these: the quantization residual
is sent later, and errors do not accumulate. All receivers have bitwise equal values, whatever their
shards: blocks that share a scale are within the smallest part that a message can have, and a code
times its scale, which has 8 bits of mantissa, is exact in float32.
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

DENSE_BELOW = 4096  # elements per message; for smaller ones indices cost more than they save


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
        dtype: of the copy; None keeps that of every array.
        capacity: maximum fraction of a message's elements that can have changed.
        bits: 0: send changed elements exactly; 8 or 4: send quantized differences of all elements.
        block: maximum number of elements that share a scale if `bits` is not 0.
        every: in steps that are multiples of this, everything is sent in full and checked.
        dense_below: tensors whose messages have fewer elements are always sent in full.
        network: as for `Route`.

    Raises:
        ValueError: the source or the target is not in the devices' default memory.
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
            # Copied, since jit can forward an input buffer as the output, and training donates it.
            news = [
                jnp.copy(x.astype(m.out)) for x, m in zip(operands[:n], self._moves, strict=True)
            ]
            return self._run(news, list(operands[n : 2 * n]), list(operands[2 * n :]), dense)

        key = ("delta", plans, self._way, dense)
        return spmd.compiled(key, self._devices, inputs, ranks, fn, tuple(range(n, 3 * n)))

    # Code that runs on every device

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
    """State of one tensor while the program is traced."""

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
        """Quantizes the shard's differences unit by unit, if the codes are fewer bytes."""
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
        """Adds encoded differences to `old`."""
        apart = decode(
            codes.reshape(-1, self._code_units[-1]), self._unit, self._blocks, jnp.float32
        )
        apart = _from_units(apart, old.shape, self._units)
        return (old.astype(jnp.float32) + apart).astype(old.dtype)

    def held(self) -> Any:
        """Receivers' values, after `updated`, of this device's shard."""
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
        """The copy, updated with the parts that this device holds of the source."""
        copy = self._copy
        for r in self._plan.kept:
            copy = self._put(r, copy, self._cut(r, mine))
        return copy

    def dense(self) -> Any:
        """The copy, with every message sent in full."""
        copy = self._kept(self._new)
        for r in self._plan.rounds:
            part = self._send(r, _bits(self._cut(r, self._new)))
            copy = self._put(r, copy, part.view(copy.dtype))
        return copy

    def _sparse(self) -> Any:
        """The copy, with only changes sent: indices and values in one message."""
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
        """The copy, with quantized differences of all elements sent."""
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
        """Number of messages for which this device's copy differs from the last sent values."""
        wrong = jnp.int32(0)
        for r in self._plan.rounds:
            told = self._send(r, _checksum(self._cut(r, self._sent)))
            bad = (told != _checksum(self._cut_of_copy(r, self._copy))).astype(jnp.int32)
            gets = spmd.mine(self._devices, {b.target: 1 for b in r.boxes}, 0)
            wrong = wrong + bad[0] * gets
        return wrong


def _units(x: Any, units: tuple[int, ...]) -> Any:
    """Reshapes a shard to [units, elements per unit]."""
    sizes = [n for pair in zip(x.shape, units, strict=True) for n in (pair[0] // pair[1], pair[1])]
    first, second = range(0, len(sizes), 2), range(1, len(sizes), 2)
    return x.reshape(sizes).transpose(*first, *second).reshape(-1, math.prod(units))


def _from_units(x: Any, shape: tuple[int, ...], units: tuple[int, ...]) -> Any:
    """Inverse of `_units`."""
    grid = [n // u for n, u in zip(shape, units, strict=True)]
    k = len(grid)
    order = [i for pair in zip(range(k), range(k, 2 * k), strict=True) for i in pair]
    return x.reshape(*grid, *units).transpose(order).reshape(shape)


def _bits(x: Any) -> Any:
    return x.view({1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])


def _checksum(x: Any) -> Any:
    """32-bit checksum that depends on every bit and its position."""
    bits = _bits(x).reshape(-1).astype(jnp.uint32)
    place = jnp.arange(bits.size, dtype=jnp.uint32)
    mixed = (bits + jnp.uint32(1)) * (place * jnp.uint32(2654435761) | jnp.uint32(1))
    return (mixed ^ (mixed >> jnp.uint32(15))).sum(dtype=jnp.uint32)[None]

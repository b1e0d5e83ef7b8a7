"""Resharding steps as one compiled program on a one-dimensional mesh of devices.

Every tensor enters and leaves as an array of its shards, stacked along the first dimension and
sharded over the mesh `("d",)`, whatever its actual sharding: a view without copies. Collectives are
written explicitly inside `shard_map`, so the traffic is the planned one and does not depend on the
partitioner.

On CPUs narrow floating-point numbers are sent as unsigned integers, since that backend would widen
them.
"""

import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl_eff.parallel.reshard.collectives import (
    AllToAll,
    Collective,
    Exchange,
    Gather,
    Permute,
    Round,
    Slice,
)

AXIS = "d"
# Bytes below which messages of one kind are fused. Fusing costs a copy, which is slow on CPUs.
SMALL = {"cpu": 64 << 10, "gpu": 1 << 20, "tpu": 1 << 20}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Shape of a tensor's shard in a program, and its dtypes: before, on the wire, and after."""

    shape: tuple[int, ...]
    dtype: Any
    wire: Any
    out: Any


@dataclasses.dataclass(frozen=True)
class Item:
    """Tensors that go through the same steps and can share messages."""

    steps: tuple[Collective, ...]
    leaves: tuple[Leaf, ...]


@functools.cache
def flat(devices: tuple[int, ...]) -> Mesh:
    """One-dimensional mesh of these devices."""
    every = jax.devices()
    return Mesh(np.array([every[i] for i in devices]), (AXIS,))


@functools.cache
def stacked(devices: tuple[int, ...], ndim: int) -> NamedSharding:
    """Sharding of stacked shards along the first dimension; scalars are replicated."""
    return NamedSharding(flat(devices), PartitionSpec(AXIS) if ndim else PartitionSpec())


@functools.cache
def local_devices(devices: tuple[int, ...]) -> tuple[int, ...]:
    """The devices that belong to this process."""
    every, me = jax.devices(), jax.process_index()
    return tuple(i for i in devices if every[i].process_index == me)


def view(devices: tuple[int, ...], shape: tuple[int, ...], dtype: Any, shards: list[Any]) -> Any:
    """Stacks the shards of this process's devices, in order, into one array without copying."""
    whole = (shape[0] * len(devices), *shape[1:]) if shape else ()
    return jax.make_array_from_single_device_arrays(
        whole, stacked(devices, len(shape)), shards, dtype=dtype
    )


@functools.cache
def number(devices: tuple[int, ...], k: int) -> Any:
    """The scalar `k` on every device, as an operand."""
    every = jax.devices()
    mine = [jax.device_put(np.int32(k), every[d]) for d in local_devices(devices)]
    return view(devices, (), jnp.int32, mine)


_programs: dict[Any, Any] = {}
_lock = threading.Lock()


def compiled(
    key: Any,
    devices: tuple[int, ...],
    inputs: Sequence[tuple[tuple[int, ...], Any]],
    ranks: Sequence[int],
    fn: Callable[..., Any],
    donate: tuple[int, ...] = (),
) -> Any:
    """Compiled program of `fn` on shards, cached by key, devices and inputs.

    Args:
        key: identifies `fn`.
        devices: of the program.
        inputs: (shape, dtype) of the operands' shards.
        ranks: of the elements of `fn`'s result, a tuple.
        fn: function of one device's shards.
        donate: indices of donated operands.
    """
    key = (key, devices, tuple((s, jnp.dtype(d)) for s, d in inputs))
    with _lock:
        if key in _programs:
            return _programs[key]
    operands = [
        jax.ShapeDtypeStruct(
            (s[0] * len(devices), *s[1:]) if s else (), d, sharding=stacked(devices, len(s))
        )
        for s, d in inputs
    ]
    mapped = jax.shard_map(
        fn,
        mesh=flat(devices),
        in_specs=tuple(stacked(devices, len(s)).spec for s, _ in inputs),
        out_specs=tuple(stacked(devices, n).spec for n in ranks),
        check_vma=False,
    )
    done = jax.jit(mapped, donate_argnums=donate).lower(*operands).compile()
    with _lock:
        return _programs.setdefault(key, done)


def program(devices: tuple[int, ...], items: tuple[Item, ...]) -> Any:
    """Compiled program of items: `(*leaves) -> leaves`, with the items' leaves in order."""
    leaves = [leaf for item in items for leaf in item.leaves]
    return compiled(
        items,
        devices,
        [(leaf.shape, leaf.dtype) for leaf in leaves],
        [len(leaf.shape) for leaf in leaves],
        functools.partial(_run, devices, items),
    )


def zeros(devices: tuple[int, ...], leaves: tuple[tuple[tuple[int, ...], Any], ...]) -> Any:
    """Compiled `() -> leaves` of zeros, given (shape, dtype) of their shards."""

    def fn():
        return tuple(jnp.zeros(s, d) for s, d in leaves)

    return compiled(("zeros", leaves), devices, (), [len(s) for s, _ in leaves], fn)


def cut_part(
    devices: tuple[int, ...], shape: tuple[int, ...], dtype: Any, dim: int, parts: int
) -> Any:
    """Compiled `(leaf, k) -> leaf`: the k-th of equal parts of every shard along `dim`."""

    def fn(x: Any, k: Any) -> tuple[Any]:
        n = shape[dim] // parts
        return (lax.dynamic_slice_in_dim(x, k * n, n, dim),)

    inputs = [(shape, dtype), ((), jnp.int32)]
    return compiled(("cut", dim, parts), devices, inputs, [len(shape)], fn)


def paste_part(
    devices: tuple[int, ...], shape: tuple[int, ...], dtype: Any, dim: int, parts: int
) -> Any:
    """Compiled `(leaf, part, k) -> leaf` that replaces the k-th part in place."""
    n = shape[dim] // parts

    def fn(x: Any, part: Any, k: Any) -> tuple[Any]:
        return (lax.dynamic_update_slice_in_dim(x, part, k * n, dim),)

    part = (*shape[:dim], n, *shape[dim + 1 :])
    inputs = [(shape, dtype), (part, dtype), ((), jnp.int32)]
    return compiled(("paste", dim, parts), devices, inputs, [len(shape)], fn, donate=(0,))


# Code that runs on every device


@dataclasses.dataclass
class _Post:
    """Small messages of one or more tensors, to be fused with others of the same key.

    Attributes:
        key: identifies a collective and its devices.
        lead: number of leading dimensions that `send` can change; it leaves the others unchanged.
        send: the collective.
        messages: its operands.
    """

    key: Any
    lead: int
    send: Callable[[Any], Any]
    messages: list[Any]


# Coroutine that returns a step's results; it yields posts and receives their results.
Running = Generator[_Post, list[Any], list[Any]]


def _run(devices: tuple[int, ...], items: tuple[Item, ...], *operands: Any) -> tuple[Any, ...]:
    rest, runs = list(operands), []
    for item in items:
        values = [_encoded(rest.pop(0), leaf.wire) for leaf in item.leaves]
        runs.append(_steps(devices, item.steps, values))
    ends = together(runs)
    leaves = [leaf for item in items for leaf in item.leaves]
    flat = [v for values in ends for v in values]
    return tuple(_decoded(v, leaf) for v, leaf in zip(flat, leaves, strict=True))


def _steps(devices: tuple[int, ...], steps: tuple[Collective, ...], values: list[Any]) -> Running:
    for step in steps:
        values = yield from _STEPS[type(step)](step, devices, values)
    return values


def together(runs: Sequence[Running]) -> list[list[Any]]:
    """Runs coroutines and returns their results; concurrent posts of one key are fused."""
    ends: dict[int, list[Any]] = {}
    replies: dict[int, Any] = dict.fromkeys(range(len(runs)))
    while replies:
        posts: dict[Any, list[tuple[int, _Post]]] = {}
        for i, reply in replies.items():
            try:
                post = runs[i].send(reply)
                posts.setdefault(post.key, []).append((i, post))
            except StopIteration as end:
                ends[i] = end.value
        replies = {}
        for same in posts.values():
            first = same[0][1]
            messages = [m for _, post in same for m in post.messages]
            got = _joined(messages, first.lead, first.send)
            for i, post in same:
                replies[i] = [got.pop(0) for _ in post.messages]
    return [ends[i] for i in range(len(runs))]


def as_bits(dtype: Any) -> Any:
    """Wire dtype: on CPUs an unsigned integer of the same width for narrow dtypes."""
    dtype = jnp.dtype(dtype)
    narrow = {"bool": jnp.uint8, "bfloat16": jnp.uint16, "float16": jnp.uint16}
    narrow |= {"float8_e4m3fn": jnp.uint8, "float8_e5m2": jnp.uint8}
    on_cpu = jax.devices()[0].platform == "cpu"
    return jnp.dtype(narrow.get(dtype.name, dtype)) if on_cpu else dtype


def _encoded(x: Any, wire: Any) -> Any:
    bits = as_bits(wire)
    x = x.astype(wire)
    return x if bits == wire else x.view(bits) if wire.kind != "b" else x.astype(bits)


def _decoded(x: Any, leaf: Leaf) -> Any:
    x = x if x.dtype == leaf.wire else x.view(leaf.wire) if leaf.wire.kind != "b" else x != 0
    return x.astype(leaf.out)


def mine(devices: tuple[int, ...], values: dict[int, Any], default: Any) -> Any:
    """This device's entry in a table."""
    rows = np.array([values.get(d, default) for d in devices], np.int32)
    if (rows == rows[0]).all():
        return jnp.asarray(rows[0])
    return jnp.asarray(rows)[lax.axis_index(AXIS)]


def _groups(step: Collective, devices: tuple[int, ...]) -> list[list[int]]:
    place = {d: i for i, d in enumerate(devices)}
    return [[place[d] for d in group] for group in step.groups]


def _bytes(x: Any) -> int:
    return x.size * x.dtype.itemsize


def _small_bytes() -> int:
    return SMALL.get(jax.devices()[0].platform, 1 << 20)


def _small(x: Any) -> bool:
    return _bytes(x) < _small_bytes()


def _joined(messages: list[Any], lead: int, send: Callable[[Any], Any]) -> list[Any]:
    """Applies `send` to messages, fused into one per dtype."""
    out: list[Any] = [None] * len(messages)
    kinds: dict[Any, list[int]] = {}
    for i, m in enumerate(messages):
        kinds.setdefault(m.dtype, []).append(i)
    for members in kinds.values():
        rows = [messages[i].reshape(*messages[i].shape[:lead], -1) for i in members]
        got = send(jnp.concatenate(rows, axis=lead))
        ends = np.cumsum([r.shape[lead] for r in rows])[:-1]
        for i, part in zip(members, jnp.split(got, ends, axis=got.ndim - 1), strict=True):
            out[i] = part.reshape(*got.shape[:-1], *messages[i].shape[lead:])
    return out


def _each(
    values: list[Any],
    alone: Callable[[Any], Any],
    post: _Post,
    before: Callable[[Any], Any] = lambda x: x,
    after: Callable[[Any], Any] = lambda x: x,
) -> Running:
    """Sends large values individually with `alone`, and small ones in a post.

    `before` and `after` convert small values to messages and back.
    """
    out = [None if _small(x) else alone(x) for x in values]
    small = [i for i, x in enumerate(out) if x is None]
    if small:
        post.messages = [before(values[i]) for i in small]
        for i, x in zip(small, (yield post), strict=True):
            out[i] = after(x)
    return out


def _slice(step: Slice, devices: tuple[int, ...], values: list[Any]) -> Running:
    k = mine(devices, {d: i for group in step.groups for i, d in enumerate(group)}, 0)
    parts = len(step.groups[0])

    def part(x: Any) -> Any:
        n = x.shape[step.dim] // parts
        return lax.dynamic_slice_in_dim(x, k * n, n, step.dim)

    return [part(x) for x in values]
    yield  # makes this a generator, like all steps


def _gather(step: Gather, devices: tuple[int, ...], values: list[Any]) -> Running:
    groups, dim = _groups(step, devices), step.dim

    def alone(x: Any) -> Any:
        return lax.all_gather(x, AXIS, axis_index_groups=groups, axis=dim, tiled=True)

    def send(m: Any) -> Any:
        return lax.all_gather(m, AXIS, axis_index_groups=groups)

    post = _Post((Gather, step.groups), 0, send, [])
    return (yield from _each(values, alone, post, after=lambda x: _in_line(x, dim)))


def _in_line(x: Any, dim: int) -> Any:
    """Concatenates the parts in the first axis along `dim` of the others."""
    x = jnp.moveaxis(x, 0, dim)
    return x.reshape(*x.shape[:dim], x.shape[dim] * x.shape[dim + 1], *x.shape[dim + 2 :])


def _all_to_all(step: AllToAll, devices: tuple[int, ...], values: list[Any]) -> Running:
    groups, i = _groups(step, devices), step.split
    parts = len(groups[0])

    def send(m: Any, i: int = 0, j: int = 0) -> Any:
        return lax.all_to_all(m, AXIS, i, j, axis_index_groups=groups, tiled=True)

    def apart(x: Any) -> Any:
        x = x.reshape(*x.shape[:i], parts, x.shape[i] // parts, *x.shape[i + 1 :])
        return jnp.moveaxis(x, i, 0)

    post = _Post((AllToAll, step.groups), 1, send, [])
    into = _each(
        values,
        lambda x: send(x, i, step.join),
        post,
        before=apart,
        after=lambda x: _in_line(x, step.join),
    )
    return (yield from into)


def _permute(step: Permute, devices: tuple[int, ...], values: list[Any]) -> Running:
    return (yield from sent(step.pairs, devices, values))


def sent(pairs: Sequence[tuple[int, int]], devices: tuple[int, ...], values: list[Any]) -> Running:
    """Sends values from each pair's first device to its second."""
    place = {d: i for i, d in enumerate(devices)}
    ends = sorted((place[a], place[b]) for a, b in pairs)

    def send(m: Any) -> Any:
        return lax.ppermute(m, AXIS, ends)

    return (yield from _each(values, send, _Post((Permute, tuple(ends)), 0, send, [])))


def _exchange(step: Exchange, devices: tuple[int, ...], values: list[Any]) -> Running:
    units = [ratios(x.shape, step.units) for x in values]
    small = [_on_a_grid(step) and _small_box(step, x) for x in values]
    out = yield from _by_grid(step, devices, [x for x, s in zip(values, small, strict=True) if s])
    done = [out.pop(0) if s else None for s in small]
    large = [i for i, s in enumerate(small) if not s]
    if large:
        some = [values[i] for i in large]
        moved = yield from _by_boxes(step, devices, [units[i] for i in large], some)
        for i, x in zip(large, moved, strict=True):
            done[i] = x
    return done


def _by_boxes(
    step: Exchange, devices: tuple[int, ...], units: list[Any], values: list[Any]
) -> Running:
    """Cuts, sends and places each box individually."""
    out: list[Any] = [None] * len(values)
    for r in step.kept:
        out = placed(step, r, devices, units, out, taken(r, devices, units, values))
    for r in step.rounds:
        pairs = [(b.source, b.target) for b in r.boxes]
        got = yield from sent(pairs, devices, taken(r, devices, units, values))
        out = placed(step, r, devices, units, out, got)
    return out


def _on_a_grid(step: Exchange) -> bool:
    """True if all boxes have one shape that divides both shards."""
    sizes = {r.size for r in (*step.kept, *step.rounds)}
    if len(sizes) != 1 or not step.rounds:
        return False
    (size,) = sizes
    ends = zip(step.units, step.out_units, size, strict=True)
    return all(a % n == 0 and b % n == 0 for a, b, n in ends)


def _small_box(step: Exchange, x: Any) -> bool:
    boxes = math.prod(step.units) // math.prod(step.rounds[0].size)
    return _bytes(x) // boxes < _small_bytes()


def _by_grid(step: Exchange, devices: tuple[int, ...], values: list[Any]) -> Running:
    """Collects all boxes that a device sends in one gather, and arranges its result in another.

    This takes two kernels per tensor instead of two per message.
    """
    if not values:
        return []
    (size,) = {r.size for r in step.rounds}
    place = {d: i for i, d in enumerate(devices)}
    lines = [ratios(units, size) for units in (step.units, step.out_units)]
    count = len(step.rounds)
    sends = np.zeros((len(devices), count + 1), np.int32)  # round -> box; last: kept
    fills = np.zeros((len(devices), math.prod(lines[1])), np.int32)  # box -> round
    for k, r in enumerate((*step.rounds, *step.kept)):
        for b in r.boxes:
            row = min(k, count)
            sends[place[b.source], row] = _number(ratios(b.start, size), lines[0])
            fills[place[b.target], _number(ratios(b.put, size), lines[1])] = row
    sends, fills = (_row(table) for table in (sends, fills))
    ends = [sorted((place[b.source], place[b.target]) for b in r.boxes) for r in step.rounds]

    def send(m: Any) -> Any:
        return jnp.stack([lax.ppermute(m[k], AXIS, pairs) for k, pairs in enumerate(ends)])

    ready = [_boxed(x, lines[0])[sends] for x in values]
    key = (Exchange, tuple(map(tuple, ends)))
    post = _Post(key, 1, send, [x[:count].reshape(count, -1) for x in ready])
    out = []
    for x, got in zip(ready, (yield post), strict=True):
        rows = jnp.concatenate([got.reshape(count, *x.shape[1:]), x[count:]])
        out.append(_unboxed(rows[fills], lines[1]))
    return out


def _row(table: np.ndarray) -> Any:
    """This device's row of a table."""
    if (table == table[0]).all():
        return jnp.asarray(table[0])
    return jnp.asarray(table)[lax.axis_index(AXIS)]


def _number(at: Sequence[int], line: Sequence[int]) -> int:
    """Index of a box among all boxes of a shard."""
    number = 0
    for a, n in zip(at, line, strict=True):
        number = number * n + a
    return number


def _boxed(x: Any, line: tuple[int, ...]) -> Any:
    """Splits a shard, `line` boxes long in each dimension, into (boxes, *box)."""
    shape = [m for n, k in zip(x.shape, line, strict=True) for m in (k, n // k)]
    x = x.reshape(shape).transpose(*range(0, 2 * x.ndim, 2), *range(1, 2 * x.ndim, 2))
    return x.reshape(-1, *x.shape[len(line) :])


def _unboxed(x: Any, line: tuple[int, ...]) -> Any:
    n = len(line)
    box = x.shape[1:]
    x = x.reshape(*line, *box).transpose([k for i in range(n) for k in (i, n + i)])
    return x.reshape([k * m for k, m in zip(line, box, strict=True)])


def ratios(shape: Sequence[int], units: Sequence[int]) -> tuple[int, ...]:
    return tuple(n // u for n, u in zip(shape, units, strict=True))


def _times(units: Sequence[int], by: Sequence[int]) -> tuple[int, ...]:
    return tuple(u * b for u, b in zip(units, by, strict=True))


def taken(r: Round, devices: tuple[int, ...], units: list[Any], values: list[Any]) -> list[Any]:
    """Parts that a device sends in a round."""
    at = [
        mine(devices, {b.source: b.start[i] for b in r.boxes}, r.boxes[0].start[i])
        for i in range(len(r.size))
    ]

    def piece(x: Any, unit: tuple[int, ...]) -> Any:
        size = _times(r.size, unit)
        if size == x.shape:
            return x
        return lax.dynamic_slice(x, [a * u for a, u in zip(at, unit, strict=True)], size)

    return [piece(x, u) for x, u in zip(values, units, strict=True)]


def put_at(r: Round, devices: tuple[int, ...]) -> list[Any]:
    """Offsets, in units, at which a device places what it receives in a round."""
    return [
        mine(devices, {b.target: b.put[i] for b in r.boxes}, r.boxes[0].put[i])
        for i in range(len(r.size))
    ]


def placed(
    step: Exchange,
    r: Round,
    devices: tuple[int, ...],
    units: list[Any],
    out: list[Any],
    got: list[Any],
) -> list[Any]:
    """Places what was received in a round; devices that received nothing keep their values."""
    targets = {b.target: 1 for b in r.boxes}
    everyone = all(d in targets for d in step.receivers)
    got_some = mine(devices, targets, 0) == 1
    at = put_at(r, devices)

    def one(whole: Any, part: Any, unit: tuple[int, ...]) -> Any:
        if r.size == step.out_units:
            return part if everyone or whole is None else jnp.where(got_some, part, whole)
        if whole is None:
            whole = jnp.zeros(_times(step.out_units, unit), part.dtype)
        start = [a * u for a, u in zip(at, unit, strict=True)]
        if not everyone:
            part = jnp.where(got_some, part, lax.dynamic_slice(whole, start, part.shape))
        return lax.dynamic_update_slice(whole, part, start)

    return [one(w, p, u) for w, p, u in zip(out, got, units, strict=True)]


_STEPS = {
    Slice: _slice,
    Gather: _gather,
    AllToAll: _all_to_all,
    Permute: _permute,
    Exchange: _exchange,
}

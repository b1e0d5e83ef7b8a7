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
import threading
from collections.abc import Callable, Sequence
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
    Slice,
)
from jaxrl_eff.parallel.reshard.exchange import AXIS, Running, each, exchange, mine, sent, together


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
    n = shape[dim] // parts

    def fn(x: Any, k: Any) -> tuple[Any]:
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


def _groups(step: Collective, devices: tuple[int, ...]) -> list[list[int]]:
    place = {d: i for i, d in enumerate(devices)}
    return [[place[d] for d in group] for group in step.groups]


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
    gather = functools.partial(lax.all_gather, axis_name=AXIS, axis_index_groups=groups)
    return each(
        values, (Gather, step.groups), gather,
        alone=functools.partial(gather, axis=dim, tiled=True),
        after=lambda x: _in_line(x, dim),
    )  # fmt: skip


def _in_line(x: Any, dim: int) -> Any:
    """Concatenates the parts in the first axis along `dim` of the others."""
    x = jnp.moveaxis(x, 0, dim)
    return x.reshape(*x.shape[:dim], x.shape[dim] * x.shape[dim + 1], *x.shape[dim + 2 :])


def _all_to_all(step: AllToAll, devices: tuple[int, ...], values: list[Any]) -> Running:
    groups, i = _groups(step, devices), step.split

    def send(m: Any, i: int = 0, j: int = 0) -> Any:
        return lax.all_to_all(m, AXIS, i, j, axis_index_groups=groups, tiled=True)

    def apart(x: Any) -> Any:
        parts = len(groups[0])
        x = x.reshape(*x.shape[:i], parts, x.shape[i] // parts, *x.shape[i + 1 :])
        return jnp.moveaxis(x, i, 0)

    return each(
        values, (AllToAll, step.groups), send, lead=1, before=apart,
        alone=lambda x: send(x, i, step.join), after=lambda x: _in_line(x, step.join),
    )  # fmt: skip


_STEPS = {
    Slice: _slice,
    Gather: _gather,
    AllToAll: _all_to_all,
    Permute: lambda step, devices, values: sent(step.pairs, devices, values),
    Exchange: exchange,
}

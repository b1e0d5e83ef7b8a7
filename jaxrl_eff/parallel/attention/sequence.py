"""Attention of a call whose rows are sharded over the sequence axis of its mesh."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_eff.parallel.attention import kernels, ring
from jaxrl_eff.parallel.attention.context import Mask
from jaxrl_eff.parallel.attention.on_mesh import on_mesh
from jaxrl_eff.parallel.devices import CORE_FLOPS_PER_S, peak_flops_per_s
from jaxrl_eff.parallel.mesh import Placement, mesh
from jaxrl_eff.parallel.reshard.layout import Network
from jaxrl_eff.types import Array

GATHERED_BYTES = 1 << 30  # limit on a layer's all-gathered keys and values per device
CPU_CHUNK = 128  # tokens; faster for many short sequences and no slower for long ones
WAYS = {"ring": ring.ring, "gathered": ring.gathered, "ulysses": ring.ulysses}


@functools.lru_cache(maxsize=256)
def attend(
    place: Placement, way: str = "", reach: int | None = None, nested: bool = False
) -> Callable[..., Array]:
    """Attention on global arrays whose rows, tokens and heads are sharded according to `place`.

    Cached, since another function object would cause a program to be retraced.

    Args:
        way: "ring", "gathered" or "ulysses"; "": the one estimated fastest for the traced shapes.
        reach: use a ring that sends keys and values this many shards on; see `ring.ring`.
        nested: inside a `jax.shard_map` over the axes that shard rows; see `on_mesh`.

    Raises:
        ValueError: an unknown way.
    """
    if way not in ("", *WAYS):
        raise ValueError(
            f"unknown attention over the sequence axis {way!r}; expected one of {list(WAYS)}."
        )
    grid = mesh(place)
    if place.seq == 1:
        return _when_called(lambda: on_mesh(ring.local("seq", kernel=kernel()), grid))
    if reach is not None:
        return on_mesh(ring.ring("seq", reach=reach, kernel=kernel()), grid, nested=nested)
    made = {
        name: on_mesh(make("seq", kernel=kernel()), grid, nested=nested)
        for name, make in WAYS.items()
    }
    if way:
        return made[way]
    parts = place.row_shards if nested else 1

    def chosen(q: Array, k: Array, v: Array, mask: Mask, **how: Any) -> Array:
        whole = q.shape[0] * parts, *q.shape[1:]
        return made[fastest(place, whole, k.shape[2], q.dtype)](q, k, v, mask, **how)

    chosen.names = ring.NAMES
    return chosen


@functools.lru_cache(maxsize=1)
def own() -> Callable[..., Array]:
    """Attention on a device's own rows, inside a `shard_map` over all axes of a mesh."""
    return _when_called(lambda: ring.local("seq", kernel=kernel()))


def _when_called(make: Callable[[], Callable[..., Array]]) -> Callable[..., Array]:
    """Defers `make` to tracing, so that a kernel is tested only for models that use it."""

    def attend(*args: Any, **how: Any) -> Array:
        return make()(*args, **how)

    attend.names = ring.NAMES
    return attend


def fastest(
    place: Placement,
    shape: tuple[int, ...],
    kv_heads: int,
    dtype: Any,
    *,
    network: Network | None = None,
    flops_per_s: float | int | None = None,
) -> str:
    """Variant estimated fastest for one layer's forward pass.

    A ring overlaps communication with compute but pays the latency of P - 1 messages; the others
    send everything at once, without overlap.

    Args:
        place: devices and mesh; its seq axis has P devices.
        shape: of the global queries, [B, T, N, H].
        network: bandwidths and latencies; None: those typical of this platform.
        flops_per_s: of a device; None: its published peak, or a typical value for a CPU core.
    """
    network = network or Network.local()
    flops_per_s = flops_per_s or (
        peak_flops_per_s(jax.devices()[0].device_kind, dtype) or CORE_FLOPS_PER_S
    )
    rows, length, heads, dim = shape
    rows, heads, kv = (max(1, n // w) for n, w in (
        (rows, place.row_shards), (heads, place.tensor), (kv_heads, place.tensor)
    ))  # fmt: skip
    parts, itemsize = place.seq, jnp.dtype(dtype).itemsize
    line = place.devices[: parts * place.tensor : place.tensor]
    crosses = len({network.hosts[d] for d in line}) > 1
    rate, start = network.rate(line[0], line[-1]), network.latency(crosses)
    compute = 2.0 * rows * length * length * heads * dim / parts / flops_per_s
    sizes = (rows * length, heads, kv, dim, parts, itemsize)
    hop = ring.wire_bytes("ring", *sizes) / (parts - 1) / rate + start
    seconds = {"ring": compute / parts + (parts - 1) * max(compute / parts, hop)}
    if 2 * rows * length * kv * dim * itemsize <= GATHERED_BYTES:
        seconds["gathered"] = compute + ring.wire_bytes("gathered", *sizes) / rate + start
    if heads % parts == 0:
        seconds["ulysses"] = compute + ring.wire_bytes("ulysses", *sizes) / rate + 2 * start
    return min(seconds, key=seconds.__getitem__)


def kernel() -> kernels.Kernel:
    """Kernel for the default device."""
    return kernels.best(CPU_CHUNK if jax.default_backend() == "cpu" else kernels.CHUNK)


def for_whole_rows() -> bool:
    """True if `attend` should be used for unsharded rows too, if it fits.

    True on TPUs, where single-device attention writes its scores to memory, and on GPUs, where it
    writes a full mask and computes pairs of different documents.
    """
    return jax.default_backend() == "tpu" or _on_gpu()


def fits_whole_rows(head_dim: int, dtype: Any) -> bool:
    """True if `attend` fits unsharded rows of a model with this head dim and dtype.

    On GPUs: if the dtype has at most 16 bits, where the Triton kernel is faster, and the kernel
    supports the head dim and runs here.
    """
    if not _on_gpu():
        return True
    takes = jnp.dtype(dtype).itemsize <= 2 and kernels.TRITON.fits(head_dim, dtype)
    return takes and kernel().name != "xla"  # tests the kernel, so evaluated last


def _on_gpu() -> bool:
    return jax.default_backend() in ("gpu", "cuda")


@functools.lru_cache(maxsize=256)
def both(place: Placement, local: int, way: str = "", nested: bool = False) -> Callable[..., Array]:
    """Attention on rows sharded over all of data, fsdp and seq, with unsharded tokens.

    The first `local` tokens of a row attend to each other; the rest are a stripe of a row shared by
    the devices along seq, and attend to all its stripes. The two are independent, so the compiler
    can overlap the local part with the transfer of keys. `way` and `nested` as for `attend`.
    """
    own = ring.local("seq", kernel=kernel())
    shared = {name: make("seq", kernel=kernel()) for name, make in WAYS.items()}

    def attend(q: Array, k: Array, v: Array, mask: Mask, **how: Any) -> Array:
        outs = []
        for mine, part in ((True, slice(local)), (False, slice(local, None))):
            pieces = [x[:, part] for x in (q, k, v)]
            if pieces[0].shape[1]:
                there = mask.each(lambda x, part=part: x[:, part])
                by = own if mine else shared[way or _fastest_of_stripes(place, *pieces[:2])]
                outs.append(by(*pieces, there, **how))
        return jnp.concatenate(outs, axis=1)

    return on_mesh(attend, mesh(place), split=False, nested=nested)


def _fastest_of_stripes(place: Placement, q: Array, k: Array) -> str:
    """`fastest`, given one device's queries and keys."""
    rows, length, heads, dim = q.shape
    whole = rows * place.row_shards, length * place.seq, heads * place.tensor, dim
    return fastest(place, whole, k.shape[2] * place.tensor, q.dtype) if place.seq > 1 else "ring"


def joined(local: Array, shared: Array, parts: int) -> Array:
    """Joins device rows `[G P, Tl]` and group rows `[G, P Td]` to `[G P, Tl + Td]`.

    On rank r of a group, stripe r of the group's row follows the device's own row.
    """
    groups, length = shared.shape
    stripes = striped(shared, parts).reshape(groups * parts, length // parts)
    return jnp.concatenate([local, stripes], axis=1)


def divided(x: Array, local: int, parts: int) -> tuple[Array, Array]:
    """Inverse of `joined`."""
    rows, length = x.shape
    stripes = x[:, local:].reshape(rows // parts, parts * (length - local))
    return x[:, :local], unstriped(stripes, parts)


def striped(x: Array, parts: int) -> Array:
    """Permutes `[B, T]` so that token i is in stripe i mod P, on the device.

    Striped attention (Brandon et al., 2023, arXiv:2311.09431): balanced for any mix of documents.
    """
    rows, length = x.shape
    return x.reshape(rows, length // parts, parts).swapaxes(1, 2).reshape(rows, length)


def unstriped(x: Array, parts: int) -> Array:
    """Inverse of `striped`."""
    rows, length = x.shape
    return x.reshape(rows, parts, length // parts).swapaxes(1, 2).reshape(rows, length)

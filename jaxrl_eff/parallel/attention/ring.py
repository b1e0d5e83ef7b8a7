"""Exact attention over rows whose tokens are sharded over a mesh axis.

Three variants that differ in their communication, each with the signature and the result of
`models.attention.plain`. They are called inside a `shard_map` over the axis, on shards of equal
length; `on_mesh.on_mesh` wraps them for global arrays.

- `ring`: keys and values circulate while attention to the current shard is computed (Liu et al.,
  2023, arXiv:2310.01889). Memory falls with the number of devices; transfers overlap with compute.
- `gathered`: keys and values are all-gathered once. The same bytes, in one large message.
- `ulysses`: an all-to-all exchanges tokens for heads (Jacobs et al., 2023, arXiv:2309.14509). Fewer
  bytes on many devices, but not overlapped, and the number of heads must be divisible.

Masks depend only on each token's position and segment, so any order of tokens over devices is
correct (see `token_order`); `ring` all-gathers these and nothing else. The residuals of the
backward pass are local: q, k, v, the output and its lse, the last two named "attend_out" and
"attend_lse". A rematerialization policy that saves both names does not repeat the transfers.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxrl_eff.parallel.attention import blockwise, kernels
from jaxrl_eff.parallel.attention.blockwise import Queries, Where
from jaxrl_eff.parallel.attention.context import Attend, Mask
from jaxrl_eff.parallel.attention.kernels import Kernel
from jaxrl_eff.parallel.attention.token_order import pad
from jaxrl_eff.types import Array, Float, Int

NAMES = ("attend_out", "attend_lse")


class _Tour(NamedTuple):
    """Forward and backward pass of a device's queries over the keys of all devices.

    Attributes:
        forward: (kernel, axis, q, kv, where, softcap) -> out, lse.
        backward: (kernel, axis, queries, kv, where, softcap) -> dq, dkv.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]


def ring(axis: str = "seq", *, kernel: Kernel | None = None, reach: int | None = None) -> Attend:
    """Attention with keys and values circulating over `axis`, one permute per hop.

    The forward pass has P - 1 permutes; the backward pass as many for keys and values, and P for
    their float32 gradients, which are sent while the next hop is computed. With a reach of n: n, n
    and n + 1.

    Args:
        axis: mesh axis over which tokens are sharded.
        kernel: kernel to use if it fits, see `kernels`; None: XLA.
        reach: number of subsequent shards that a shard's keys are sent to; None: all. Requires
            tokens in order and windows that reach no farther back.

    Raises:
        ValueError: a negative reach.
    """
    if reach is not None and reach < 0:
        raise ValueError(f"reach is {reach}; it must be at least 0.")
    ways = (functools.partial(f, reach) for f in (_ring_forward, _ring_backward))
    return functools.partial(_spread, _Tour(*ways), axis, kernel)


def gathered(axis: str = "seq", *, kernel: Kernel | None = None) -> Attend:
    """Attention to keys and values all-gathered over `axis`, once forward and once backward.

    Their gradients are reduce-scattered in float32. Arguments as for `ring`.
    """
    return functools.partial(_spread, _GATHERED, axis, kernel)


def ulysses(axis: str = "seq", *, kernel: Kernel | None = None) -> Attend:
    """Attention to complete rows with heads sharded over `axis`. Arguments as for `ring`.

    Key heads are repeated as needed to be divisible by P.

    Raises:
        ValueError: (on use) the number of query heads is not divisible by P.
    """
    return functools.partial(_ulysses, axis, kernel)


def local(axis: str = "seq", *, kernel: Kernel | None = None) -> Attend:
    """Attention within each device's own shard, without communication. Arguments as for `ring`."""
    return functools.partial(_spread, _ALONE, axis, kernel)


def _spread(
    tour: _Tour,
    axis: str,
    kernel: Kernel | None,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    if kernel is None or not kernel.fits(k.shape[3], k.dtype):
        kernel = kernels.xla()
    heads, length = k.shape[2], q.shape[1]
    chunk = kernel.chunk(max(length, k.shape[1]))
    if kernel.exact:
        q, k, v = (pad(x, chunk) for x in (q, k, v))
        mask = mask.each(lambda x: pad(x, chunk))
    folded = blockwise.fold(q * jnp.asarray(scale, q.dtype), heads, chunk)
    kv = jnp.stack([blockwise.fold(x, heads, chunk) for x in (k, v)], axis=1)
    where = Where(
        blockwise.fold_where(*mask[:2], chunk) + _zero_of(q),
        blockwise.fold_where(*mask[2:4], chunk),
        None if mask.window is None else jnp.asarray(mask.window, jnp.int32),
    )
    tour = tour if lax.axis_size(axis) > 1 else _ALONE
    out = _attention(tour, kernel, axis, softcap, *_varying(axis, (folded, kv, where)))
    return blockwise.unfold(out, q.shape[1], chunk)[:, :length]


def _zero_of(q: Array) -> Int[Array, ""]:
    """Zero that JAX treats as depending on q, so that masks are not hoisted out of the layer loop.

    Masks depend on positions only and are the same for all layers, so JAX would compute those of
    all chunks before the loop over layers and keep them.
    """
    one = q[0, 0, 0, 0]
    return ((one != one) & False).astype(jnp.int32)


def _varying(axis: str, tree: Any) -> Any:
    """Casts all arrays to vary over the same mesh axes, for `shard_map`'s varying-axes check."""
    arrays, treedef = jax.tree.flatten(tree)
    kinds = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    every = {axis}.union(*kinds)
    return treedef.unflatten(
        lax.pcast(x, tuple(sorted(every - kind)), to="varying")
        for x, kind in zip(arrays, kinds, strict=True)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _attention(tour, kernel, axis, softcap, q, kv, where):
    return _attention_forward(tour, kernel, axis, softcap, q, kv, where)[0]


def _attention_forward(tour, kernel, axis, softcap, q, kv, where):
    out, lse = tour.forward(kernel, axis, q, kv, where, softcap)
    out = checkpoint_name(out.astype(kv.dtype), NAMES[0])
    lse = checkpoint_name(lse, NAMES[1])
    return out, (q, kv, out, lse, where)


def _attention_backward(tour, kernel, axis, softcap, saved, dout):
    q, kv, out, lse, where = saved
    delta = (dout.astype(lse.dtype) * out.astype(lse.dtype)).sum(axis=-1)
    queries = Queries(q, dout, lse, delta)
    dq, dkv = tour.backward(kernel, axis, queries, kv, where, softcap)
    return dq.astype(q.dtype), dkv.astype(kv.dtype), None


_attention.defvjp(_attention_forward, _attention_backward)


# Single device


def _alone_forward(kernel, axis, q, kv, where, softcap):
    del axis
    return kernel.forward(blockwise.nothing(q), q, kv, where, softcap)


def _alone_backward(kernel, axis, queries, kv, where, softcap):
    del axis
    return kernel.backward(blockwise.nothing(queries.q)[0], queries, kv, where, softcap)


_ALONE = _Tour(_alone_forward, _alone_backward)


# Ring. Hops are a loop, although that copies each received shard into the loop carry: unrolled, the
# compiler can schedule all sends before any computation, and every device then holds all shards.


def _ring_forward(reach, kernel, axis, q, kv, where, softcap):
    sends, at = _sends(reach, axis), _hops(where, axis)

    def compute(met, kv, hop):
        return kernel.forward(met, q, kv, at(hop), softcap)

    def step(carry, hop):
        kv, met = carry
        coming = _next(kv, axis)
        return (coming, compute(met, kv, hop)), None

    carry, _ = lax.scan(step, (kv, blockwise.nothing(q)), jnp.arange(sends, dtype=jnp.int32))
    kv, met = carry
    return compute(met, kv, sends)


def _ring_backward(reach, kernel, axis, queries, kv, where, softcap):
    sends, at = _sends(reach, axis), _hops(where, axis)
    none = blockwise.nothing(queries.q)[0]

    def compute(dq, kv, hop):
        return kernel.backward(dq, queries, kv, at(hop), softcap)

    def last(dq, kv, dkv, hop):
        # The gradient accumulated so far for this shard arrives while this hop is computed.
        found = _next(dkv, axis)
        dq, dkv = compute(dq, kv, hop)
        return dq, found + dkv

    def step(carry, hop):
        dq, kv, dkv = carry
        coming = _next(kv, axis)
        dq, dkv = last(dq, kv, dkv, hop)
        return (dq, coming, dkv), None

    if sends == 0:
        return compute(none, kv, 0)
    coming = _next(kv, axis)
    dq, dkv = compute(none, kv, 0)
    between = jnp.arange(1, sends, dtype=jnp.int32)
    (dq, kv, dkv), _ = lax.scan(step, (dq, coming, dkv), between)
    dq, dkv = last(dq, kv, dkv, sends)
    return dq, _next(dkv, axis, -sends)


def _sends(reach: int | None, axis: str) -> int:
    most = lax.axis_size(axis) - 1
    return most if reach is None else min(reach, most)


def _next(x: Array, axis: str, by: int = 1) -> Array:
    parts = lax.axis_size(axis)
    return lax.ppermute(x, axis, [(i, (i + by) % parts) for i in range(parts)])


def _hops(where: Where, axis: str) -> Callable[[int | Array], Where]:
    """All-gathers positions and segments of keys; hop -> those of the keys that arrive in it."""
    places = lax.all_gather(where.k, axis)

    def of_hop(hop: int | Array) -> Where:
        source = (lax.axis_index(axis) - hop) % lax.axis_size(axis)
        return where._replace(k=lax.dynamic_index_in_dim(places, source, keepdims=False))

    return of_hop


# Gathered


def _every(kv: Array, where: Where, axis: str) -> tuple[Array, Where]:
    kv, k_where = (lax.all_gather(x, axis, tiled=True) for x in (kv, where.k))
    return kv, where._replace(k=k_where)


def _gathered_forward(kernel, axis, q, kv, where, softcap):
    return _alone_forward(kernel, axis, q, *_every(kv, where, axis), softcap)


def _gathered_backward(kernel, axis, queries, kv, where, softcap):
    dq, dkv = _alone_backward(kernel, axis, queries, *_every(kv, where, axis), softcap)
    return dq, lax.psum_scatter(dkv, axis, tiled=True)


_GATHERED = _Tour(_gathered_forward, _gathered_backward)


# Ulysses


def _ulysses(
    axis: str,
    kernel: Kernel | None,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    **how: Any,
) -> Float[Array, "B T N H"]:
    parts = lax.axis_size(axis)
    k, v = repeated_heads(q.shape[2], (k, v), parts, axis)
    if parts > 1:
        q, k, v, where = _varying(axis, (q, k, v, mask[:4]))
        q, k, v = (lax.all_to_all(x, axis, 2, 1, tiled=True) for x in (q, k, v))
        where = (lax.all_gather(x, axis, axis=1, tiled=True) for x in where)
        mask = Mask(*where, mask.window)
    out = _spread(_ALONE, axis, kernel, q, k, v, mask, **how)
    return lax.all_to_all(out, axis, 1, 2, tiled=True) if parts > 1 else out


def repeated_heads(heads: int, arrays: Any, parts: int, axis: str) -> list[Array]:
    """Repeats key heads, if needed, so that they can be sharded like the query heads."""
    repeats = head_repeats(heads, arrays[0].shape[2], parts, axis)
    return [jnp.repeat(x, repeats, axis=2) if repeats > 1 else x for x in arrays]


def head_repeats(heads: int, kv_heads: int, parts: int, axis: str) -> int:
    """Number of times each key head is repeated so that heads can be sharded over `axis`.

    Raises:
        ValueError: the number of query heads is not divisible by the size of the axis.
    """
    if heads % parts:
        raise ValueError(
            f"{heads} query heads cannot be split over the {parts} devices of mesh axis {axis!r}: "
            "the number of heads must be a multiple; use ring or gathered."
        )
    # Each repeated head serves a whole number of query heads: P / gcd(K, P) divides N / K.
    return parts // math.gcd(kv_heads, parts)


def wire_bytes(
    variant: str,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    parts: int,
    itemsize: int,
) -> int:
    """Bytes that each device sends in a layer's forward pass, including positions and segments.

    Args:
        variant: "ring", "gathered" or "ulysses".
        tokens: of all rows, over all devices of the axis.
        parts: devices along the axis.
        itemsize: bytes per element of queries, keys and values.

    Raises:
        ValueError: the variant is unknown, or "ulysses" cannot split the heads.
    """
    piece = -(-tokens // parts)
    ints = 2 * piece * 4 * (parts - 1)
    if variant in ("ring", "gathered"):
        return ints + 2 * piece * kv_heads * head_dim * itemsize * (parts - 1)
    if variant == "ulysses":
        repeated = kv_heads * head_repeats(heads, kv_heads, parts, "of ulysses")
        sent = 2 * piece * (heads + repeated) * head_dim * itemsize
        return 2 * ints + sent * (parts - 1) // parts
    raise ValueError(f"variant is {variant!r}; it must be 'ring', 'gathered' or 'ulysses'.")

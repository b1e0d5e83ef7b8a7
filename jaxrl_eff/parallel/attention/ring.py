"""Exact attention over rows whose tokens are spread over an axis of the mesh.

Three ways that differ in what travels, each with the signature of `models.attention.plain`, the
definition they equal. They are called inside a `shard_map` over the axis, on pieces of one length;
`on_mesh` makes of them an attention on global arrays.

- `ring`: keys and values go round while attention to those at hand is computed (Liu et al., 2023,
  arXiv:2310.01889). Memory falls with the number of devices; transfers hide behind compute.
- `gathered`: keys and values are gathered once. As much on the wire, in one large message.
- `ulysses`: tokens are exchanged for heads (Jacobs et al., 2023, arXiv:2309.14509). Less on the
  wire on many devices, but not hidden, and heads must divide.

Which token is where is told by its position and segment alone, the only things that are gathered
by `ring`, so that any order of tokens over devices is right (see `order`). What the backward pass
keeps is the piece's own: q, k, v, the output and its lse, the last two under the names
"attend_out" and "attend_lse": a rematerialization policy that saves both does not repeat the
transfers.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jaxrl_eff.parallel.attention import blockwise, kernels, token_order
from jaxrl_eff.parallel.attention.kernels import CHUNK, Kernel
from jaxrl_eff.types import Array, Float, Int

Attend = Callable[..., Array]

NAMES = ("attend_out", "attend_lse")


class _Tour(NamedTuple):
    """How the queries of a device meet all keys.

    Attributes:
        forward: (kernel, axis, q, kv, q_where, k_where, window, softcap) -> out, lse.
        backward: (kernel, axis, q, dout, lse, delta, kv, q_where, k_where, window, softcap)
            -> dq, dkv.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]


def ring(
    axis: str = "seq",
    *,
    chunk: int = CHUNK,
    kernel: Kernel | None = None,
    reach: int | None = None,
    unroll: int = 1,
) -> Attend:
    """Attention with keys and values going round `axis`, one permute a hop.

    P - 1 permutes forward; backward as many for keys and values, and P for their gradients, which
    are float32 and travel while the next hop is computed. With a reach of n: n, n and n + 1.

    Args:
        axis: of the mesh, over which tokens are spread.
        chunk: tokens in a chunk of queries or keys, at most, where XLA computes.
        kernel: that computes where it fits, see `kernels`; None: XLA does.
        reach: on how many pieces behind it a piece's keys are sent; None: on all. It takes that
            tokens are in order (`order.contiguous`), and no window reaches farther back.
        unroll: hops in one iteration of the loop over them. More leave the compiler more freedom
            to overlap, and let it hold as many pieces at once.

    Raises:
        ValueError: a negative reach.
    """
    if reach is not None and reach < 0:
        raise ValueError(f"reach is {reach}; it must be at least 0.")
    ways = (functools.partial(f, unroll, reach) for f in (_ring_forward, _ring_backward))
    return functools.partial(_spread, _Tour(*ways), axis, chunk, kernel)


def gathered(axis: str = "seq", *, chunk: int = CHUNK, kernel: Kernel | None = None) -> Attend:
    """Attention to keys and values gathered over `axis`, once forward and once backward.

    Their gradients are summed in float32, each device getting its own piece. Arguments as `ring`'s.
    """
    return functools.partial(_spread, _GATHERED, axis, chunk, kernel)


def ulysses(axis: str = "seq", *, chunk: int = CHUNK, kernel: Kernel | None = None) -> Attend:
    """Attention to whole rows by a part of the heads. Arguments as `ring`'s.

    Key heads that do not divide by P are repeated until they do.

    Raises:
        ValueError: (on use) the query heads do not divide by P.
    """
    return functools.partial(_ulysses, axis, chunk, kernel)


def local(axis: str = "seq", *, chunk: int = CHUNK, kernel: Kernel | None = None) -> Attend:
    """Attention of every device to its own piece alone. Arguments as `ring`'s."""
    return functools.partial(_spread, _ALONE, axis, chunk, kernel)


def _spread(
    tour: _Tour,
    axis: str,
    chunk: int,
    kernel: Kernel | None,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    q_position: Int[Array, "B T"],
    k_position: Int[Array, "B S"],
    q_segment: Int[Array, "B T"],
    k_segment: Int[Array, "B S"],
    window: int | Int[Array, ""] | None = None,
    softcap: float | None = None,
    scale: float,
) -> Float[Array, "B T N H"]:
    if kernel is None or not kernel.fits(k.shape[3], k.dtype):
        kernel = kernels.xla(chunk)
    heads, length = k.shape[2], q.shape[1]
    chunk = kernel.chunk(max(length, k.shape[1]))
    if kernel.exact:
        q, q_position, q_segment = (_pad(x, chunk) for x in (q, q_position, q_segment))
        k, v, k_position, k_segment = (_pad(x, chunk) for x in (k, v, k_position, k_segment))
    folded = blockwise.fold(q * jnp.asarray(scale, q.dtype), heads, chunk)
    kv = jnp.stack([blockwise.fold(x, heads, chunk) for x in (k, v)], axis=1)
    q_where = blockwise.fold_where(q_position, q_segment, chunk) + _zero_of(q)
    k_where = blockwise.fold_where(k_position, k_segment, chunk)
    windows = [] if window is None else [jnp.asarray(window, jnp.int32)]
    operands = _varying(axis, folded, kv, q_where, k_where, *windows)
    tour = tour if lax.axis_size(axis) > 1 else _ALONE
    how = tour, kernel, axis, softcap
    out = _attention(*how, *operands[:4], operands[4] if windows else None)
    return blockwise.unfold(out, q.shape[1], chunk)[:, :length]


def _zero_of(q: Array) -> Int[Array, ""]:
    """0, but JAX does not know.

    What a loop over layers computes of positions alone JAX would compute before the loop and keep,
    since it is the same for all layers: the masks of all chunks at once.
    """
    one = q[0, 0, 0, 0]
    return ((one != one) & False).astype(jnp.int32)


def _varying(axis: str, *arrays: Array) -> list[Array]:
    """The arrays as of one kind for `shard_map`'s check of what differs between devices."""
    kinds = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    every = {axis}.union(*kinds)
    return [
        lax.pcast(x, tuple(sorted(every - kind)), to="varying")
        for x, kind in zip(arrays, kinds, strict=True)
    ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _attention(tour, kernel, axis, softcap, q, kv, q_where, k_where, window):
    return _attention_forward(tour, kernel, axis, softcap, q, kv, q_where, k_where, window)[0]


def _attention_forward(tour, kernel, axis, softcap, q, kv, q_where, k_where, window):
    out, lse = tour.forward(kernel, axis, q, kv, q_where, k_where, window, softcap)
    out = checkpoint_name(out.astype(kv.dtype), NAMES[0])
    lse = checkpoint_name(lse, NAMES[1])
    return out, (q, kv, out, lse, q_where, k_where, window)


def _attention_backward(tour, kernel, axis, softcap, saved, dout):
    q, kv, out, lse, *where = saved
    delta = (dout.astype(lse.dtype) * out.astype(lse.dtype)).sum(axis=-1)
    dq, dkv = tour.backward(kernel, axis, q, dout, lse, delta, kv, *where, softcap)
    return dq.astype(q.dtype), dkv.astype(kv.dtype), None, None, None


_attention.defvjp(_attention_forward, _attention_backward)


# One device


def _alone_forward(kernel, axis, q, *rest):
    del axis
    return kernel.forward(*blockwise.nothing(q), q, *rest)


def _alone_backward(kernel, axis, q, *rest):
    del axis
    return kernel.backward(blockwise.nothing(q)[0], q, *rest)


_ALONE = _Tour(_alone_forward, _alone_backward)


# Ring. Hops are a loop, although it copies what came to where the next iteration finds it: of an
# unrolled ring the compiler may send all pieces before anything is computed, and then every device
# holds them all.


def _ring_forward(unroll, reach, kernel, axis, q, kv, q_where, k_where, *rest):
    sends = _sends(reach, axis)
    places = lax.all_gather(k_where, axis)

    def compute(met, kv, hop):
        return kernel.forward(*met, q, kv, q_where, _of_hop(places, hop, axis), *rest)

    def step(carry, hop):
        kv, met = carry
        coming = _next(kv, axis)
        return (coming, compute(met, kv, hop)), None

    carry, _ = lax.scan(
        step, (kv, blockwise.nothing(q)), jnp.arange(sends, dtype=jnp.int32), unroll=unroll
    )
    kv, met = carry
    return compute(met, kv, sends)


def _ring_backward(unroll, reach, kernel, axis, q, dout, lse, delta, kv, q_where, k_where, *rest):
    sends = _sends(reach, axis)
    places = lax.all_gather(k_where, axis)

    def compute(dq, kv, hop):
        there = _of_hop(places, hop, axis)
        return kernel.backward(dq, q, dout, lse, delta, kv, q_where, there, *rest)

    def last(dq, kv, dkv, hop):
        # What earlier devices found for the piece at hand arrives while this one computes.
        found = _next(dkv, axis)
        dq, dkv = compute(dq, kv, hop)
        return dq, found + dkv

    def step(carry, hop):
        dq, kv, dkv = carry
        coming = _next(kv, axis)
        dq, dkv = last(dq, kv, dkv, hop)
        return (dq, coming, dkv), None

    if sends == 0:
        return compute(blockwise.nothing(q)[0], kv, 0)
    coming = _next(kv, axis)
    dq, dkv = compute(blockwise.nothing(q)[0], kv, 0)
    between = jnp.arange(1, sends, dtype=jnp.int32)
    (dq, kv, dkv), _ = lax.scan(step, (dq, coming, dkv), between, unroll=unroll)
    dq, dkv = last(dq, kv, dkv, sends)
    return dq, _next(dkv, axis, -sends)


def _sends(reach: int | None, axis: str) -> int:
    most = lax.axis_size(axis) - 1
    return most if reach is None else min(reach, most)


def _next(x: Array, axis: str, by: int = 1) -> Array:
    parts = lax.axis_size(axis)
    return lax.ppermute(x, axis, [(i, (i + by) % parts) for i in range(parts)])


def _of_hop(places: Int[Array, "P m 2 B d"], hop: int | Array, axis: str) -> Int[Array, "m 2 B d"]:
    source = (lax.axis_index(axis) - hop) % lax.axis_size(axis)
    return lax.dynamic_index_in_dim(places, source, keepdims=False)


# Gathered


def _gathered_forward(kernel, axis, q, kv, q_where, k_where, *rest):
    kv, k_where = (lax.all_gather(x, axis, tiled=True) for x in (kv, k_where))
    return _alone_forward(kernel, axis, q, kv, q_where, k_where, *rest)


def _gathered_backward(kernel, axis, q, dout, lse, delta, kv, q_where, k_where, *rest):
    kv, k_where = (lax.all_gather(x, axis, tiled=True) for x in (kv, k_where))
    dq, dkv = _alone_backward(kernel, axis, q, dout, lse, delta, kv, q_where, k_where, *rest)
    return dq, lax.psum_scatter(dkv, axis, tiled=True)


_GATHERED = _Tour(_gathered_forward, _gathered_backward)


# Ulysses


def _ulysses(
    axis: str,
    chunk: int,
    kernel: Kernel | None,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    q_position: Int[Array, "B T"],
    k_position: Int[Array, "B S"],
    q_segment: Int[Array, "B T"],
    k_segment: Int[Array, "B S"],
    **how: Any,
) -> Float[Array, "B T N H"]:
    parts = lax.axis_size(axis)
    repeats = head_repeats(q.shape[2], k.shape[2], parts, axis)
    where = [q_position, q_segment, k_position, k_segment]
    if parts > 1:
        q, k, v, *where = _varying(axis, q, k, v, *where)
        k, v = (jnp.repeat(x, repeats, axis=2) if repeats > 1 else x for x in (k, v))
        to_heads = functools.partial(lax.all_to_all, split_axis=2, concat_axis=1, tiled=True)
        q, k, v = (to_heads(x, axis) for x in (q, k, v))
        where = [lax.all_gather(x, axis, axis=1, tiled=True) for x in where]
    names = ("q_position", "q_segment", "k_position", "k_segment")
    out = _spread(
        _ALONE, axis, chunk, kernel, q, k, v, **dict(zip(names, where, strict=True)), **how
    )
    return lax.all_to_all(out, axis, 1, 2, tiled=True) if parts > 1 else out


def head_repeats(heads: int, kv_heads: int, parts: int, axis: str) -> int:
    """How often each key head is repeated so that heads can be split over `axis`.

    Raises:
        ValueError: the query heads do not divide by the size of the axis.
    """
    if heads % parts:
        raise ValueError(
            f"{heads} query heads cannot be split over the {parts} devices of mesh axis {axis!r}: "
            "the number of heads must be a multiple; use ring or gathered."
        )
    # Each repeated head is read by a whole number of query heads: P / gcd(K, P) divides N / K.
    return parts // math.gcd(kv_heads, parts)


# On global arrays


def on_mesh(
    attend: Attend,
    mesh: Mesh | AbstractMesh,
    *,
    axis: str = "seq",
    rows: Sequence[str] = ("dcn", "data", "fsdp"),
    heads: str = "tensor",
    split: bool = True,
) -> Attend:
    """`attend` on global arrays: rows, tokens and heads split over axes of `mesh`.

    Rows or query heads that do not divide stay whole; key heads are then repeated as `ulysses`
    does. Lengths that do not divide are padded.

    Args:
        attend: `ring(axis)`, `gathered(axis)` or `ulysses(axis)`.
        axis: over which tokens are split.
        rows, heads: axes over which these are, if the mesh has them.
        split: False leaves rows whole, and splits them over `axis` behind `rows` instead of their
            tokens.

    Raises:
        ValueError: `mesh` has no such axis for tokens.
    """
    sizes = dict(mesh.shape)
    if axis not in sizes:
        raise ValueError(f"no axis {axis!r} in the mesh; it has {list(sizes)}.")
    rows = tuple(a for a in (*rows, *([] if split else [axis])) if a in sizes)
    ways = {"rows": math.prod(sizes[a] for a in rows), "heads": sizes.get(heads, 1)}

    def attention(
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        *,
        q_position: Int[Array, "B T"],
        k_position: Int[Array, "B S"],
        q_segment: Int[Array, "B T"],
        k_segment: Int[Array, "B S"],
        window: int | Int[Array, ""] | None = None,
        softcap: float | None = None,
        scale: float,
    ) -> Float[Array, "B T N H"]:
        length = q.shape[1]
        of_rows = rows if rows and q.shape[0] % ways["rows"] == 0 else None
        of_heads = heads if heads in sizes and q.shape[2] % ways["heads"] == 0 else None
        if of_heads:
            repeats = head_repeats(q.shape[2], k.shape[2], ways["heads"], heads)
            k, v = (jnp.repeat(x, repeats, axis=2) if repeats > 1 else x for x in (k, v))
        of_tokens = axis if split else None
        spec = PartitionSpec(of_rows, of_tokens, of_heads)
        where = {
            "q_position": q_position, "k_position": k_position, "q_segment": q_segment,
            "k_segment": k_segment,
        }  # fmt: skip
        pieces = sizes[axis] if split else 1
        q, k, v, where = jax.tree.map(lambda x: _pad(x, pieces), (q, k, v, where))
        # A window may be traced, and what is traced goes in as an operand.
        windows = {} if window is None else {"window": jnp.asarray(window, jnp.int32)}

        def local(q, k, v, where, windows):
            return attend(q, k, v, **where, **windows, softcap=softcap, scale=scale)

        out = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(spec, spec, spec, PartitionSpec(of_rows, of_tokens), PartitionSpec()),
            out_specs=spec,
        )(q, k, v, where, windows)
        return out[:, :length]

    attention.names = NAMES
    return attention


def _pad(x: Array, multiple: int) -> Array:
    short = token_order.padded(x.shape[1], multiple) - x.shape[1]
    return jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2)) if short else x


def wire_bytes(
    variant: str,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    parts: int,
    itemsize: int,
) -> int:
    """Bytes that each device sends in a layer's forward pass, metadata included.

    Args:
        variant: "ring", "gathered" or "ulysses".
        tokens: of all rows, on all devices of the axis.
        parts: devices of the axis.
        itemsize: bytes of a number.

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

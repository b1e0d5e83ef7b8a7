"""Distributed attention on global arrays, sharded over the axes of a mesh."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jaxrl_eff.parallel.attention import ring
from jaxrl_eff.parallel.attention.context import Attend, Mask
from jaxrl_eff.parallel.attention.token_order import pad
from jaxrl_eff.types import Array, Float


def on_mesh(
    attend: Attend,
    mesh: Mesh | AbstractMesh,
    *,
    axis: str = "seq",
    rows: Sequence[str] = ("dcn", "data", "fsdp"),
    heads: str = "tensor",
    split: bool = True,
    nested: bool = False,
) -> Attend:
    """Wraps `attend` for global arrays with rows, tokens and heads sharded over axes of `mesh`.

    Rows or query heads that do not divide are replicated; where query heads are sharded, key heads
    are repeated as in `ring.ulysses`. Lengths that do not divide are padded.

    Args:
        attend: `ring.ring(axis)`, `ring.gathered(axis)` or `ring.ulysses(axis)`.
        axis: mesh axis for tokens.
        rows, heads: mesh axes for rows and heads, if the mesh has them.
        split: False shards rows over `rows` and `axis`, and does not shard tokens.
        nested: True inside a `jax.shard_map` over all axes but `axis` and, if it has several
            devices, `heads`: arrays have a device's own rows.

    Raises:
        ValueError: `mesh` has no such axis for tokens.
    """
    sizes = dict(mesh.shape)
    if axis not in sizes:
        raise ValueError(f"unknown mesh axis {axis!r}; expected one of {list(sizes)}.")
    over: dict[str, Any] = {"mesh": mesh}
    if nested:
        left = {a for a in (axis, heads) if sizes.get(a, 1) > 1}
        rows, sizes = (), {a: sizes[a] for a in left}
        over = {"axis_names": left, "check_vma": False}
    rows = tuple(a for a in (*rows, *([] if split else [axis])) if a in sizes)
    ways = {"rows": math.prod(sizes[a] for a in rows), "heads": sizes.get(heads, 1)}

    def attention(
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        mask: Mask,
        *,
        scale: float,
        softcap: float | None = None,
    ) -> Float[Array, "B T N H"]:
        length = q.shape[1]
        of_rows = rows if rows and q.shape[0] % ways["rows"] == 0 else None
        of_heads = heads if heads in sizes and q.shape[2] % ways["heads"] == 0 else None
        if of_heads:
            k, v = ring.repeated_heads(q.shape[2], (k, v), ways["heads"], heads)
        of_tokens, pieces = (axis, sizes[axis]) if split else (None, 1)
        spec, of_mask = (PartitionSpec(of_rows, of_tokens, *h) for h in ([of_heads], []))
        q, k, v = (pad(x, pieces) for x in (q, k, v))
        mask = mask.each(lambda x: pad(x, pieces))
        if mask.window is not None:  # it can be a tracer, which is taken only as an operand
            mask = mask._replace(window=jnp.asarray(mask.window, jnp.int32))
        own = functools.partial(attend, scale=scale, softcap=softcap)
        if nested and not sizes:
            return own(q, k, v, mask)
        out = jax.shard_map(
            own,
            in_specs=(spec, spec, spec, Mask(*[of_mask] * 4, PartitionSpec())),
            out_specs=spec,
            **over,
        )(q, k, v, mask)
        return out[:, :length]

    attention.names = ring.NAMES
    return attention

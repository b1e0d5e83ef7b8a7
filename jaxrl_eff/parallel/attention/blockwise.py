"""One device's share of distributed attention: its queries on one shard of the keys, in XLA.

Queries and keys are processed in chunks, and a pair of chunks is computed only if some query sees
some key. So no score matrix exceeds chunk x chunk, and pairs masked by documents, causality or a
window cost only a comparison. Partial results are pairs (out, lse): the softmax output over the
keys processed so far and its logsumexp. `merge` combines two of them stably in any order, as in
FlashAttention (Dao, 2023, arXiv:2307.08691, section 2.3).

Letters, in addition to those of `types`: n chunks of queries, m chunks of keys, c queries per
chunk, d keys per chunk, R = G c.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxrl_eff.parallel.attention.context import Mask
from jaxrl_eff.types import Array, Float, Int

NEG = -1e30  # lse of a query that has seen no key; finite, so that differences are finite
FLOOR = -1e29


class Where(NamedTuple):
    """A `Mask` in chunks: (position, segment) of every query and key.

    Attributes:
        q, k: of queries and of keys, see `fold_where`.
        window: as in `Mask`.
    """

    q: Int[Array, "n 2 B c"]
    k: Int[Array, "m 2 B d"]
    window: Int[Array, ""] | None = None


class Queries(NamedTuple):
    """Operands of the backward pass that belong to queries.

    Attributes:
        q: scaled queries.
        dout: gradient of the output.
        lse: over all keys, including those of other shards.
        delta: rowsum(dout * out), with `out` over all keys.
    """

    q: Float[Array, "n B K R H"]
    dout: Float[Array, "n B K R H"]
    lse: Float[Array, "n B K R"]
    delta: Float[Array, "n B K R"]


def wide(dtype: Any) -> Any:
    """Accumulation dtype: float64 for float64, otherwise float32."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def merge(
    out: Float[Array, "*r H"],
    lse: Float[Array, "*r"],
    other: Float[Array, "*r H"],
    other_lse: Float[Array, "*r"],
) -> tuple[Float[Array, "*r H"], Float[Array, "*r"]]:
    """Combines the partial attention over two sets of keys.

    lse' = log(e^lse + e^other_lse), out' = e^(lse - lse') out + e^(other_lse - lse') other. The
    factors are computed as sigmoids of lse - other_lse and its negative: they sum to 1 even if lse'
    is so large that its rounding error matters, and nothing overflows.
    """
    apart = lse - other_lse
    out = lax.logistic(apart)[..., None] * out + lax.logistic(-apart)[..., None] * other
    return out, jnp.maximum(lse, other_lse) + jnp.log1p(jnp.exp(-jnp.abs(apart)))


def nothing(q: Float[Array, "n B K R H"]) -> tuple[Array, Array]:
    """Initial (out, lse), before any key."""
    out = jnp.zeros_like(q, wide(q.dtype))
    return out, jnp.full_like(out[..., 0], NEG)


def forward(
    met: tuple[Float[Array, "n B K R H"], Float[Array, "n B K R"]],
    q: Float[Array, "n B K R H"],
    kv: Float[Array, "m 2 B K d H"],
    where: Where,
    softcap: float | None,
) -> tuple[Float[Array, "n B K R H"], Float[Array, "n B K R"]]:
    """Updates (out, lse) with these keys. `q` is already scaled."""

    def queries(met, chunk):
        i, q, q_where = chunk

        def keys(one, chunk):
            kv, k_where = chunk
            seen = Mask(*q_where, *k_where, where.window).seen()
            one = lax.cond(
                seen.any(), lambda: merge(*one, *_piece(q, kv, seen, softcap)), lambda: one
            )
            return one, None

        return _put(met, i, _scan(keys, _at(met, i), (kv, where.k))[0]), None

    return _scan(queries, tuple(met), (jnp.arange(len(q)), q, where.q))[0]


def backward(
    dq: Float[Array, "n B K R H"],
    queries: Queries,
    kv: Float[Array, "m 2 B K d H"],
    where: Where,
    softcap: float | None,
) -> tuple[Float[Array, "n B K R H"], Float[Array, "m 2 B K d H"]]:
    """Adds these keys' share to dq; returns it and the gradient of the keys and values.

    Both are in the accumulation dtype.
    """
    of_queries = (jnp.arange(len(queries.q)), where.q, queries)

    def keys(dq, chunk):
        kv, k_where = chunk

        def one_chunk(carry, chunk):
            dq, dkv = carry
            i, q_where, queries = chunk
            seen = Mask(*q_where, *k_where, where.window).seen()

            def add():
                more, more_kv = _piece_gradient(queries, kv, seen, softcap)
                return _at(dq, i) + more, dkv + more_kv

            one, dkv = lax.cond(seen.any(), add, lambda: (_at(dq, i), dkv))
            return (_put(dq, i, one), dkv), None

        return _scan(one_chunk, (dq, jnp.zeros_like(kv, dq.dtype)), of_queries)[0]

    return _scan(keys, dq, (kv, where.k))


def _piece(q, kv, seen, softcap):
    score, _ = _scores(q, kv[0], seen, softcap)
    # The floor gives a query that sees no key zero weights instead of uniform ones.
    top = jnp.maximum(score.max(axis=-1), FLOOR)
    weight = jnp.exp(score - top[..., None])
    total = weight.sum(axis=-1)
    out = _product("bkrd,bkdh->bkrh", weight, kv[1])
    total = jnp.where(total > 0, total, 1)
    lse = jnp.where(top > FLOOR, top + jnp.log(total), NEG)
    return out / total[..., None], lse


def _piece_gradient(queries, kv, seen, softcap):
    q, dout, lse, delta = queries
    score, slope = _scores(q, kv[0], seen, softcap)
    weight = jnp.exp(score - jnp.maximum(lse, FLOOR)[..., None])
    dv = _product("bkrd,bkrh->bkdh", weight, dout)
    dweight = _product("bkrh,bkdh->bkrd", dout, kv[1])
    dscore = weight * (dweight - delta[..., None]) * slope
    dq = _product("bkrd,bkdh->bkrh", dscore, kv[0])
    dk = _product("bkrd,bkrh->bkdh", dscore, q)
    return dq, jnp.stack([dk, dv])


def _scores(q, k, seen, softcap):
    """Scores c tanh(q.k / c), NEG where masked, and their derivative with respect to q.k."""
    score, slope = _product("bkrh,bkdh->bkrd", q, k), jnp.ones((), wide(q.dtype))
    if softcap is not None:
        bend = jnp.tanh(score / softcap)
        score, slope = softcap * bend, 1 - bend * bend
    rows, heads, _, keys = score.shape
    groups = score.reshape(rows, heads, -1, *seen.shape[1:])
    score = jnp.where(seen[:, None, None], groups, NEG).reshape(rows, heads, -1, keys)
    return score, slope


def _product(letters: str, x: Array, y: Array) -> Array:
    """Einsum with operands in `y`'s dtype, that of the inputs, and wide accumulation."""
    return jnp.einsum(letters, x.astype(y.dtype), y, preferred_element_type=wide(y.dtype))


def _at(tree: Any, i: Array) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _put(tree: Any, i: Array, one: Any) -> Any:
    """Replaces the i-th chunk; in place inside a loop, where a scan output would be a copy."""
    return jax.tree.map(lambda x, y: lax.dynamic_update_index_in_dim(x, y, i, 0), tree, one)


def _scan(body: Callable, carry: Any, chunks: Any) -> tuple[Any, Any]:
    """`lax.scan`, unrolled if there is a single chunk."""
    return lax.scan(body, carry, chunks, unroll=jax.tree.leaves(chunks)[0].shape[0] == 1)


# Conversion to and from chunks


def chunks(length: int, most: int) -> tuple[int, int]:
    """(number, size) of equal chunks of at most `most` tokens; the last one is padded."""
    number = max(1, -(-length // most))
    return number, -(-length // number)


def fold(x: Float[Array, "B T N H"], heads: int, most: int) -> Float[Array, "n B K R H"]:
    """Splits tokens into leading chunks of at most `most`; query heads per key head become rows."""
    rows, length, _, dim = x.shape
    number, size = chunks(length, most)
    x = jnp.pad(x, ((0, 0), (0, number * size - length), (0, 0), (0, 0)))
    x = x.reshape(rows, number, size, heads, -1, dim).transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(number, rows, heads, -1, dim)


def unfold(x: Float[Array, "n B K R H"], length: int, most: int) -> Float[Array, "B T N H"]:
    """Inverse of `fold` for `length` tokens."""
    number, rows, heads, _, dim = x.shape
    size = chunks(length, most)[1]
    x = x.reshape(number, rows, heads, -1, size, dim).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(rows, number * size, -1, dim)[:, :length]


def fold_where(
    position: Int[Array, "B T"], segment: Int[Array, "B T"], most: int
) -> Int[Array, "n 2 B c"]:
    """Positions and segments in the chunks of `fold`; added tokens are padding (segment 0)."""
    where = jnp.stack([position.astype(jnp.int32), segment.astype(jnp.int32)])
    number, size = chunks(where.shape[2], most)
    where = jnp.pad(where, ((0, 0), (0, 0), (0, number * size - where.shape[2])))
    return where.reshape(2, -1, number, size).transpose(2, 0, 1, 3)

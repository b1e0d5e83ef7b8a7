"""Outputs of a language model for the calls of a graph: log-probabilities, values, scores.

Index t describes the choice of token t, so everything here is shifted by one against the hidden
states: position t reads the hidden state of t - 1, and a segment's first token gets 0.

The vocabulary is large, so logits are computed for a chunk of tokens at a time and recomputed in
the backward pass; logits of the whole batch never exist, unless one chunk holds all tokens.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrl_eff.models.config import LMConfig
from jaxrl_eff.models.logits import Warp, entropy, log_softmax_at
from jaxrl_eff.models.logits import warp as warp_logits
from jaxrl_eff.models.transformer import apply, scalar, unembed
from jaxrl_eff.parallel.attention.context import SequenceLayout, current_layout
from jaxrl_eff.types import Array, Float, Int, PyTree

# Maximum number of logits at once, for any vocabulary: 128 MiB of float32 on a CPU. Every chunk
# reads the whole table and adds a gradient of its size, so accelerators use larger chunks.
CHUNK_LOGITS, CHUNK_LOGITS_CPU = 2**27, 2**25

CallFn = Callable[[PyTree, dict[str, Array], Array], dict[str, Array]]


def token_logprobs(
    cfg: LMConfig,
    params: PyTree,
    tokens: Int[Array, "B T"],
    position: Int[Array, "B T"],
    segment: Int[Array, "B T"],
    *,
    warp: Warp = Warp(),
    chunk: int | None = None,
    with_entropy: bool = True,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Returns log pi(token t | tokens before t) and the entropy of that choice, both in nats.

    Both are 0 at a segment's first token and at padding. The distribution is the warped one, and
    both carry gradients.

    Args:
        warp: temperature and truncation, as when the tokens were sampled.
        chunk: number of tokens whose logits exist at once; None: set by `CHUNK_LOGITS`; 0: all.
        with_entropy: False skips the entropy and returns zeros in its place.

    Example:
        >>> from jaxrl_eff import LMConfig, init, token_logprobs
        >>> lm = LMConfig(vocab=8, layers=1, width=4, heads=1, kv_heads=1, head_dim=4, ffn=8)
        >>> params = init(lm, jax.random.key(0))
        >>> tokens, position = jnp.array([[5, 6, 7]]), jnp.array([[0, 1, 2]])
        >>> segment = jnp.ones_like(tokens)
        >>> logp, entropy = token_logprobs(lm, params, tokens, position, segment)
        >>> logp.shape, float(logp[0, 0]), bool((logp[0, 1:] < 0).all())
        ((1, 3), 0.0, True)
    """
    # Only per-token numbers are exchanged between devices, never hidden states.
    over = _layout(cfg, tokens)
    where = map(over.place, (tokens, position, segment))
    hidden, _ = apply(cfg, params, *where, attend=over.attend)
    following = over.place(over.next(tokens))
    fn = functools.partial(_of_hidden, cfg, params, warp, with_entropy)
    found = _in_chunks(fn, hidden, following, _pieces(cfg, tokens.shape, chunk))
    chosen = (position > 0) & (segment > 0)
    logp, spread = (_shift(over, over.restore(x), chosen) for x in found)
    return logp, spread


def _layout(cfg: LMConfig, tokens: Array) -> SequenceLayout:
    of_model = {"sight": cfg.sight, "head_dim": cfg.head_dim, "dtype": cfg.dtype}
    return current_layout(tokens.shape[1], **of_model)


def _of_hidden(cfg, params, warp, with_entropy, hidden, following):
    logits = unembed(cfg, params, hidden)
    logits = warp_logits(logits, warp, keep=following)
    logp = log_softmax_at(logits, following)
    return logp, entropy(logits) if with_entropy else jnp.zeros_like(logp)


def _pieces(cfg: LMConfig, shape: tuple[int, ...], chunk: int | None) -> int:
    """Returns the number of pieces of the time axis."""
    rows, length = shape
    if chunk is None:
        on_cpu = jax.default_backend() == "cpu"
        chunk = (CHUNK_LOGITS_CPU if on_cpu else CHUNK_LOGITS) // cfg.vocab
    chunk = chunk or rows * length
    return math.ceil(length / max(1, chunk // rows))


def _in_chunks(fn, hidden, following, pieces: int):
    """Computes `fn(hidden, following)` in pieces, each recomputed in the backward pass.

    Piece j is every pieces-th position from j, so that each piece has its share of every device's
    rows and positions for any sharding of the batch.
    """
    if pieces == 1:
        return fn(hidden, following)
    rows, length, width = hidden.shape
    each = math.ceil(length / pieces)
    extra = each * pieces - length
    hidden = jnp.pad(hidden, ((0, 0), (0, extra), (0, 0))).reshape(rows, each, pieces, width)
    following = jnp.pad(following, ((0, 0), (0, extra))).reshape(rows, each, pieces)
    swapped = jnp.moveaxis(hidden, 2, 0), jnp.moveaxis(following, 2, 0)
    outs = jax.lax.map(jax.checkpoint(lambda piece: fn(*piece)), swapped)
    back = lambda x: jnp.moveaxis(x, 0, 2).reshape(rows, each * pieces)[:, :length]  # noqa: E731
    return jax.tree.map(back, outs)


def _shift(over: SequenceLayout, x: Float[Array, "B T"], chosen: Array) -> Float[Array, "B T"]:
    """Shifts numbers about the token after t to token t."""
    return jnp.where(chosen, over.previous(x), 0.0)


def scalar_head(
    cfg: LMConfig,
    params: PyTree,
    tokens: Int[Array, "B T"],
    position: Int[Array, "B T"],
    segment: Int[Array, "B T"],
) -> Float[Array, "B T"]:
    """Returns the value head's number after reading token t (not shifted); 0 at padding."""
    over = _layout(cfg, tokens)
    where = map(over.place, (tokens, position, segment))
    hidden, _ = apply(cfg, params, *where, attend=over.attend)
    return jnp.where(segment > 0, over.restore(scalar(cfg, params, hidden)), 0.0)


def token_values(
    cfg: LMConfig,
    params: PyTree,
    tokens: Int[Array, "B T"],
    position: Int[Array, "B T"],
    segment: Int[Array, "B T"],
) -> Float[Array, "B T"]:
    """Returns the value head's estimate before token t is chosen; 0 at first tokens and padding."""
    after = scalar_head(cfg, params, tokens, position, segment)
    over = _layout(cfg, tokens)
    return _shift(over, after, (position > 0) & (segment > 0))


def logprobs(
    cfg: LMConfig,
    *,
    warp: Warp = Warp(),
    chunk: int | None = None,
    name: str = "logp",
    entropy: bool = False,
) -> CallFn:
    """Returns an infer function: tokens, position, segment -> `name`, and `entropy` if set.

    Example:
        >>> from jaxrl_eff import LMConfig, core, logprobs
        >>> lm = LMConfig(vocab=8, layers=1, width=4, heads=1, kv_heads=1, head_dim=4, ffn=8)
        >>> fn, reads = logprobs(lm, name="ref_logp"), "tokens position segment"
        >>> core.infer("ref_inf", of="ref", fn=fn, reads=reads, writes="ref_logp").writes
        ('ref_logp',)
    """

    def call(params: PyTree, batch: dict[str, Array], key: Array) -> dict[str, Array]:
        del key
        logp, spread = token_logprobs(
            cfg, params, batch["tokens"], batch["position"], batch["segment"],
            warp=warp, chunk=chunk, with_entropy=entropy,
        )  # fmt: skip
        return {name: logp, "entropy": spread} if entropy else {name: logp}

    return call


def values(cfg: LMConfig) -> CallFn:
    """Returns an infer function: tokens, position, segment -> `value`.

    Example:
        >>> from jaxrl_eff import LMConfig, abstract, values
        >>> lm = LMConfig(vocab=8, layers=1, width=4, heads=1, kv_heads=1, head_dim=4, ffn=8)
        >>> lm = lm.replace(head="value")
        >>> params = jax.tree.map(lambda x: jnp.zeros(x.shape), abstract(lm))
        >>> batch = {"tokens": jnp.array([[5, 6]]), "position": jnp.array([[0, 1]])}
        >>> batch["segment"] = jnp.array([[1, 1]])
        >>> values(lm)(params, batch, jax.random.key(0))["value"].tolist()
        [[0.0, 0.0]]
    """

    def call(params: PyTree, batch: dict[str, Array], key: Array) -> dict[str, Array]:
        del key
        where = batch["tokens"], batch["position"], batch["segment"]
        return {"value": token_values(cfg, params, *where)}

    return call


def token_scores(cfg: LMConfig) -> CallFn:
    """Returns an infer function: tokens, position, segment -> `after`, see `scalar_head`.

    Example:
        >>> from jaxrl_eff.models import LMConfig, abstract, token_scores
        >>> lm = LMConfig(vocab=8, layers=1, width=4, heads=1, kv_heads=1, head_dim=4, ffn=8)
        >>> lm = lm.replace(head="value")
        >>> params = jax.tree.map(lambda x: jnp.zeros(x.shape), abstract(lm))
        >>> batch = {"tokens": jnp.array([[5, 6]]), "position": jnp.array([[0, 1]])}
        >>> batch["segment"] = jnp.array([[1, 1]])
        >>> token_scores(lm)(params, batch, jax.random.key(0))["after"].shape
        (1, 2)
    """

    def call(params: PyTree, batch: dict[str, Array], key: Array) -> dict[str, Array]:
        del key
        where = batch["tokens"], batch["position"], batch["segment"]
        return {"after": scalar_head(cfg, params, *where)}

    return call


def last_score(batch: dict[str, Array], key: Array) -> dict[str, Array]:
    """Computes `score` from `after` at each row's last token; one sequence per row.

    Example:
        >>> from jaxrl_eff.models import last_score
        >>> batch = {"after": jnp.array([[1.0, 2.0, 3.0]]), "segment": jnp.array([[1, 1, 0]])}
        >>> last_score(batch, jax.random.key(0))["score"].tolist()
        [2.0]
    """
    del key
    segment = batch["segment"]
    at = jnp.arange(segment.shape[1])[None, :]
    end = jnp.where(segment > 0, at, -1).max(axis=1, keepdims=True)
    return {"score": jnp.where(at == end, batch["after"], 0.0).sum(axis=1)}

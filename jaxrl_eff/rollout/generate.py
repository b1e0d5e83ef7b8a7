"""Sampling responses: one compiled program that reads the prompts and then loops over tokens.

Prompts of unequal length are left-aligned. Each is read once and its cache repeated for the R
samples. While decoding, all rows write the same slot Tp + s, one slice for the whole batch, and
the gap between a prompt's end and slot Tp is masked like any padding. At the end the gaps are
removed. The loop stops when every row has ended; with `compactions` the unfinished rows move to a
smaller batch first.

Not supported: admitting new prompts where others finished, which needs a loop on the host.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_eff import tree
from jaxrl_eff.models import attention
from jaxrl_eff.models import params as params_
from jaxrl_eff.models.config import LMConfig
from jaxrl_eff.models.transformer import Cache, apply, cast_for_decode, unembed, unstack_layers
from jaxrl_eff.models.weights import transient
from jaxrl_eff.rollout import cache as kv
from jaxrl_eff.rollout.sampling import Sampling, draw, ends, uniforms
from jaxrl_eff.types import Array, Float, Int, PyTree

# Size limit of parameters that are unstacked before decoding. On an accelerator a loop over layers
# copies each layer's parameters out of the stack at every token; unstacking only takes longer to
# compile.
UNSTACK_BYTES, UNSTACK_BYTES_CPU = 2**34, 2**28

GenerateFn = Callable[[PyTree, dict[str, Array], Array], dict[str, Array]]


class _State(NamedTuple):
    """State of the rows being decoded; after a compaction, fewer than the batch has.

    `token` was drawn at step - 1 and is in `tokens` already, but not in the cache.
    """

    step: Array  # []
    row: Array  # [b] index in the batch
    uniform: Array  # [b, max_tokens] random numbers
    position: Array  # [b] of `token`
    token: Array  # [b]
    done: Array  # [b]
    tokens: Array  # [b, max_tokens]
    logp: Array  # [b, max_tokens]
    count: Array  # [b] tokens of the response
    cache: Cache


def sample(
    cfg: LMConfig, sampling: Sampling, *, attend: attention.Attend | None = None
) -> GenerateFn:
    """Returns the function of a generate call.

    It reads prompt, prompt_length and, if present, prompt_example. It writes tokens, segment,
    position, mask, logp, group and, given prompt_example, example, for B = P * R rows of Tp +
    max_tokens: prompt, response and padding, with the samples of a prompt adjacent. The token that
    ends a response is part of it. `logp` is under the warped distribution.

    Args:
        attend: the attention; None: `attention.choose(cfg)`.

    Example:
        >>> from jaxrl_eff import LMConfig, Sampling, init, sample
        >>> lm = LMConfig(vocab=8, layers=1, width=4, heads=1, kv_heads=1, head_dim=4, ffn=8)
        >>> generate = jax.jit(sample(lm, Sampling(max_tokens=2, samples=3)))
        >>> batch = {"prompt": jnp.array([[5, 6]]), "prompt_length": jnp.array([2])}
        >>> out = generate(init(lm, jax.random.key(0)), batch, jax.random.key(1))
        >>> out["tokens"].shape, out["mask"][0].tolist()
        ((3, 4), [0.0, 0.0, 1.0, 1.0])
    """
    attend = attend or attention.choose(cfg)
    unstacked = small(params_.abstract(cfg)) if sampling.unstack is None else sampling.unstack
    stops = (*cfg.eos, *sampling.stop)

    def advance(params: PyTree, state: _State) -> _State:
        """Reads the last token, draws the next."""
        segment = jnp.ones_like(state.token)[:, None]
        hidden, cache = apply(
            cfg, params, state.token[:, None], state.position[:, None], segment,
            attend=attend, cache=state.cache,
        )  # fmt: skip
        logits = unembed(cfg, params, hidden[:, 0])
        return _record(sampling, stops, state._replace(cache=cache), logits)

    def call(params: PyTree, batch: dict[str, Array], key: Array) -> dict[str, Array]:
        prompt, length = batch["prompt"], batch["prompt_length"]
        # A microbatch has the indices of its prompts in the batch, so samples do not depend on it.
        group = batch.get("prompt_row", jnp.arange(len(prompt), dtype=jnp.int32))
        group = jnp.repeat(group, sampling.samples)
        sample_ = jnp.tile(jnp.arange(sampling.samples, dtype=jnp.int32), len(prompt))
        uniform = uniforms(key, group * sampling.samples + sample_, sampling.max_tokens)
        params = cast_for_decode(cfg, params)
        hidden, cache = _read(cfg, params, prompt, length, attend)
        if unstacked and not transient(params):  # unstacked, all would be dequantized
            params, cache = unstack_layers(cfg, params), kv.unstack(cache)
        cache = kv.repeat(cache, sampling.samples)
        logits = jnp.repeat(unembed(cfg, params, hidden), sampling.samples, axis=0)
        state = _begin(sampling, uniform, jnp.repeat(length, sampling.samples), cache)
        state = _record(sampling, stops, state, logits)
        tokens, logp, count = _decode(
            sampling, prompt.shape[1], lambda s: advance(params, s), state
        )
        out = _close_up(sampling, prompt, length, tokens, logp, count) | {"group": group}
        if "prompt_example" in batch:
            out["example"] = jnp.repeat(batch["prompt_example"], sampling.samples)
        return out

    return call


def small(params: PyTree) -> bool:
    """Returns True if parameters are worth unstacking for decoding (`models.unstack_layers`)."""
    on_cpu = jax.default_backend() == "cpu"
    return tree.nbytes(params) <= (UNSTACK_BYTES_CPU if on_cpu else UNSTACK_BYTES)


def _read(
    cfg: LMConfig,
    params: PyTree,
    prompt: Int[Array, "P T"],
    length: Int[Array, "P"],
    attend: attention.Attend,
) -> tuple[Float[Array, "P D"], Cache]:
    """Returns the hidden state at each prompt's last token, and the cache of the prompts."""
    at = jnp.broadcast_to(jnp.arange(prompt.shape[1]), prompt.shape)
    segment = (at < length[:, None]).astype(jnp.int32)
    cache = kv.empty(cfg, *prompt.shape)
    hidden, cache = apply(cfg, params, prompt, at, segment, attend=attend, cache=cache)
    last = jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)[:, 0]
    return last, cache


def _begin(
    sampling: Sampling, uniform: Float[Array, "B R"], length: Int[Array, "B"], cache: Cache
) -> _State:
    rows, shape = length.shape[0], (length.shape[0], sampling.max_tokens)
    row = jnp.arange(rows, dtype=jnp.int32)
    return _State(
        step=jnp.int32(0),
        row=row,
        uniform=uniform,
        position=length - 1,
        token=jnp.zeros(rows, jnp.int32),
        done=jnp.zeros(rows, bool),
        tokens=jnp.full(shape, sampling.pad, jnp.int32),
        logp=jnp.zeros(shape, jnp.float32),
        count=jnp.zeros(rows, jnp.int32),
        cache=cache.replace(slot=jnp.int32(cache.slot)),
    )


def _record(
    sampling: Sampling, stops: tuple[int, ...], state: _State, logits: Float[Array, "B V"]
) -> _State:
    """Draws a token for every row and records it for those that have not ended."""
    uniform = jax.lax.dynamic_index_in_dim(state.uniform, state.step, axis=1, keepdims=False)
    token, logp = draw(logits, sampling.warp, uniform)
    token = jnp.where(state.done, sampling.pad, token)
    at = (0, state.step)
    return state._replace(
        step=state.step + 1,
        position=state.position + 1,
        token=token,
        done=state.done | ends(token, stops),
        tokens=jax.lax.dynamic_update_slice(state.tokens, token[:, None], at),
        logp=jax.lax.dynamic_update_slice(
            state.logp, jnp.where(state.done, 0.0, logp)[:, None], at
        ),
        count=state.count + (~state.done).astype(jnp.int32),
    )


def _decode(
    sampling: Sampling, width: int, advance: Callable[[_State], _State], state: _State
) -> tuple[Int[Array, "B R"], Float[Array, "B R"], Int[Array, "B"]]:
    """Runs `advance` until every row has ended; returns tokens, logp and count of the batch."""
    full = state.tokens, state.logp, state.count

    def run(state: _State, enough: int, steps: int) -> _State:
        """Runs until `steps` tokens were drawn or at most `enough` rows are unfinished."""
        return jax.lax.while_loop(
            lambda s: (s.step < steps) & ((~s.done).sum() > enough), advance, state
        )

    for left in range(sampling.compactions, -1, -1):
        rows = state.token.shape[0]
        enough = (rows + 1) // 2 if left and rows > 1 else 0
        # Only the whole batch has a growing cache: when a smaller batch starts depends on when rows
        # end, which is unknown at compile time.
        growths = sampling.growths if left == sampling.compactions else 1
        room = state.cache.segment.shape[1] - width
        for i in range(growths):
            steps = -(-sampling.max_tokens * (i + 1) // growths)
            state = state._replace(cache=kv.grow(state.cache, steps - room))
            state, room = run(state, enough, steps), steps
        mine, row = (state.tokens, state.logp, state.count), state.row
        full = tuple(all_.at[row].set(some) for all_, some in zip(full, mine, strict=True))
        if enough:
            state = _compact(state, enough)
    return full


def _compact(state: _State, rows: int) -> _State:
    """Selects `rows` rows, unfinished ones first. Dropped rows have ended, or time is up."""
    order = jnp.argsort(state.done, stable=True)[:rows]
    kept = {
        name: jnp.take(getattr(state, name), order, axis=0)
        for name in ("row", "uniform", "position", "token", "done", "tokens", "logp", "count")
    }
    return state._replace(**kept, cache=kv.take(state.cache, order))


def _close_up(
    sampling: Sampling,
    prompt: Int[Array, "P T"],
    length: Int[Array, "P"],
    tokens: Int[Array, "B R"],
    logp: Float[Array, "B R"],
    count: Int[Array, "B"],
) -> dict[str, Array]:
    """Moves every response to the end of its prompt."""
    width, rows = prompt.shape[1], tokens.shape[0]
    prompt = jnp.repeat(prompt, sampling.samples, axis=0)
    length = jnp.repeat(length, sampling.samples)[:, None]
    at = jnp.broadcast_to(jnp.arange(width + sampling.max_tokens), (rows, width + tokens.shape[1]))
    inside = at < length + count[:, None]
    answer = inside & (at >= length)
    source = jnp.where(at < length, at, at - length + width)
    source = jnp.where(inside, source, 0)
    gathered = jnp.take_along_axis(jnp.concatenate([prompt, tokens], axis=1), source, axis=1)
    shifted = jnp.concatenate([jnp.zeros(prompt.shape, jnp.float32), logp], axis=1)
    return {
        "tokens": jnp.where(inside, gathered, sampling.pad),
        "segment": inside.astype(jnp.int32),
        "position": jnp.where(inside, at, 0),
        "mask": answer.astype(jnp.float32),
        "logp": jnp.where(answer, jnp.take_along_axis(shifted, source, axis=1), 0.0),
    }

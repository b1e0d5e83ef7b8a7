"""A decoder-only transformer: tokens in, hidden states out.

Pre-norm residual blocks of grouped-query attention and a gated MLP. The layers are one module
scanned over parameters stacked on a leading axis, `layers/...[L, ...]`, so compile time does not
grow with depth; per-layer differences (window, rotation) are scanned inputs. For decoding a small
model the same blocks run over unstacked parameters (`unstack_layers`).

The KV cache is an argument and a result. The module is independent of meshes: parameters and
activations carry logical axis names, which have no effect until rules are given.
"""

import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jaxrl_eff import tree
from jaxrl_eff.models import attention, rope, weights
from jaxrl_eff.models.config import LMConfig
from jaxrl_eff.models.layers import KEEP_WEIGHTS, SAVED, Block, Context, Linear, Norm, normal
from jaxrl_eff.models.products import product
from jaxrl_eff.types import Array, Float, Int, PyTree


@flax.struct.dataclass
class Cache:
    """Keys and values of the tokens read so far. All rows write the same slots.

    Attributes:
        k, v: `[L, B, K, S, H]`, or for unstacked parameters a tuple of L arrays `[B, K, S, H]`.
            Heads precede slots, the order that the matrix products over them need.
        position, segment: `[B, S]` of each slot; segment 0 where nothing was written.
        slot: first slot of the next tokens, the same for all rows.
    """

    k: Any
    v: Any
    position: Int[Array, "B S"]
    segment: Int[Array, "B S"]
    slot: Int[Array, ""] | int


class LanguageModel(nn.Module):
    """Embedding, layers, final norm, and the head (`unembed` or `scalar`).

    Attributes:
        cfg: sizes and options.
        attend: the attention, with the signature of `attention.plain`.
        stacked: True if parameters of layers are stacked under `layers`; else `layers_0` ...
    """

    cfg: LMConfig
    attend: attention.Attend = attention.plain
    stacked: bool = True

    def setup(self) -> None:
        cfg = self.cfg
        self.embed = _Embed(cfg)
        block = _remat(cfg)
        if self.stacked:
            scan = nn.scan(
                block, variable_axes={"params": 0}, split_rngs={"params": True},
                in_axes=(0, 0, nn.broadcast), length=cfg.layers, unroll=cfg.loop_unroll,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )  # fmt: skip
            self.layers = scan(cfg, self.attend)
        else:
            self.layers = [block(cfg, self.attend) for _ in range(cfg.layers)]
        self.final_norm = Norm(cfg)
        if cfg.head == "value":
            self.value = Linear(cfg, (cfg.width,), (1,), ("embed", None))
        elif not cfg.tie:
            self.unembed_ = _Unembed(cfg, name="unembed")

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        position: Int[Array, "B T"],
        segment: Int[Array, "B T"],
        *,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Returns hidden states after the final norm, and the cache including these tokens.

        Args:
            tokens, position, segment: see `core.glossary`.
            cache: keys and values read before; the given tokens are written at its slot and
                attend to all its entries. None: they attend to each other.
        """
        cfg = self.cfg
        cache = _advance(cache, position, segment)
        ctx = Context(
            position, position if cache is None else cache.position,
            segment, segment if cache is None else cache.segment,
            rope.table(cfg.rope, cfg.head_dim, position),
            cfg.rope_local and rope.table(cfg.rope_local, cfg.head_dim, position),
            None if cache is None else cache.slot,
        )  # fmt: skip
        x = nn.with_logical_constraint(self.embed(tokens), ("batch", "length", "act_embed"))
        local = jnp.asarray(cfg.windowed)
        if self.stacked:
            kv = None if cache is None else (cache.k, cache.v)
            (x, kv), _ = self.layers((x, kv), local, jnp.arange(cfg.layers), ctx)
        else:
            kv = []
            for i, block in enumerate(self.layers):
                mine = None if cache is None else (cache.k[i], cache.v[i])
                (x, mine), _ = block((x, mine), local[i], None, ctx)
                kv.append(mine)
            kv = None if cache is None else tuple(zip(*kv, strict=True))
        hidden = self.final_norm(x)
        if self.is_initializing():
            self.scalar(hidden) if cfg.head == "value" else self.unembed(hidden)
        if cache is not None:
            cache = cache.replace(k=kv[0], v=kv[1], slot=cache.slot + tokens.shape[1])
        return hidden, cache

    def unembed(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Returns logits, float32, soft-capped if the config sets it."""
        cfg = self.cfg
        logits = self.embed.attend(hidden) if cfg.tie else self.unembed_(hidden)
        if cfg.final_softcap is not None:
            logits = cfg.final_softcap * jnp.tanh(logits / cfg.final_softcap)
        return logits

    def scalar(self, hidden: Float[Array, "... D"]) -> Float[Array, "..."]:
        """Returns one number per position, float32 (head="value")."""
        return self.value(hidden).astype(jnp.float32)[..., 0]


class _Embed(nn.Module):
    cfg: LMConfig

    def setup(self) -> None:
        cfg = self.cfg
        box = nn.with_logical_partitioning(normal(cfg), ("vocab", "embed"))
        self.table = self.param("table", box, (cfg.vocab, cfg.width), jnp.dtype(cfg.param_dtype))

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        dtype = jnp.dtype(self.cfg.dtype)
        x = jnp.take(self.table, tokens, axis=0, mode="clip").astype(dtype)
        return x * jnp.asarray(math.sqrt(self.cfg.width), dtype) if self.cfg.embed_scale else x

    def attend(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        table = self.table.astype(hidden.dtype)
        return product(hidden, table.T, jnp.float32)


class _Unembed(nn.Module):
    cfg: LMConfig

    @nn.compact
    def __call__(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        cfg = self.cfg
        box = nn.with_logical_partitioning(normal(cfg), ("embed", "vocab"))
        kernel = self.param("kernel", box, (cfg.width, cfg.vocab), jnp.dtype(cfg.param_dtype))
        kernel = kernel.astype(hidden.dtype)
        return product(hidden, kernel, jnp.float32)


def _remat(cfg: LMConfig):
    """Returns `Block`, rematerialized in the backward pass according to `cfg.remat`."""
    if cfg.remat in KEEP_WEIGHTS:
        return Block
    policies = jax.checkpoint_policies
    held = policies.save_only_these_names(SAVED[3])
    policy = {
        "full": held,
        "dots": policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, held),
        "outputs": policies.save_only_these_names(*SAVED[:2], SAVED[3]),
        "host": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[*SAVED[:2], SAVED[3]],
            names_which_can_be_offloaded=[SAVED[2]],
            offload_src="device", offload_dst="pinned_host",
        ),
    }[cfg.remat]  # fmt: skip
    # In a loop XLA cannot merge the recomputation with the forward pass; unrolled, it would.
    return nn.remat(Block, policy=policy, prevent_cse=cfg.loop_unroll > 1)


def _advance(cache: Cache | None, position: Array, segment: Array) -> Cache | None:
    """Writes the positions and segments of the new tokens at the cache's slot."""
    if cache is None:
        return None
    at = (0, cache.slot)
    return cache.replace(
        position=jax.lax.dynamic_update_slice(cache.position, position, at),
        segment=jax.lax.dynamic_update_slice(cache.segment, segment, at),
    )


def apply(
    cfg: LMConfig,
    params: PyTree,
    tokens: Int[Array, "B T"],
    position: Int[Array, "B T"],
    segment: Int[Array, "B T"],
    *,
    attend: attention.Attend | None = None,
    cache: Cache | None = None,
) -> tuple[Float[Array, "B T D"], Cache | None]:
    """Runs `LanguageModel.__call__` on a plain parameter tree, stacked or from `unstack_layers`.

    Args:
        attend: the attention; None: `attention.choose(cfg)`.

    Example:
        >>> from jaxrl_eff import LMConfig, apply, init
        >>> lm = LMConfig(vocab=8, layers=1, width=4, heads=1, kv_heads=1, head_dim=4, ffn=8)
        >>> params = init(lm, jax.random.key(0))
        >>> tokens, position = jnp.array([[5, 6, 7]]), jnp.array([[0, 1, 2]])
        >>> segment = jnp.ones_like(tokens)
        >>> hidden, cache = apply(lm, params, tokens, position, segment)
        >>> hidden.shape, cache
        ((1, 3, 4), None)
    """
    if weights.transient(params):
        # If unrolled, the compiler could dequantize or gather all layers before the first.
        cfg = cfg.replace(unroll=cfg.unroll or 1)
    model = LanguageModel(cfg, attend or attention.choose(cfg), stacked="layers" in params)
    return model.apply({"params": dict(params)}, tokens, position, segment, cache=cache)


def unembed(cfg: LMConfig, params: PyTree, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Returns logits, float32, soft-capped if the config sets it."""
    return _head(cfg, params, hidden, "unembed")


def scalar(cfg: LMConfig, params: PyTree, hidden: Float[Array, "... D"]) -> Float[Array, "..."]:
    """Returns the value head's number at every position, float32."""
    return _head(cfg, params, hidden, "scalar")


def _head(cfg: LMConfig, params: PyTree, hidden: Array, method: str) -> Array:
    kept = {name: params[name] for name in ("embed", "unembed", "value") if name in params}
    return LanguageModel(cfg).apply({"params": kept}, hidden, method=method)


def cast_for_decode(cfg: LMConfig, params: PyTree) -> PyTree:
    """Casts the parameters that every use would round to `cfg.dtype` anyway to that dtype.

    A loop over tokens then reads the narrow ones. Parameters in host memory are unchanged; weights
    compute what they would compute at every product, see `weights.Kernel.prepared`.
    """

    def narrow(path: Any, x: Any) -> Any:
        rounded = tree.path_name(path[-1:]) in ("kernel", "bias", "table")
        return weights.prepared(x, jnp.dtype(cfg.dtype)) if rounded else x

    is_weight = lambda x: isinstance(x, weights.Weight)  # noqa: E731
    return jax.tree_util.tree_map_with_path(narrow, params, is_leaf=is_weight)


def unstack_layers(cfg: LMConfig, params: PyTree) -> PyTree:
    """Returns the parameters with one entry per layer, `layers_0` ..., instead of stacked ones."""
    rest = {name: value for name, value in params.items() if name != "layers"}
    split = [jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(cfg.layers)]
    return rest | {f"layers_{i}": layer for i, layer in enumerate(split)}

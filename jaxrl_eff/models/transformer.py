"""A decoder-only transformer: tokens in, hidden states out.

Pre-norm residual blocks of grouped-query attention and a gated MLP. The layers are one module
scanned over parameters stacked on a leading axis, `layers/...[L, ...]`, so compile time does not
grow with depth; per-layer differences (window, rotation) are scanned inputs. For decoding a small
model the same blocks run over unstacked parameters (`unstack_layers`).

The KV cache is an argument and a result. The module is independent of meshes: parameters and
activations carry logical axis names, which have no effect until rules are given.
"""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxrl_eff import tree
from jaxrl_eff.models import attention, rope
from jaxrl_eff.models.config import LMConfig
from jaxrl_eff.peft import products, quantized
from jaxrl_eff.types import Array, Float, Int, PyTree

# Checkpoint names for rematerialization policies: an attention's output and log-sum-exp (named by a
# ring, `parallel.attention.ring.NAMES`), a layer's input, and a node's part of the weights
# (`parallel.zero.collectives.STAGE`).
SAVED = ("attend_out", "attend_lse", "layer_input", "zero_stage1")


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


class _Context(NamedTuple):
    """Inputs shared by all layers: positions, segments, rotations, cache slot."""

    q_position: Array
    k_position: Array
    q_segment: Array
    k_segment: Array
    rotation: tuple[Array, Array]
    rotation_local: tuple[Array, Array] | None
    slot: Array | int | None


def _normal(cfg: LMConfig, scale: float = 1.0):
    return nn.initializers.normal(cfg.init_std * scale)


def _act(name: str, x: Array) -> Array:
    return jax.nn.silu(x) if name == "silu" else jax.nn.gelu(x, approximate=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated(name: str, gate: Array, up: Array) -> Array:
    """Computes act(gate) * up. Its residuals are the two inputs, without intermediate values."""
    return _act(name, gate) * up


def _gated_forward(name: str, gate: Array, up: Array):
    return _gated(name, gate, up), (gate, up)


def _gated_backward(name: str, saved, g: Array):
    gate, up = saved
    value, slope = jax.jvp(functools.partial(_act, name), (gate,), (jnp.ones_like(gate),))
    return g * up * slope, g * value


_gated.defvjp(_gated_forward, _gated_backward)


def _whole(leaf: Any) -> Array:
    """Returns a parameter, gathered if this device has only a shard (`parallel.zero.weights`)."""
    return leaf.whole() if hasattr(leaf, "whole") else leaf


def _sharded_weights(params: PyTree) -> bool:
    there = lambda x: hasattr(x, "whole")  # noqa: E731
    return any(map(there, jax.tree.leaves(params, is_leaf=there)))


def _gathered(variables: PyTree) -> PyTree:
    """Returns variables with `_whole` parameters."""
    return jax.tree.map(_whole, variables, is_leaf=lambda x: hasattr(x, "whole"))


def _here(x: Array) -> Array:
    """Returns a parameter in device memory; inside a loop over layers, fetches one at a time."""
    host = jax.typeof(x).memory_space == jax.memory.Space.Host
    return jax.device_put(x, jax.memory.Space.Device) if host else x


_KEEP_WEIGHTS = ("none", "attention")  # `remat` values that do not recompute the whole layer


class Norm(nn.Module):
    """RMSNorm: x / rms(x) * w in float32. With `norm_offset` the stored weight is w - 1."""

    cfg: LMConfig
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        cfg = self.cfg
        start = nn.initializers.zeros if cfg.norm_offset else nn.initializers.ones
        box = nn.with_logical_partitioning(start, (self.axis,))
        w = _here(self.param("scale", box, (x.shape[-1],), jnp.dtype(cfg.param_dtype)))
        w = w.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + cfg.norm_eps)
        # Llama rounds before the product, Gemma after it.
        if cfg.norm_offset:
            return (y * (1 + w)).astype(x.dtype)
        return y.astype(x.dtype) * w.astype(x.dtype)


class Linear(nn.Module):
    """Contraction of the last axes of x with a kernel of named axes; the bias covers the new axes.

    Applies adapters stored beside the kernel, see `peft.products`.
    """

    cfg: LMConfig
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[str | None, ...]
    bias: bool = False
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        dtype, stored = jnp.dtype(self.cfg.dtype), jnp.dtype(self.cfg.param_dtype)
        lead = x.shape[: x.ndim - len(self.inputs)]
        here = self._there(products.LEAVES)
        apart = self._there((*quantized.LEAVES, "kernel"))
        if len(apart) > 1 or hasattr(apart.get("kernel"), "whole"):
            if self.cfg.remat not in _KEEP_WEIGHTS:  # the whole layer is recomputed
                apart = {k: _whole(leaf) for k, leaf in apart.items()}
            # Gathered or dequantized kernels are recomputed in the backward pass, never saved.
            names = jax.checkpoint_policies.save_only_these_names(SAVED[3])
            unrolled = self.cfg.loop_unroll > 1
            run = jax.checkpoint(self._multiply, prevent_cse=unrolled, policy=names)
            y = run(apart, here, x.reshape(*lead, -1))
        else:
            box = nn.with_logical_partitioning(_normal(self.cfg, self.scale), self.axes)
            kernel = self.param("kernel", box, self.inputs + self.outputs, stored)
            y = self._multiply({"kernel": kernel}, here, x.reshape(*lead, -1))
        y = y.reshape(*lead, *self.outputs)
        if not self.bias:
            return y
        axes = self.axes[len(self.inputs) :]
        box = nn.with_logical_partitioning(nn.initializers.zeros, axes)
        bias = _here(self.param("bias", box, self.outputs, stored)).astype(dtype)
        return y + bias.reshape((1,) * len(lead) + bias.shape)

    def _there(self, names: tuple[str, ...]) -> dict[str, Any]:
        found = {k: self.get_variable("params", k) for k in names}
        return {k: leaf for k, leaf in found.items() if leaf is not None}

    def _multiply(self, kept: dict[str, Any], beside: dict[str, Array], x: Array) -> Array:
        """Multiplies x by the kernel (or the dequantized one), and applies the leaves beside it."""
        dtype, whole = jnp.dtype(self.cfg.dtype), None
        kept, beside = ({k: _here(_whole(v)) for k, v in d.items()} for d in (kept, beside))
        if "kernel" in kept:
            kernel = kept["kernel"].astype(dtype)
        else:
            # Gathered over the fsdp axis as codes, in a fraction of the bytes.
            axes = tuple(None if axis == "embed" else axis for axis in self.axes)
            kept = {k: nn.with_logical_constraint(leaf, axes) for k, leaf in kept.items()}
            kernel = quantized.dequantize(kept, dtype)
        matrix = kernel.reshape(math.prod(self.inputs), math.prod(self.outputs))
        names = self.axes[0], self.axes[len(self.inputs)]
        if self.has_variable("shared", "whole"):
            whole = self.get_variable("shared", "whole")
        return products.product(beside, x, matrix, names, _product, whole)


def _product(x: Float[Array, "... D"], matrix: Float[Array, "D F"], dtype=None) -> Array:
    """Computes x @ matrix, merging rows and time into one axis where possible.

    With two axes to sum over, the gradient of the matrix would first transpose both operands (50 %
    slower on CPUs). But a sharded axis must not be merged.
    """
    lead = x.shape[:-1]
    if not _sharded("length"):
        x = x.reshape(-1, x.shape[-1])
    widened = dtype is not None and dtype != x.dtype
    y = _widened(x, matrix, dtype) if widened else jnp.einsum("...d,df->...f", x, matrix)
    return y.reshape(*lead, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _widened(x: Float[Array, "... D"], matrix: Float[Array, "D F"], dtype) -> Array:
    """Computes x @ matrix, summed and returned in a wider dtype.

    Its gradient is rounded to the dtype of x before the products of the backward pass. These would
    otherwise have a wide and a narrow operand and run in the wide dtype, several times slower on
    matrix units.
    """
    return jnp.einsum("...d,df->...f", x, matrix, preferred_element_type=dtype)


def _widened_forward(x: Array, matrix: Array, dtype):
    return _widened(x, matrix, dtype), (x, matrix)


def _widened_backward(dtype, saved, g: Array):
    del dtype
    _, back = jax.vjp(functools.partial(jnp.einsum, "...d,df->...f"), *saved)
    return back(g.astype(saved[0].dtype))


_widened.defvjp(_widened_forward, _widened_backward)


def _sharded(name: str) -> bool:
    """Returns True if the current rules shard this logical axis over several devices."""
    axes = next((axes for key, axes in nn.get_logical_axis_rules() if key == name), None)
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return any(sizes.get(axis, 2) > 1 for axis in axes)


class Attention(nn.Module):
    """Grouped-query attention with rotation, over the given tokens or over the cache."""

    cfg: LMConfig
    attend: attention.Attend

    @nn.compact
    def __call__(self, x, local, ctx: _Context, kv, layer):
        cfg = self.cfg
        q = self._project("q", "heads", cfg.heads)(x)
        k = self._project("k", "kv_heads", cfg.kv_heads)(x)
        v = self._project("v", "kv_heads", cfg.kv_heads)(x)
        if cfg.qk_norm:
            q = Norm(cfg, axis="head_dim", name="q_norm")(q)
            k = Norm(cfg, axis="head_dim", name="k_norm")(k)
        cos, sin = ctx.rotation
        if ctx.rotation_local is not None:
            cos = jnp.where(local, ctx.rotation_local[0], cos)
            sin = jnp.where(local, ctx.rotation_local[1], sin)
        q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)
        q = nn.with_logical_constraint(q, ("batch", "length", "act_heads", None))
        k = nn.with_logical_constraint(k, ("batch", "length", "act_kv_heads", None))
        v = nn.with_logical_constraint(v, ("batch", "length", "act_kv_heads", None))
        if kv is not None:
            k, v, kv = _remember(kv, k, v, ctx.slot, layer)
        attend = jax.checkpoint(self._attend) if cfg.remat == "attention" else self._attend
        out = attend(q, k, v, local, ctx)
        if not getattr(self.attend, "names", ()):  # a ring names its own outputs
            out = checkpoint_name(out, SAVED[0])
        out = Linear(
            cfg, (cfg.heads, cfg.head_dim), (cfg.width,), ("heads", "head_dim", "embed"),
            cfg.o_bias, (2 * cfg.layers) ** -0.5, name="o",
        )(out)  # fmt: skip
        return out, kv

    def _project(self, name: str, axis: str, heads: int) -> Linear:
        cfg = self.cfg
        return Linear(
            cfg, (cfg.width,), (heads, cfg.head_dim), ("embed", axis, "head_dim"),
            cfg.qkv_bias, name=name,
        )  # fmt: skip

    def _attend(self, q, k, v, local, ctx: _Context):
        cfg = self.cfg
        # Positions are int32, so this window has no effect where the layer is global.
        window = None if cfg.window is None else jnp.where(local, cfg.window, 2**30)
        return self.attend(
            q, k, v, q_position=ctx.q_position, k_position=ctx.k_position, q_segment=ctx.q_segment,
            k_segment=ctx.k_segment, window=window, softcap=cfg.attn_softcap, scale=cfg.score_scale,
        )  # fmt: skip


def _remember(kv, k, v, slot, layer):
    """Writes new keys and values; returns all those of this layer, and the updated cache."""

    def write(all_, new):
        new = jnp.swapaxes(new, 1, 2)
        if layer is None:
            all_ = one = jax.lax.dynamic_update_slice(all_, new, (0, 0, slot, 0))
        else:
            # One array carried through the loop over layers is updated in place; a scanned input
            # and output would be copied entirely at every token.
            all_ = jax.lax.dynamic_update_slice(all_, new[None], (layer, 0, 0, slot, 0))
            one = jax.lax.dynamic_index_in_dim(all_, layer, keepdims=False)
        return all_, jnp.swapaxes(one, 1, 2)

    (all_k, k), (all_v, v) = write(kv[0], k), write(kv[1], v)
    return k, v, (all_k, all_v)


class Mlp(nn.Module):
    """Gated MLP: down(act(gate x) * up x)."""

    cfg: LMConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        cfg = self.cfg
        wide = functools.partial(
            Linear, cfg, (cfg.width,), (cfg.ffn,), ("embed", "ffn"), cfg.mlp_bias
        )
        y = _gated(cfg.act, wide(name="gate")(x), wide(name="up")(x))
        y = nn.with_logical_constraint(y, ("batch", "length", "act_ffn"))
        return Linear(
            cfg, (cfg.ffn,), (cfg.width,), ("ffn", "embed"),
            cfg.mlp_bias, (2 * cfg.layers) ** -0.5, name="down",
        )(y)  # fmt: skip


class _Piece(Mlp):
    """The MLP on a chunk of every row, as a scan body."""

    def __call__(self, carry: None, x: Float[Array, "B T D"]) -> tuple[None, Array]:
        return carry, super().__call__(x)


def _in_pieces(cfg: LMConfig, x: Float[Array, "B T D"], sharded: bool) -> Float[Array, "B T D"]:
    """Applies `Mlp` to `mlp_chunk` tokens of each row at a time. Called in a compact method.

    Args:
        sharded: True if this device may have only shards of the weights; they are gathered once
            for all chunks.
    """
    rows, length, width = x.shape
    pieces = math.ceil(length / cfg.mlp_chunk)
    extra = pieces * cfg.mlp_chunk - length
    cut = jnp.pad(x, ((0, 0), (0, extra), (0, 0))).reshape(rows, pieces, cfg.mlp_chunk, width)
    run = nn.scan(
        nn.remat(_Piece), variable_broadcast=("params", "shared"), split_rngs={"params": False},
        in_axes=1, out_axes=1,
    )  # fmt: skip
    if sharded:
        run = nn.map_variables(run, "params", _gathered)
        if cfg.remat in _KEEP_WEIGHTS:  # otherwise the whole layer is recomputed
            names = jax.checkpoint_policies.save_only_these_names(SAVED[3])
            run = nn.remat(run, policy=names, prevent_cse=cfg.loop_unroll > 1)
    _, y = run(cfg, name="mlp")(None, cut)
    return y.reshape(rows, -1, width)[:, :length]


class Block(nn.Module):
    """One transformer layer. The carry is (hidden, keys and values or None)."""

    cfg: LMConfig
    attend: attention.Attend

    @nn.compact
    def __call__(self, carry, local, layer, ctx: _Context):
        cfg, (x, kv) = self.cfg, carry
        x = checkpoint_name(x, SAVED[2])
        y = Norm(cfg, name="attn_norm")(x)
        y, kv = Attention(cfg, self.attend, name="attn")(y, local, ctx, kv, layer)
        x = x + (Norm(cfg, name="post_attn_norm")(y) if cfg.post_norms else y)
        y = Norm(cfg, name="mlp_norm")(x)
        chunked = 0 < cfg.mlp_chunk < y.shape[1]
        sharded = self.has_variable("params", "mlp") and _sharded_weights(self.variables["params"])
        y = _in_pieces(cfg, y, sharded) if chunked else Mlp(cfg, name="mlp")(y)
        x = x + (Norm(cfg, name="post_mlp_norm")(y) if cfg.post_norms else y)
        return (nn.with_logical_constraint(x, ("batch", "length", "act_embed")), kv), None


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
                block, variable_axes={"params": 0}, variable_broadcast="shared",
                split_rngs={"params": True},
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
        ctx = _Context(
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
        box = nn.with_logical_partitioning(_normal(cfg), ("vocab", "embed"))
        self.table = self.param("table", box, (cfg.vocab, cfg.width), jnp.dtype(cfg.param_dtype))

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        dtype = jnp.dtype(self.cfg.dtype)
        x = jnp.take(self.table, tokens, axis=0, mode="clip").astype(dtype)
        return x * jnp.asarray(math.sqrt(self.cfg.width), dtype) if self.cfg.embed_scale else x

    def attend(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        table = self.table.astype(hidden.dtype)
        return _product(hidden, table.T, jnp.float32)


class _Unembed(nn.Module):
    cfg: LMConfig

    @nn.compact
    def __call__(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        cfg = self.cfg
        box = nn.with_logical_partitioning(_normal(cfg), ("embed", "vocab"))
        kernel = self.param("kernel", box, (cfg.width, cfg.vocab), jnp.dtype(cfg.param_dtype))
        kernel = kernel.astype(hidden.dtype)
        return _product(hidden, kernel, jnp.float32)


def _remat(cfg: LMConfig):
    """Returns `Block`, rematerialized in the backward pass according to `cfg.remat`."""
    if cfg.remat in _KEEP_WEIGHTS:
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
    if quantized.inside(params) or _sharded_weights(params):
        # If unrolled, the compiler could dequantize or gather all layers before the first.
        cfg = cfg.replace(unroll=cfg.unroll or 1)
    model = LanguageModel(cfg, attend or attention.choose(cfg), stacked="layers" in params)
    params = dict(params)
    shared = params.pop("shared", {})  # arrays shared by all layers, see `peft.products`
    variables = {"params": params, "shared": shared}
    return model.apply(variables, tokens, position, segment, cache=cache)


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

    A loop over tokens then reads the narrow ones. Parameters in host memory are unchanged.
    """

    def narrow(name: str, x: Array) -> Array:
        rounded = name.split("/")[-1] in ("kernel", "bias", "table")
        host = jax.typeof(x).memory_space == jax.memory.Space.Host
        return x.astype(jnp.dtype(cfg.dtype)) if rounded and not host else x

    return tree.map_with_name(narrow, params)


def unstack_layers(cfg: LMConfig, params: PyTree) -> PyTree:
    """Returns the parameters with one entry per layer, `layers_0` ..., instead of stacked ones."""
    rest = {name: value for name, value in params.items() if name != "layers"}
    split = [jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(cfg.layers)]
    return rest | {f"layers_{i}": layer for i, layer in enumerate(split)}

"""Layers of the transformer: norm, linear, attention, gated MLP, and the residual block."""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxrl_eff.models import attention, rope, weights
from jaxrl_eff.models.config import LMConfig
from jaxrl_eff.types import Array, Float

# Checkpoint names for rematerialization policies: an attention's output and log-sum-exp (named by a
# ring, `parallel.attention.ring.NAMES`), a layer's input, and a node's part of the weights
# (`parallel.zero.collectives.STAGE`).
SAVED = ("attend_out", "attend_lse", "layer_input", "zero_stage1")


class Context(NamedTuple):
    """Inputs shared by all layers: positions, segments, rotations, cache slot."""

    q_position: Array
    k_position: Array
    q_segment: Array
    k_segment: Array
    rotation: tuple[Array, Array]
    rotation_local: tuple[Array, Array] | None
    slot: Array | int | None


def normal(cfg: LMConfig, scale: float = 1.0):
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


KEEP_WEIGHTS = ("none", "attention")  # `remat` values that do not recompute the whole layer


class Norm(nn.Module):
    """RMSNorm: x / rms(x) * w in float32. With `norm_offset` the stored weight is w - 1."""

    cfg: LMConfig
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        cfg = self.cfg
        start = nn.initializers.zeros if cfg.norm_offset else nn.initializers.ones
        box = nn.with_logical_partitioning(start, (self.axis,))
        w = weights.parameter(self, "scale", box, (x.shape[-1],), jnp.dtype(cfg.param_dtype))
        w = weights.array(w, jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + cfg.norm_eps)
        # Llama rounds before the product, Gemma after it.
        if cfg.norm_offset:
            return (y * (1 + w)).astype(x.dtype)
        return y.astype(x.dtype) * w.astype(x.dtype)


class Linear(nn.Module):
    """Contraction of the last axes of x with a kernel of named axes; the bias covers the new axes.

    The kernel is an array or a weight, see `models.weights`.
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
        if unknown := sorted({*self.variables.get("params", ())} - {"kernel", "bias"}):
            raise ValueError(
                f"{'/'.join(self.path)} has {unknown} beside its kernel, which the model does not "
                "read; the view of its Spec makes a weight of them."
            )
        lead = x.shape[: x.ndim - len(self.inputs)]
        box = nn.with_logical_partitioning(normal(self.cfg, self.scale), self.axes)
        kernel = weights.parameter(self, "kernel", box, self.inputs + self.outputs, stored)
        y = self._multiply(x.reshape(*lead, -1), kernel).reshape(*lead, *self.outputs)
        if not self.bias:
            return y
        axes = self.axes[len(self.inputs) :]
        box = nn.with_logical_partitioning(nn.initializers.zeros, axes)
        bias = weights.parameter(self, "bias", box, self.outputs, stored)
        return y + weights.array(bias, dtype).reshape((1,) * len(lead) + self.outputs)

    def _multiply(self, x: Float[Array, "... D"], kernel: Any) -> Float[Array, "... F"]:
        if not weights.transient(kernel):
            return weights.matmul(x, kernel)
        if self.cfg.remat not in KEEP_WEIGHTS:  # the whole layer is recomputed
            kernel = weights.gathered(kernel)
        # Gathered or dequantized kernels are recomputed in the backward pass, never saved. A new
        # function, since JAX keeps its trace, and what a kernel closes over, as long as it exists.
        run = jax.checkpoint(
            lambda x, kernel: weights.matmul(x, kernel),
            prevent_cse=self.cfg.loop_unroll > 1,
            policy=jax.checkpoint_policies.save_only_these_names(SAVED[3]),
        )
        return run(x, kernel)


class Attention(nn.Module):
    """Grouped-query attention with rotation, over the given tokens or over the cache."""

    cfg: LMConfig
    attend: attention.Attend

    @nn.compact
    def __call__(self, x, local, ctx: Context, kv, layer):
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

    def _attend(self, q, k, v, local, ctx: Context):
        cfg = self.cfg
        # Positions are int32, so this window has no effect where the layer is global.
        window = None if cfg.window is None else jnp.where(local, cfg.window, 2**30)
        where = ctx.q_position, ctx.q_segment, ctx.k_position, ctx.k_segment
        mask = attention.Mask(*where, window)
        return self.attend(q, k, v, mask, scale=cfg.score_scale, softcap=cfg.attn_softcap)


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
        sharded: True if this device has only shards of the weights; they are gathered once for all
            chunks.
    """
    rows, length, width = x.shape
    pieces = math.ceil(length / cfg.mlp_chunk)
    extra = pieces * cfg.mlp_chunk - length
    cut = jnp.pad(x, ((0, 0), (0, extra), (0, 0))).reshape(rows, pieces, cfg.mlp_chunk, width)
    run = nn.scan(
        nn.remat(_Piece), variable_broadcast="params", split_rngs={"params": False},
        in_axes=1, out_axes=1,
    )  # fmt: skip
    if sharded:
        run = nn.map_variables(run, "params", weights.gathered)
        if cfg.remat in KEEP_WEIGHTS:  # otherwise the whole layer is recomputed
            names = jax.checkpoint_policies.save_only_these_names(SAVED[3])
            run = nn.remat(run, policy=names, prevent_cse=cfg.loop_unroll > 1)
    _, y = run(cfg, name="mlp")(None, cut)
    return y.reshape(rows, -1, width)[:, :length]


class Block(nn.Module):
    """One transformer layer. The carry is (hidden, keys and values or None)."""

    cfg: LMConfig
    attend: attention.Attend

    @nn.compact
    def __call__(self, carry, local, layer, ctx: Context):
        cfg, (x, kv) = self.cfg, carry
        x = checkpoint_name(x, SAVED[2])
        y = Norm(cfg, name="attn_norm")(x)
        y, kv = Attention(cfg, self.attend, name="attn")(y, local, ctx, kv, layer)
        x = x + (Norm(cfg, name="post_attn_norm")(y) if cfg.post_norms else y)
        y = Norm(cfg, name="mlp_norm")(x)
        chunked = 0 < cfg.mlp_chunk < y.shape[1]
        sharded = weights.sharded(self.variables.get("params", {}))
        y = _in_pieces(cfg, y, sharded) if chunked else Mlp(cfg, name="mlp")(y)
        x = x + (Norm(cfg, name="post_mlp_norm")(y) if cfg.post_norms else y)
        return (nn.with_logical_constraint(x, ("batch", "length", "act_embed")), kv), None

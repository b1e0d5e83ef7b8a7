"""What the parameters are: shapes, axis names, counts, and their first values."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrl_eff import tree
from jaxrl_eff.models.config import LMConfig
from jaxrl_eff.models.transformer import LanguageModel
from jaxrl_eff.types import Array, Key, PyTree


def _boxed(cfg: LMConfig, key: Key[Array, ""]) -> PyTree:
    # The attention has no parameters and one token shows every shape.
    one = jnp.ones((1, 1), jnp.int32)
    return LanguageModel(cfg).init(key, one, one, one)["params"]


@functools.lru_cache(maxsize=64)
def _shapes(cfg: LMConfig) -> PyTree:
    return jax.eval_shape(functools.partial(_boxed, cfg), jax.random.key(0))


def abstract(cfg: LMConfig) -> PyTree:
    """Shape and dtype of every parameter, as `jax.ShapeDtypeStruct`s, without making any."""
    return nn.unbox(_shapes(cfg))


def logical_axes(cfg: LMConfig) -> PyTree:
    """For every parameter the names of its axes, a tuple: `("layers", "embed", "ffn")`.

    None stands for an axis that is never sharded. The tree has the structure of `abstract(cfg)`
    with tuples as leaves.
    """
    boxed = lambda x: isinstance(x, nn.meta.AxisMetadata)  # noqa: E731
    return jax.tree.map(lambda x: tuple(x.names), _shapes(cfg), is_leaf=boxed)


@functools.partial(jax.jit, static_argnums=0)
def init(cfg: LMConfig, key: Key[Array, ""]) -> PyTree:
    """First values: N(0, init_std^2), narrower by sqrt(2L) for what writes to the residual.

    The values depend on the key and the shapes alone, not on how they are sharded, as long as
    `jax_threefry_partitionable` is on (JAX's default).
    """
    return nn.unbox(_boxed(cfg, key))


def count(cfg: LMConfig) -> int:
    """Number of parameters; tied embeddings count once."""
    return tree.size(abstract(cfg))


def flops_per_token(cfg: LMConfig, context: float | int) -> float:
    """Forward FLOPs for one token that sees `context` keys (a multiply-add counts 2).

    A backward pass costs twice as much again. Norms and other elementwise work are left out.
    """
    products = 2 * tree.size(abstract(cfg)["layers"])
    seen = [min(context, cfg.window) if local else context for local in cfg.windowed]
    attention = sum(4 * cfg.heads * cfg.head_dim * keys for keys in seen)
    head = 2 * cfg.width * (cfg.vocab if cfg.head == "lm" else 1)
    return float(products + attention + head)

"""Parameters of a model: shapes, axis names, counts, and initial values."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrl_eff import tree
from jaxrl_eff.models.config import LMConfig
from jaxrl_eff.models.transformer import LanguageModel
from jaxrl_eff.types import Array, Key, PyTree


def _boxed(cfg: LMConfig, key: Key[Array, ""]) -> PyTree:
    # Attention has no parameters of its own, and one token is enough to infer every shape.
    one = jnp.ones((1, 1), jnp.int32)
    return LanguageModel(cfg).init(key, one, one, one)["params"]


@functools.lru_cache(maxsize=64)
def _shapes(cfg: LMConfig) -> PyTree:
    return jax.eval_shape(functools.partial(_boxed, cfg), jax.random.key(0))


def abstract(cfg: LMConfig) -> PyTree:
    """Returns every parameter as a `jax.ShapeDtypeStruct`, without allocating any.

    Example:
        >>> from jaxrl_eff import LMConfig, abstract
        >>> lm = LMConfig(vocab=8, layers=1, width=4, heads=1, kv_heads=1, head_dim=4, ffn=8)
        >>> abstract(lm)["embed"]["table"]
        ShapeDtypeStruct(shape=(8, 4), dtype=float32)
    """
    return nn.unbox(_shapes(cfg))


def logical_axes(cfg: LMConfig) -> PyTree:
    """Returns the axis names of every parameter, a tuple such as `("layers", "embed", "ffn")`.

    None denotes an axis that is never sharded. The tree has the structure of `abstract(cfg)` with
    tuples as leaves.

    Example:
        >>> from jaxrl_eff import LMConfig, logical_axes
        >>> lm = LMConfig(vocab=8, layers=1, width=4, heads=1, kv_heads=1, head_dim=4, ffn=8)
        >>> logical_axes(lm)["layers"]["mlp"]["up"]
        {'kernel': ('layers', 'embed', 'ffn')}
    """
    boxed = lambda x: isinstance(x, nn.meta.AxisMetadata)  # noqa: E731
    return jax.tree.map(lambda x: tuple(x.names), _shapes(cfg), is_leaf=boxed)


@functools.partial(jax.jit, static_argnums=0)
def init(cfg: LMConfig, key: Key[Array, ""]) -> PyTree:
    """Initializes parameters: N(0, init_std^2), narrower by sqrt(2L) for outputs to the residual.

    The values depend only on the key and the shapes, not on the sharding, if
    `jax_threefry_partitionable` is on (JAX's default).

    Example:
        >>> from jaxrl_eff import LMConfig, init
        >>> lm = LMConfig(vocab=8, layers=1, width=4, heads=1, kv_heads=1, head_dim=4, ffn=8)
        >>> params = init(lm, jax.random.key(0))
        >>> params["embed"]["table"].shape
        (8, 4)
    """
    return nn.unbox(_boxed(cfg, key))


def count(cfg: LMConfig) -> int:
    """Returns the number of parameters; tied embeddings count once.

    Example:
        >>> from jaxrl_eff import LMConfig, count
        >>> lm = LMConfig(vocab=8, layers=1, width=4, heads=1, kv_heads=1, head_dim=4, ffn=8)
        >>> count(lm)
        236
    """
    return tree.size(abstract(cfg))


def flops_per_token(cfg: LMConfig, context: float | int) -> float:
    """Returns the forward FLOPs of one token that sees `context` keys (a multiply-add counts 2).

    A backward pass costs twice as much. Norms and other elementwise operations are not counted.

    Example:
        >>> from jaxrl_eff.models import LMConfig, flops_per_token
        >>> lm = LMConfig(vocab=8, layers=1, width=4, heads=1, kv_heads=1, head_dim=4, ffn=8)
        >>> flops_per_token(lm, context=10)
        560.0
    """
    products = 2 * tree.size(abstract(cfg)["layers"])
    seen = [min(context, cfg.window) if local else context for local in cfg.windowed]
    attention = sum(4 * cfg.heads * cfg.head_dim * keys for keys in seen)
    head = 2 * cfg.width * (cfg.vocab if cfg.head == "lm" else 1)
    return float(products + attention + head)

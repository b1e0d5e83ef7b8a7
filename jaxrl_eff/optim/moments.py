"""Adam with moments stored by codecs and float32 arithmetic."""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrl_eff.optim import codecs, mcf
from jaxrl_eff.optim.mcf import Scalar
from jaxrl_eff.optim.paths import path_name


class LowPrecisionAdamState(NamedTuple):
    """State of `scale_by_adam`.

    Attributes:
        count: updates so far, int32.
        mu, nu: part of the codec -> tree of the parameters' structure; leaves without the part are
            `optax.MaskedNode`.
    """

    count: jax.Array
    mu: dict[str, Any]
    nu: dict[str, Any]


def scale_by_adam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    mu: str = "float32",
    nu: str = "float32",
    seed: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """Adam (Kingma and Ba 2014, arXiv:1412.6980, Algorithm 1) with a codec for each moment.

    optax.scale_by_adam keeps the second moment in the parameters' dtype. In bfloat16 with
    b2 = 0.999 it does not decay: a step changes it by less than half a unit in the last place.

    Args:
        b1, b2, eps: as in the paper.
        mu, nu: "float32", "bf16", "bf16_sr" (stochastic rounding), "bf16x2" (two bfloat16, as in
            Collage-plus) or "int8" (groups of 32 along the last axis; "bf16_sr" for vectors and
            for axes that do not divide).
        seed: of the stochastic rounding.

    Returns:
        A transform from gradients of any float dtype to float32 updates. Entries beyond 2^63 are
        clipped, see `mcf.gradients`: moments stay finite in every codec.

    Raises:
        ValueError: an unknown codec.
    """
    for which, name in (("mu", mu), ("nu", nu)):
        codecs.moment(name, which, ())

    def init(params: Any) -> LowPrecisionAdamState:
        def zeros() -> Any:  # new arrays for each moment, so that the state can be donated
            return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)

        count = jnp.zeros((), jnp.int32)
        return LowPrecisionAdamState(
            count,
            encode_moment(mu, "mu", zeros(), count, seed),
            encode_moment(nu, "nu", zeros(), count, seed),
        )

    def update(updates, state, params=None, **extra):
        del params, extra
        count = optax.safe_increment(state.count)
        g = mcf.gradients(jax.tree.map(mcf.load, updates))
        m = decode_moment(mu, "mu", state.mu, g)
        v = decode_moment(nu, "nu", state.nu, g)
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, g)
        v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, v, g)
        first, second = mcf.one_minus_power(b1, count), mcf.one_minus_power(b2, count)
        # The barrier keeps XLA from recomputing these for every entry.
        first, second = jax.lax.optimization_barrier((first, second))
        out = jax.tree.map(lambda m, v: m / first / (jnp.sqrt(v / second) + eps), m, v)
        state = LowPrecisionAdamState(
            count,
            encode_moment(mu, "mu", m, count, seed),
            encode_moment(nu, "nu", v, count, seed),
        )
        return out, state

    return optax.GradientTransformationExtraArgs(init, update)


def finite_moments(mu: Any, nu: Any) -> tuple[Any, Any]:
    """Clips trees of float32 moments to what `scale_by_adam` itself can reach; NaNs stay NaN."""
    return (
        jax.tree.map(lambda m: jnp.clip(m, -mcf.LARGEST, mcf.LARGEST), mu),
        jax.tree.map(lambda v: jnp.minimum(v, mcf.LARGEST**2), nu),
    )


def encode_moment(
    name: str, which: str, tree: Any, count: jax.Array, seed: int | jax.Array
) -> dict[str, Any]:
    """Encodes a float32 tree as the codec's parts, each a tree."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    encoded = []
    for path, x in paths:
        codec = codecs.moment(name, which, x.shape)
        noise = None
        if codec.noisy:
            noise = mcf.noise(x.shape, seed, count, leaf_id(path, which))
        encoded.append(codec.encode(x, noise))
    parts = sorted({k for e in encoded for k in e})
    return {k: treedef.unflatten([e.get(k, optax.MaskedNode()) for e in encoded]) for k in parts}


def decode_moment(name: str, which: str, stored: dict[str, Any], like: Any) -> Any:
    """Decodes a stored moment to a float32 tree; `like` has its structure and shapes."""
    leaves, treedef = jax.tree.flatten(like)
    columns = {k: treedef.flatten_up_to(tree) for k, tree in stored.items()}
    out = []
    for i, x in enumerate(leaves):
        codec = codecs.moment(name, which, x.shape)
        out.append(codec.decode({k: columns[k][i] for k in codec.parts}))
    return treedef.unflatten(out)


def leaf_id(path: tuple, salt: str) -> int:
    """A hash of the leaf's name alone, so that other leaves do not change its noise."""
    return zlib.crc32(f"{salt}/{path_name(path)}".encode())

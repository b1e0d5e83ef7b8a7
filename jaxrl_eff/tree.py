"""Paths, masks by regular expression, and sizes of pytrees."""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_eff.shapes import Array, Float


def path_name(path: tuple[Any, ...]) -> str:
    """A key path as text: `layers/attn/q/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def names(tree: Any) -> list[str]:
    """The path of every leaf, in tree order."""
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def map_with_name(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`fn(name, leaf, ...)` over the leaves."""
    return jax.tree_util.tree_map_with_path(lambda p, *xs: fn(path_name(p), *xs), tree, *rest)


def match(tree: Any, patterns: Iterable[str]) -> Any:
    """True for the leaves whose whole name matches one of the patterns.

    Raises:
        ValueError: a pattern matches no leaf, which is a typing error far more often than not.
    """
    patterns = tuple(patterns)
    every = names(tree)
    for pattern in patterns:
        if not any(re.fullmatch(pattern, name) for name in every):
            raise ValueError(f"the pattern {pattern!r} matches no parameter; there are {every}.")
    return map_with_name(lambda name, _: any(re.fullmatch(p, name) for p in patterns), tree)


def size(tree: Any) -> int:
    """Number of elements."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """Bytes of all leaves (arrays or ShapeDtypeStructs), each counted once however replicated."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def norm(tree: Any) -> Float[Array, ""]:
    """Euclidean norm over all leaves, in float32."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, start=jnp.float32(0)))

"""Paths, masks by regular expression, and sizes of pytrees.

Example:
    >>> from jaxrl_eff import tree
    >>> params = {"layers": {"mlp": {"up": jnp.ones((2, 3))}}}
    >>> tree.names(params), tree.size(params)
    (['layers/mlp/up'], 6)
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_eff.types import Array, Float


def path_name(path: tuple[Any, ...]) -> str:
    """Returns a key path as text: `layers/attn/q/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def names(tree: Any) -> list[str]:
    """Returns the path of every leaf, in tree order."""
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def map_with_name(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Maps `fn(name, leaf, ...)` over the leaves."""
    return jax.tree_util.tree_map_with_path(lambda p, *xs: fn(path_name(p), *xs), tree, *rest)


def flat(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Returns name -> leaf, in tree order: `layers/attn/q/kernel`; a flat dict's own keys.

    Args:
        is_leaf: see `jax.tree.leaves`.

    Raises:
        ValueError: two leaves have the same name, as in `{"a": {"b": x}, "a/b": y}`.
    """
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    pairs = [(path_name(path), leaf) for path, leaf in found]
    table = dict(pairs)
    if len(table) < len(pairs):
        every = [name for name, _ in pairs]
        twice = sorted({name for name in every if every.count(name) > 1})
        raise ValueError(f"several leaves of the tree are called {twice}.")
    return table


def with_leaves(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """Returns nested dicts with these leaves set or added, by name; does not change the input."""
    out = dict(tree)
    inner: dict[str, dict[str, Any]] = {}
    for name, leaf in leaves.items():
        first, _, rest = name.partition("/")
        if rest:
            inner.setdefault(first, {})[rest] = leaf
        else:
            out[first] = leaf
    return out | {k: with_leaves(out.get(k, {}), v) for k, v in inner.items()}


def without(tree: Any, gone: Callable[[str], bool]) -> Any:
    """Returns nested dicts without leaves whose name is `gone`; drops dicts left empty."""
    return with_leaves({}, {k: v for k, v in flat(tree).items() if not gone(k)})


def where(condition: Any, new: Any, old: Any) -> Any:
    """Selects `new` or `old`, leaf by leaf."""
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)


def match(tree: Any, patterns: Iterable[str]) -> Any:
    """Returns True for the leaves whose whole name matches one of the patterns.

    Raises:
        ValueError: a pattern matches no leaf, which is almost always a typo.
    """
    patterns = tuple(patterns)
    every = names(tree)
    for pattern in patterns:
        if not any(re.fullmatch(pattern, name) for name in every):
            raise ValueError(
                f"the pattern {pattern!r} matches no parameter; expected one of {every}."
            )
    return map_with_name(lambda name, _: matches(name, patterns), tree)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Returns True if one of the patterns matches the whole name."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def size(tree: Any) -> int:
    """Returns the number of elements."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """Returns the bytes of all leaves (arrays or ShapeDtypeStructs), ignoring replication."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def norm(tree: Any) -> Float[Array, ""]:
    """Computes the Euclidean norm over all leaves, in float32."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, start=jnp.float32(0)))

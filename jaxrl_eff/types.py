"""Array types for signatures: `Float[Array, "B T"]`.

The test suite checks them with jaxtyping and beartype. At run time they are documentation:
jaxtyping is only a development dependency, and without it every annotation is the bare type.

Letters used throughout: B rows, T query time, S key time, D width, F feed-forward width, N query
heads, K key/value heads, G = N/K, H head dimension, V vocabulary, L layers, R samples per prompt,
P prompts.
"""

from typing import Any

from jax import Array

try:
    from jaxtyping import Bool, Float, Int, Key, PyTree, Shaped
except ImportError:

    class _Bare:
        """Stand-in for jaxtyping: `Float[T, "B T"]` is `T`."""

        def __class_getitem__(cls, item: Any) -> Any:
            return item[0] if isinstance(item, tuple) else item

    Bool = Float = Int = Key = Shaped = _Bare
    PyTree = Any

__all__ = ["Array", "Bool", "Float", "Int", "Key", "PyTree", "Shaped"]

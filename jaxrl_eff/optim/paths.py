"""Names of parameters, as `jaxrl_eff.tree` has them: this room needs nothing of the package."""

from typing import Any

import jax


def path_name(path: tuple[Any, ...]) -> str:
    """A key path as text: `layers/attn/q/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")

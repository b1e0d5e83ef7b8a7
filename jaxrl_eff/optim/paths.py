"""Names of parameters, equal to those of `jaxrl_eff.tree`, which `optim` does not depend on."""

from typing import Any

import jax


def path_name(path: tuple[Any, ...]) -> str:
    """A key path as text: `layers/attn/q/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")

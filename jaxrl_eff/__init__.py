"""Efficient RLHF and fine-tuning of language models in JAX.

A *graph* is a short list of named *calls*; a *plan* gives every call a *placement*;
`core.compile(graph, plan, ...)` makes the step. Subpackages are imported on first use, so that
`from jaxrl_eff import optim` needs nothing but jax, optax and chex.
"""

import importlib

__version__ = "0.1.0"

_ROOMS = (
    "algorithms", "checkpoints", "cli", "core", "data", "models", "optim", "parallel", "peft",
    "planner", "rollout", "train", "masked", "tree",
)  # fmt: skip


def __getattr__(name: str):
    if name in _ROOMS:
        return importlib.import_module(f"jaxrl_eff.{name}")
    raise AttributeError(f"jaxrl_eff has no room {name!r}; it has {', '.join(_ROOMS)}")


def __dir__():
    return [*_ROOMS, "__version__"]

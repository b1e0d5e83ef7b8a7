"""Efficient RLHF and fine-tuning of language models in JAX.

A *graph* is a short list of named *calls*; a *plan* gives every call a *placement*;
`dataflow.compile(graph, plan, ...)` makes the step. Rooms are imported on first use, so that
`from jaxrl_eff import optim` needs nothing but jax, optax and chex.
"""

import importlib

__version__ = "0.1.0"

_ROOMS = (
    "algorithms", "checkpoint", "data", "dataflow", "deltas", "edges", "evaluate", "masked",
    "meters", "metrics", "models", "optim", "parallel", "report", "rewards", "rollout", "train",
    "tree",
)  # fmt: skip


def __getattr__(name: str):
    if name in _ROOMS:
        return importlib.import_module(f"jaxrl_eff.{name}")
    raise AttributeError(f"jaxrl_eff has no room {name!r}; it has {', '.join(_ROOMS)}")


def __dir__():
    return [*_ROOMS, "__version__"]

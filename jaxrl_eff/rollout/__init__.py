"""Generation: sampling of responses with log-probabilities from prompts, and their rewards.

The names below are public, everything else is private.
"""

from jaxrl_eff import public

__all__, __getattr__, __dir__ = public.table(
    __name__, {"generate": ("sample",), "sampling": ("Sampling",)}, modules=("rewards",)
)

"""Generation: from prompts to sampled responses with log-probabilities, and rewards of them."""

from jaxrl_eff import public

__all__, __getattr__, __dir__ = public.table(
    __name__, {"generate": ("sample",), "sampling": ("Sampling",)}
)

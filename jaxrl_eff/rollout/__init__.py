"""Generation: from prompts to sampled responses with their log-probabilities."""

from jaxrl_eff.rollout.generate import sample
from jaxrl_eff.rollout.sampling import Sampling

__all__ = ["Sampling", "sample"]

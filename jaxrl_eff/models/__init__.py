"""A decoder-only language model as functions of (parameters, arrays).

`LMConfig` describes the model, `init` makes its parameters, `apply` runs it, and the functions of
`heads` compute what the calls of a graph need: log-probabilities, values, scores.
"""

from jaxrl_eff.models.config import LMConfig, Rope
from jaxrl_eff.models.heads import (
    last_score,
    logprobs,
    scalar_head,
    token_logprobs,
    token_scores,
    token_values,
    values,
)
from jaxrl_eff.models.logits import Warp, warp
from jaxrl_eff.models.params import abstract, count, flops_per_token, init, logical_axes
from jaxrl_eff.models.transformer import (
    Cache,
    LanguageModel,
    apply,
    cast_for_decode,
    unembed,
    unstack_layers,
)

__all__ = [
    "Cache",
    "LMConfig",
    "LanguageModel",
    "Rope",
    "Warp",
    "abstract",
    "apply",
    "cast_for_decode",
    "count",
    "flops_per_token",
    "init",
    "last_score",
    "logical_axes",
    "logprobs",
    "scalar_head",
    "token_logprobs",
    "token_scores",
    "token_values",
    "unembed",
    "unstack_layers",
    "values",
    "warp",
]  # fmt: skip

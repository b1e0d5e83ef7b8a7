"""A decoder-only language model as functions of (parameters, arrays).

`LMConfig` describes the model, `init` makes its parameters, `apply` runs it, and the functions of
`heads` compute what the calls of a graph need: log-probabilities, values, scores. The names below
are public, everything else is private.
"""

from jaxrl_eff import public

__all__, __getattr__, __dir__ = public.table(
    __name__,
    {
        "config": ("LMConfig", "Rope"),
        "heads": (
            "last_score", "logprobs", "scalar_head", "token_logprobs", "token_scores",
            "token_values", "values",
        ),
        "logits": ("Warp", "warp"),
        "params": ("abstract", "count", "flops_per_token", "init", "logical_axes"),
        "transformer": (
            "Cache", "LanguageModel", "apply", "cast_for_decode", "unembed", "unstack_layers",
        ),
    },
)  # fmt: skip

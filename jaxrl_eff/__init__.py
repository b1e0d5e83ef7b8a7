"""Efficient RLHF and fine-tuning of language models in JAX.

A *graph* is a short list of named *calls*; a *plan* gives every call a *placement*;
`compile(graph, plan, specs)` makes the step. The names in `__all__`, here and in each room (the
subpackages), are public; everything else is private and can change. All are imported on first use,
so that `from jaxrl_eff import optim` needs only jax, optax and chex.

`core.generate`, `infer`, `train` and `local` make calls; they stay in `core`, since
`jaxrl_eff.train` is the room that trains from a config.

Examples in docstrings assume `import jax, optax`, `import jax.numpy as jnp`, `import numpy as np`.
"""

from jaxrl_eff import public

__version__ = "0.1.0"

__all__, __getattr__, __dir__ = public.table(
    __name__,
    {
        "core": ("Call", "Graph", "Model", "Placement", "Spec", "compile"),
        "parallel": ("Route",),
        "models": (
            "LMConfig", "abstract", "apply", "count", "init", "logical_axes", "logprobs",
            "token_logprobs", "values",
        ),
        "optim": (
            "collage_adamw", "full_precision_params", "lowp_chain", "optimizer",
            "precision_metrics", "warmup_then", "watch_descent",
        ),
        "rollout": ("Sampling", "sample"),
        "checkpoints": ("Checkpoints", "load_hf", "read_config", "save_hf"),
        "algorithms": ("Rollout",),
        "data": (
            "CharTokenizer", "batches", "encode_prompt", "encode_prompt_completion", "holdout",
            "jsonl", "load_tokenizer", "parquet",
        ),
        "planner.search": ("search",),
        "planner.simulate": ("simulate",),
        "train": ("Run",),
        "train.run": ("run",),
    },
    modules=(
        "algorithms", "checkpoints", "checkpoints.deltas", "core", "data", "data.toys", "masked",
        "models", "optim", "optim.sparse", "parallel", "peft", "planner", "planner.clusters",
        "rollout", "rollout.rewards", "train", "tree",
    ),
)  # fmt: skip

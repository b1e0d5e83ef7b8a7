"""Data pipeline: sources, chat templates, packing, and resumable batches of static shape.

A source (`jsonl`, `parquet`, ...) has examples, an `encode_...` function turns one into tokens, and
`batches` puts them into arrays. The names below are public, everything else is private.
"""

from jaxrl_eff import public

__all__, __getattr__, __dir__ = public.table(
    __name__,
    {
        "encode": (
            "encode_chat_prompt", "encode_messages", "encode_preference", "encode_prompt",
            "encode_prompt_completion", "encode_text",
        ),
        "loader": ("Loader", "batches"),
        "source_files": ("file", "jsonl", "parquet"),
        "sources": ("Examples", "Source", "holdout", "mapped", "python_source", "subset"),
        "tokenizer": ("CharTokenizer", "Tokenizer", "load_tokenizer"),
    },
    modules=("needles", "toys"),
)  # fmt: skip

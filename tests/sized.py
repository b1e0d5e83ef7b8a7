"""Models that are sizes and nothing else."""

from jaxrl_eff.models import LMConfig


def sized(layers, width, heads, kv_heads, head_dim, ffn, vocab, **options) -> LMConfig:
    """A config of these sizes, in the order of Hugging Face's tables."""
    return LMConfig(
        layers=layers, width=width, heads=heads, kv_heads=kv_heads, head_dim=head_dim, ffn=ffn,
        vocab=vocab, **options,
    )  # fmt: skip

"""Conversion of `LMConfig` to Hugging Face's `config.json`, with a check that it is lossless.

The result is read back and compared, since a family's format can lack a field.
"""

import dataclasses
from typing import Any

from jaxrl_eff.checkpoints.hf_config import ACTIVATIONS, CLASSES, read_config
from jaxrl_eff.checkpoints.hf_names import CODES
from jaxrl_eff.checkpoints.hf_rope import scaling
from jaxrl_eff.models.config import LMConfig

# Fields of LMConfig that are not stored in a checkpoint.
_RUNTIME = ("dtype", "param_dtype", "remat", "mlp_chunk", "unroll", "head", "init_std")


def write_config(cfg: LMConfig) -> dict[str, Any]:
    """Returns the `config.json` that transformers reads as this model.

    Raises:
        ValueError: the family's format cannot represent some fields; the message names them.
    """
    if cfg.family not in CLASSES:
        raise ValueError(f"unknown family {cfg.family!r}; expected one of {[*CLASSES]}.")
    gemma, act = (
        cfg.family.startswith("gemma"),
        {v: k for k, v in ACTIVATIONS.items() if k != "swish"},
    )
    raw: dict[str, Any] = {
        "architectures": [_architecture(cfg)],
        "model_type": cfg.family,
        "vocab_size": cfg.vocab,
        "hidden_size": cfg.width,
        "intermediate_size": cfg.ffn,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim,
        "max_position_embeddings": cfg.max_length,
        "rms_norm_eps": cfg.norm_eps,
        "hidden_act": act[cfg.act],
        "tie_word_embeddings": cfg.tie,
        "rope_theta": cfg.rope.theta,
        "rope_scaling": scaling(cfg.rope),
        "initializer_range": cfg.init_std,
        "bos_token_id": cfg.bos,
        "eos_token_id": _one_or_list(cfg.eos),
        "pad_token_id": cfg.pad,
        "torch_dtype": cfg.param_dtype,
    }
    if cfg.head == "value":
        raw |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    if cfg.family not in ("mistral", "qwen2"):
        raw["attention_bias"] = cfg.qkv_bias
    if cfg.family == "llama":
        raw["mlp_bias"] = cfg.mlp_bias
    if cfg.family == "mistral":
        raw["sliding_window"] = cfg.window
    elif cfg.family != "llama":
        raw["sliding_window"] = cfg.window
        raw["layer_types"] = [
            "sliding_attention" if here else "full_attention" for here in cfg.windowed
        ]
    if cfg.family in ("qwen2", "qwen3"):
        raw["use_sliding_window"] = cfg.window is not None
    if gemma:
        raw |= {
            "hidden_activation": act[cfg.act],
            "query_pre_attn_scalar": _scalar(cfg.score_scale),
            "attn_logit_softcapping": cfg.attn_softcap,
            "final_logit_softcapping": cfg.final_softcap,
        }
    if cfg.family == "gemma3_text":
        raw["rope_local_base_freq"] = (cfg.rope_local or cfg.rope).theta
    _verify(cfg, raw)
    return raw


def check_exportable(cfg: LMConfig) -> None:
    """Checks that this model can be exported, without its parameters.

    Raises:
        ValueError: its family's format cannot represent a field; the message names it.
    """
    write_config(cfg)
    if cfg.param_dtype not in CODES.values():
        dtypes = [*CODES.values()]
        raise ValueError(
            f"param_dtype={cfg.param_dtype!r} cannot be saved; expected one of {dtypes}."
        )


def _architecture(cfg: LMConfig) -> str:
    if cfg.head == "lm":
        return CLASSES[cfg.family] + "ForCausalLM"
    text = "Text" if cfg.family == "gemma3_text" else ""
    return f"{CLASSES[cfg.family]}{text}ForSequenceClassification"


def _one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    return (list(ids) if len(ids) > 1 else ids[0]) if ids else None


def _scalar(scale: float) -> int | float:
    """Returns query_pre_attn_scalar, as an integer if possible, which transformers expects."""
    exact = scale**-2
    return round(exact) if abs(exact - round(exact)) < 1e-6 * exact else exact


def _verify(cfg: LMConfig, raw: dict[str, Any]) -> None:
    """Reads the result back and compares: the format can lack a field."""
    again = read_config(raw)
    for field in dataclasses.fields(cfg):
        mine, theirs = getattr(cfg, field.name), getattr(again, field.name)
        if field.name == "query_scale":
            mine, theirs = round(cfg.score_scale, 7), round(again.score_scale, 7)
        if field.name == "rope_local":
            mine, theirs = mine or cfg.rope, theirs or again.rope
        if field.name == "windowed" and cfg.window is None:
            continue
        if field.name not in _RUNTIME and mine != theirs:
            raise ValueError(
                f"{field.name}={mine!r} cannot be said in the format of {cfg.family!r}, "
                f"which would read it as {theirs!r}."
            )

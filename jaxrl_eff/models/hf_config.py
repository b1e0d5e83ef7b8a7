"""Hugging Face's `config.json` <-> `LMConfig`.

This file and `hf.py` are the only places where the name of a family decides anything. Both
spellings of the rotary embedding are read: `rope_theta` + `rope_scaling` (transformers 4) and
`rope_parameters` (transformers 5); the older one is written, since both versions read it. What a
file leaves out takes the default of its family's configuration class, as in transformers.

Left out: everything that `LMConfig` cannot say (mixtures of experts, partial rotary dimensions,
run-time rotary scalings, bidirectional attention, quantized weights). A file that asks for one of
these is refused by name instead of being run as something else.
"""

import dataclasses
import json
from os import PathLike
from pathlib import Path
from typing import Any

from jaxrl_eff.models.config import ROPE_KINDS, LMConfig, Rope

CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
}

_COMMON = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "rope_theta": 10_000.0,
    "head_dim": None,
    "num_key_value_heads": None,
    "initializer_range": 0.02,
}
_GEMMA = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
# What each family's configuration class assumes for a field that the file does not hold.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": {"max_position_embeddings": 32_768, "max_window_layers": 28, "sliding_window": 4096},
    "qwen3": {
        "max_position_embeddings": 32_768,
        "max_window_layers": 28,
        "sliding_window": 4096,
        "head_dim": 128,
    },
    "gemma2": _GEMMA
    | {
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": _GEMMA
    | {
        "max_position_embeddings": 131_072,
        "vocab_size": 262_208,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6,
    },
}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# Fields of LMConfig that a checkpoint does not decide.
_RUNTIME = ("dtype", "param_dtype", "remat", "unroll", "head", "init_std")


def config_from_hf(source: dict[str, Any] | str | PathLike[str]) -> LMConfig:
    """Reads a configuration given as a dict, as the path of a `config.json` or as its directory.

    From a path, the end-of-sequence ids of a `generation_config.json` beside it come first in
    `eos`: instruction-tuned checkpoints often name the end of a turn only there. A directory of a
    sequence classifier with one label gives `head="value"`.

    Raises:
        FileNotFoundError: there is no `config.json`.
        ValueError: an architecture, or the value of a field, that is not supported; named.
    """
    if isinstance(source, dict):
        return _parse(source)
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    cfg = _parse(read_json(path))
    generation = path.with_name("generation_config.json")
    if generation.exists():
        ids = _ids(read_json(generation).get("eos_token_id"))
        cfg = cfg.replace(eos=tuple(dict.fromkeys([*ids, *cfg.eos])))
    return cfg


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not hold a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path.name} in {path.parent}.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, but it should hold an object.")
    return value


def _parse(raw: dict[str, Any]) -> LMConfig:
    classifier = any("ForSequenceClassification" in name for name in raw.get("architectures") or ())
    raw = _text_config(raw)
    family = raw.get("model_type")
    if family not in CLASSES:
        raise ValueError(
            f"model_type={family!r} is not supported; there is {', '.join(CLASSES)}, gemma3."
        )
    given = _COMMON | _DEFAULTS[family] | raw
    _refuse(family, raw, classifier)
    try:
        return LMConfig(**_fields(family, given), head="value" if classifier else "lm")
    except KeyError as error:
        raise ValueError(f"the {family} configuration has no {error.args[0]!r}.") from error


def _text_config(raw: dict[str, Any]) -> dict[str, Any]:
    if raw.get("model_type") != "gemma3":
        return raw
    if not isinstance(raw.get("text_config"), dict):
        raise ValueError("model_type='gemma3' needs a text_config, which is not there.")
    outer = {k: raw[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in raw}
    if "tie_word_embeddings" in raw:
        outer["tie_word_embeddings"] = raw["tie_word_embeddings"]
    return outer | raw["text_config"] | {"model_type": "gemma3_text"}


def _refuse(family: str, raw: dict[str, Any], classifier: bool) -> None:
    """Raises for what would be silently run as another model."""
    known = ("ForCausalLM", "ForSequenceClassification", "ForConditionalGeneration", "Model")
    for name in raw.get("architectures") or ():
        if not name.endswith(known):
            raise ValueError(f"architecture {name!r} is not supported; it should end in {known}.")
    labels = raw.get("num_labels", len(raw.get("id2label") or (0, 1)))
    if classifier and labels != 1:
        raise ValueError(f"a sequence classifier with {labels} labels; only one is supported.")
    wanted = {
        "quantization_config": (None,),
        "use_bidirectional_attention": (None, False),
        "partial_rotary_factor": (None, 1, 1.0),
        "num_local_experts": (None, 0),
        "num_experts": (None, 0),
    }
    if family in ("mistral", "qwen2"):
        wanted["attention_bias"] = (None, family == "qwen2", False)
    if family != "llama":
        wanted["mlp_bias"] = (None, False)
    for name, allowed in wanted.items():
        if raw.get(name) not in allowed:
            raise ValueError(
                f"{name}={raw[name]!r} is not supported for model_type={family!r}; "
                f"it may be {' or '.join(map(repr, allowed))}."
            )


def _fields(family: str, given: dict[str, Any]) -> dict[str, Any]:
    gemma = family.startswith("gemma")
    heads, width = given["num_attention_heads"], given["hidden_size"]
    window, windowed = _windows(family, given)
    rope, rope_local = _ropes(family, given)
    act = given.get("hidden_activation" if gemma else "hidden_act") or given.get("hidden_act")
    act = act or ("gelu_pytorch_tanh" if gemma else "silu")
    if act not in _ACTIVATIONS:
        raise ValueError(
            f"hidden_act={act!r} is not supported; there is {', '.join(_ACTIVATIONS)}."
        )
    bias = bool(given["attention_bias"])
    return {
        "vocab": given["vocab_size"],
        "layers": given["num_hidden_layers"],
        "width": width,
        "heads": heads,
        "kv_heads": given["num_key_value_heads"] or heads,
        "head_dim": given["head_dim"] or width // heads,
        "ffn": given["intermediate_size"],
        "family": family,
        "norm_eps": float(given["rms_norm_eps"]),
        "norm_offset": gemma,
        "post_norms": gemma,
        "qk_norm": family in ("qwen3", "gemma3_text"),
        "qkv_bias": family == "qwen2" or bias,
        "o_bias": family != "qwen2" and bias,
        "mlp_bias": bool(given["mlp_bias"]),
        "act": _ACTIVATIONS[act],
        "rope": rope,
        "rope_local": rope_local,
        "tie": bool(given["tie_word_embeddings"]),
        "embed_scale": gemma,
        "query_scale": given["query_pre_attn_scalar"] ** -0.5 if gemma else None,
        "attn_softcap": given.get("attn_logit_softcapping") if gemma else None,
        "final_softcap": given.get("final_logit_softcapping") if gemma else None,
        "window": window,
        "windowed": windowed,
        "max_length": given["max_position_embeddings"],
        "bos": next(iter(_ids(given["bos_token_id"])), None),
        "eos": _ids(given["eos_token_id"]),
        "pad": next(iter(_ids(given["pad_token_id"])), None),
        "init_std": float(given["initializer_range"]),
    }


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    # -1 is how some files say "none".
    return tuple(i for i in ([value] if isinstance(value, int) else value) if i >= 0)


def _windows(family: str, given: dict[str, Any]) -> tuple[int | None, tuple[bool, ...]]:
    """The window in tokens, and for each layer whether it applies."""
    layers, window = given["num_hidden_layers"], given.get("sliding_window")
    if family in ("qwen2", "qwen3") and not given.get("use_sliding_window", False):
        window = None
    if family == "llama" or window is None:
        window, default = None, (False,) * layers
    elif family == "mistral":
        default = (True,) * layers
    elif family in ("qwen2", "qwen3"):
        default = tuple(i >= given["max_window_layers"] for i in range(layers))
    else:
        every = 2 if family == "gemma2" else given["sliding_window_pattern"]
        default = tuple((i + 1) % every != 0 for i in range(layers))
    kinds = given.get("layer_types")
    if kinds is None:
        windowed = default
    else:
        for kind in kinds:
            if kind not in ("full_attention", "sliding_attention"):
                raise ValueError(
                    f"layer_types has {kind!r}; supported are full_attention, sliding_attention."
                )
        windowed = tuple(kind == "sliding_attention" and window is not None for kind in kinds)
        if len(windowed) != layers:
            raise ValueError(f"layer_types has {len(windowed)} entries for {layers} layers.")
        if family in ("llama", "mistral") and windowed != default:
            raise ValueError(f"layer_types={kinds} is not supported for model_type={family!r}.")
    return (window if any(windowed) else None), windowed


def _ropes(family: str, given: dict[str, Any]) -> tuple[Rope, Rope | None]:
    """Rotations of the global layers and, where they differ, of the windowed ones."""
    length = given["max_position_embeddings"]
    new = given.get("rope_parameters") or {}
    old = given.get("rope_scaling") or {}
    nested = "full_attention" in new or "sliding_attention" in new
    full = (new.get("full_attention") or {}) if nested else new
    rope = _rope(given["rope_theta"], length, full | old)
    if family != "gemma3_text":
        if nested and (local := new.get("sliding_attention")):
            other = _rope(given["rope_theta"], length, local)
            return rope, (None if other == rope else other)
        return rope, None
    local = (new.get("sliding_attention") or {}) if nested else {}
    return rope, _rope(given["rope_local_base_freq"], length, local)


def _rope(theta: float, length: int, scaling: dict[str, Any]) -> Rope:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise ValueError(f"rope_type={kind!r} is not supported; there is {', '.join(ROPE_KINDS)}.")
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        factor = scaling["partial_rotary_factor"]
        raise ValueError(f"partial_rotary_factor={factor} is not supported; it may be 1.0.")
    theta = float(scaling.get("rope_theta") or theta)
    if kind == "default":
        return Rope(theta=theta)
    original = scaling.get("original_max_position_embeddings") or length
    factor = scaling.get("factor")
    if factor is None and kind == "yarn":
        factor = length / original
    if factor is None:
        raise ValueError(f"rope_type={kind!r} needs a factor, which is not there.")
    if kind == "linear":
        return Rope(theta=theta, kind=kind, factor=float(factor))
    shared = {"theta": theta, "kind": kind, "factor": float(factor), "original_length": original}
    if kind == "llama3":
        try:
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        except KeyError as error:
            raise ValueError(f"rope_type='llama3' has no {error.args[0]!r}.") from error
        return Rope(**shared, low_freq_factor=float(low), high_freq_factor=float(high))
    return Rope(
        **shared,
        beta_fast=float(scaling.get("beta_fast") or 32.0),
        beta_slow=float(scaling.get("beta_slow") or 1.0),
        truncate=bool(scaling.get("truncate", True)),
        attention_factor=scaling.get("attention_factor"),
        mscale=scaling.get("mscale"),
        mscale_all_dim=scaling.get("mscale_all_dim"),
    )


def config_to_hf(cfg: LMConfig) -> dict[str, Any]:
    """The `config.json` that transformers reads as this model.

    Raises:
        ValueError: the family's format cannot say what a field says; the fields are named.
    """
    if cfg.family not in CLASSES:
        raise ValueError(f"family={cfg.family!r} is not supported; there is {', '.join(CLASSES)}.")
    gemma, act = (
        cfg.family.startswith("gemma"),
        {v: k for k, v in _ACTIVATIONS.items() if k != "swish"},
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
        "rope_scaling": _scaling(cfg.rope),
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


def _architecture(cfg: LMConfig) -> str:
    if cfg.head == "lm":
        return CLASSES[cfg.family] + "ForCausalLM"
    text = "Text" if cfg.family == "gemma3_text" else ""
    return f"{CLASSES[cfg.family]}{text}ForSequenceClassification"


def _one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    return (list(ids) if len(ids) > 1 else ids[0]) if ids else None


def _scalar(scale: float) -> int | float:
    """query_pre_attn_scalar; transformers wants it whole."""
    exact = scale**-2
    return round(exact) if abs(exact - round(exact)) < 1e-6 * exact else exact


def _scaling(rope: Rope) -> dict[str, Any] | None:
    if rope.kind == "default":
        return None
    raw: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind != "linear":
        raw["original_max_position_embeddings"] = rope.original_length
    if rope.kind == "llama3":
        raw |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        raw |= {k: getattr(rope, k) for k in ("beta_fast", "beta_slow", "truncate")}
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(rope, name) is not None:
                raw[name] = getattr(rope, name)
    return raw


def _verify(cfg: LMConfig, raw: dict[str, Any]) -> None:
    """Reads back what was written: the format may have no word for a field."""
    again = _parse(raw)
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

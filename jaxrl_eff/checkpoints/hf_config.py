"""Conversion of Hugging Face's `config.json` to `LMConfig`; `hf_config_write` is the inverse.

Only this module, `hf_config_write`, `hf_rope`, `hf_load` and `known_fields` depend on the name of a
model family. Missing fields take the default of the family's configuration class, as in
transformers; additional fields must be known to be harmless, else the file is rejected with the
field's name.

Not supported: everything that `LMConfig` cannot represent (mixtures of experts, partial rotary
dimensions, run-time rotary scalings, bidirectional attention, quantized weights). A file that needs
one of these is rejected with the field's name instead of being run as another model.
"""

from collections.abc import Collection
from os import PathLike
from pathlib import Path
from typing import Any

from jaxrl_eff import fields
from jaxrl_eff.checkpoints import known_fields
from jaxrl_eff.checkpoints.hf_rope import ropes
from jaxrl_eff.models.config import LARGEST, LMConfig

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
    "hidden_act": "silu",
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
    "hidden_activation": "gelu_pytorch_tanh",
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "max_window_layers": 28,
    "sliding_window": 4096,
}
# Defaults of each family's configuration class for fields missing from the file.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
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
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# Sizes: name in the file -> name in LMConfig and in its bounds, LARGEST.
_SIZES = {
    "vocab_size": "vocab",
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "num_attention_heads": "heads",
    "intermediate_size": "ffn",
    "max_position_embeddings": "max_length",
}
_SCALAR = "query_pre_attn_scalar"
_SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")


def read_config(
    source: dict[str, Any] | str | PathLike[str], *, ignore: Collection[str] = ()
) -> LMConfig:
    """Reads a configuration: a dict, the path of a `config.json`, or its directory.

    Given a path, the end-of-sequence ids of a `generation_config.json` in the same directory come
    first in `eos`: instruction-tuned checkpoints often name the end of a turn only there. A
    directory of a sequence classifier with one label gives `head="value"`.

    Args:
        ignore: names of fields to ignore; a dot selects a field within an object
            ("rope_scaling.factor").

    Raises:
        FileNotFoundError: there is no `config.json`.
        ValueError: an architecture or a field's value is not supported, or an unknown field has an
            effect; the message names it. Unknown fields without effect cause a warning.

    Example:
        >>> from jaxrl_eff import read_config
        >>> raw = dict(model_type="llama", vocab_size=8, hidden_size=4, num_hidden_layers=2)
        >>> raw |= dict(num_attention_heads=2, intermediate_size=8)
        >>> lm = read_config(raw)
        >>> lm.layers, lm.head_dim
        (2, 2)
    """
    if isinstance(source, dict):
        return _parse("config.json", fields.without(source, ignore))
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    cfg = _parse(str(path), fields.without(fields.read_json(path), ignore))
    generation = path.with_name("generation_config.json")
    if generation.exists():
        told = fields.without(fields.read_json(generation), ignore)
        ids = _ids(str(generation), "eos_token_id", told.get("eos_token_id"))
        cfg = cfg.replace(eos=tuple(dict.fromkeys([*ids, *cfg.eos])))
    return cfg


def _parse(where: str, raw: dict[str, Any]) -> LMConfig:
    names = fields.texts(where, "architectures", raw.get("architectures"))
    raw, idle = _text_config(where, raw)
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in CLASSES:
        raise ValueError(
            f"{where}: unknown model_type {fields.short(family)}; expected one of "
            f"{[*CLASSES, 'gemma3']}."
        )
    only = known_fields.ONLY | known_fields.ONLY_OF.get(family, {})
    idle += fields.checked(where, raw, known_fields.READ[family] | known_fields.HARMLESS, only=only)
    given = _COMMON | _DEFAULTS[family] | raw
    head = _head(where, family, names, raw)
    try:
        found = _fields(where, family, given, idle)
    except KeyError as error:
        raise ValueError(f"{where}: {family} has no {error.args[0]!r}.") from error
    fields.warn(where, idle)
    try:
        return LMConfig(**found, head=head)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _text_config(where: str, raw: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns the decoder's fields, and the outer fields that are unknown but have no effect."""
    if raw.get("model_type") != "gemma3":
        return raw, []
    if not isinstance(raw.get("text_config"), dict):
        raise ValueError(f"{where}: model_type='gemma3' needs a text_config, which is not there.")
    idle = fields.checked(
        where, raw, known_fields.GEMMA3 | known_fields.HARMLESS, only=known_fields.ONLY
    )
    inner = raw["text_config"]
    outer = {k: raw[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in raw}
    # Tying is a setting of the whole model, which ties by default.
    around = {"tie_word_embeddings": raw.get("tie_word_embeddings", True)}
    around |= {k: raw[k] for k in ("id2label", "num_labels") if k in raw}
    return outer | inner | around | {"model_type": "gemma3_text"}, idle


def _head(where: str, family: str, names: list[str], raw: dict[str, Any]) -> str:
    """Returns the head, from the names of the architectures and the number of labels."""
    tasks = ("ForCausalLM", "ForSequenceClassification", "ForConditionalGeneration", "Model")
    name = CLASSES[family]
    allowed = [f"{name}{text}{task}" for text in ("", "Text") for task in tasks]
    for architecture in names:
        if architecture not in allowed:
            raise ValueError(
                f"{where}: architecture {architecture!r} is not supported for "
                f"model_type={family!r}; it should be {name} and one of {', '.join(tasks)}."
            )
    if not any("ForSequenceClassification" in architecture for architecture in names):
        return "lm"
    labels = raw.get("num_labels")
    if raw.get("id2label") is not None:
        labels = len(fields.mapping(where, "id2label", raw["id2label"]))
    labels = 2 if labels is None else labels
    if labels != 1:
        raise ValueError(
            f"{where}: a sequence classifier with {fields.short(labels)} labels; only one is "
            "supported."
        )
    return "value"


def _fields(where: str, family: str, given: dict[str, Any], idle: list[str]) -> dict[str, Any]:
    gemma = family.startswith("gemma")
    sizes = {
        mine: fields.integer(where, name, given[name], 1, LARGEST[mine])
        for name, mine in _SIZES.items()
    }
    heads, width = sizes["heads"], sizes["width"]
    on = {k: given.get(k) is not None and fields.switch(where, k, given[k]) for k in _SWITCHES}
    window, windowed = _windows(where, family, given, on["use_sliding_window"])
    rope, rope_local = ropes(where, family, given, idle)
    bias = on["attention_bias"]
    return sizes | {
        "kv_heads": _size(where, "num_key_value_heads", given, "kv_heads", heads),
        "head_dim": _head_dim(where, given, width, heads),
        "family": family,
        "norm_eps": float(fields.number(where, "rms_norm_eps", given["rms_norm_eps"], 0)),
        "norm_offset": gemma,
        "post_norms": gemma,
        "qk_norm": family in ("qwen3", "gemma3_text"),
        "qkv_bias": family == "qwen2" or bias,
        "o_bias": family != "qwen2" and bias,
        "mlp_bias": on["mlp_bias"],
        "act": _activation(where, "hidden_activation" if gemma else "hidden_act", given),
        "rope": rope,
        "rope_local": rope_local,
        "tie": on["tie_word_embeddings"],
        "embed_scale": gemma,
        "query_scale": _above_zero(where, _SCALAR, given) ** -0.5 if gemma else None,
        "attn_softcap": _score_cap(where, family, given) if gemma else None,
        "final_softcap": _cap(where, "final_logit_softcapping", given) if gemma else None,
        "window": window,
        "windowed": windowed,
        "bos": next(iter(_ids(where, "bos_token_id", given["bos_token_id"])), None),
        "eos": _ids(where, "eos_token_id", given["eos_token_id"]),
        "pad": next(iter(_ids(where, "pad_token_id", given["pad_token_id"])), None),
        "init_std": float(fields.number(where, "initializer_range", given["initializer_range"], 0)),
    }  # fmt: skip


def _size(where: str, name: str, given: dict[str, Any], mine: str, default: int) -> int:
    value = given[name]
    return default if value is None else fields.integer(where, name, value, 1, LARGEST[mine])


def _head_dim(where: str, given: dict[str, Any], width: int, heads: int) -> int:
    if given["head_dim"] is None and width % heads:
        raise ValueError(
            f"{where}: hidden_size={width} is not a multiple of num_attention_heads={heads}, and "
            "there is no head_dim."
        )
    return _size(where, "head_dim", given, "head_dim", width // heads)


def _activation(where: str, name: str, given: dict[str, Any]) -> str:
    value = given[name]
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise ValueError(
            f"{where}: unknown {name} {fields.short(value)}; expected one of {[*ACTIVATIONS]}."
        )
    return ACTIVATIONS[value]


def _above_zero(where: str, name: str, given: dict[str, Any]) -> int | float:
    return fields.number(where, name, given[name], 0, above=True)


def _score_cap(where: str, family: str, given: dict[str, Any]) -> float | None:
    """Returns the cap on scores; transformers' Gemma 3 has one in its config but applies none."""
    cap = _cap(where, "attn_logit_softcapping", given)
    if cap is not None and family == "gemma3_text":
        raise ValueError(
            f"{where}: attn_logit_softcapping={cap} is not supported for model_type={family!r}, "
            "whose scores transformers does not cap. ignore=('attn_logit_softcapping',) reads the "
            "file as if it did not hold it."
        )
    return cap


def _cap(where: str, name: str, given: dict[str, Any]) -> float | None:
    return None if given[name] is None else float(_above_zero(where, name, given))


def _ids(where: str, name: str, value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    # Some files use -1 for "none".
    found = [fields.integer(where, name, i, -1, LARGEST["vocab"]) for i in ids]
    return tuple(i for i in found if i >= 0)


def _windows(
    where: str, family: str, given: dict[str, Any], switched: bool
) -> tuple[int | None, tuple[bool, ...]]:
    """Returns the window in tokens, and for each layer True if it applies."""
    layers, window = given["num_hidden_layers"], given.get("sliding_window")
    if window is not None:
        fields.integer(where, "sliding_window", window, 1, LARGEST["max_length"])
    if family in ("qwen2", "qwen3") and not switched:
        window = None
    if family == "llama" or window is None:
        window, default = None, (False,) * layers
    elif family == "mistral":
        default = (True,) * layers
    elif family in ("qwen2", "qwen3"):
        first = fields.integer(
            where, "max_window_layers", given["max_window_layers"], 0, LARGEST["vocab"]
        )
        default = tuple(i >= first for i in range(layers))
    else:
        every = 2 if family == "gemma2" else given["sliding_window_pattern"]
        fields.integer(where, "sliding_window_pattern", every, 1, LARGEST["layers"])
        default = tuple((i + 1) % every != 0 for i in range(layers))
    if given.get("layer_types") is None:
        return (window if any(default) else None), default
    kinds = fields.texts(where, "layer_types", given["layer_types"])
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(
                f"{where}: layer_types has {kind!r}; supported are full_attention, "
                "sliding_attention."
            )
    windowed = tuple(kind == "sliding_attention" for kind in kinds)
    if len(windowed) != layers:
        raise ValueError(f"{where}: layer_types has {len(windowed)} entries for {layers} layers.")
    if any(windowed) and window is None:
        raise ValueError(
            f"{where}: layer_types has 'sliding_attention', but no window applies "
            f"(sliding_window={given.get('sliding_window')})."
        )
    if family in ("llama", "mistral") and windowed != default:
        raise ValueError(
            f"{where}: layer_types={fields.short(kinds)} is not supported for "
            f"model_type={family!r}."
        )
    return (window if any(windowed) else None), windowed

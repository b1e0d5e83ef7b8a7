"""Fields of config.json and adapter_config.json: those that are known, and all others."""

import dataclasses
import json
import re
import warnings

import pytest
from golden.make_golden import CASES, HERE

from jaxrl_eff import fields
from jaxrl_eff.checkpoints import known_fields, read_config, write_config
from jaxrl_eff.checkpoints.hf_config import _COMMON, _DEFAULTS, CLASSES
from jaxrl_eff.checkpoints.hf_config_write import check_exportable
from jaxrl_eff.checkpoints.peft_config import read

RAW = {case: json.loads((HERE / f"{case}.json").read_text())["config"] for case in CASES}
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def installed(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason="needs the extra 'parity'")


def defaults_of(cls):
    missing = dataclasses.MISSING
    return {
        f.name: f.default_factory() if f.default is missing else f.default
        for f in dataclasses.fields(cls)
        if f.default is not missing or f.default_factory is not missing
    }


@pytest.mark.parity
@pytest.mark.parametrize("family", CLASSES)
def test_every_field_of_transformers_classes_is_known(family):
    transformers = installed("transformers")
    text = "Text" if family == "gemma3_text" else ""
    cls = getattr(transformers, f"{CLASSES[family]}{text}Config")
    theirs, allowed = defaults_of(cls), known_fields.ONLY | known_fields.ONLY_OF.get(family, {})
    names = {f.name for f in dataclasses.fields(cls)} | set(cls().to_dict())
    assert names <= known_fields.READ[family] | known_fields.HARMLESS | set(allowed)
    for name, values in allowed.items():
        assert name not in known_fields.READ[family] or name in ("attention_bias", "mlp_bias")
        if name in theirs and name not in known_fields.READ[family]:
            assert theirs[name] in values, name
    # What a file leaves out is what the class assumes.
    for name, value in (_COMMON | _DEFAULTS[family]).items():
        if name in theirs:
            assert theirs[name] == value, name


@pytest.mark.parity
def test_parameters_of_generation_are_known():
    transformers = installed("transformers")
    read = {"bos_token_id", "eos_token_id", "pad_token_id"}
    told = set(transformers.GenerationConfig().to_dict()) - read
    assert told <= known_fields.GENERATION | known_fields.HARMLESS


@pytest.mark.parity
def test_every_field_of_gemma3_around_its_decoder_is_known():
    transformers = installed("transformers")
    assert set(
        transformers.Gemma3Config().to_dict()
    ) <= known_fields.GEMMA3 | known_fields.HARMLESS | set(known_fields.ONLY)


@pytest.mark.parity
def test_every_field_of_peft_is_known():
    installed("peft.tuners")  # "peft" alone is also a folder of these tests
    import peft

    theirs = defaults_of(peft.LoraConfig)
    names = {f.name for f in dataclasses.fields(peft.LoraConfig)}
    assert names <= known_fields.LORA_READ | known_fields.LORA_HARMLESS | set(
        known_fields.LORA_ONLY
    )
    assert {
        k for k, v in known_fields.LORA_ONLY.items() if k in theirs and theirs[k] not in v
    } == set()
    assert theirs["init_lora_weights"] in known_fields.INITS


@pytest.mark.parametrize("case", CASES)
def test_what_the_project_writes_it_reads_without_a_warning(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cfg = read_config(RAW[case])
        assert read_config(write_config(cfg)) == cfg


DECIDING = [
    "embedding_multiplier", "logits_scaling", "residual_multiplier", "clip_qkv", "num_experts",
    "quantization_config", "use_bidirectional_attention", "per_layer_config", "pruned_heads",
    "partial_rotary_factor", "original_max_position_embeddings", "invented_tomorrow",
    "is_encoder_decoder", "chunk_size_feed_forward", "attention_chunk_size",
]  # fmt: skip


@pytest.mark.parametrize("name", DECIDING)
@pytest.mark.parametrize("case", ["llama", "qwen3", "gemma3"])
def test_a_field_that_may_decide_is_refused_until_it_is_ignored(case, name):
    for value in (7, 0.5, True, {"a": 1}, "text"):
        with pytest.raises(ValueError, match=re.escape(f"{name}=")) as caught:
            read_config(RAW[case] | {name: value})
        assert "ignore=" in str(caught.value) and "\n" not in str(caught.value)
    assert read_config(RAW[case] | {name: 7}, ignore=(name,)) == read_config(RAW[case])


def test_a_field_of_another_family_is_refused():
    for name, value in {"sliding_window": 7, "query_pre_attn_scalar": 3}.items():
        with pytest.raises(ValueError, match=name):
            read_config(RAW["llama"] | {name: value})
    with pytest.raises(ValueError, match=r"rope_scaling\.short_factor=\[2.0\]"):
        read_config(
            RAW["llama"]
            | {"rope_scaling": {"type": "linear", "factor": 2.0, "short_factor": [2.0]}}
        )


def test_unknown_fields_that_say_nothing_are_one_warning():
    odd = {"one": None, "two": False, "three": [], "rope_scaling": {"type": "default", "x": None}}
    with pytest.warns(UserWarning, match=r"one, two, three, rope_scaling\.x") as caught:
        assert read_config(RAW["llama"] | odd) == read_config(RAW["llama"])
    assert len(caught) == 1
    with pytest.raises(ValueError, match="zero=0"):
        read_config(RAW["llama"] | {"zero": 0})


WRONG = [None, "text", [], {}, True, 0, -3, 0.5, float("nan"), float("inf"), 10**30, [1], {"a": 1}]
NUMBERS = [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta",
    "rope_scaling", "rope_parameters", "hidden_act", "tie_word_embeddings", "attention_bias",
    "layer_types", "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "model_type",
    "initializer_range", "sliding_window", "query_pre_attn_scalar", "attn_logit_softcapping",
    "rope_local_base_freq", "max_window_layers", "use_sliding_window", "sliding_window_pattern",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*not known here")
@pytest.mark.parametrize("name", NUMBERS)
def test_a_value_of_another_type_is_one_line_that_names_it(name):
    refused = 0
    for case in ("llama", "qwen2", "gemma3"):
        for value in WRONG:
            try:
                cfg = read_config(RAW[case] | {name: value})
            except ValueError as error:
                refused += 1
                assert name in str(error) or name in ("layer_types", "model_type"), error
                assert "\n" not in str(error) and len(str(error)) < 400
            else:
                assert write_config(cfg)
    assert refused >= 12


@pytest.mark.parametrize("value", [*WRONG, "linear"])
@pytest.mark.parametrize(
    "name", ["rope_type", "factor", "low_freq_factor", "original_max_position_embeddings"]
)
def test_values_within_a_rope_are_checked(name, value):
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 48,
    }  # fmt: skip
    try:
        read_config(RAW["llama"] | {"rope_scaling": scaling | {name: value}})
    except ValueError as error:
        assert name in str(error) or "low_freq_factor" in str(error)


def test_a_cap_that_transformers_holds_but_does_not_apply_is_refused():
    raw = RAW["gemma3"] | {"attn_logit_softcapping": 3.0}
    with pytest.raises(ValueError, match=r"attn_logit_softcapping=3\.0 is not supported"):
        read_config(raw)
    assert read_config(raw, ignore=("attn_logit_softcapping",)).attn_softcap is None
    with pytest.raises(ValueError, match="attn_"):
        check_exportable(read_config(RAW["gemma3"]).replace(attn_softcap=3.0))


def test_architectures_that_contradict_the_model_type_are_refused():
    for name in ("MixtralForCausalLM", "LlamaForTokenClassification", "GemmaForCausalLM"):
        with pytest.raises(ValueError, match=name):
            read_config(RAW["llama"] | {"architectures": [name]})


def test_the_whole_of_gemma3_says_whether_it_ties():
    outer = {"model_type": "gemma3", "text_config": RAW["gemma3"] | {"tie_word_embeddings": False}}
    assert read_config(outer).tie
    assert not read_config(outer | {"tie_word_embeddings": False}).tie
    with pytest.raises(ValueError, match="odd=3"):
        read_config(outer | {"odd": 3})


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"qk_norm": True}, "qk_norm"), ({"window": 4, "windowed": ()}, "windowed|window"),
        ({"post_norms": True}, "post_norms"), ({"attn_softcap": 3.0}, "attn_softcap"),
        ({"o_bias": True}, "bias"), ({"query_scale": 0.3}, "query_scale"),
        ({"family": "mixtral"}, "family"), ({"embed_scale": True}, "embed_scale"),
    ],
)  # fmt: skip
def test_a_shape_that_cannot_be_exported_is_found_without_parameters(changes, field):
    cfg = read_config(RAW["llama"])
    check_exportable(cfg)
    with pytest.raises(ValueError, match=field):
        check_exportable(cfg.replace(**changes))


def lora_at(tmp_path, **changes):
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({k: v for k, v in (LORA | changes).items() if v is not ...}))
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"}, {"init_lora_weights": "OLoRA"},
        {"init_lora_weights": "corda"}, {"init_lora_weights": "loftq"},
        {"init_lora_weights": "lora_ga"}, {"init_lora_weights": "mica"}, {"init_lora_weights": 1},
        {"alora_invocation_tokens": [1]}, {"rank_pattern": {"q_proj": 3}},
        {"alpha_pattern": {"q_proj": 3}}, {"bias": "all"}, {"bias": "lora_only"},
        {"fan_in_fan_out": True}, {"layers_to_transform": [0]}, {"layers_to_transform": 0},
        {"layer_replication": [[0, 2]]}, {"trainable_token_indices": [1]}, {"lora_bias": True},
        {"target_parameters": ["x"]}, {"use_qalora": True}, {"use_bdlora": {"a": 1}},
        {"arrow_config": {"a": 1}}, {"kasa_config": {"a": 1}}, {"monteclora_config": {"a": 1}},
        {"velora_config": {"a": 1}}, {"megatron_config": {"a": 1}}, {"invented_tomorrow": 1},
        {"task_type": "TOKEN_CLS"}, {"target_modules": None}, {"target_modules": "all-linear"},
        {"target_modules": "("}, {"target_modules": 3}, {"modules_to_save": "lm_head"},
        {"r": 0}, {"r": "4"}, {"r": True}, {"r": 1e9}, {"r": ...}, {"lora_alpha": None},
        {"lora_alpha": float("nan")}, {"use_dora": "yes"}, {"use_rslora": 1}, {"peft_type": "IA3"},
        {"ensure_weight_tying": 2}, {"exclude_modules": {}},
    ],
    ids=str,
)  # fmt: skip
def test_adapters_that_mean_something_else_are_refused_by_name(changes, tmp_path):
    (name,) = changes
    with pytest.raises(ValueError, match=name) as caught:
        read(lora_at(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_adapters_that_mean_the_same_are_read(tmp_path):
    plain = read(lora_at(tmp_path))
    for changes in (
        {"init_lora_weights": False}, {"init_lora_weights": "gaussian"}, {"lora_dropout": 0.5},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}, {"peft_version": "9"},
        {"base_model_name_or_path": "x"}, {"rank_pattern": {}}, {"layers_pattern": ""},
    ):  # fmt: skip
        assert read(lora_at(tmp_path, **changes)) == plain
    with pytest.warns(UserWarning, match="later, more") as caught:
        assert read(lora_at(tmp_path, later=None, more=False)) == plain
    assert len(caught) == 1
    assert read(lora_at(tmp_path, invented=3, bias="all"), ignore=("invented", "bias")) == plain


def test_modules_are_matched_as_peft_matches_them(tmp_path):
    q = "model.layers.1.self_attn.q_proj"
    for changes, adapts in (
        ({}, True), ({"target_modules": [q]}, True), ({"target_modules": ["proj"]}, False),
        ({"target_modules": r".*\.[qv]_proj"}, True), ({"target_modules": "q_proj"}, False),
        ({"exclude_modules": ["q_proj"]}, False), ({"exclude_modules": ".*layers.1.*"}, False),
        ({"modules_to_save": ["self_attn"]}, False),
    ):  # fmt: skip
        assert read(lora_at(tmp_path, **changes)).adapts(q) is adapts, changes
    kept = read(lora_at(tmp_path, modules_to_save=["norm"]))
    assert kept.keeps("model.norm") and kept.keeps("model.layers.0.input_layernorm")


def test_json_is_read_strictly(tmp_path):
    path = tmp_path / "config.json"
    for text, message in (
        ("[1]", "holds a list"), ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a": 1, "a": 2}', "'a' is 1 and 2"), ("{", "not JSON"), ("", "not JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not JSON"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            fields.read_json(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.write_text('{"a": 1, "a": 1}')
    assert fields.read_json(path) == {"a": 1}
    path.unlink()
    path.mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        fields.read_json(path)

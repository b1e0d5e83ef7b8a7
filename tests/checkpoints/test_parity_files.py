"""Directories of transformers and PEFT, changed in all sorts of ways: their logits, or a refusal.

pip install -e '.[dev,parity]' && pytest -m parity

The long ones are slow besides: pytest -m 'parity and slow'.
"""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import make_golden
from safetensors.numpy import load_file, save_file

from jaxrl_eff import checkpoints, tree
from jaxrl_eff.checkpoints import load_hf, peft_files, read_config, save_hf
from jaxrl_eff.models import apply, unembed
from jaxrl_eff.peft import lora, weights

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch", reason="torch is not installed: pip install '.[parity]'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers", reason="needs the extra 'parity'")
    pytest.importorskip("peft.tuners", reason="needs the extra 'parity'")  # "peft" is a folder here
    import peft as theirs

IDS = np.random.RandomState(1).randint(48, size=24, dtype="i4")


def model_at(directory, case, **changes):
    config = make_golden._TINY | make_golden.CASES[case] | changes
    config |= {"attn_implementation": "eager"}
    model, _ = make_golden.reference(config)
    model.save_pretrained(directory)
    return model


def reloaded(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    ).eval()


def logits_of(model):
    with torch.no_grad():
        return model(torch.tensor(IDS[None], dtype=torch.long)).logits[0].float().numpy()


def ours(cfg, params):
    tokens = jnp.asarray(IDS)[None]
    place, params = jnp.arange(tokens.shape[1])[None], weights.assembled(cfg, params)
    return np.asarray(
        unembed(cfg, params, apply(cfg, params, tokens, place, jnp.ones_like(tokens))[0])
    )[0]


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 77.0}
FULL, LOCAL = "full_attention", "sliding_attention"
# Family's case, fields of config.json that are changed (... takes one out).
EDITS = [
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("llama", {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default"}}),
    ("llama", {"rope_parameters": ..., "rope_theta": 99.0}),
    ("llama", {"rope_parameters": {"rope_theta": 50.0}, "rope_theta": 9.0}),
    ("llama", {"rope_parameters": {FULL: LINEAR}}),
    ("llama", {"rope_parameters": {"rope_type": "default", "factor": 8.0}}),
    ("llama", {"rope_parameters": LINEAR, "partial_rotary_factor": 0.5}),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "type": "linear", "factor": 2.0}}),
    ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    ("llama", {"hidden_act": "relu"}),
    ("llama", {"sliding_window": 3}),
    ("llama", {"pretraining_tp": 2, "attention_dropout": 0.5, "use_cache": False}),
    ("llama", {"layer_types": [LOCAL, FULL]}),
    ("llama", {"rms_norm_eps": 0.1}),
    ("llama", {"dtype": ..., "torch_dtype": "bfloat16"}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": ...}),
    ("mistral", {"sliding_window": 2}),
    ("mistral", {"layer_types": [FULL, LOCAL]}),
    ("qwen2", {"use_sliding_window": False}),
    ("qwen2", {"layer_types": ..., "max_window_layers": 2}),
    ("qwen2", {"layer_types": [LOCAL, FULL, LOCAL]}),
    ("qwen2", {"use_sliding_window": ..., "layer_types": ...}),
    ("qwen2", {"attention_bias": False}),
    ("qwen3", {"sliding_window": 3, "use_sliding_window": True, "layer_types": [FULL, LOCAL]}),
    ("gemma2", {"query_pre_attn_scalar": ...}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": ...}),
    ("gemma2", {"hidden_act": "relu"}),
    ("gemma2", {"hidden_activation": "silu"}),
    ("gemma2", {"layer_types": ..., "sliding_window": 3}),
    ("gemma2", {"layer_types": [FULL, FULL, LOCAL, LOCAL]}),
    ("gemma2", {"use_bidirectional_attention": True}),
    ("gemma3", {"rope_parameters": {FULL: LINEAR, LOCAL: {"rope_type": "default"}}}),
    ("gemma3", {"rope_parameters": {FULL: LINEAR}, "rope_theta": 9.0, "rope_local_base_freq": 5.0}),
    ("gemma3", {"rope_parameters": {LOCAL: LINEAR}, "rope_theta": 9.0}),
    ("gemma3", {"rope_parameters": LINEAR}),
    ("gemma3", {"rope_parameters": ..., "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ("gemma3", {"layer_types": ..., "sliding_window_pattern": 2, "_sliding_window_pattern": ...}),
    ("gemma3", {"layer_types": ..., "_sliding_window_pattern": 2}),
    ("gemma3", {"sliding_window": 2}),
    ("gemma3", {"attn_logit_softcapping": 3.0}),
]  # fmt: skip
REFUSED = 12  # of these, no more: a refusal of everything would agree with everything


def edited(case, changes, to):
    model_at(to, case)
    path = to / "config.json"
    told = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in told.items() if v is not ...}))
    cfg = read_config(to)
    close(ours(cfg, load_hf(to, cfg)), logits_of(reloaded(to)))


@pytest.mark.slow
def test_every_edit_of_a_config_gives_their_logits_or_a_refusal(tmp_path):
    refused = []
    for i, (case, changes) in enumerate(EDITS):
        try:
            edited(case, changes, tmp_path / str(i))
        except ValueError as error:
            refused.append((case, changes, str(error)))
        except AssertionError as error:
            raise AssertionError(f"{case} {changes}: {error}") from error
    print(*refused, sep="\n")
    assert len(refused) <= REFUSED


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_stored_beside_its_table(equal, tmp_path):
    model_at(tmp_path, "llama3")
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    head = stored["model.embed_tokens.weight"] + (0.0 if equal else 1.0)
    save_file(stored | {"lm_head.weight": head}, path, metadata={"format": "pt"})
    cfg = read_config(tmp_path)
    if equal:
        close(ours(cfg, load_hf(tmp_path, cfg)), logits_of(reloaded(tmp_path)))
    else:
        with pytest.raises(ValueError, match=r"lm_head\.weight"):
            load_hf(tmp_path, cfg)


LAYERS = ["q_proj", "down_proj"]
ADAPTERS = [
    {}, {"target_modules": r".*\.(q|up)_proj"}, {"use_dora": True}, {"use_rslora": True},
    {"init_lora_weights": "gaussian"}, {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"init_lora_weights": "mica"},
    {"init_lora_weights": False}, {"exclude_modules": ["down_proj"]},
    {"layers_to_transform": [1]}, {"rank_pattern": {"q_proj": 3}}, {"alpha_pattern": {"q_proj": 3}},
    {"alora_invocation_tokens": [7, 8]}, {"bias": "all"}, {"bias": "lora_only"},
    {"lora_bias": True}, {"trainable_token_indices": [3, 4]},
    {"layer_replication": [[0, 2], [1, 2]]},
    {"target_parameters": ["mlp.up_proj.weight"]}, {"fan_in_fan_out": True},
    {"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["embed_tokens", "lm_head"]}, {"modules_to_save": ["norm"]},
    {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    {"target_modules": [*LAYERS, "lm_head"]}, {"target_modules": [*LAYERS, "embed_tokens"]},
    {"target_modules": [*LAYERS, "embed_tokens"], "ensure_weight_tying": True},
    {"target_modules": "all-linear"}, {"modules_to_save": ["k_proj", "input_layernorm"]},
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama", "llama3", "gemma2"])
def test_adapters_of_peft_give_their_logits_or_a_refusal(case, tmp_path):
    model_at(tmp_path / "base", case)
    cfg = read_config(tmp_path / "base")
    base, equal = load_hf(tmp_path / "base", cfg), 0
    for i, options in enumerate(ADAPTERS):
        torch.manual_seed(i)
        told = {"r": 2, "lora_alpha": 6, "target_modules": LAYERS, "task_type": "CAUSAL_LM"}
        settings = theirs.LoraConfig(**told | json.loads(json.dumps(options)))
        model = theirs.get_peft_model(reloaded(tmp_path / "base"), settings).eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.2 * torch.randn_like(p))
        wanted = logits_of(model)
        model.save_pretrained(tmp_path / str(i))
        try:
            leaves = peft_files.load_peft(tmp_path / str(i), cfg)
        except ValueError as error:
            print(case, options, error)
            continue
        np.testing.assert_allclose(
            ours(cfg, tree.with_leaves(base, leaves)), wanted, rtol=1e-3, atol=1e-3,
            err_msg=f"{case} {options}",
        )  # fmt: skip
        equal += 1
    assert equal >= 11, equal


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "kind", "whole"),
    [
        ("llama", "lora", ()),
        ("llama", "dora", ("unembed/kernel", "embed/table")),
        ("llama3", "rslora", ("embed/table", "final_norm/scale")),
        ("llama3", "lora", ("layers/mlp_norm/scale",)),
        ("gemma2", "lora", ("embed/table",)),
        ("gemma3", "dora", ("embed/table", "final_norm/scale", "layers/attn/q_norm/scale")),
    ],
)
def test_adapters_of_the_project_have_its_logits_in_peft(case, kind, whole, tmp_path):
    model_at(tmp_path / "base", case)
    cfg = read_config(tmp_path / "base")
    base = load_hf(tmp_path / "base", cfg)
    targets = ("layers/attn/[qv]/kernel", "layers/mlp/up/kernel")
    like, _ = lora.lora_shapes(cfg, 2, targets, dora=kind == "dora")
    first = lora.lora_init(base, like, jax.random.key(0), lora.lora_scale(kind, 4.0, 2))
    flat = tree.flat(base)
    changed = {k: v for k, v in (first | {w: flat[w] for w in whole}).items() if "scale" not in k}
    changed |= {w: flat[w] for w in whole}
    for i, (k, v) in enumerate(changed.items()):
        changed[k] = v + 0.2 * jax.random.normal(jax.random.key(i), v.shape)
    params = tree.with_leaves(base, first | changed)
    peft_files.save_peft(
        tmp_path / "a", cfg, params, base_model=str(tmp_path / "base"), whole=whole
    )
    model = theirs.PeftModel.from_pretrained(reloaded(tmp_path / "base"), tmp_path / "a").eval()
    np.testing.assert_allclose(ours(cfg, params), logits_of(model), rtol=1e-3, atol=1e-3)
    leaves = peft_files.load_peft(tmp_path / "a", cfg)
    close(ours(cfg, tree.with_leaves(base, leaves)), ours(cfg, params))
    # PEFT writes it again, and the same model is read.
    model.save_pretrained(tmp_path / "b")
    leaves = peft_files.load_peft(tmp_path / "b", cfg)
    close(ours(cfg, tree.with_leaves(base, leaves)), ours(cfg, params))
    save_hf(tmp_path / "merged", cfg, weights.merged(cfg, params))
    assert checkpoints.load_hf(tmp_path / "merged", cfg)
    np.testing.assert_allclose(
        logits_of(reloaded(tmp_path / "merged")), logits_of(model), rtol=1e-3, atol=1e-3
    )

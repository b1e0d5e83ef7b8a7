"""LoRA to PEFT's files and back, and that the files say what PEFT computes from them."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_lora import CFG, adapted

from jaxrl_eff import checkpoints, models, tree
from jaxrl_eff.checkpoints import peft_files
from jaxrl_eff.peft import weights


@pytest.fixture(scope="module")
def base():
    return models.init(CFG, jax.random.key(0))


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_files_hold_what_was_trained(base, kind, tmp_path):
    params = adapted(base, kind)
    peft_files.save_peft(tmp_path, CFG, params)
    back = tree.with_leaves(base, peft_files.load_peft(tmp_path, CFG))
    assert tree.names(back) == tree.names(params)
    for name, x in tree.flat(back).items():
        np.testing.assert_allclose(x, tree.flat(params)[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_peft_would_merge_to_the_same_checkpoint(base, kind, tmp_path):
    """W + alpha/r B A on torch's [out, in] matrices; DoRA scales rows to their magnitude."""
    params = adapted(base, kind)
    checkpoints.save_hf(tmp_path / "base", CFG, base)
    checkpoints.save_hf(tmp_path / "merged", CFG, weights.merged(CFG, params))
    peft_files.save_peft(tmp_path / "adapter", CFG, params)
    start, want, adapter = (
        load_file(tmp_path / f)
        for f in (
            "base/model.safetensors", "merged/model.safetensors",
            "adapter/adapter_model.safetensors",
        )
    )  # fmt: skip
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    seen = 0
    for name, w in start.items():
        module = "base_model.model." + name.removesuffix(".weight")
        if f"{module}.lora_A.weight" in adapter:
            a, b = adapter[f"{module}.lora_A.weight"], adapter[f"{module}.lora_B.weight"]
            w = w + config["lora_alpha"] / config["r"] * b @ a
            if kind == "dora":
                size = adapter[f"{module}.lora_magnitude_vector"]
                w = w * (size / np.linalg.norm(w, axis=1))[:, None]
            seen += 1
        np.testing.assert_allclose(w, want[name], rtol=1e-5, atol=1e-5)
    assert seen == 7 * CFG.layers


def test_what_was_trained_whole_is_in_the_file(base, tmp_path):
    """A value head and norms: PEFT's modules_to_save, under the names that it gives them."""
    cfg = CFG.replace(head="value")
    base = models.init(cfg, jax.random.key(3))
    params = adapted(base, "lora")
    peft_files.save_peft(tmp_path, cfg, params, whole=("value/kernel", "layers/attn_norm/scale"))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["input_layernorm", "score"]
    assert config["task_type"] == "SEQ_CLS"
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert stored["base_model.model.score.weight"].shape == (1, CFG.width)
    assert "base_model.model.model.layers.1.input_layernorm.weight" in stored
    leaves = peft_files.load_peft(tmp_path, cfg)
    assert {"value/kernel", "layers/attn_norm/scale"} <= set(leaves)
    for name, x in leaves.items():
        np.testing.assert_allclose(x, tree.flat(params)[name], rtol=1e-6, err_msg=name)
    with pytest.raises(ValueError, match=r"\['q_proj'\] have LoRA and are trained whole"):
        peft_files.save_peft(tmp_path, cfg, params, whole=("layers/attn/q/kernel",))


def test_rank_stabilized_files_of_peft_are_read(base, tmp_path):
    peft_files.save_peft(tmp_path, CFG, adapted(base, "lora"))
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"use_rslora": True, "lora_alpha": 8}))
    leaves = peft_files.load_peft(tmp_path, CFG)
    np.testing.assert_allclose(leaves["layers/attn/q/lora_scale"], 8 / 2)


def test_files_that_do_not_fit_are_refused(base, tmp_path):
    with pytest.raises(ValueError, match="no LoRA to be saved"):
        peft_files.save_peft(tmp_path, CFG, base)
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        peft_files.load_peft(tmp_path, CFG)
    peft_files.save_peft(tmp_path, CFG, adapted(base, "lora"))
    file, path = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    stored, config = load_file(file), json.loads(path.read_text())
    one = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    for wrong, message in (
        ({k: v for k, v in stored.items() if k != one}, "has no .*q_proj"),
        (stored | {one: stored[one][:, 1:].copy()}, r"but should be \(4, 16\)"),
        (stored | {"else": stored[one]}, "has 'else'"),
    ):
        save_file(wrong, file)
        with pytest.raises(ValueError, match=message):
            peft_files.load_peft(tmp_path, CFG)
    path.write_text(json.dumps(config | {"peft_type": "IA3"}))
    with pytest.raises(ValueError, match="peft_type is 'IA3'"):
        peft_files.load_peft(tmp_path, CFG)

"""Files of weights: which ones are the model, and damaged or foreign ones refused by name."""

import json
import struct

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_lora import CFG, adapted

from jaxrl_eff import checkpoints, models
from jaxrl_eff.checkpoints import hf_load, peft_files

TIED = CFG.replace(tie=True)
TABLE, HEAD = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"


@pytest.fixture(scope="module")
def params():
    return models.init(CFG, jax.random.key(0))


@pytest.fixture
def saved(params, tmp_path):
    checkpoints.save_hf(tmp_path, CFG, params)
    hf_load.check_weights(tmp_path, CFG)
    return tmp_path


def refused(directory, message, cfg=CFG, **options):
    for check in (hf_load.check_weights, checkpoints.load_hf):
        with pytest.raises((ValueError, OSError), match=message) as caught:
            check(directory, cfg, **options)
        assert "\n" not in str(caught.value)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": 5}}, r"weight_map\.a=5"),
        ({"weight_map": ["a"]}, r"weight_map=\['a'\]"),
        ({"weight_map": {}}, "weight_map={}"),
        ([1], "holds a list"),
        ({"weight_map": {"a": "../model.safetensors"}}, r"names '\.\./model"),
        ({"weight_map": {"a": "/etc/passwd"}}, "names '/etc/passwd'"),
        ({"weight_map": {"a": "missing.safetensors"}}, r"names 'missing\.safetensors'"),
        ({"weight_map": {"a": "."}}, r"names '\.'"),
        ({"weight_map": {"a": "part.safetensors"}}, r"has model\.safetensors and .*index"),
    ],
    ids=str,
)
def test_an_index_that_cannot_be_followed_is_refused(index, message, saved):
    (saved / "part.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    (saved / INDEX).write_text(json.dumps(index))
    refused(saved, message)
    assert hf_load.weight_files(saved, ignore=(INDEX,)) == [saved / "model.safetensors"]


def test_files_that_no_loader_reads_are_left_alone(saved, params):
    for name in ("model-old.safetensors", "pytorch_model.bin", "consolidated.safetensors"):
        (saved / name).write_bytes(b"not a model")
    (saved / INDEX).write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    again = checkpoints.load_hf(saved, CFG)
    np.testing.assert_array_equal(again["embed"]["table"], params["embed"]["table"])


def test_an_adapter_within_a_models_directory_is_refused(saved):
    (saved / "adapter_config.json").write_text("{}")
    refused(saved, r"adapter_config\.json beside the model")
    hf_load.check_weights(saved, CFG, ignore=("adapter_config.json",))


def test_one_tensor_in_two_files_is_refused(saved):
    (saved / "model.safetensors").rename(saved / "a.safetensors")
    save_file({"model.norm.weight": np.ones(CFG.width, np.float32)}, saved / "b.safetensors")
    files = {"x": "a.safetensors", "y": "b.safetensors"}
    (saved / INDEX).write_text(json.dumps({"weight_map": files}))
    refused(saved, r"'model\.norm\.weight' is in both .*a\.safetensors and .*b\.safetensors")


def header(path, change):
    """Rewrites the header of a safetensors file, leaving the bytes of its tensors."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    told = change(json.loads(data[8 : 8 + size]))
    text = told if isinstance(told, bytes) else json.dumps(told).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def longer(told):
    told["model.norm.weight"]["shape"] = [10**12]
    return told


def overlapping(told):
    told["model.norm.weight"]["data_offsets"] = told["lm_head.weight"]["data_offsets"]
    return told


@pytest.mark.parametrize("change", [longer, overlapping, lambda _: b"[]", lambda _: b"{" * 5000])
def test_a_header_that_lies_is_refused(change, saved):
    header(saved / "model.safetensors", change)
    refused(saved, r"model\.safetensors cannot be read")


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1])
def test_a_file_that_was_cut_is_refused(size, saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(saved, r"model\.safetensors cannot be read")
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    refused(saved, r"model\.safetensors cannot be read")


def test_tensors_that_are_not_the_models_can_be_ignored_by_name(saved):
    path = saved / "model.safetensors"
    save_file(load_file(path) | {"model.odd.0.x": np.ones(3, np.float32)}, path)
    refused(saved, r"model\.odd\.0\.x")
    hf_load.check_weights(saved, CFG, ignore=("model.odd.*",))


def test_sizes_of_the_configuration_are_compared_before_anything_is_allocated(saved):
    for changes in ({"vocab": 2**28}, {"ffn": 2**26}, {"layers": 500, "windowed": ()}):
        refused(saved, "should be|has no tensor", CFG.replace(**changes))


def test_a_head_beside_the_table_it_is_tied_to_is_the_same(tmp_path):
    checkpoints.save_hf(tmp_path, TIED, models.init(TIED, jax.random.key(0)))
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    table = stored["model.embed_tokens.weight"]
    save_file(stored | {"lm_head.weight": table.copy()}, path)
    hf_load.check_weights(tmp_path, TIED)
    for other in (table + 1, table[1:].copy()):
        save_file(stored | {"lm_head.weight": other}, path)
        refused(tmp_path, "tie_word_embeddings is true, but 'lm_head.weight' is not the same", TIED)
    hf_load.check_weights(tmp_path, TIED, ignore=("lm_head.weight",))


@pytest.fixture
def adapter(params, tmp_path):
    peft_files.save_peft(tmp_path, CFG, adapted(params, "lora"))
    return tmp_path / "adapter_model.safetensors"


def test_adapters_hold_what_their_configuration_names(adapter):
    path = adapter.parent / "adapter_config.json"
    config, stored = json.loads(path.read_text()), load_file(adapter)
    for changes, message in (
        ({"target_modules": ["q_proj"]}, "has 'base_model.*does not name"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules names 'lm_head'"),
        ({"target_modules": ".*embed_tokens"}, "target_modules names 'model.embed_tokens'"),
        ({"target_modules": ["layers.0.self_attn.q_proj"]}, "some layers only"),
        ({"target_modules": []}, "does not name"),
        ({"modules_to_save": ["norm"]}, "modules_to_save names"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"r": 3}, "but should be"),
    ):
        path.write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=message):
            peft_files.load_peft(adapter.parent, CFG)
    path.write_text(json.dumps(config))
    norm = {"base_model.model.model.norm.weight": np.ones(CFG.width, np.float32)}
    save_file(stored | norm, adapter)
    with pytest.raises(ValueError, match=r"modules_to_save=\[\] does not name .*norm\.weight"):
        peft_files.load_peft(adapter.parent, CFG)
    assert peft_files.load_peft(adapter.parent, CFG, ignore=("*.norm.weight",))
    for broken in (b"", adapter.read_bytes()[:50], b"\xff" * 100):
        adapter.write_bytes(broken)
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors cannot be read"):
            peft_files.load_peft(adapter.parent, CFG)


def test_a_table_that_is_tied_is_saved_for_both(tmp_path):
    base = models.init(TIED, jax.random.key(0))
    params = adapted(base, "lora")
    peft_files.save_peft(tmp_path, TIED, params, whole=("embed/table", "final_norm/scale"))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    # "norm" alone would also be the end of "input_layernorm".
    assert config["modules_to_save"] == ["model.embed_tokens", "model.norm"]
    assert config["ensure_weight_tying"] is True
    path = tmp_path / "adapter_model.safetensors"
    stored = load_file(path)
    np.testing.assert_array_equal(stored[TABLE], stored[HEAD])
    back = peft_files.load_peft(tmp_path, TIED)
    np.testing.assert_array_equal(back["embed/table"], base["embed"]["table"])
    for change, message in (
        ({HEAD: stored[HEAD] + 1}, "is not the same as"),
        ({HEAD: None}, "lm_head.weight' is not in"),
        ({TABLE: None}, "embed_tokens.weight' is not in"),
    ):
        save_file({k: v for k, v in (stored | change).items() if v is not None}, path)
        with pytest.raises(ValueError, match=message):
            peft_files.load_peft(tmp_path, TIED)


def test_a_module_with_lora_and_kept_whole_is_found_before_training():
    cfg = CFG.replace(qkv_bias=True)
    lora_q = ["layers/attn/q/kernel"]
    assert peft_files.check_exportable(cfg, lora_q, ["final_norm/scale"]) == ["model.norm"]
    with pytest.raises(ValueError, match=r"\['q_proj'\] have LoRA and are trained whole"):
        peft_files.check_exportable(cfg, lora_q, ["layers/attn/q/bias"])

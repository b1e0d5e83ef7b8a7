"""Checkpoints in and out: parity with golden logits, slices, and refusals."""

import json
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.make_golden import CASES, HERE, weights
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from jaxrl_eff.checkpoints import load_hf, read_config, save_hf, write_config
from jaxrl_eff.checkpoints.hf_names import tensors
from jaxrl_eff.models import LMConfig, abstract, apply, init, params, unembed

DATA = Path(os.environ.get("JAXRL_EFF_DATA", Path(__file__).parents[3] / "shared" / "data"))


def needs(path: str) -> pytest.MarkDecorator:
    reason = f"{path} is not there; set JAXRL_EFF_DATA to the folder of checkpoints"
    return pytest.mark.skipif(not (DATA / path).exists(), reason=reason)


def written(case: str, to: Path, dtype: str = "float32") -> dict:
    """Writes a golden case as a checkpoint; returns its tensors."""
    told = json.loads((HERE / f"{case}.json").read_text())
    state = weights(told["shapes"], gemma=told["config"]["model_type"].startswith("gemma"))
    state = {k: v.astype(jnp.dtype(dtype)) for k, v in state.items()}
    to.mkdir(exist_ok=True)
    (to / "config.json").write_text(json.dumps(told["config"]))
    save_file(state, to / "model.safetensors")
    return state


def logits_of(cfg: LMConfig, params: dict, ids: np.ndarray) -> np.ndarray:
    @jax.jit
    def run(params, ids):
        position = jnp.arange(ids.shape[1])[None]
        hidden, _ = apply(cfg, params, ids, position, jnp.ones_like(ids))
        return unembed(cfg, params, hidden)

    return np.asarray(run(params, jnp.asarray(ids)[None])[0])


def equal(a, b) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, tmp_path):
    written(case, tmp_path)
    cfg = read_config(tmp_path)
    with np.load(HERE / f"{case}.npz") as golden:
        got = logits_of(cfg, load_hf(tmp_path, cfg), golden["ids"])
        np.testing.assert_allclose(got, golden["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_saving_returns_every_byte_and_the_same_config(case, tmp_path):
    state = written(case, tmp_path / "a")
    cfg = read_config(tmp_path / "a")
    assert read_config(write_config(cfg)) == cfg
    save_hf(tmp_path / "b", cfg, load_hf(tmp_path / "a", cfg))
    again = load_file(tmp_path / "b" / "model.safetensors")
    assert set(again) == set(state)
    for name, value in state.items():
        np.testing.assert_array_equal(again[name], value)
    assert read_config(tmp_path / "b") == cfg


def spread(cfg: LMConfig) -> dict:
    """Shardings that cut layers, heads, the inside of heads, the width and the vocabulary."""
    mesh = jax.make_mesh(
        (2, 2, 2), ("stage", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    rules = {"layers": "stage", "embed": "fsdp", "heads": "tensor", "ffn": "tensor"}
    rules |= {"vocab": "tensor", "head_dim": None, "kv_heads": "tensor"}
    return jax.tree.map(
        lambda axes: NamedSharding(mesh, PartitionSpec(*(rules.get(a) for a in axes))),
        params.logical_axes(cfg),
        is_leaf=lambda x: isinstance(x, tuple),
    )


@pytest.mark.parametrize("case", ["llama3", "qwen3", "gemma2"])
def test_shards_hold_what_the_whole_model_does(case, tmp_path):
    written(case, tmp_path)
    cfg = read_config(tmp_path)
    whole, shardings = load_hf(tmp_path, cfg), spread(cfg)
    parts = load_hf(tmp_path, cfg, shardings)
    assert jax.tree.map(lambda x: x.sharding, parts) == shardings
    equal(parts, whole)
    save_hf(tmp_path / "out", cfg, parts)
    equal(load_hf(tmp_path / "out", cfg), whole)


def test_any_axis_can_be_cut(tmp_path):
    written("llama3", tmp_path)
    cfg = read_config(tmp_path)
    whole = load_hf(tmp_path, cfg)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    for axis in range(4):

        def cut(x, axis=axis):
            here = axis < x.ndim and x.shape[axis] % 2 == 0
            return NamedSharding(
                mesh, PartitionSpec(*[None] * axis, "x") if here else PartitionSpec()
            )

        equal(load_hf(tmp_path, cfg, jax.tree.map(cut, abstract(cfg))), whole)


def test_a_shard_reads_only_its_layers(tmp_path, monkeypatch):
    written("gemma2", tmp_path)
    cfg = read_config(tmp_path)
    from jaxrl_eff.checkpoints import hf_load

    biggest = []
    place = hf_load._place

    def watched(shape, dtype, sharding, read):
        def counted(index):
            block = read(index)
            biggest.append(block.size / np.prod(shape))
            return block

        return place(shape, dtype, sharding, counted)

    monkeypatch.setattr(hf_load, "_place", watched)
    mesh = jax.make_mesh((4,), ("stage",), axis_types=(jax.sharding.AxisType.Auto,))
    shardings = jax.tree.map(
        lambda x: NamedSharding(mesh, PartitionSpec("stage" if x.shape[0] == 4 else None)),
        abstract(cfg),
    )
    load_hf(tmp_path, cfg, shardings)
    stacked = len(jax.tree.leaves(abstract(cfg)["layers"]))
    assert sorted(biggest) == [0.25] * 4 * stacked + [1.0] * 2


def test_many_files_hold_what_one_does(tmp_path):
    written("gemma3", tmp_path)
    cfg = read_config(tmp_path)
    whole = load_hf(tmp_path, cfg)
    save_hf(tmp_path / "many", cfg, whole, shard_bytes=20_000)
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 3
    equal(load_hf(tmp_path / "many", cfg), whole)
    index = tmp_path / "many" / "model.safetensors.index.json"
    first = sorted((tmp_path / "many").glob("model-*"))[0]
    first.unlink()
    with pytest.raises(FileNotFoundError, match=first.name):
        load_hf(tmp_path / "many", cfg)
    index.unlink()
    with pytest.raises(FileNotFoundError, match="index"):
        load_hf(tmp_path / "many", cfg)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_read_exactly_and_kept(dtype, tmp_path):
    state = written("llama", tmp_path, dtype)
    cfg = read_config(tmp_path)
    wide = load_hf(tmp_path, cfg)
    assert wide["embed"]["table"].dtype == jnp.float32
    table = state["model.embed_tokens.weight"]
    np.testing.assert_array_equal(wide["embed"]["table"], table.astype(np.float32))
    half = load_hf(tmp_path, cfg, dtype=dtype)
    save_hf(tmp_path / "out", cfg, half)
    again = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in state.items():
        assert again[name].dtype == value.dtype
        np.testing.assert_array_equal(again[name], value)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype


def test_value_head_starts_at_zero_or_small_and_survives_saving(tmp_path):
    written("llama", tmp_path)
    cfg = read_config(tmp_path).replace(head="value")
    assert not np.any(load_hf(tmp_path, cfg)["value"]["kernel"])
    small = load_hf(tmp_path, cfg, value_std=0.01)
    assert 0.002 < float(jnp.std(small["value"]["kernel"])) < 0.05
    save_hf(tmp_path / "critic", cfg, small)
    assert read_config(tmp_path / "critic") == cfg
    raw = json.loads((tmp_path / "critic" / "config.json").read_text())
    assert raw["architectures"] == ["LlamaForSequenceClassification"]
    equal(load_hf(tmp_path / "critic", cfg), small)
    with pytest.raises(ValueError, match="lm_head"):
        load_hf(tmp_path / "critic", cfg.replace(head="lm"))


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", ""])
def test_the_decoder_is_found_inside_other_models(prefix, tmp_path):
    state = written("gemma3", tmp_path)
    cfg = read_config(tmp_path)
    whole = load_hf(tmp_path, cfg)
    inner = json.loads((tmp_path / "config.json").read_text())
    state = {k.replace("model.", prefix, 1): v for k, v in state.items()}
    if prefix:
        state["vision_tower.patches.weight"] = np.zeros((2, 2), np.float32)
        outer = {"model_type": "gemma3", "text_config": inner}
        assert read_config(outer) == cfg
    save_file(state, tmp_path / "model.safetensors")
    equal(load_hf(tmp_path, cfg), whole)


def damaged(directory: Path, change) -> None:
    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj"),
        (lambda s: s.pop("model.embed_tokens.weight"), "embed_tokens"),
        (lambda s: s.update({"model.odd.bias": np.ones(3, np.float32)}), "model.odd.bias"),
        (lambda s: s.update({"model.norm.weight": np.ones(3, np.float32)}), r"\[3\].*\[32\]"),
        (lambda s: s.update({"model.norm.weight": np.ones(32, np.int8)}), "I8"),
    ],
    ids=["missing", "no embedding", "extra", "misshapen", "integers"],
)
def test_a_wrong_tensor_is_named(change, message, tmp_path):
    written("llama", tmp_path)
    cfg = read_config(tmp_path)
    damaged(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load_hf(tmp_path, cfg)


def test_known_buffers_and_tied_copies_are_passed_over(tmp_path):
    state = written("llama3", tmp_path)
    cfg = read_config(tmp_path)
    copies = {
        "lm_head.weight": state["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    damaged(tmp_path, lambda s: s.update(copies))
    load_hf(tmp_path, cfg)


def test_pickles_and_damaged_files_are_refused(tmp_path):
    written("llama", tmp_path)
    cfg = read_config(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        load_hf(tmp_path, cfg)
    path.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pickled.*pytorch_model\.bin"):
        load_hf(tmp_path, cfg)
    with pytest.raises(FileNotFoundError, match="no directory"):
        load_hf(tmp_path / "nowhere", cfg)
    with pytest.raises(ValueError, match="float64"):
        load_hf(tmp_path, cfg, dtype="float64")


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("llama", {"model_type": "mixtral"}, "unknown model_type 'mixtral'"),
        ("llama", {"model_type": None}, "unknown model_type None"),
        ("llama", {"hidden_act": "relu"}, "unknown hidden_act 'relu'"),
        (
            "llama",
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "unknown rope_type 'dynamic'",
        ),
        ("llama", {"rope_scaling": {"type": "linear"}}, "factor"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"hidden_size": ...}, "hidden_size"),
        ("llama", {"architectures": ["LlamaForTokenClassification"]}, "ForTokenClassification"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "2 labels"),
        ("mistral", {"attention_bias": True}, "attention_bias=True"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types has 1"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_an_unsupported_config_is_named(case, change, message, tmp_path):
    raw = json.loads((HERE / f"{case}.json").read_text())["config"] | change
    with pytest.raises(ValueError, match=re.escape(message)):
        read_config({k: v for k, v in raw.items() if v is not ...})


def test_a_config_that_the_format_cannot_say_is_refused():
    raw = json.loads((HERE / "mistral.json").read_text())["config"]
    with pytest.raises(ValueError, match="qkv_bias=True"):
        write_config(read_config(raw).replace(qkv_bias=True))


def test_ends_of_turns_come_from_the_generation_config(tmp_path):
    written("llama", tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    assert read_config(tmp_path).eos == (7, 2)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert read_config(tmp_path / "config.json").eos == (5, 2)


def test_saving_replaces_its_own_directory_and_no_other(tmp_path, key):
    raw = json.loads((HERE / "llama.json").read_text())["config"]
    cfg = read_config(raw)
    first, second = init(cfg, key), init(cfg, jax.random.fold_in(key, 1))
    save_hf(tmp_path / "m", cfg, first)
    for left in (".config.json.partial", ".tokenizer.json.0123456789abcdef.partial"):
        (tmp_path / "m" / left).touch()  # by a process that was killed while it wrote that file
    save_hf(tmp_path / "m", cfg, second)
    equal(load_hf(tmp_path / "m", cfg), second)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert not [p for p in (tmp_path / "m").iterdir() if p.name.endswith(".partial")]
    (tmp_path / "m" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"thesis\.txt"):
        save_hf(tmp_path / "m", cfg, first)
    with pytest.raises(ValueError, match="embed/table"):
        save_hf(tmp_path / "n", cfg, {**first, "embed": {"table": jnp.zeros((3, 3))}})
    assert not (tmp_path / "n").exists()


def test_every_parameter_has_one_tensor():
    for case in CASES:
        cfg = read_config(json.loads((HERE / f"{case}.json").read_text())["config"])
        for head in ("lm", "value"):
            table = tensors(cfg.replace(head=head))
            assert len({t.path for t in table}) == len({t.name for t in table}) == len(table)


@needs("stories260K/hf")
def test_stories_logits_and_greedy_tokens():
    directory = DATA / "stories260K" / "hf"
    cfg = read_config(directory)
    params = load_hf(directory, cfg)
    with np.load(DATA / "stories260K" / "golden_logits_f64.npz") as golden:
        for name in ("greedy", "story1"):
            got = logits_of(cfg, params, golden[f"{name}/ids"])
            np.testing.assert_allclose(got, golden[f"{name}/logits"], rtol=1e-4, atol=1e-4)
    from jaxrl_eff.rollout import Sampling, sample

    told = json.loads((DATA / "stories260K" / "greedy200.json").read_text())
    fn = jax.jit(sample(cfg, Sampling(max_tokens=200, temperature=0.0)))
    prompt = {
        "prompt": jnp.asarray([told["prompt"]], jnp.int32),
        "prompt_length": jnp.asarray([len(told["prompt"])], jnp.int32),
        "prompt_example": jnp.zeros(1, jnp.int32),
    }
    tokens = np.asarray(fn(params, prompt, jax.random.key(0))["tokens"])[0]
    assert tokens[len(told["prompt"]) :].tolist() == told["ids"][-200:]


@needs("verl_digit")
def test_digit_logits_from_bfloat16():
    cfg = read_config(DATA / "verl_digit")
    with np.load(DATA / "verl_digit" / "golden_logits_f64.npz") as golden:
        got = logits_of(cfg, load_hf(DATA / "verl_digit", cfg), golden["ids"])
        np.testing.assert_allclose(got, golden["logits"], rtol=1e-4, atol=1e-4)


def test_tokenizer_files_travel_with_the_weights(tmp_path, key):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "notes.md"):
        (source / name).write_text("{}")
    (source / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 9}')
    raw = json.loads((HERE / "llama.json").read_text())["config"]
    cfg = read_config(raw)
    save_hf(tmp_path / "m", cfg, init(cfg, key), tokenizer_from=source)
    there = {p.name for p in (tmp_path / "m").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja"} < there and "notes.md" not in there
    told = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert told == {"temperature": 0.6, "bos_token_id": 1, "eos_token_id": 2}
    shutil.rmtree(tmp_path / "m")

"""The same comparison as the golden numbers, live; and what we save, loaded by transformers.

pip install -e '.[dev,parity]' && pytest -m parity
"""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import make_golden

from jaxrl_eff.checkpoints import load_hf, read_config, save_hf
from jaxrl_eff.data.tokenizer import CharTokenizer
from jaxrl_eff.models import LMConfig, apply, init, unembed
from jaxrl_eff.models.transformer import scalar

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch", reason="torch is not installed: pip install '.[parity]'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers", reason="needs the extra 'parity'")


def hidden_of(cfg: LMConfig, params: dict, ids: np.ndarray) -> jax.Array:
    tokens = jnp.asarray(ids)[None]
    position = jnp.arange(tokens.shape[1])[None]
    return apply(cfg, params, tokens, position, jnp.ones_like(tokens))[0]


@pytest.mark.parametrize("case", make_golden.CASES)
def test_logits_and_files_agree_with_transformers(case, tmp_path):
    config = make_golden._TINY | make_golden.CASES[case]
    model, _ = make_golden.reference(config)
    # transformers writes its own, newest form of the configuration, and the weights in parts.
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    cfg = read_config(tmp_path / "theirs")
    assert cfg.replace(dtype="float32") == read_config(config).replace(
        **{k: getattr(cfg, k) for k in ("bos", "eos", "pad")}
    )
    params = load_hf(tmp_path / "theirs", cfg)
    ids = np.random.RandomState(1).randint(cfg.vocab, size=40, dtype="i4")
    wanted = make_golden.logits(model, ids)
    got = np.asarray(unembed(cfg, params, hidden_of(cfg, params, ids)))[0]
    print(f"{case}: largest difference {np.abs(got - wanted).max():.1e}")
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)

    save_hf(tmp_path / "ours", cfg, params, shard_bytes=30_000)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(again) is type(model)
    np.testing.assert_array_equal(make_golden.logits(again.eval(), ids), wanted)


@pytest.mark.parametrize("case", make_golden.CASES)
def test_a_value_model_is_a_classifier_in_transformers(case, tmp_path):
    told = json.loads((make_golden.HERE / f"{case}.json").read_text())["config"]
    cfg = read_config(told).replace(head="value", pad=0)
    params = init(cfg, jax.random.key(1))
    save_hf(tmp_path / "m", cfg, params)
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "m", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ids = np.random.RandomState(2).randint(1, cfg.vocab, size=20, dtype="i4")
    with torch.no_grad():
        wanted = model.eval()(torch.tensor(ids[None], dtype=torch.long)).logits.item()
    got = scalar(cfg, params, hidden_of(cfg, params, ids))[0, -1]
    np.testing.assert_allclose(float(got), wanted, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_loaded_as_bfloat16(tmp_path):
    told = json.loads((make_golden.HERE / "qwen3.json").read_text())["config"]
    cfg = read_config(told).replace(param_dtype="bfloat16")
    save_hf(tmp_path / "m", cfg, init(cfg, jax.random.key(1)))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert model.dtype == torch.bfloat16


def test_a_character_tokenizer_is_the_same_in_transformers(tmp_path):
    template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    ours = CharTokenizer("abc 0+=\n", template)
    cfg = LMConfig(vocab=ours.vocab, layers=1, width=8, heads=1, kv_heads=1, head_dim=8, ffn=8)
    save_hf(tmp_path / "m", cfg, init(cfg, jax.random.key(0)), tokenizer_from=ours)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    text = "ab+c = 0\n  a"
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    assert theirs(text)["input_ids"] == ours.encode(text, special=True)
    assert theirs.decode(ours.encode(text, special=True), skip_special_tokens=True) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)
    assert theirs.apply_chat_template([{"role": "user", "content": "a"}])["input_ids"] == [3, 2]

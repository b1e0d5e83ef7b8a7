"""Merging into a Hugging Face directory and out of it; parameters' names and the files'."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrl_eff.checkpoints import deltas, load_hf, read_config, save_hf
from jaxrl_eff.checkpoints.deltas import AuditError, Limits
from jaxrl_eff.data.tokenizer import CharTokenizer
from jaxrl_eff.models import LMConfig, init

TOY = CharTokenizer("abcdefgh ")
CFG = LMConfig(
    vocab=TOY.vocab, layers=2, width=16, heads=4, kv_heads=2, head_dim=8, ffn=24, max_length=32,
    bos=1, eos=(2,), pad=0, init_std=0.3, param_dtype="bfloat16",
)  # fmt: skip


def changed(params, seed, share=0.05):
    """Some entries multiplied; every leaf has some."""

    def change(x):
        rng = np.random.default_rng(seed)
        some = rng.random(x.shape) < share
        some.reshape(-1)[0] = True
        x = np.asarray(x)
        return jnp.asarray(np.where(some, x * x.dtype.type(1.5), x))

    return jax.tree.map(change, params)


@pytest.fixture(scope="module")
def params():
    base = init(CFG, jax.random.key(0))
    return base, changed(base, 1)


@pytest.fixture(scope="module")
def home(tmp_path_factory, params):
    """The base in one file, the tuned model in several."""
    home = tmp_path_factory.mktemp("models")
    save_hf(home / "base", CFG, params[0], tokenizer_from=TOY)
    save_hf(home / "tuned", CFG, params[1], tokenizer_from=TOY, shard_bytes=3000)
    assert len(list((home / "tuned").glob("model-*.safetensors"))) > 3
    return home


@pytest.fixture(scope="module")
def delta(home):
    base, tuned = (deltas.read_directory(home / d) for d in ("base", "tuned"))
    return deltas.diff(base, tuned, method="every twentieth")


def files(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def test_the_hash_does_not_depend_on_files(home, params, tmp_path):
    save_hf(tmp_path / "many", CFG, params[0], shard_bytes=2000)
    many, one = (deltas.read_directory(d) for d in (tmp_path / "many", home / "base"))
    assert list(many) != [] and deltas.content_hash(many) == deltas.content_hash(one)
    whole = load_file(home / "base" / "model.safetensors")
    assert deltas.content_hash(whole) == deltas.content_hash(one)
    assert deltas.content_hash(deltas.read_directory(home / "tuned")) != deltas.content_hash(one)


def test_merging_then_rolling_back_is_the_same_files(home, delta, params, tmp_path):
    before = files(home / "base")
    found = deltas.merge(home / "base", delta, tmp_path / "merged")
    assert found.passed and found.changed == delta.count
    cfg = read_config(tmp_path / "merged").replace(param_dtype="bfloat16")
    equal(load_hf(tmp_path / "merged", cfg), params[1])
    merged = files(tmp_path / "merged")
    assert merged.keys() == before.keys()
    assert [n for n in before if merged[n] != before[n]] == ["model.safetensors"]
    deltas.rollback(tmp_path / "merged", delta, tmp_path / "back")
    assert files(tmp_path / "back") == before == files(home / "base")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "merged"]


def test_a_delta_of_one_layout_goes_into_another(home, delta, params, tmp_path):
    save_hf(tmp_path / "many", CFG, params[0], shard_bytes=2500)
    (tmp_path / "many" / "pytorch_model.bin").write_text("the base's weights")
    (tmp_path / "many" / "README.md").write_text("card")
    deltas.merge(tmp_path / "many", delta, tmp_path / "out")
    cfg = read_config(tmp_path / "out").replace(param_dtype="bfloat16")
    equal(load_hf(tmp_path / "out", cfg), params[1])
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert "README.md" in names and "model.safetensors.index.json" in names
    assert "pytorch_model.bin" not in names


def test_what_fails_the_audit_is_not_merged(home, delta, tmp_path):
    seen = []

    def kl(base, tuned):
        assert base == home / "base"
        seen.append(deltas.content_hash(deltas.read_directory(tuned)))
        return 0.5

    out, undo = tmp_path / "out", tmp_path / "undo"
    for limits, suite in (
        (Limits(share=1e-3), {}),
        (Limits(kl=0.4), {}),
        (Limits(kl=0.6), {"config": lambda d: not (d / "config.json").exists()}),
    ):
        with pytest.raises(AuditError, match="the audit failed: ") as error:
            deltas.merge(
                home / "base", delta, out, limits=limits, kl=kl, suite=suite, undo=undo
            )  # fmt: skip
        assert not error.value.audit.passed
        assert list(tmp_path.iterdir()) == []
        alone = deltas.audit_directory(home / "base", delta, limits=limits, kl=kl, suite=suite)
        assert alone.failures == error.value.audit.failures
    assert set(seen) == {deltas.content_hash(deltas.read_directory(home / "tuned"))}
    found = deltas.merge(home / "base", delta, out, limits=Limits(kl=0.6), kl=kl, undo=undo)
    assert found.passed and found.kl == 0.5 and out.exists() and undo.exists()


def test_every_merge_can_be_undone(home, delta, tmp_path):
    """Of a delta to be added, or without originals, by the file that the merge leaves."""
    half = deltas.scale(delta, 0.5)
    unknown = deltas.Delta(half.tensors, "", "add")
    bare = deltas.diff(*(deltas.read_directory(home / d) for d in ("base", "tuned")),
                       originals=False)  # fmt: skip
    for i, one in enumerate((half, unknown, bare)):
        deltas.merge(home / "base", one, tmp_path / f"{i}", undo=tmp_path / "undo")
        deltas.rollback(tmp_path / f"{i}", deltas.load(tmp_path / "undo"), tmp_path / f"back{i}")
        assert files(tmp_path / f"back{i}") == files(home / "base")


def test_a_rollback_proves_itself(home, delta, tmp_path):
    other = tmp_path / "other"
    deltas.merge(home / "base", delta, other)
    state = load_file(other / "model.safetensors")
    untouched = next(
        (n, i) for n, x in state.items() for i in range(x.size)
        if i not in delta.tensors[n].indices
    )  # fmt: skip
    state[untouched[0]].reshape(-1)[untouched[1]] += 1
    save_file(state, other / "model.safetensors")
    with pytest.raises(ValueError, match="not the base"):
        deltas.rollback(other, delta, tmp_path / "back")
    bare = deltas.Delta(delta.tensors)
    with pytest.raises(ValueError, match="hash, so nothing would be proven"):
        deltas.rollback(other, bare, tmp_path / "back")
    with pytest.raises(ValueError, match="no originals"):
        deltas.rollback(other, deltas.diff({"w": np.zeros(2, np.float32)},
                                           {"w": np.ones(2, np.float32)}, originals=False),
                        tmp_path / "back")  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other"]


def test_what_cannot_be_merged_is_refused(home, delta, tmp_path):
    with pytest.raises(FileExistsError, match="is there already"):
        deltas.merge(home / "base", delta, home / "tuned")
    with pytest.raises(FileExistsError, match="is there already"):
        deltas.rollback(home / "tuned", delta, home / "base")
    with pytest.raises(ValueError, match="made for the base"):
        deltas.merge(home / "tuned", delta, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no directory"):
        deltas.merge(home / "none", delta, tmp_path / "out")
    with pytest.raises(ValueError, match="needs a function"):
        deltas.merge(home / "base", delta, tmp_path / "out", limits=Limits(kl=1))
    assert list(tmp_path.iterdir()) == []


def test_files_beside_or_wrong_are_told_apart(tmp_path):
    save_file({"w": np.zeros(3, np.float32)}, tmp_path / "model-1.safetensors")
    save_file({"w": np.zeros(3, np.float32)}, tmp_path / "model-2.safetensors")
    index = {"weight_map": {"w": "model-1.safetensors", "v": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="'w', which another file holds"):
        deltas.read_directory(tmp_path)
    save_file({"n": np.zeros((0, 3), np.int64)}, tmp_path / "model-2.safetensors")
    table = deltas.read_directory(tmp_path)
    assert table["n"].shape == (0, 3) and table["n"].dtype == np.int64
    assert isinstance(table["w"], np.memmap) and not table["w"].flags.writeable


def test_parameters_and_files_have_the_same_delta(home, delta, params):
    mine = deltas.diff(*params)
    there = deltas.to_hf(mine, CFG, base=delta.base)
    back = deltas.from_hf(delta, CFG, base=mine.base)
    for got, wanted in ((there, delta), (back, mine)):
        assert got.base == wanted.base and got.tensors.keys() == wanted.tensors.keys()
        for name, entries in wanted.tensors.items():
            other = got.tensors[name]
            assert (other.shape, other.dtype) == (entries.shape, entries.dtype)
            np.testing.assert_array_equal(other.indices, entries.indices)
            assert other.values.tobytes() == entries.values.tobytes()
            assert other.originals.tobytes() == entries.originals.tobytes()
    equal(deltas.apply(params[0], back), params[1])


@pytest.mark.parametrize(
    "change",
    [
        dict(qkv_bias=True, o_bias=True, mlp_bias=True, tie=True),
        dict(head="value", qk_norm=True, post_norms=True),
    ],
    ids=["biases, tied", "value head, norms"],
)
def test_names_return_for_other_models(change):
    cfg = CFG.replace(**change)
    base = init(cfg, jax.random.key(1))
    mine = deltas.diff(base, changed(base, 2))
    again = deltas.from_hf(deltas.to_hf(mine, cfg), cfg, base=mine.base)
    assert again.tensors.keys() == mine.tensors.keys()
    for name, entries in mine.tensors.items():
        np.testing.assert_array_equal(again.tensors[name].indices, entries.indices)
        assert again.tensors[name].values.tobytes() == entries.values.tobytes()


def test_names_of_another_model_are_refused(delta, params):
    mine = deltas.diff(*params)
    with pytest.raises(ValueError, match=r"'layers/mlp/\S+' .*24.* is .*32.* in the model"):
        deltas.to_hf(mine, CFG.replace(ffn=32))
    with pytest.raises(ValueError, match=r"'unembed/kernel' .* is missing in the model"):
        deltas.to_hf(mine, CFG.replace(tie=True))
    with pytest.raises(ValueError, match=r"no tensor 'lm_head\.weight' \(1 such"):
        deltas.from_hf(delta, CFG.replace(tie=True))
    with pytest.raises(ValueError, match=r"is \[24, 16\]; the model has \[32, 16\]"):
        deltas.from_hf(delta, CFG.replace(ffn=32))


def test_the_ready_made_kl_loads_both(home, params):
    rows = np.array([[1, 3, 4, 5], [1, 6, -1, -1]], np.int32)
    cfg = CFG.replace(param_dtype="float32")
    wide = [load_hf(home / d, cfg) for d in ("base", "tuned")]
    wanted = deltas.lm_kl(cfg, rows)(*wide)
    assert wanted > 1e-4
    assert deltas.hf_kl(rows)(home / "base", home / "tuned") == pytest.approx(wanted, rel=1e-6)

"""Delta files: small, complete, and refused when anything is wrong with them."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jaxrl_eff.checkpoints.deltas import Delta, Entries, load, save
from jaxrl_eff.checkpoints.deltas import file as delta_file


def made(dtype="bfloat16", size=2000, density=0.05, seed=0, originals=True, **fields):
    rng = np.random.default_rng(seed)
    at = np.flatnonzero(rng.random(size) < density)
    width = np.dtype(dtype).itemsize
    new, old = rng.integers(0, 256, (2, len(at), width), np.uint8).view(dtype)[..., 0]
    entries = Entries((size // 4, 4), dtype, at, new, old if originals else None)
    fields = {"base": "sha256:" + "a" * 64, "method": "random 5 %", **fields}
    if fields.get("semantics") == "add":
        values = rng.standard_normal(len(at), np.float32)
        entries = Entries(entries.shape, dtype, at, values, entries.originals)
    return Delta({"layers/w": entries}, **fields)


def same(a, b):
    fields = ("base", "semantics", "method", "granularity")
    assert [getattr(a, f) for f in fields] == [getattr(b, f) for f in fields]
    assert a.tensors.keys() == b.tensors.keys()
    for name, x in a.tensors.items():
        y = b.tensors[name]
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        for p, q in zip(*((e.indices, e.values, e.originals) for e in (x, y)), strict=True):
            assert (p is None) == (q is None)
            if p is not None:
                assert p.dtype == q.dtype and p.tobytes() == q.tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("semantics", ["set", "add"])
@pytest.mark.parametrize("originals", [True, False])
def test_what_is_saved_is_loaded(dtype, semantics, originals, tmp_path):
    delta = made(dtype, originals=originals, semantics=semantics, granularity="row")
    size = save(delta, tmp_path / "new" / "d.safetensors")
    assert (tmp_path / "new" / "d.safetensors").stat().st_size == size
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["d.safetensors"]
    same(load(tmp_path / "new" / "d.safetensors"), delta)


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8),
        st.sets(st.integers(0, 59), max_size=60),
        max_size=4,
    )
)
def test_every_set_of_tensors_returns(tmp_path_factory, chosen):
    path = tmp_path_factory.mktemp("d") / "d.safetensors"
    tensors = {}
    for name, at in chosen.items():
        at = np.array(sorted(at), np.int64)
        tensors[name] = Entries((3, 20), "float32", at, at.astype(np.float32))
    delta = Delta(tensors)
    save(delta, path)
    same(load(path), Delta({k: v for k, v in tensors.items() if len(v)}))


def test_an_entry_takes_three_bytes_at_one_percent(tmp_path):
    delta = made(size=4_000_000, density=0.01, originals=False)
    each = save(delta, tmp_path / "d") / delta.count
    assert 3.0 < each < 3.05  # 2 of the value, 8.1 bits of the index, and the header
    with_originals = made(size=4_000_000, density=0.01)
    assert save(with_originals, tmp_path / "d") / delta.count < 5.05
    assert save(with_originals, tmp_path / "d", originals=False) / delta.count == each
    assert load(tmp_path / "d").reversible is False
    # PEFT's SHiRA stores two int32 and a float32: 12 bytes.
    assert 12 / each > 3.9
    assert delta_file.index_bytes(tmp_path / "d")["layers/w"] < 8.2 / 8 * delta.count


def test_it_is_a_safetensors_file(tmp_path):
    delta = made()
    save(delta, tmp_path / "d")
    arrays = load_file(tmp_path / "d")
    assert set(arrays) == {"layers/w/indices", "layers/w/values", "layers/w/originals"}
    assert arrays["layers/w/values"].dtype == ml_dtypes.bfloat16


def rewritten(path, change):
    """The file with another header of its own."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    told = json.loads(header["__metadata__"]["delta"])
    change(told)
    header["__metadata__"]["delta"] = json.dumps(told)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(version=2), "version 2 of the format; known is 1"),
        (lambda h: h.pop("version"), "header cannot be read"),
        (lambda h: h.update(base="sha256:" + "b" * 64), "damaged.*checksum"),
        (lambda h: h.update(semantics="add"), "damaged.*checksum"),
        (lambda h: h["tensors"]["layers/w"].update(shape=[400, 5]), "damaged.*checksum"),
        (lambda h: h.pop("checksum"), "damaged.*checksum"),
    ],
)
def test_another_header_is_refused(change, message, tmp_path):
    path = tmp_path / "d.safetensors"
    save(made(), path)
    rewritten(path, lambda h: None)
    load(path)
    rewritten(path, change)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_broken_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "d.safetensors"
    save(made(), path)
    good = path.read_bytes()
    for cut in (0, 4, 100, len(good) - 1):
        path.write_bytes(good[:cut])
        with pytest.raises(ValueError, match=r"d\.safetensors cannot be read"):
            load(path)
    path.write_bytes(good + b"x")
    with pytest.raises(ValueError, match="cannot be read"):
        load(path)
    start = 8 + struct.unpack("<Q", good[:8])[0]
    for at in (start, (start + len(good)) // 2, len(good) - 1):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(ValueError, match="damaged"):
            load(path)
    save_file({"w": np.zeros(3, np.float32)}, path)
    with pytest.raises(ValueError, match="no delta"):
        load(path)
    save_file({"w": np.zeros(3, np.float32)}, path, {"delta": "[]"})
    with pytest.raises(ValueError, match="header cannot be read"):
        load(path)
    path.write_text("not at all")
    with pytest.raises(ValueError, match="cannot be read"):
        load(path)
    with pytest.raises(FileNotFoundError, match=r"no file .*none"):
        load(tmp_path / "none")


def test_no_changed_byte_goes_unnoticed(tmp_path):
    path, delta = tmp_path / "d", made(size=300)
    save(delta, path)
    good = path.read_bytes()
    same_anyway = 0
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        try:
            same(load(path), delta)  # the last digit of a number that rounds to the same
            same_anyway += 1
        except ValueError:
            pass
    assert same_anyway < 5 and len(good) > 500


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "d"
    save(made(seed=0), path)
    old = path.read_bytes()

    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        save(made(seed=1), path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]

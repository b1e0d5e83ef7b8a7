"""Files with the right checksum that lie: refused in one line, in little memory and time."""

import json
import random
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrl_eff.checkpoints import deltas
from jaxrl_eff.checkpoints.deltas import Delta, Entries, coding
from jaxrl_eff.checkpoints.deltas import file as delta_file
from jaxrl_eff.cli import delta as command


def good(path, semantics="set"):
    """A file with gaps, runs, and a scalar."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, at in {
        "gaps": np.arange(0, 400, 7),
        "runs": np.r_[20:90, 200:300],
        "one": np.zeros(1, int),
    }.items():
        shape = () if name == "one" else (20, 20)
        values = rng.normal(size=len(at)).astype(np.float32)
        tensors[name] = Entries(shape, "float32", at, values, values + 1)
    deltas.save(Delta(tensors, base="sha256:" + "a" * 64, semantics=semantics), path)
    return path


def taken_apart(path):
    """(header without its checksum, arrays)."""
    metadata, arrays = delta_file.read_file(path)
    header = json.loads(metadata["delta"])
    del header["checksum"]
    return header, {k: np.array(v) for k, v in arrays.items()}


def sealed(path, header, arrays):
    """Writes them with a valid checksum."""
    header = {**header, "checksum": delta_file._checksum(header, arrays)}
    save_file(arrays, path, metadata={"delta": json.dumps(header)})
    return path


def bomb(entries, size):
    runs = bytes([1]) + coding._rice(np.array([0])) + coding._rice(np.array([entries - 1]))
    arrays = {"b/indices": np.frombuffer(runs, np.uint8), "b/values": np.ones(1, np.float32)}
    told = {"shape": [size], "dtype": "float32", "count": 1}
    header = {
        "version": 1, "base": "", "semantics": "set", "method": "", "granularity": "element",
        "density": 0.0, "tensors": {"b": told},
    }  # fmt: skip
    return header, arrays


@pytest.mark.parametrize("entries", [2**36, 2**30, 2**20, 2])
def test_runs_are_counted_before_they_are_expanded(entries, tmp_path):
    path = sealed(tmp_path / "d", *bomb(entries, 2**40))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"'b' cannot be read: the bytes hold {entries} "):
            deltas.load(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    header, arrays = bomb(1, 2**40)
    assert deltas.load(sealed(path, header, arrays)).tensors["b"].indices.tolist() == [0]


def test_the_count_of_the_header_must_be_that_of_values_and_code(tmp_path):
    header, arrays = bomb(3, 2**40)
    for count in (2, 3):
        header["tensors"]["b"]["count"] = count
        with pytest.raises(ValueError, match=r"the values of 'b' are float32\[1\], not"):
            deltas.load(sealed(tmp_path / "d", header, arrays))
    arrays["b/values"] = np.ones(3, np.float32)
    assert deltas.load(sealed(tmp_path / "d", header, arrays)).count == 3


FIELDS = {
    "version": ([True, "1", 2, None], "version"),
    "base": ([1, None, []], "base is .* not text"),
    "semantics": (["mul", 3], r"semantics (is 3|'mul')"),
    "method": ([{}, 1.5], "method is .* not text"),
    "granularity": ([None], "granularity is None"),
    "density": ([-0.1, 2, "1", None, float("nan"), True], "density is"),
    "tensors": ([[], "x", None, 3], "tensors is"),
}
SHAPES = [[-1, 20], [2**62, 2], [2**70], [True, 20], [1.0], "20", None, [20] * 40, 400, [[20]], []]
COUNTS = [0, -1, 401, 2**80, 58.0, None, "58", True]
DTYPES = ["float31", "", None, 3, ["float32"], "object", "<f4"]


def test_every_field_is_checked(tmp_path):
    header, arrays = taken_apart(good(tmp_path / "d"))
    path = tmp_path / "d"

    def refused(header, message):
        with pytest.raises(ValueError, match=message) as error:
            deltas.load(sealed(path, header, arrays))
        assert "\n" not in str(error.value) and len(str(error.value)) < 600

    for field, (values, message) in FIELDS.items():
        for value in values:
            refused({**header, field: value}, message)
        refused({k: v for k, v in header.items() if k != field}, "is missing|header cannot be read")
    refused({**header, "more": 1}, "'more' is not known")

    def tensor(**change):
        return {**header, "tensors": {**header["tensors"], "gaps": change}}

    plain = header["tensors"]["gaps"]
    for shape in SHAPES:
        refused(tensor(**{**plain, "shape": shape}), "shape of 'gaps' is|count of 'gaps' is")
    for count in COUNTS:
        refused(tensor(**{**plain, "count": count}), "count of 'gaps' is|values of 'gaps' are")
    for dtype in DTYPES:
        refused(tensor(**{**plain, "dtype": dtype}), "'gaps': unknown dtype")
    refused(tensor(**{**plain, "dtype": "bfloat16"}), "contradicts itself: the values of 'gaps'")
    refused(tensor(**plain, more=1), "of 'gaps' it says")
    refused(tensor(shape=[20, 20]), "of 'gaps' it says")
    less = {k: v for k, v in header["tensors"].items() if k != "gaps"}
    refused({**header, "tensors": less}, "the array 'gaps/.*' belongs to no tensor")
    refused({**header, "tensors": {**header["tensors"], "new": plain}}, "'new' has no indices")


def test_nested_headers_are_refused(tmp_path):
    header, arrays = taken_apart(good(tmp_path / "d"))
    for deep in ("[" * 100_000 + "]" * 100_000, '{"a":' * 50_000 + "1" + "}" * 50_000, "9" * 5000):
        text = json.dumps(header)[:-1] + f', "checksum": "", "method": {deep}}}'
        save_file(arrays, tmp_path / "d", metadata={"delta": text})
        with pytest.raises(ValueError, match="header cannot be read") as error:
            deltas.load(tmp_path / "d")
        assert len(str(error.value)) < 600


def test_codes_of_indices_that_overlap_overflow_or_end_elsewhere():
    varint = coding._varint
    for k in (40, 61, 62, 63, 2**40):  # remainder bits: the shift would overflow
        unary = np.packbits([0] * 23 + [1], bitorder="little").tobytes()
        code = bytes([0]) + varint(k) + varint(len(unary)) + varint(0) + unary + b"\0" * min(k, 99)
        with pytest.raises(ValueError):
            coding.decode(np.frombuffer(code, np.uint8), 2**40, 1)
    fine = coding.encode(np.arange(0, 300, 3), 300)
    assert len(coding.decode(fine, 300, 100)) == 100
    for count in (0, 99, 101, 2**50):
        with pytest.raises(ValueError, match=f"hold 100 indices, not {count}"):
            coding.decode(fine, 300, count)
    with pytest.raises(ValueError, match="hold 0 indices, not 1"):
        coding.decode(np.zeros(0, np.uint8), 300, 1)


def mutated(rng, header, arrays):
    """A change or two of bytes, arrays or fields, as someone would who wants to hurt."""
    header, arrays = json.loads(json.dumps(header)), {k: v.copy() for k, v in arrays.items()}
    numbers = [-1, 0, 1, 2, 57, 2**31, 2**40, 2**62, 2**63, 2**64, 1e300, None, "x", [], True]
    for _ in range(rng.randint(1, 2)):
        kind = rng.randrange(5)
        name = rng.choice(sorted(arrays))
        if kind < 2 and name.endswith("indices") and len(arrays[name]):
            x = arrays[name]
            for _ in range(rng.randint(1, 3)):
                x[rng.randrange(min(len(x), 12 if kind else len(x)))] = rng.randrange(256)
        elif kind == 2:
            x = arrays[name]
            cut = [x[: len(x) // 2], np.tile(x, 2), x.astype(np.float16), x[None], x[:0]]
            arrays[name] = np.ascontiguousarray(rng.choice(cut))
        elif kind == 3 and isinstance(header["tensors"], dict):
            told = header["tensors"][rng.choice(sorted(header["tensors"]))]
            field = rng.choice(["shape", "count", "dtype"])
            value = rng.choice(numbers)
            told[field] = [value, rng.choice(numbers)] if field == "shape" else value
        else:
            header[rng.choice(sorted(header))] = rng.choice(numbers)
    return header, arrays


def fuzzed(tmp_path, seed, tries):
    """How many of the files are refused; the others are read as what they say."""
    rng, refused = random.Random(seed), 0
    parts = taken_apart(good(tmp_path / "good"))
    for i in range(tries):
        path = sealed(tmp_path / "d", *mutated(rng, *parts))
        try:
            for name, e in deltas.load(path).tensors.items():
                assert len(e) == len(e.values) and len(e) <= e.size, name
                coding.checked(e.indices, e.size)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1000, i
    return refused


def test_changed_files_are_refused_or_consistent(tmp_path):
    tracemalloc.start()
    try:
        assert fuzzed(tmp_path, 0, 200) > 100
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_thousands_of_changed_files_are_refused_or_consistent(tmp_path):
    assert fuzzed(tmp_path, 1, 10_000) > 5000


def test_changed_safetensors_headers_end_in_one_line(tmp_path):
    """Bytes of the file's own header, of which the checksum does not know."""
    rng, path = random.Random(0), good(tmp_path / "d")
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(end)] = rng.choice(b'0123456789-"[]{},:x\0\xff')
        path.write_bytes(changed)
        try:
            deltas.load(path)
        except ValueError as error:
            assert "\n" not in str(error)


def test_what_the_base_does_not_have_is_refused_before_indices_are_read(tmp_path, monkeypatch):
    path = good(tmp_path / "d")
    base = {k: np.zeros((20, 20), np.float32) for k in ("gaps", "runs")}
    base["one"] = np.zeros((), np.float32)
    deltas.load(path, base=base)
    monkeypatch.setattr(coding, "decode", lambda *_: pytest.fail("the indices were read"))
    for change, message in (
        ({}, "'gaps', which is not there"),
        ({"gaps": np.zeros((400,), np.float32)}, r"'gaps' is float32\[400\], but the delta"),
        ({"gaps": np.zeros((20, 20), np.float16)}, r"'gaps' is float16\[20, 20\]"),
    ):
        some = {k: v for k, v in base.items() if k != "gaps"} | change
        with pytest.raises(ValueError, match=message):
            deltas.load(path, base=some)


def test_the_command_says_it_in_one_line(tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    save_file({"b": np.zeros(8, np.float32)}, model / "model.safetensors")
    path = sealed(tmp_path / "d", *bomb(2**36, 2**40))
    for argv, message in (
        (["show", f"{path}"], "the bytes hold 68719476736 indices, not 1"),
        (["audit", f"--base={model}", f"--delta={path}"], "is for float32[1099511627776]"),
        (["apply", f"--base={model}", f"--delta={path}", f"--out={tmp_path}/o"], "'b' is float32"),
        (["remove", f"--model={model}", f"--delta={path}", f"--out={tmp_path}/o"], "'b' is"),
        (["compose", f"{path}", f"--out={tmp_path}/o"], "the bytes hold"),
        (["show", f"{tmp_path}"], "there is no file"),
    ):
        with pytest.raises(SystemExit) as end:
            command.main(argv)
        out, err = capsys.readouterr()
        assert (end.value.code, out, err.count("\n")) == (2, "", 1) and message in err, argv


def test_text_of_a_file_moves_no_cursor(tmp_path, capsys):
    at = np.arange(3)
    entries = Entries((9,), "float32", at, at.astype(np.float32))
    path = tmp_path / "d"
    deltas.save(Delta({"a\x1b[2Jb": entries}, method="line\n\x1b[31mred"), path)
    command.main(["show", str(path)])
    out = capsys.readouterr().out
    assert "\x1b" not in out and r"a\x1b[2Jb" in out and r"line\n\x1b[31mred" in out
    assert len(load_file(path)) == 2

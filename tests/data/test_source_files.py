import gzip
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from jaxrl_eff.data import source_files

SHARED = Path(__file__).parents[2] / "../shared/data"


def write(path, *lines):
    path.write_bytes(b"".join(lines))
    return path


def test_jsonl_reads_each_line_by_index_and_skips_empty_ones(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        b'{"n": 0}\n',
        b"\n",
        b'{"n": "\xc3\xa9\\n"}\r\n',
        b"  \n",
        b'{"n": 2}',
    )
    source = source_files.jsonl(path)
    assert len(source) == 3
    assert [source[i]["n"] for i in (2, 0, 1)] == [2, 0, "é\n"]
    assert [e["n"] for e in source] == [0, "é\n", 2]


def test_jsonl_names_file_and_line_of_what_is_not_an_object(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"n": 0}\n', b"\n", b'{"n": \n', b"[1]\n")
    source = source_files.jsonl(path)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3: not JSON"):
        source[1]
    with pytest.raises(ValueError, match=r"a\.jsonl, line 4: list instead of a JSON object"):
        source[2]


BAD_LINES = {
    b'{"n": NaN}': "not JSON: NaN is no JSON value",
    b'{"n": [-Infinity]}': "not JSON: -Infinity is no JSON value",
    b'{"n": "\\ud83d"}': r"half of a surrogate pair alone, '\\ud83d'",
    b'{"n": {"\\uDE00": 1}}': r"half of a surrogate pair alone, '\\ude00'",
    b'{"n": "\xed\xa0\xbd"}': "not UTF-8",
    b'{"n": "\xff"}': "not UTF-8",
    b'{"n": ' + b"[" * 100000 + b"]" * 100000 + b"}": "nested too deeply",
    b'{"n": ' + b"9" * 5000 + b"}": "not JSON: Exceeds the limit",
    b'{"n": 1} {"n": 2}': "not JSON: Extra data",
    b"text": "not JSON",
    b"3": "int instead of a JSON object",
    b"null": "NoneType instead of a JSON object",
}


@pytest.mark.parametrize("bad", BAD_LINES, ids=lambda bad: repr(bad[:20]))
def test_what_no_row_may_be_is_one_line_with_its_place(tmp_path, bad):
    source = source_files.jsonl(write(tmp_path / "a.jsonl", b'{"n": 0}\n\n', bad, b"\n"))
    assert source[0] == {"n": 0}
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3: " + BAD_LINES[bad]) as error:
        source[1]
    assert "\n" not in str(error.value)


def test_pairs_of_surrogates_are_characters(tmp_path):
    source = source_files.jsonl(write(tmp_path / "a.jsonl", b'{"n": "\\ud83d\\uDE00"}'))
    assert source[0] == {"n": "😀"}


def test_a_mark_of_utf8_is_not_part_of_the_first_row(tmp_path):
    source = source_files.jsonl(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"n": 0}\r\n{"n": 1}'))
    assert list(source) == [{"n": 0}, {"n": 1}]
    assert len(source_files.jsonl(write(tmp_path / "b.jsonl", b"\xef\xbb\xbf"))) == 0
    assert len(source_files.jsonl(write(tmp_path / "c.jsonl", b" \r\n\n"))) == 0


def test_an_array_of_objects_is_read_as_lines_are(tmp_path):
    rows = [{"n": 0}, {"n": [1, "é"]}]
    for text in (json.dumps(rows), json.dumps(rows, indent=1), "\ufeff\n " + json.dumps(rows)):
        path = write(tmp_path / "a.json", text.encode())
        assert list(source_files.jsonl(path)) == rows
    mixed = source_files.jsonl(write(tmp_path / "b.json", b'[{"n": 0}, 3]'))
    with pytest.raises(ValueError, match=r"b\.json, item 1: int instead of a JSON object"):
        mixed[1]
    with pytest.raises(ValueError, match=r"c\.json: not JSON: "):
        source_files.jsonl(write(tmp_path / "c.json", b'[{"n": 0},\n {"n": '))
    with pytest.raises(ValueError, match=r"d\.json: not JSON: NaN"):
        source_files.jsonl(write(tmp_path / "d.json", b'[{"n": 0},\n {"n": NaN}]'))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(b'{"n": 0}\n', mtime=0), "compressed by gzip"),
        (b"\x28\xb5\x2f\xfd\x00", "compressed by zstd"),
        (b"PAR1\x15", "a parquet file, not JSON lines"),
        ('{"n": 0}'.encode("utf-16"), "in UTF-16"),
    ],
)
def test_files_of_other_kinds_are_named(tmp_path, data, message):
    with pytest.raises(ValueError, match=r"a\.jsonl is " + message):
        source_files.jsonl(write(tmp_path / "a.jsonl", data))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    for read in (source_files.jsonl, source_files.parquet, source_files.file):
        with pytest.raises(OSError, match=r"cannot read the data file .*a pipe"):
            read(tmp_path / "a.jsonl")
    with pytest.raises(OSError, match="a pipe or a device"):
        source_files.jsonl("/dev/null")
    with pytest.raises(ValueError, match=r"cannot read the data file .*null"):
        source_files.jsonl("a\0b")


def test_a_file_is_read_as_its_own_kind(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [{"n": 0}, {"n": 1}]
    for name in ("a.parquet", "a.PQ", "a", "a.data"):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
        assert list(source_files.file(tmp_path / name)) == rows
    for name in ("b.jsonl", "b.json", "b", "b.txt"):
        path = write(tmp_path / name, b'{"n": 0}\n{"n": 1}')
        assert list(source_files.file(path)) == rows
    with pytest.raises(ValueError, match="not a parquet file"):
        source_files.file(write(tmp_path / "c.parquet", b'{"n": 0}'))


def test_maps_of_parquet_are_dicts_as_in_json(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    value = {"a": [{"b": {"x": 1, "y": None}}], "c": None}
    kind = pa.struct(
        [("a", pa.list_(pa.struct([("b", pa.map_(pa.string(), pa.int64()))]))), ("c", pa.string())]
    )
    pairs = {"a": [{"b": [("x", 1), ("y", None)]}], "c": None}
    pq.write_table(pa.table({"v": pa.array([pairs, None], kind)}), tmp_path / "a.parquet")
    assert list(source_files.parquet(tmp_path / "a.parquet")) == [{"v": value}, {"v": None}]


def test_a_damaged_row_group_is_named(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [str(i) * 9 for i in range(99)]}), path, use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[4:200] = b"\xff" * 196
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet: row group 0 cannot be read"):
        source_files.parquet(path)[0]


def test_an_unreachable_file_is_named(tmp_path):
    for reader in (source_files.jsonl, source_files.parquet):
        with pytest.raises(FileNotFoundError, match=r"cannot read the data file .*none\.x"):
            reader(tmp_path / "none.x")
        with pytest.raises(IsADirectoryError, match="cannot read the data file"):
            reader(tmp_path)


def test_parquet_reads_rows_across_groups_in_any_thread(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [{"n": i, "turns": [{"role": "user", "content": str(i)}]} for i in range(23)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5)
    source = source_files.parquet(path, groups_in_memory=2)
    assert len(source) == 23
    order = np.random.default_rng(0).permutation(23)
    read = {}
    threads = [
        threading.Thread(target=lambda part=part: read.update({i: source[i] for i in part}))
        for part in np.split(order, [11])
    ]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert [read[i] for i in range(23)] == rows
    assert source_files.parquet(path, columns=["n"])[7] == {"n": 7}
    with pytest.raises(
        ValueError, match=r"a\.parquet: unknown column 'm'; expected one of \['n', 'turns'\]"
    ):
        source_files.parquet(path, columns=["m"])


def test_what_is_no_parquet_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match=r"a\.txt: not a parquet file"):
        source_files.parquet(write(tmp_path / "a.txt", b"hello, this is text"))


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the data that lies beside the repository")
def test_real_files_are_read():
    gsm8k = source_files.jsonl(SHARED / "gsm8k/test.jsonl")
    assert len(gsm8k) == 1319
    lines = (SHARED / "gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()
    assert [e["answer"] for e in gsm8k] == [json.loads(line)["answer"] for line in lines]
    digits = source_files.parquet(SHARED / "verl_digit/train.parquet")
    assert len(digits) == 800 and digits[0]["prompt"][0]["role"] == "user"

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from jaxrl_eff.data import sources

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
    source = sources.jsonl(path)
    assert len(source) == 3
    assert [source[i]["n"] for i in (2, 0, 1)] == [2, 0, "é\n"]
    assert [e["n"] for e in source] == [0, "é\n", 2]


def test_jsonl_names_file_and_line_of_what_is_not_an_object(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"n": 0}\n', b"\n", b'{"n": \n', b"[1]\n")
    source = sources.jsonl(path)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3: not JSON"):
        source[1]
    with pytest.raises(ValueError, match=r"a\.jsonl, line 4: list instead of a JSON object"):
        source[2]


def test_an_unreachable_file_is_named(tmp_path):
    for reader in (sources.jsonl, sources.parquet):
        with pytest.raises(FileNotFoundError, match=r"cannot read the data file .*none\.x"):
            reader(tmp_path / "none.x")
        with pytest.raises(IsADirectoryError, match="cannot read the data file"):
            reader(tmp_path)


def test_an_index_outside_the_source_is_an_error_that_says_how_many_there_are():
    source = sources.python_source([{"a": 1}])
    for index in (-1, 1):
        with pytest.raises(IndexError, match=f"has 1 examples, so there is no {index}"):
            source[index]


def test_python_source_takes_a_sequence_or_a_function():
    for rows in ([{"a": i} for i in range(3)], lambda: ({"a": i} for i in range(3))):
        source = sources.python_source(rows)
        assert isinstance(source, sources.Source)
        assert list(source) == [{"a": 0}, {"a": 1}, {"a": 2}]


def test_parquet_reads_rows_across_groups_in_any_thread(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [{"n": i, "turns": [{"role": "user", "content": str(i)}]} for i in range(23)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5)
    source = sources.parquet(path, groups_in_memory=2)
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
    assert sources.parquet(path, columns=["n"])[7] == {"n": 7}
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'm'; it has \['n', 'turns'\]"):
        sources.parquet(path, columns=["m"])


def test_what_is_no_parquet_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match=r"a\.txt: not a parquet file"):
        sources.parquet(write(tmp_path / "a.txt", b"hello, this is text"))


def test_require_names_the_field_the_example_and_what_was_there():
    rows = [{"prompt": "a", "answer": "b"}, {"prompt": "a", "text": "b"}]
    source = sources.require(rows, "prompt answer")
    assert source[0] == rows[0]
    with pytest.raises(
        ValueError, match=r"example 1 has no field 'answer'; it has \['prompt', 'text'\]"
    ):
        source[1]
    with pytest.raises(ValueError, match="example 0 has no field 'question'"):
        sources.require(rows, ["question"])
    with pytest.raises(ValueError, match="example 0 is a str, not a dict"):
        sources.require(["a"], "prompt")


def test_holdout_is_disjoint_complete_and_fixed_by_the_seed():
    rows = [{"n": i} for i in range(50)]

    def numbers(source):
        return [e["n"] for e in source]

    rest, held = sources.holdout(rows, 7, seed=3)
    assert len(held) == 7 and len(rest) == 43
    assert sorted(numbers(rest) + numbers(held)) == list(range(50))
    assert numbers(held) == sorted(numbers(held))
    assert numbers(sources.holdout(rows, 7, seed=3)[1]) == numbers(held)
    assert numbers(sources.holdout(rows, 7, seed=4)[1]) != numbers(held)
    with pytest.raises(ValueError, match="cannot hold out 51 of 50"):
        sources.holdout(rows, 51, seed=0)


def test_views_compose():
    source = sources.mapped([{"n": i} for i in range(9)], lambda e: {"m": e["n"] * 10})
    assert list(sources.subset(source, [4, 0])) == [{"m": 40}, {"m": 0}]
    with pytest.raises(ValueError, match=r"a subset of 9 examples cannot hold 0\.\.9"):
        sources.subset(source, [0, 9])


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the data that lies beside the repository")
def test_real_files_are_read():
    gsm8k = sources.require(sources.jsonl(SHARED / "gsm8k/test.jsonl"), "question answer")
    assert len(gsm8k) == 1319
    lines = (SHARED / "gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()
    assert [e["answer"] for e in gsm8k] == [json.loads(line)["answer"] for line in lines]
    digits = sources.parquet(SHARED / "verl_digit/train.parquet")
    assert len(digits) == 800 and digits[0]["prompt"][0]["role"] == "user"

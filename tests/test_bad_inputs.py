"""What cannot be used is refused in one line with exit code 2: no traceback, no hang, no change."""

import collections

import bad_files
import bad_inputs
import pytest

CASES = bad_inputs.cases()
# A few of every kind that needs no process of its own.
PER_KIND = {
    "value": 4, "range": 3, "config": 2, "data": 3, "command": 2, "model": 2, "tokenizer": 1,
    "adapter": 1, "delta": 2,
}  # fmt: skip


def few():
    by_kind = collections.defaultdict(list)
    for case in CASES:
        by_kind[case.kind].append(case)
    return [
        case
        for kind, n in PER_KIND.items()
        for case in by_kind[kind][:: len(by_kind[kind]) // n][:n]
    ]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return bad_files.home(tmp_path_factory.mktemp("bad") / "home")


def test_there_are_as_many_as_are_said():
    assert len(CASES) == bad_inputs.COUNT
    assert len({(c.kind, c.name) for c in CASES}) > 0.98 * len(CASES)
    assert [c.name for c in CASES] == [c.name for c in bad_inputs.cases()]
    assert len(few()) == 20


@pytest.mark.parametrize("case", few(), ids=lambda c: f"{c.kind}: {c.name}"[:60])
def test_some_are_refused(case, home, tmp_path):
    assert bad_inputs.outcome(case, home, tmp_path) == ""


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.kind}: {c.name}"[:60])
def test_all_are_refused(case, home, tmp_path):
    assert bad_inputs.outcome(case, home, tmp_path) == ""

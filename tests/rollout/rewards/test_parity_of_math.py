"""Numbers as math-verify reads them: pip install 'jaxrl_eff[math]' && pytest -m parity."""

import importlib.util
import logging
import random

import pytest
from launch import ROOT

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def study():
    """The comparison of `experiments/rewards`."""
    pytest.importorskip("math_verify", reason="needs the extra 'math'")
    spec = importlib.util.spec_from_file_location("study", ROOT / "experiments/rewards/run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    logging.disable(logging.CRITICAL)
    yield module
    logging.disable(logging.NOTSET)


def test_pairs_that_both_read_are_judged_alike(study):
    rng = random.Random(1)
    agreed = 0
    for _ in range(100):
        case = study.pair(rng)
        case |= study.judged(case["truth"], case["answer"])
        if "None" not in case["ours"]:
            assert case["ours"] == case["values"], case
        if not case["both"] or "percent" in case["names"][0] + case["names"][1]:
            continue
        if case["theirs"] == case["values"]:  # elsewhere math-verify reads other numbers
            equations = [bool({"x =", "chain"} & set(names)) for names in case["names"]]
            assert any(equations) or case["we say"] == case["they say"], case
            agreed += case["we say"] == case["they say"]
    assert agreed >= 25


@pytest.mark.parametrize("final", ["72", "1,234", "-7", "0.5", "1.50", "12,000,000", "1/4"])
def test_plain_answers_are_read_alike(study, final):
    assert study.theirs(final)[1] == study.parse(final)

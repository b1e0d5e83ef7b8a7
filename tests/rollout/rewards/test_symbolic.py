"""Formulas compared by math-verify in a process of its own."""

import importlib.util
import sys
import threading

import pytest

from jaxrl_eff.rollout.rewards import symbolic
from jaxrl_eff.train import parts
from jaxrl_eff.train.settings import RewardSettings

installed = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="needs the extra 'math'"
)


def score(truth, response, **options):
    return symbolic.math(**options)({"answer": truth}, response)


def no_worker(monkeypatch):
    monkeypatch.setattr(symbolic, "_ask", lambda question: pytest.fail("asked math-verify"))


@installed
def test_numbers_are_compared_here(monkeypatch):
    no_worker(monkeypatch)
    assert score("#### 1,000", r"so \boxed{10^3}") == 1.0
    assert score(0.5, "It is 1/2.") == 1.0
    assert score("1e5", "#### 1") == 0.0
    assert score(5, "", anywhere=False) == 0.0
    assert score(5, r"\boxed{" + "x" * symbolic.LONGEST + "}") == 0.0


@installed
@pytest.mark.parametrize("truth", [None, True, ["2"], "", "  "])
def test_a_truth_that_says_nothing_is_an_error(truth, monkeypatch):
    no_worker(monkeypatch)
    with pytest.raises(ValueError, match="field 'answer' holds nothing that math-verify"):
        score(truth, "0")
    with pytest.raises(ValueError, match=r"unknown field 'answer'; expected one of \['truth'\]"):
        symbolic.math()({"truth": "5"}, "0")


def test_without_math_verify_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'jaxrl_eff\[math\]'"):
        parts.reward_fn(RewardSettings(name="math"))


def test_the_clock_has_a_range():
    for seconds in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="but must be above 0 and at most 3600"):
            symbolic.math(seconds=seconds)


@installed
@pytest.mark.parity
def test_formulas_are_compared_in_any_thread():
    reward = parts.reward_fn(RewardSettings(name="math"))
    pairs = [
        (r"3\sqrt{13}", r"It is $\boxed{\sqrt{117}}$.", 1),
        (r"3\sqrt{13}", r"\boxed{13}", 0),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}", 1),
        ("6 - 5i", r"\boxed{-5i+6}", 1),
        ("3, 5, 7", r"\boxed{7, 5, 3}", 1),
        ("3, 5, 7", r"\boxed{7}", 0),
        ("x^3+3x-6", "$3x + x^3 - 6$", 1),
        ("x^3+3x-6", "3x", 0),
        ("4", r"\boxed{\sqrt{16}}", 1),
        ("2k+2", "#### 2(k+1)", 1),
    ]
    got = []

    def work():
        got.append([reward({"answer": truth}, response) for truth, response, _ in pairs])

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [[right for _, _, right in pairs]] * 3
    with pytest.raises(ValueError, match="holds nothing that math-verify understands"):
        reward({"answer": r"\frac{"}, "0")


@installed
@pytest.mark.parity
def test_a_comparison_without_end_scores_nothing_and_the_next_is_made():
    assert score(r"\sqrt{2}", r"\boxed{10^{10^{9}}}", seconds=0.5) == 0.0
    assert score(r"\sqrt{2}", r"\boxed{2^{1/2}}") == 1.0
    symbolic._comparer.process.kill()
    symbolic._comparer.process.wait()
    assert score(r"\sqrt{2}", r"\boxed{2^{1/2}}") == 1.0

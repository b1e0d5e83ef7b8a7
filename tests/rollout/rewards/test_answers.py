"""Where a response says its answer."""

import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_eff.rollout.rewards import verify
from jaxrl_eff.rollout.rewards.answers import boxed, marked, number, truth


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("#### 42", 42), ("so 3 and\n#### 1,234", 1234),
        ("#### $1,234,567.50", Fraction("1234567.5")), ("#### -7.", -7), ("#### −7", -7),
        ("-$3.50", Fraction("-3.5")), ("$-3.50", Fraction("-3.5")),
        ("#### 18 dollars, not 20", 18), ("She has 5. Then she has 42.", 42), ("12 - 3 = 9", 9),
        ("It is 12-3", None), ("3,4", None), ("1,2345", None), (r"thus $\boxed{42}$, from 7", 42),
        (r"\boxed{1} and \boxed{\text{it is } 2}", 2), (r"\boxed{\frac{1}{2}}", Fraction(1, 2)),
        (r"\boxed{-\dfrac{3}{6}}", Fraction(-1, 2)), (r"\boxed{\$5}", 5), (r"\boxed{5", None),
        ("a half is 1/2.", Fraction(1, 2)), ("50%", 50), (".5", Fraction(1, 2)), ("+3", 3),
        ("version 2.5.3 of 2024-10-12", None), ("1/0", None), ("", None), ("none", None),
        ("####", None), ("x5", None), ("9" * 5000, None), ("1" + ",111" * 3000, None),
    ],
)  # fmt: skip
def test_the_number_of_a_text(text, value):
    assert number(text) == value


def test_without_a_mark_there_is_no_strict_answer():
    assert number("it is 42", anywhere=False) is None
    assert number("#### 42", anywhere=False) == 42
    assert number(r"\boxed{42}", anywhere=False) == 42


def test_boxes_nest_and_must_close():
    assert boxed(r"\boxed{a{b}c} \boxed{d") == "a{b}c"
    assert boxed(r"\boxed{\boxed{5}}") == r"\boxed{5}"
    assert boxed(r"} \boxed{\{1\}}") == r"\{1\}"
    assert boxed("boxed{1}") is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("answer: 7 (see step 3)", 7), ("The answer is $9{,}500.", 9500), ("so 72.", 72),
        ("She sold 48/2 = <<48/2=24>>24.\nIn all 48+24 = <<48+24=72>>72 clips.", 72),
        ("She has 5. Then she has 42.", 42), ("It is $1000.00.", 1000),
        ("thus $x = 5$ and so.", 5), ("The total is $5 + 7 = 12$ dollars.", 12),
        ("It costs $5 and he has $6.", 6), ("**Answer:** 72", 72), ("**Answer: 72**", 72),
        ("The final answer is **72**.", 72), ("Final answer: $\\frac{1}{2}$", Fraction(1, 2)),
        ("The answer is:\n72", 72), ("Answer = 72", 72),
        ("<think>3+4</think><answer>7</answer>", 7), ("<answer>\\boxed{7}</answer>", 7),
        ("So there are 72 clips left.", 72), ("#### 72\n\nI hope that helps", 72),
        ("#### 3. Conclusion\nThe total is 10.", 10),
        ("\\boxed{10}\n#### Verification\n5+5=10", 10),
        ("The answer is the sum of 3 and 4, which is 7.", 7), ("- \\boxed{5}", 5),
        ("\\boxed{45}^\\circ", 45), ("\\boxed{5} cm", 5), ("The temperature is -5 degrees", -5),
        ("(72 clips)", 72), ("the result (72)", 72),
        ("speed = distance/time = 60/2 = 30 mph", 30), ("2*3=6, 6+1=7.", 7),
        ("3 + 4 = 7 and 7 + 1 = 8", 8), ("Total:5", 5), ("Total = 5 apples", 5), ("#### 72%", 72),
        ("answer: 7 since 3 + 4 = 7", 7), ('"72"', 72), ('The answer is "72".', 72), ("`72`", 72),
        ("Answer: `72`", 72), ("It is *72*.", 72), ("答案是 72。", 72), ("答案：72", 72),
        ("so 7 → 8", 8), ("therefore => 8", 8), ("2^10 = 1024", 1024),
        ("There are 10^6 of them", 1000000), ("I ate ½", Fraction(1, 2)),
        ("she has 1 1/2 cups", Fraction(3, 2)), ("#### 7 (seven)", 7), ("#### $\\boxed{7}$", 7),
        ("> 72", 72), ("The probability is 1/6.", Fraction(1, 6)),
        ("it costs $3.50 each", Fraction(7, 2)), ("costs 5,000 dollars", 5000),
        ("answer is 1,234.", 1234), ("The answer is \\(7\\).", 7), ("\\[x = 7\\]", 7),
        ("$$\nx = 7\n$$", 7), ("So the total is:\n\n72", 72), ("72 is the answer", 72),
        ("The answer is: 72 apples.", 72), ("the answer is 3.14", Fraction(157, 50)),
        ("The answer is 50%.", 50), ("there are 5 of 7", 7), ("The answer is 1e5", 100000),
        ("72🎉", 72), ("72 🎉", 72), ("The answer is 72 🎉", 72), ("Answer: 12,\\!000", 12000),
        ("Answer: -3/4", Fraction(-3, 4)), ("x = -\\frac{3}{4}", Fraction(-3, 4)),
        ("So x=3/4", Fraction(3, 4)), ("The answer is ~72", 72), ("21", 21), ("answer 7", 7),
        ("72.So", 72), ("ANSWER: 7", 7), ("Therefore, the answer is x = 5.", 5),
        ("### Answer\n72", 72), ("Each gets 3 apples; total 12", 12), ("#### 72.00", 72),
        ("####72", 72), ("#### 1,234.", 1234), ("#### -1,234", -1234), ("####\n72", 72),
        ("it was 5 m/s", 5), ("She earns $30/hour", 30), ("5 miles + 4 miles = 9 miles", 9),
        ("31 days * 3000 posts/day = 93000 posts", 93000), ("so 10\u202f000.", 10000),
        ("so 10\\,000.", 10000), ("40% - 30% = 10%", 10),
        ("She needs \\frac{3}{4} cup", Fraction(3, 4)),
    ],
)  # fmt: skip
def test_an_answer_is_found_where_it_is_said(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "<answer>7", "#### 3\\sqrt{13}", "The answer is 3\\sqrt{13}.", "The answer is x+2.",
        "The answer is either 3 or 4.", "-\\boxed{5}", "\\boxed{3}\\sqrt{2}", "\\boxed{5",
        "\\boxed{\\frac{1}{2", "She lost COVID-19", "see problem #5", "He ran 5 million",
        "5 feet 3 inches", "It takes 2 hours 30 minutes.", "the square root of 5", "in base 5",
        "in step 3", "on June 20", "f(3)", "so sqrt(13)", "$\\sqrt{13}$ is it", "x = 5 and y = 7",
        "$3$, $5$, $7$", "3, 5 and 7", "between 3 and 5", "from 3 to 7", "version 2.5.3",
        "at 12:30", "2024-10-12", "answer: 18 or 20", "#### 18 or 20", "#### 18, 20",
        "#### x = 5, y = 7", "#### 18 dollars and 20 cents", "#### 5 feet 3 inches",
        "#### no solution", "3\n#### none", "answer: 7x", "answer: 7 + x", "The answer is 7!",
        "It is 7!", "apples + 5", "so - 5", "3\n- 5 red", "It equals 0.333...", "2 x 3",
        "In 2019 100 people came", "x5", "5 < 7", "he is > 5", "so 3,4", "The answer is (C) 7",
        "2:30 PM", "5th", "The answer is 5th", "He needs 3 quarters",
        "\\boxed{3} and then \\boxed{x}", "the ratio is 3:4", "is 7 (see step 3)", "12>21",
        "The answers are 3 and 4", "She has 12 100 dollar bills.",
        "The answer is 5 apples, and 3 pears.",
    ],
)  # fmt: skip
def test_what_is_no_number_on_its_own_is_none(text):
    assert number(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "$\\boxed{3}$ million", "$\\boxed{3}\\text{ million}$", "$\\boxed{3} + 5$",
        "$5 + \\boxed{3}$",
        "$\\boxed{3} : 5$", "$\\boxed{3}:\\boxed{5}$", "$\\boxed{6}, \\boxed{7}$",
        "$\\boxed{6}$ or $\\boxed{7}$", "$(\\boxed{3}, 5)$", "$\\{\\boxed{3}\\}$",
        "$\\frac{1}{\\boxed{5}}$", "$\\frac{\\boxed{3}}{\\boxed{5}}$", "$\\sqrt{\\boxed{3}}$",
        "$x^{\\boxed{5}}$", "$x < \\boxed{3}$", "$x \\le \\boxed{3}$", "$\\boxed{3}x + \\boxed{4}$",
    ],
)  # fmt: skip
def test_a_box_within_a_formula_or_list_is_no_answer(text):
    assert number(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("$5 + \\boxed{3} = 8$", 3), ("The answer is \\boxed{7}!", 7), ("> \\boxed{7}", 7),
        ("=> \\boxed{7}", 7), ("\\boxed{7} - that is all", 7), ("<b>\\boxed{7}</b>", 7),
        ("\\textcolor{red}{\\boxed{7}}", 7), ("so $\\boxed{7}$, since 3 + 4 = 7", 7),
        ("\\boxed{7} times", 7), ("\\boxed{5! = 120}", 120), ("So… 7", 7),
        ("1. Add them.\n2. This gives 7.", 7), ("72. That is all.", 72),
    ],
)  # fmt: skip
def test_an_answer_beside_other_signs_is_found(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "The answer is not 7.", "It isn't 7.", "it cannot be 7", "The answer is no more than 7",
        "The odds are 1 in 6.", "The answer is 1 in 6.", "There are 7 and a half.", "on 5 June",
        "The answer is 5 June.", "on Jan 5", "5 degrees below zero", "Answer:\n\n- 7 apples",
        "Steps:\n1. Add them.\n2. Subtract them.", "Steps:\n(1) Add\n(2) Subtract", "**1. Add**",
    ],
)  # fmt: skip
def test_denied_odds_dates_and_items_are_no_answers(text):
    assert number(text) is None


def test_thoughts_say_no_answer():
    assert number("<think>\\boxed{8}?</think>The answer is 7.") == 7
    assert number("so \\boxed{8}</think>\n\n7") == 7  # the prompt opened it
    assert number("<think>8</think>") is None
    assert number("<think>maybe 8") is None
    assert marked("<think>\\boxed{x}</think>\\boxed{y}") == "y"


@pytest.mark.parametrize(
    "text",
    [r"\boxed{" * 20000, "1," * 20000, "-$" * 20000, "1/" * 20000, "<a>" * 20000, "{" * 40000],
)
def test_hostile_text_takes_no_time(text):
    reward = verify.weighted(
        (1, verify.numeric()), (1, verify.tagged("a")), (1, verify.word_share(["a"]))
    )
    assert np.isfinite(reward({"answer": "7"}, text))


@pytest.mark.parametrize(
    "text",
    [
        *("answer is " * 4000, "answer a b c d e f " * 2000, "####" * 10000, "#### a\n" * 5000),
        *("<answer>" * 5000, "<<1" * 10000, "$" * 40000, "1 or " * 8000, r"\text{" * 8000),
        *("(a " * 10000 + "1" + ")" * 10000, "1" * 40000, "a" * 40000 + "1", "1." * 20000),
        *(
            r"\boxed1" * 6000,
            "** " * 10000 + "1",
            "[" * 40000 + "1",
            "'1" * 20000,
            "x=" * 20000 + "1",
        ),
    ],
    ids=lambda text: text[:12],
)
def test_hostile_answers_take_no_time(text):
    start = time.perf_counter()
    found = number(text)
    assert time.perf_counter() - start < 1
    assert found is None or found == 1


WORDS = [
    *("7", "12", ".", ", ", " ", "\n", "####", r"\boxed{", "}", "$", "answer is ", "<answer>", "("),
    *(")", "x", " = ", "- ", "**", "and ", "cm ", r"\frac", "%", ":"),
]


@given(st.text(max_size=200) | st.lists(st.sampled_from(WORDS), max_size=40).map("".join))
@settings(deadline=None, max_examples=200)
def test_any_response_has_a_number_or_none(text):
    for found in (number(text), number(text, anywhere=False), truth(text)):
        assert found is None or isinstance(found, Fraction)


FORMS = (
    "Let 3 and 4.\n#### {}",
    r"By 17, it is $\boxed{{{}}}$.",
    "First 2 + 2 = 4. The answer is {}.",
    "Answer: {}",
    "<think>1, 2</think><answer>{}</answer>",
    "After 3 steps\nx = {}",
    "We get 8.\n\nSo there are {} of them.",
)


@given(st.fractions(max_denominator=60))
@settings(deadline=None, max_examples=50)
def test_an_answer_is_the_same_wherever_it_is_said(value):
    for form in FORMS:
        assert number(form.format(value)) == value, form

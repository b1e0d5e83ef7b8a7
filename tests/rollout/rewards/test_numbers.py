"""Numbers as people and LaTeX write them."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_eff.rollout.rewards.numbers import parse, power


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1{,}234", 1234), ("1,234", 1234), ("10\\,000", 10000), ("10\\!,000", 10000),
        ("11,\\! 111", 11111), ("11,\\! 111,\\! 111,\\! 100", 11111111100), ("1'000", 1000),
        ("1’000", 1000), ("1 000", 1000), ("1\u2009000", 1000), ("1\xa0000", 1000),
        ("1_000", 1000), ("\\frac12", Fraction(1, 2)), ("\\frac{1}{2}", Fraction(1, 2)),
        ("\\dfrac{1}{2}", Fraction(1, 2)), ("\\tfrac12", Fraction(1, 2)),
        ("\\cfrac{1}{2}", Fraction(1, 2)), ("\\frac{-1}{2}", Fraction(-1, 2)),
        ("-\\frac{1}{2}", Fraction(-1, 2)), ("1\\frac{2}{3}", Fraction(5, 3)),
        ("1 1/2", Fraction(3, 2)), ("50%", 50), ("50\\%", 50), ("$5", 5), ("\\$32,\\!348", 32348),
        ("€5", 5), ("5 USD", 5), ("1e5", 100000), ("1.5e-3", Fraction(3, 2000)),
        ("3\\times10^4", 30000), ("3 x 10^4", 30000), ("3\\cdot 10^{4}", 30000), ("2^{10}", 1024),
        ("5\\text{ cm}^2", 5), ("25 m^2", 25), ("5 cm", 5), ("12 \\text{ in 3 days}", 12),
        ("5\\mathrm{cm}", 5), ("45^\\circ", 45), ("45°", 45), ("45^{\\circ}", 45),
        ("864 \\mbox{ inches}^2", 864), ("\\boxed{5}", 5), ("\\fbox{5}", 5), ("\\boxed 5", 5),
        ("x = 5", 5), ("5 + 67 = 72", 72), ("7.", 7), ("**7**", 7), ("\\left(5\\right)", 5),
        ("\\(5\\)", 5), ("$$5$$", 5), ("\\displaystyle 5", 5), (".5", Fraction(1, 2)), ("5.", 5),
        ("- 4", -4), ("−4", -4), ("–4", -4), ("+3", 3), ("-$5", -5), ("$-5", -5),
        ("72 clips", 72), ("½", Fraction(1, 2)), ("2½", Fraction(5, 2)),
        ("-1\\frac12", Fraction(-3, 2)), ("5°C", 5), ("5²", 25), ("2¹⁰", 1024),
        ("9.8\\,\\mathrm{m/s^2}", Fraction(49, 5)), ("9.8 m/s²", Fraction(49, 5)),
        ("\\text{it is } 2", 2), ("$x = 5$", 5), ("$5$ cm", 5), ("\\text{5 cm}", 5),
        ("1,234,567.89", Fraction(123456789, 100)), ("5 square feet", 5), ("60 mph", 60),
        ("(-3)^2", 9), ("-2^2", -4), ("3/4 cup", Fraction(3, 4)), ("0012", 12),
        ("5 dollars per day", 5), ("18 dollars", 18), ("\\frac{3.5}{2}", Fraction(7, 4)),
        ("\\frac{\\frac12}{3}", Fraction(1, 6)), ("x \\approx 3.14", Fraction(157, 50)),
        ("10^{-3}", Fraction(1, 1000)), ("90\\text{ degrees}", 90), ("１２", 12),
        ("10\\text{ km/h}", 10), ("f(2,3) = 5", 5), ("\\$5.00", 5), ("6\\text{ (hours)}", 6),
        ("{5}", 5), ("5$", 5), ("1{,}234{,}567", 1234567), ("$9{,}500.", 9500),
        ("\\frac{1{,}000}{3}", Fraction(1000, 3)), ("3\\frac{1}{2}\\%", Fraction(7, 2)),
        ("1 / 2", Fraction(1, 2)), ("1⁄2", Fraction(1, 2)), ("5 in.", 5), ("12 ft.", 12),
        ("5\\ \\text{m}", 5), ("5~\\text{m}", 5), ("\\textbf{7}", 7), ("7\\%.", 7),
        ("72 (seventy two)", 72), ("5! = 120", 120), ("5! = 5 \\times 4! = 120", 120),
        ("\\large 72", 72), ("\\text{A: }72", 72), ("\\text{}5", 5),
    ],
)  # fmt: skip
def test_a_number_is_read_wholly(text, value):
    assert parse(text) == value
    assert parse(f"  {text}\n") == value


@pytest.mark.parametrize(
    "text",
    [
        "3\\sqrt{13}", "\\left( 3, \\frac{\\pi}{2} \\right)", "6 - 5i", "3, 5, 7", "x^3+3x-6",
        "2k+2", "\\frac{\\sqrt{3}}{3}", "1 \\pm \\sqrt{19}", "4210_{5}", "4210_5",
        "0.\\overline{3}", "0.333...", "0.(3)", "3.14\\ldots", "3,4", "1,2345", "0,5", "0{,}5",
        "1.234,56", "1.234.567", "0,123", "5!", "72...", "12:30", "3:4", "2024-10-12",
        "10/12/2024", "3rd", "5th", "2x", "5i", "3\\pi", "\\pi", "5e", "1/0", "\\frac{1}{0}",
        "1/2/3", "2^{1/2}", "2^0.5", "2^3^2", "x", "", "none", "inf", "nan", "\\infty",
        "5 million", "5\\text{ million}", "5 dozen", "5k", "3-4", "3 to 4", "\\{5\\}",
        "x \\in [-2,7]", "\\text{June 20}", "(3,5)", "[3,5]", "x > 5", "x \\neq 5",
        "x = 5, y = 7", "x = 5 or x = 7", "5\\text{ or }7", "3 and 5", "18 dollars and 20 cents",
        "5 feet 3 inches", "5\\text{ feet }3\\text{ inches}", "12-3", "5+67", "3*4", "3\\cdot 4",
        "2\\frac{5}{3}", "1.5\\frac12", "0x1F", "2 choose 1", "\\binom{5}{2}", "5 \\pmod{7}",
        "5 (mod 7)", "7 squared", "\\sin 30", "log 5", "5 \\sqrt{2}", "\\frac{3\\sqrt{2}}{2}",
        "\\frac{a}{b}", "1 234/567", "1,23", "1, 234", "(1,234)", "--5", "+-5", "5'", "3 xyz",
        "5\\text{ feet 3 inches}", "\\frac123", "5xy", "5 ab", "10\\text{th}", "5^{th}",
        "5^\\text{th}", "1,234,5", "12 34", "1 0000", "１２x", "٣", "5٣", "5₃",
        "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "5%x", "5=x", "2..5", "3e5x", "1e5e5",
        "\\sqrt[3]{8}", "|5|", "5 \\quad 7", "3\\quad 500", "1 and 1/2", "14 \\text{ and } 15",
        "11:05 \\text{ AM}", "p - q", "(x+2)(x+7)", "\\text{(C)}", "3/56x", "-2 + 7i",
        "\\frac{9}{19} + 2", "y = 2x + 3", "2 \\times 3^2", "5n^2", "2\\%i", "3\\text{ times }4",
        "5 minus 2", "-(5", "5)", "{5", "5}", "1 or 2", "\\frac{1}{2}\\pi", "5 > 3", "5 < x",
        "5 \\leq 7", "5\\,\\text{or}\\,7", "120^\\circ 30'", "5\\\\",
        "5 June", "5 Sept", "5 May", "\\text{5 June}", "\\text{June }5", "1 \\text{ in } 6",
        "1\\text{ in 6}", "2 tens", "5 mil", "2 below zero", "x != 5", "5 != 3", "\\text{x}2",
    ],
)  # fmt: skip
def test_what_is_not_understood_is_none(text):
    assert parse(text) is None


@pytest.mark.parametrize(
    "text",
    [
        *("1e999999999", "1e-999999", "10^{1000000000}", r"10^{10^9}", r"3\times10^{999999}"),
        *("9" * 1500, "1" * 10**6, "." + "1" * 10**6, "2^2^2^2^2", "(" * 1500, "{" * 1900),
        *(r"\frac" * 300, r"\frac{1}" * 200, "1," * 900, "-" * 1900, "$" * 1900, "=" * 1900),
        *(r"\text{" * 300, r"1\text{a}" * 200, "1 " * 900, "**" * 900, "a:" * 900, "1/" * 900),
        *("^" * 1900, "1 cm" * 400, r"\left(" * 300, "a " * 900 + "1", "5 " + "a-" * 900),
    ],
    ids=lambda text: text[:12],
)
def test_long_and_hostile_texts_are_quickly_nothing(text):
    start = time.perf_counter()
    assert parse(text) is None
    assert time.perf_counter() - start < 0.5


def test_powers_are_bounded():
    assert power(Fraction(2), 1000) == 2**1000
    assert power(Fraction(1, 2), -3) == 8
    assert power(Fraction(2), 10**9) is None
    assert power(Fraction(0), 0) is None and power(Fraction(0), -1) is None
    assert parse("9" * 999) == int("9" * 999)


def group(digits, by):
    """Digits in threes, with something between them."""
    head = len(digits) % 3 or 3
    return by.join([digits[:head], *(digits[i : i + 3] for i in range(head, len(digits), 3))])


def spellings(value):
    """Ways to write a fraction."""
    sign, top, bottom = "-" * (value < 0), abs(value.numerator), value.denominator
    for minus in {sign, sign and "- ", sign and "−"}:
        for slash in ("/", " / "):
            yield f"{minus}{top}{slash}{bottom}"
        for frac in ("frac", "dfrac", "tfrac", "cfrac"):
            yield rf"{minus}\{frac}{{{top}}}{{{bottom}}}"
        if top < 10 and bottom < 10:
            yield rf"{minus}\frac{top}{bottom}"
            yield rf"{minus}\frac {top} {bottom}"
        whole, rest = divmod(top, bottom)
        if whole and rest:
            if rest < 100:  # 1 234/567 may be of thousands
                yield f"{minus}{whole} {rest}/{bottom}"
            yield rf"{minus}{whole}\frac{{{rest}}}{{{bottom}}}"
        if bottom == 1:
            yield f"{minus}{top}"
            for by in (
                ",",
                "{,}",
                r"\,",
                r"\!,",
                r",\!",
                r",\! ",
                "'",
                " ",
                "_",
                "\u2009",
                "\u00a0",
                "~",
            ):
                yield minus + group(str(top), by)
            yield f"{minus}{top}.0"
            yield rf"{minus}{top}\times10^0"
            yield f"{minus}{top * 1000}e-3"
            yield rf"{minus}{top * 1000} \cdot 10^{{-3}}"
    if sign:
        yield rf"\frac{{-{top}}}{{{bottom}}}"
        yield rf"\left(-\frac{{{top}}}{{{bottom}}}\right)"


WRAPPERS = [
    *("{}", "${}$", "$${}$$", r"\({}\)", r"\boxed{{{}}}", r"\fbox{{{}}}", "**{}**", "x = {}"),
    *("{}.", "{} cm", r"{}\text{{ cm}}^2", r"{}\%", r"{}^\circ", r"\displaystyle {}", "{} apples"),
    *("1 + 1 = {}", r"\text{{it is }} {}"),
]


@given(
    st.fractions(max_denominator=200) | st.integers(-(10**12), 10**12).map(Fraction),
    st.integers(0, 2**30),
)
@settings(deadline=None, max_examples=60)
def test_every_spelling_of_a_number_is_that_number(value, pick):
    for text in spellings(value):
        wrapped = WRAPPERS[pick % len(WRAPPERS)].format(text)
        assert parse(wrapped) == value, wrapped


@given(st.decimals(-(10**9), 10**9, places=4))
@settings(deadline=None, max_examples=100)
def test_decimals_are_exact(value):
    assert parse(f"{value:f}") == Fraction(value)
    assert parse(f"{value:,f}") == Fraction(value)
    assert parse(f"{value:e}") == Fraction(value)


PIECES = [
    *"0123456789.,-+/^_{}()$%= aex'!:",
    r"\frac",
    r"\sqrt",
    r"\text{",
    r"\text{}",
    r"\,",
    r"\!",
    r"\boxed{",
    "½",
    "−",
    "\n",
]


@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join) | st.text(max_size=60))
@settings(deadline=None, max_examples=300)
def test_any_text_is_a_number_or_none(text):
    found = parse(text)
    assert found is None or isinstance(found, Fraction)


FORMULAS = [
    *(r"\sqrt{{{}}}", r"{}\sqrt{{2}}", r"{}\pi", "{} + x", "{}x", "({}, 1)", "{}, 2", "{} or 2"),
    *(r"{} \pm 1", "{}i", "{}_2", "x > {}", r"\{{{}\}}", "[{}, 3)", "{} million", "{}:30", "|{}|"),
    *(r"{}\text{{ or }}3", "{}!", "{}...", r"\log {}", "2^{{x}} {}"),
]


@given(st.fractions(max_denominator=99), st.sampled_from(FORMULAS))
@settings(deadline=None, max_examples=200)
def test_a_number_within_a_formula_is_not_the_formulas(value, formula):
    text = formula.format(value)
    assert parse(text) is None, text

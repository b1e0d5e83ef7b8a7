r"""The numbers that rewards read, against math-verify.

    python experiments/rewards/run.py [--pairs=2000] [--gsm8k=PATH] [--out=results.json]

Pairs of a truth and an answer are drawn with a fixed seed: a number in two spellings, or two
numbers near each other. Both sides judge every pair; a pair counts where both read both texts as
numbers. PATH is a folder with GSM8K's train.jsonl and test.jsonl.
"""

import argparse
import collections
import json
import logging
import platform
import random
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

from jaxrl_eff.rollout.rewards import answers
from jaxrl_eff.rollout.rewards.numbers import parse


def group(digits: str, by: str) -> str:
    head = len(digits) % 3 or 3
    return by.join([digits[:head], *(digits[i : i + 3] for i in range(head, len(digits), 3))])


INTEGERS: dict[str, Callable[[int], str]] = {
    "1234": str,
    "1,234": lambda n: group(str(n), ","),
    "1{,}234": lambda n: group(str(n), "{,}"),
    r"1\,234": lambda n: group(str(n), r"\,"),
    r"1\!,234": lambda n: group(str(n), r"\!,"),
    r"1,\! 234": lambda n: group(str(n), r",\! "),
    "1'234": lambda n: group(str(n), "'"),
    "1 234": lambda n: group(str(n), " "),
    "1_234": lambda n: group(str(n), "_"),
    "thin space": lambda n: group(str(n), "\u2009"),
    "1234.0": lambda n: f"{n}.0",
    "1e3": lambda n: f"{n}e0" if n % 10 else f"{n // 10}e1",
    r"3\times10^4": lambda n: rf"{n}\times10^0" if n % 10 else rf"{n // 10}\times10^1",
    r"3\cdot 10^{4}": lambda n: rf"{n}\cdot 10^{{0}}" if n % 100 else rf"{n // 100}\cdot 10^{{2}}",
    "3 x 10^4": lambda n: f"{n} x 10^0" if n % 10 else f"{n // 10} x 10^1",
    "2^{10}": lambda n: f"{n}^{{1}}",
}
FRACTIONS: dict[str, Callable[[int, int], str]] = {
    "1/2": lambda a, b: f"{a}/{b}",
    r"\frac{1}{2}": lambda a, b: rf"\frac{{{a}}}{{{b}}}",
    r"\dfrac{1}{2}": lambda a, b: rf"\dfrac{{{a}}}{{{b}}}",
    r"\tfrac{1}{2}": lambda a, b: rf"\tfrac{{{a}}}{{{b}}}",
    r"\cfrac{1}{2}": lambda a, b: rf"\cfrac{{{a}}}{{{b}}}",
    r"\frac12": lambda a, b: rf"\frac{a}{b}" if max(a, b) < 10 else rf"\frac{{{a}}}{{{b}}}",
    r"1\frac{2}{3}": lambda a, b: rf"{a // b}\frac{{{a % b}}}{{{b}}}" if a > b else f"{a}/{b}",
    "1 1/2": lambda a, b: f"{a // b} {a % b}/{b}" if a > b else f"{a}/{b}",
}
DECIMALS: dict[str, Callable[[int, int], str]] = {
    "1.5": lambda n, d: f"{n}.{d:02d}",
    "1,234.5": lambda n, d: f"{group(str(n), ',')}.{d:02d}",
    ".5": lambda n, d: f".{d:02d}",
    "1.5e-3": lambda n, d: f"{n * 100 + d}e-2",
}
SIGNS = {"-": "-{}", "- ": "- {}", "−": "−{}", r"\left(-\right)": r"\left(-{}\right)", "+": "+{}"}
AROUND = {
    "boxed": "{}",
    "$": "${}$",
    r"\text unit": r"{}\text{{ cm}}^2",
    "unit": "{} cm",
    "word": "{} apples",
    r"\mathrm": r"{}\,\mathrm{{kg}}",
    "degrees": r"{}^\circ",
    "percent": r"{}\%",
    "dollars": r"\${}",
    "euros": "€{}",
    "USD": "{} USD",
    "x =": "x = {}",
    "chain": "1 + 2 = {}",
    "displaystyle": r"\displaystyle {}",
    "full stop": "{}.",
    "bold": r"\textbf{{{}}}",
}


def drawn(rng: random.Random) -> tuple[str, str, Fraction]:
    """A spelling of a number, its name and its value."""
    kind = rng.choice(("integer", "fraction", "decimal"))
    n = rng.choice((rng.randrange(1, 100), rng.randrange(1000, 10**7), 100 * rng.randrange(1, 999)))
    if kind == "integer":
        name = rng.choice(list(INTEGERS))
        return INTEGERS[name](n), name, Fraction(n)
    if kind == "fraction":
        b = rng.randrange(2, 30)
        a = rng.choice([a for a in range(1, 90) if a % b])
        name = rng.choice(list(FRACTIONS))
        return FRACTIONS[name](a, b), name, Fraction(a, b)
    d = rng.randrange(1, 100)
    name = rng.choice(list(DECIMALS))
    return DECIMALS[name](n, d), name, Fraction(d, 100) + (0 if name == ".5" else n)


def spelled(value: Fraction, rng: random.Random) -> tuple[str, str]:
    """Another spelling of a positive number, and its name."""
    if value.denominator == 1:
        name = rng.choice(list(INTEGERS))
        return INTEGERS[name](value.numerator), name
    cents = value * 100
    if cents.denominator == 1 and rng.random() < 0.7:
        name = rng.choice([n for n in DECIMALS if n != ".5" or value < 1])
        return DECIMALS[name](*divmod(cents.numerator, 100)), name
    name = rng.choice(list(FRACTIONS))
    return FRACTIONS[name](value.numerator, value.denominator), name


def pair(rng: random.Random) -> dict:
    """A truth and an answer: texts, their values, and the names of what they are written with."""
    text, name, value = drawn(rng)
    near = (value + 1, value * 10, value / 10, value + 10, 1 / value)
    other = value if rng.random() < 0.5 else rng.choice(near)
    again, again_name = spelled(other, rng)
    sides = []
    sign = rng.choice(("", "", *SIGNS))
    for each, named, number in ((text, name, value), (again, again_name, other)):
        minus = sign if rng.random() < 0.9 else ""
        around = rng.choice(list(AROUND))
        signed = SIGNS[minus].format(each) if minus else each
        number = number if minus in ("", "+") else -number
        sides.append((AROUND[around].format(signed), number, (named, minus, around)))
    (truth, gold, gold_names), (answer, said, said_names) = sides
    return {
        "truth": truth,
        "answer": answer,
        "values": [str(gold), str(said)],
        "names": [gold_names, said_names],
        "equal": gold == said,
    }


def theirs(text: str) -> tuple[list, Fraction | None]:
    """What math-verify parses of a boxed text, and its number if it is one."""
    import math_verify
    import sympy

    found = math_verify.parse(rf"\boxed{{{text}}}", parsing_timeout=None)
    for each in found:
        if isinstance(each, str):
            continue
        if isinstance(each, sympy.Eq):
            each = each.rhs
        try:
            value = sympy.nsimplify(each.doit(), rational=True)
        except Exception:
            return found, None
        return found, Fraction(int(value.p), int(value.q)) if value.is_Rational else None
    return found, None


def judged(truth: str, answer: str) -> dict:
    """Both readings of a pair and both judgements."""
    import math_verify

    (gold, gold_number), (said, said_number) = theirs(truth), theirs(answer)
    ours = [parse(truth), parse(answer)]
    return {
        "ours": [str(v) for v in ours],
        "theirs": [str(gold_number), str(said_number)],
        "both": None not in (*ours, gold_number, said_number),
        "we say": None not in ours and ours[0] == ours[1],
        "they say": bool(math_verify.verify(gold, said, timeout_seconds=None)),
    }


def reason(case: dict) -> str:
    """Why a pair is judged differently: what math-verify read as another number than it is."""
    if any("percent" in names for names in case["names"]):
        return "percent"
    misread = set()
    for value, other, names in zip(case["values"], case["theirs"], case["names"], strict=True):
        if value != other:
            unusual = [n for n in names if n in UNUSUAL]
            misread.add(unusual[0] if unusual else " ".join(filter(None, names)))
    if misread:
        return "math-verify misreads " + " and ".join(sorted(misread))
    equations = [bool({"x =", "chain"} & set(names)) for names in case["names"]]
    return "equations are compared as wholes" if any(equations) else "six decimals"


# Spellings that math-verify reads as a product, an index or an unknown, by its own parser.
UNUSUAL = (
    *("1 1/2", "1 234", r"1\,234", "thin space", "1_234", "1'234", "1e3", "1.5e-3", "3 x 10^4"),
    *("full stop", "- ", "−", r"\left(-\right)", "+", "euros", "dollars", "USD", "bold"),
)


def study(pairs: int) -> dict:
    rng = random.Random(0)
    cases = [pair(rng) for _ in range(pairs)]
    for case in cases:
        case |= judged(case["truth"], case["answer"])
    both = [c for c in cases if c["both"]]
    apart = [c for c in both if c["we say"] != c["they say"]]
    for case in apart:
        case["why"] = reason(case)
    read = [c for c in cases if "None" not in c["ours"]]
    return {
        "pairs": pairs,
        "we read both": len(read),
        "of these right": sum(c["we say"] == c["equal"] for c in read),
        "they read both": sum("None" not in c["theirs"] for c in cases),
        "they judge right": sum(c["they say"] == c["equal"] for c in cases),
        "both read both": len(both),
        "agree": len(both) - len(apart),
        "differ": dict(collections.Counter(c["why"] for c in apart).most_common()),
        "of these we are right": sum(c["we say"] == c["equal"] for c in apart),
        "differences": [{k: c[k] for k in KEPT} for c in apart],
        "we are wrong": [{k: c[k] for k in KEPT} for c in read if c["we say"] != c["equal"]],
        "we do not read": sorted({t for c in cases for t in unread(c)}),
    }


def unread(case: dict) -> list[str]:
    both = zip((case["truth"], case["answer"]), case["ours"], strict=True)
    return [text for text, number in both if number == "None"]


KEPT = ("truth", "answer", "equal", "ours", "theirs", "we say", "they say")


def gsm8k(folder: Path) -> dict:
    """GSM8K's answers: read by both, and its solutions read without their marks."""
    rows = [
        json.loads(line)["answer"]
        for split in ("train", "test")
        for line in (folder / f"{split}.jsonl").read_text().splitlines()
    ]
    finals = [row.rpartition("####")[2].strip() for row in rows]
    ours = [answers.truth(row) for row in rows]
    unmarked = [answers.number(row.rpartition("####")[0]) for row in rows]
    differ, they_read = [], 0
    for final, mine in zip(finals, ours, strict=True):
        number = theirs(final)[1]
        they_read += number is not None
        if number is not None and number != mine:
            differ.append({"answer": final, "ours": str(mine), "theirs": str(number)})
    return {
        "answers": len(rows),
        "we read": sum(v is not None for v in ours),
        "they read": they_read,
        "agree": they_read - len(differ),
        "differences": differ,
        "without marks": {
            "the answer": sum(u == v for u, v in zip(unmarked, ours, strict=True)),
            "another number of the text": sum(
                u is not None and u != v for u, v in zip(unmarked, ours, strict=True)
            ),
            "nothing": sum(u is None for u in unmarked),
        },
        "microseconds": timed(rows),
    }


def timed(rows: list[str]) -> dict:
    """Microseconds of computing that a text takes, the best of three rounds."""
    texts = {
        "solution with ####": rows[:2000],
        "solution without marks": [row.rpartition("####")[0] for row in rows[:2000]],
        r"\boxed{} at the end": [rf"{row[:-20]} \boxed{{1{{,}}234}}" for row in rows[:2000]],
        "10,000 characters without marks": [
            (r.rpartition("####")[0] * 60)[:10000] for r in rows[:100]
        ],
    }
    return {name: round(min(seconds(each) for _ in range(3)) * 1e6) for name, each in texts.items()}


def seconds(texts: list[str]) -> float:
    start = time.process_time()
    for text in texts:
        answers.number(text)
    return (time.process_time() - start) / len(texts)


def main() -> None:
    known = argparse.ArgumentParser()
    known.add_argument("--pairs", type=int, default=2000)
    known.add_argument("--gsm8k", type=Path)
    known.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"))
    args = known.parse_args()
    logging.disable(logging.CRITICAL)
    found = {
        "versions": {n: version(n) for n in ("math-verify", "latex2sympy2_extended", "sympy")}
        | {"python": platform.python_version()},
        "generated": study(args.pairs),
    }
    if args.gsm8k:
        found["gsm8k"] = gsm8k(args.gsm8k)
    args.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    short = {k: v for k, v in found["generated"].items() if not isinstance(v, list)}
    json.dump({**found, "generated": short}, sys.stdout, indent=1, ensure_ascii=False)


if __name__ == "__main__":
    main()

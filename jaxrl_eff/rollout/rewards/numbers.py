r"""Exact parsing of numbers as people and LaTeX write them: text -> Fraction, or None.

`parse` reads a text that is exactly one number, and returns None for anything that it cannot parse
completely: a part of a formula is never taken for the number.

Supported are integers, decimals, signs (`- 3`), thousands (`1,234`, `1{,}234`, `10\,000`,
`11,\! 111`, `1'000`, `1 000`, `1_000`), fractions (`1/2`, `\frac12`, `\dfrac{-1}{2}`), proper mixed
numbers (`1 1/2`, `1\frac{2}{3}`), scientific notation (`1e5`, `3\times10^4`), powers of a number
(`2^{10}`), currency, units and words after the number (`5\text{ cm}^2`, `72 clips`), and the last
side of an equation (`5 + 67 = 72`, `x \approx 3.14`).

Choices for ambiguous notations:
- a percent sign is a unit, so 50% is always 50;
- commas separate thousands, so `1,234` is one number, `1,23` and `1, 234` are none, and neither is
  a decimal comma (`1.234,5`, `0{,}5`);
- a plain blank separates thousands only if the whole text is the number;
- `10/12` is a fraction, `10/12/2024` and `10-12` are not numbers; sums are not evaluated;
- `5!` is not a number (a factorial, or an exclamation), nor is `72...`;
- a single letter is a unit only if it is m, g, s or L and follows a blank.
Numbers of more than 1,000 digits are rejected.
"""

import re
import unicodedata
from fractions import Fraction

from jaxrl_eff.rollout.rewards import words

_LONGEST = 2000  # characters of a text that can be a number
_DIGITS = 1000  # of a number
_BITS = 4000  # of a power's numerator or denominator
_DEPTH = 5  # of groups within groups

_SUPERSCRIPT = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻"
_THIN = "\u00a0\u2007\u2008\u2009\u200a\u202f\u205f"
_CHARACTERS = str.maketrans(
    {chr(0xFF01 + i): chr(0x21 + i) for i in range(94)}
    | dict.fromkeys("−–‐‑﹣", "-")
    | dict.fromkeys("\t" + _THIN, " ")
    | {"’": "'", "×": "\\times ", "÷": "/", "⁄": "/", "∕": "/", "≈": "=", "°": "^\\circ "}
    | dict.fromkeys("⋅·∙", "\\cdot ")
    | {"。": ". ", "、": ", ", "\u200b": "", "\ufeff": ""}
    | {
        c: "\\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", c).split("⁄"))
        for c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞⅐⅑⅒"
    }
)
_REWRITES = [
    (re.compile(pattern), to)
    for pattern, to in (
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])", ""),
        (
            r"\\(?:displaystyle|textstyle|scriptstyle|small|large|Large|LARGE|[hH]uge)(?![A-Za-z])\s*",
            "",
        ),
        (r",\s*\\!\s*|\{\s*,\s*\}", ","),
        (r"\\!", ""),
        (r"\\[,;: ]|(?<!\\)~|\\(?:thin)?space(?![A-Za-z])", " "),
        (r"\\(?:[dtcs]frac|nicefrac)(?![A-Za-z])", r"\\frac"),
        (r"\\[()\[\]]", "$"),
        (r"\\([%$_])", r"\1"),
        (
            r"\\(?:mathrm|textrm|mbox|hbox|textnormal|operatorname|mathsf|mathtt)\s*(?=\{)",
            r"\\text",
        ),
        (r"\\(?:textcolor|color)\s*\{[A-Za-z]*\}", ""),
        (r"\\(?:boxed|fbox|textbf|mathbf|boldsymbol|bm|mathit|textit|emph|underline)\s*", ""),
        (r"\\(?:times|cdot|ast)(?![A-Za-z])\s*", "×"),
        (r"\^\s*\{\s*\\circ\s*\}|\^?\s*\\(?:circ|degree)(?![A-Za-z])", "°"),
        (r"\\div(?![A-Za-z])", "/"),
        (r"\\(?:approx|simeq)(?![A-Za-z])", "="),
        (r"\\pounds(?![A-Za-z])", "£"),
    )
]
_QUOTED = re.compile(r"(\*\*|[*_`\"'])(.+)\1", re.DOTALL)
_RELATION = re.compile(r"&?\s*:?={1,2}(?![=<>])")
_INNER = re.compile(r"[(\[{][^()\[\]{}]*[)\]}]")
# Signs of several answers in the earlier sides of an equation.
_SEVERAL = re.compile(
    r",(?![0-9]{3}(?![0-9]))|;|[<>≤≥≠±]|!(?!\s*(?:[-+=*/×)}]|\Z))|\\q?quad|\b(?:and|or|not)\b|\\[pm]m\b"
)
_LABEL = re.compile(r"\s*(?:\\text\s*\{([^{}0-9]*)\}|([A-Za-z][A-Za-z ]{0,60}):)")
_WRAPPED = re.compile(r"\s*\\text\s*\{((?:[^{}]|\{[^{}]*\})*)\}\s*\$*\s*")
_MONEY = r"(?:US\$|USD|EUR|GBP|Rs\.?|[$€£¥₹])"
_PREFIX = re.compile(rf"\s*\$*\s*([-+]?)\s*{_MONEY}?\s*\$*\s*([-+]?)\s*")
_SIGN = re.compile(r"\s*([-+]?)\s*")
_LITERAL = re.compile(
    r"(?P<whole>[1-9][0-9]{0,2}(?P<sep>[,' _])[0-9]{3}(?:(?P=sep)[0-9]{3})*(?![0-9])|[0-9]+)?"
    r"(?P<part>\.[0-9]+)?(?:[eE](?P<power>[-+]?[0-9]{1,6})(?!\.?[0-9]))?"
)
_POWER = re.compile(
    r"\s*\^\s*(?:\{\s*([-+]?[0-9]{1,6})\s*\}|\(\s*([-+]?[0-9]{1,6})\s*\)|([-+]?[0-9]{1,6})(?!\.?[0-9]))"
)
_TEN = re.compile(r"\s*[×*xX]\s*10(?=\s*\^)")
_MIXED = re.compile(r"\s+([0-9]{1,100})\s*/\s*([0-9]{1,100})(?!\.?[0-9])")
_SLASH = re.compile(r"\s*/\s*")
_FRAC = re.compile(r"\s*\\frac(?![A-Za-z])\s*")
_BEHIND = re.compile(
    r"(?P<blank>\s+)|(?P<sign>%|°\s*(?:[CFK](?![A-Za-z]))?|[$€£¥₹])"
    r"|\\text\s*\{(?P<text>(?:[^{}]|\{[^{}]*\})*)\}"
    r"|(?P<word>[A-Za-z]+(?:-[A-Za-z]+)*)(?:\.(?=\s*\S))?"
    r"|(?P<power>\^\s*(?:\{\s*-?[1-9]\s*\}|-?[1-9]))|(?P<join>[/×])"
    r"|\((?P<note>[A-Za-z]{2}[^(){}]*)\)|(?P<end>[.,;:?](?=\s*\$*\s*$))"
)


def parse(text: str) -> Fraction | None:
    """Returns the number that a text is, exactly; None if it cannot be parsed completely."""
    return _answer(canonical(text), 0) if len(text) <= _LONGEST else None


def characters(text: str) -> str:
    """Replaces special signs, blanks and wide digits by ASCII."""
    if text.isascii():
        return text
    text = re.sub(
        f"[{_SUPERSCRIPT}]+",
        lambda found: _raised(unicodedata.normalize("NFKC", found.group())),
        text,
    )
    text = re.sub(f"(?<=[0-9])[{_THIN}](?=[0-9])", r"\\,", text)
    return text.translate(_CHARACTERS)


def canonical(text: str) -> str:
    """Replaces the various LaTeX and Unicode spellings by a single one."""
    text = characters(text).replace("\n", "  ")
    if "\\" in text or "{" in text or "~" in text:
        for pattern, to in _REWRITES:
            text = pattern.sub(to, text)
    return text


def _raised(digits: str) -> str:
    digits = digits.replace("−", "-")
    return f"^{digits}" if len(digits) == 1 else f"^{{{digits}}}"


def _answer(s: str, depth: int) -> Fraction | None:
    """Parses a canonical text: the last side of an equation, without what wraps it."""
    if depth > _DEPTH:
        return None
    s = s.strip()
    while found := _QUOTED.fullmatch(s):
        s = found.group(2).strip()
    sides = _RELATION.split(s)
    if len(sides) > 1:
        if "!=" in s:
            return None  # unequal, or a factorial
        before = " = ".join(sides[:-1])
        for _ in range(_DEPTH):
            before = _INNER.sub("", before)
        if _SEVERAL.search(before.replace("\\text", " ")) or _joined(sides[:-1]):
            return None
    side = sides[-1]
    if found := _WRAPPED.fullmatch(side):
        return _answer(found.group(1), depth + 1)
    if found := _LABEL.match(side):
        label = found.group(1) or found.group(2) or ""
        if words.of(label) & (words.CHANGE | words.JOIN) or label.strip() in words.MONTHS:
            return None
        if found.group(1) and len(label) == 1 and label.isalpha():
            return None  # x times 2
        return _answer(side[found.end() :], depth + 1)
    return _quantity(side, depth)


def _joined(sides: list[str]) -> bool:
    """Returns True if texts within the sides join several answers."""
    inside = " ".join(re.findall(r"\\text\s*\{([^{}]*)\}", " ".join(sides)))
    return bool(words.of(inside) & {"and", "or", "not"})


def _quantity(s: str, depth: int) -> Fraction | None:
    """Parses a number with optional currency before and units after it."""
    prefix = _PREFIX.match(s)
    if prefix.group(1) and prefix.group(2):
        return None
    found = _unsigned(s, prefix.end(), depth)
    if found is None or not _only_units(s, found[1]):
        return None
    return -found[0] if "-" in prefix.group(1) + prefix.group(2) else found[0]


def _plain(s: str, depth: int) -> Fraction | None:
    """Parses a number without currency or units, as in groups."""
    sign = _SIGN.match(s)
    found = _unsigned(s, sign.end(), depth) if depth <= _DEPTH else None
    if found is None or s[found[1] :].strip():
        return None
    return -found[0] if sign.group(1) == "-" else found[0]


def _unsigned(s: str, i: int, depth: int) -> tuple[Fraction, int] | None:
    """Parses the number that begins at s[i]; returns it and its end."""
    found = _atom(s, i, depth)
    if found is None:
        return None
    value, i, kind = found
    if kind == "integer":
        mixed = _mixed(s, i, depth)
        if mixed is not None:
            part, end = mixed
            return (value + part, end) if 0 < part < 1 else None
    if ten := _TEN.match(s, i):
        found = _raise(Fraction(10), s, ten.end())
        if found is None or kind not in ("integer", "decimal"):
            return None
        return value * found[0], found[1]
    if kind != "fraction":
        found = _raise(value, s, i)
        if found is None:
            return None
        value, i = found
    if slash := _SLASH.match(s, i):
        bottom = _atom(s, slash.end(), depth)
        if bottom is not None and bottom[2] != "fraction":
            found = _raise(bottom[0], s, bottom[1])
            return (value / found[0], found[1]) if found and found[0] else None
    return value, i


def _atom(s: str, i: int, depth: int) -> tuple[Fraction, int, str] | None:
    """Parses a literal, fraction or group at s[i]; returns its value, its end and its kind."""
    if frac := _FRAC.match(s, i):
        top = _argument(s, frac.end(), depth)
        bottom = _argument(s, top[1], depth) if top else None
        return (top[0] / bottom[0], bottom[1], "fraction") if bottom and bottom[0] else None
    if s[i : i + 1] in ("(", "{"):
        end = _closing(s, i)
        if end is None or (s[i] == "(" and "," in s[i:end]):  # (1,234) could be a pair
            return None
        value = _plain(s[i + 1 : end], depth + 1)
        return None if value is None else (value, end + 1, "group")
    found = _LITERAL.match(s, i)
    whole, part = found["whole"] or "", found["part"] or ""
    if not whole + part or len(whole + part) > _DIGITS:
        return None
    if found["sep"] == " " and re.match(r"\s*(?:/|\\frac)", s[found.end() :]):
        return None  # 1 234/567: mixed number or thousands
    value = Fraction(re.sub(r"[,' _]", "", whole) + part)
    if found["power"]:
        scale = power(Fraction(10), int(found["power"]))
        return None if scale is None else (value * scale, found.end(), "decimal")
    return value, found.end(), "decimal" if part else "integer"


def _argument(s: str, i: int, depth: int) -> tuple[Fraction, int] | None:
    r"""Parses the argument of \frac at s[i]: a group or one digit."""
    i += len(s[i:]) - len(s[i:].lstrip())
    if s[i : i + 1] == "{":
        found = _atom(s, i, depth)
        return found and (found[0], found[1])
    digit = s[i : i + 1]
    return (Fraction(digit), i + 1) if digit and digit in "0123456789" else None


def _mixed(s: str, i: int, depth: int) -> tuple[Fraction, int] | None:
    """Parses the fraction after an integer, if there is one; 0 if it cannot be parsed."""
    if _FRAC.match(s, i):
        found = _atom(s, i, depth)
        return (found[0], found[1]) if found else (Fraction(0), i)
    if found := _MIXED.match(s, i):
        top, bottom = int(found.group(1)), int(found.group(2))
        return (Fraction(top, bottom) if bottom else Fraction(0)), found.end()
    return None


def _raise(value: Fraction, s: str, i: int) -> tuple[Fraction, int] | None:
    """Applies the power written at s[i], if there is one; None if it cannot be parsed."""
    if not s[i:].lstrip().startswith("^"):
        return value, i
    found = _POWER.match(s, i)
    raised = power(value, int(found[1] or found[2] or found[3])) if found else None
    if raised is None or s[found.end() :].lstrip().startswith("^"):
        return None
    return raised, found.end()


def power(base: Fraction, exponent: int) -> Fraction | None:
    """Computes base ** exponent, or None if that is undefined or has more than 4,000 bits."""
    size = max(abs(base.numerator).bit_length(), base.denominator.bit_length())
    if size * abs(exponent) > _BITS or (not base and exponent <= 0):
        return None
    return base**exponent


def _closing(s: str, i: int) -> int | None:
    """Returns the index at which the group that opens at s[i] closes."""
    depth = 0
    for j in range(i, len(s)):
        depth += (s[j] in "({") - (s[j] in ")}")
        if not depth:
            return j
    return None


def _only_units(s: str, i: int) -> bool:
    """Returns True if s[i:] has only units, words about the number and a full stop."""
    after = ""  # the kind of piece before this one
    while i < len(s):
        found = _BEHIND.match(s, i)
        if found is None or not _fits(found, after, spaced=i > 0 and s[i - 1].isspace()):
            return False
        kind = found.lastgroup or "text"
        if kind != "blank":
            after = "per" if kind == "join" and after in ("", "sign") else kind
        i = found.end()
    return after not in ("join", "per")


def _fits(found: re.Match, after: str, spaced: bool) -> bool:
    """Returns True if a piece can follow a number, given the kind of piece before it."""
    kind = found.lastgroup
    if kind == "word":
        word = found["word"]
        lone = len(word) > 3 or (after == "join" and len(word) == 1)
        return _is_unit_word(word, spaced or after == "sign" or (after in ("join", "per") and lone))
    if kind == "text":
        return _is_unit_text(found["text"])
    if kind == "note":
        return not words.of(found["note"]) & (words.CHANGE | words.JOIN)
    if kind == "power":
        return after in ("word", "text")
    if kind == "join":  # "5 m/s", and "5/day"
        return after in ("word", "text", "power") or (
            after in ("", "sign") and found["join"] == "/"
        )
    return True


def _is_unit_word(word: str, spaced: bool) -> bool:
    if word in words.UNITS:
        return True
    if word in words.MONTHS:  # "5 June"
        return False
    if len(word) == 1:
        return spaced and word in words.LETTERS
    low = word.lower()
    parts = set(low.split("-"))
    named = len(low) > 2 and spaced and not parts & (words.CHANGE | words.JOIN)
    return low == "of" or (named and re.search(r"[aeiou]", low) is not None)


def _is_unit_text(text: str) -> bool:
    found = re.findall(r"[A-Za-z]+|[0-9]+", re.sub(r"\^\{?-?[0-9]\}?", "", text))
    if not found:
        return not text.strip(" .,%°$")
    if set(map(str.lower, found)) & (words.CHANGE | words.JOIN) or set(found) & words.MONTHS:
        return False
    if re.search(r"[=<>+\\]", text.replace("\\circ", "")):
        return False
    if any(word.isdigit() for word in found):
        odds = found[0].lower() == "in" and found[-1].isdigit()
        return found[0].lower() in words.BEFORE_DIGITS and not odds
    return len(found[0]) > 1 or found[0] in words.TEXT_LETTERS or len(found) > 1

r"""Extraction of the answer in a response, and of its number.

The answer follows the last `####` or is in the last `\boxed{}`, whichever comes later; without
either, it is in `<answer>...</answer>`, or follows "answer is" or "answer:"; without these, it is
the whole text, if that is one number, or else the last number of the text, if that stands alone.
It is parsed completely (`numbers.parse`) or not at all. A response's thoughts, up to the last
`</think>`, contain no answer.
"""

import re
import unicodedata
from fractions import Fraction

from jaxrl_eff.rollout.rewards import numbers, words

_TRIES = 8  # headings, phrases
_WINDOW = 400  # characters searched around a last number
_PHRASE = re.compile(
    r"\banswers?\b(?:[ \t]+[a-z]{1,20}){0,6}?[ \t*_]*(?::|=|\bis\b|\bare\b|\bequals\b)[ \t]*[:=]?",
    re.IGNORECASE,
)
_NOTES = re.compile(r"<<[^<>]*>>")  # GSM8K's calculator
_TAGS = re.compile(r"</?[A-Za-z][\w-]{0,40}>|<\|[^|<>\s]{1,40}\|>")
_ENUMERATED = re.compile(r"[ \t]*[0-9]+[.)][ \t]+[A-Za-z*]")
_TOKEN = re.compile(
    r"(?P<text>\\(?:text|mathrm|mbox|textrm|textbf|mathbf|operatorname)\s*\{(?:[^{}]|\{[^{}]*\})*\})"
    r"|(?P<arrow>=>|->|[⇒→]|\\(?:Rightarrow|implies|rightarrow|to)(?![A-Za-z]))"
    r"|(?P<command>\\[A-Za-z]+|\\.)|(?P<bold>\*\*)"
    r"|(?P<word>[^\W\d_]{2,}(?:['-][^\W\d_]+)*)|(?P<letter>[^\W\d_])"
    r"|(?P<digits>[0-9]+)|(?P<blank>\s+)|(?P<other>.)",
    re.DOTALL,
)
_OPERATORS = "+-*/=^_<>≤≥≠±√|\\"
_BOX = re.compile(r"\\f?box(?:ed)?\s*\{|\\[{}]|[{}]")
_BARE_BOX = re.compile(r"\\f?boxed\s*([0-9])")
# Context of a box that makes it part of a formula.
_TIED_LEFT = re.compile(
    r"(?:[-+/^_*×\\0-9]|(?<![A-Za-z</])[A-Za-z0-9)}]\s*[<>≤≥≠]\s?"
    r"|\\(?:cdot|times|sqrt|[dtc]?frac|leq?|leqslant|lt|geq?|geqslant|gt|neq?)\s?|\\\{\s?"
    r"|(?:\^|_|\\(?:sqrt|[dtc]?frac(?:\s*\{(?:[^{}]|\{[^{}]*\})*\})?))\s*\{\s?"
    r"|\\boxed\s?\{(?:[^{}]|\{[^{}]*\})*\}\s?\$?\s*(?:[,;:]|,?\s*or\s)\s*\$?)\Z"
)
_SUM_LEFT = re.compile(r"(?:[0-9}]\s*[-+]|\)\s*\+|(?<![A-Za-z])[A-Za-z]\s*\+)\s\Z")
_TIED_RIGHT = re.compile(
    r"\s?(?:\^(?!\s?\{?\s?\\circ)|/|_|\\(?:sqrt|pi|frac|cdot|times|pm)(?![A-Za-z])"
    r"|[-+:,]\s?(?:[0-9]|\\(?:f?box|[dtc]?frac|sqrt|pi))|\+\s?[A-Za-z]\b)|[A-Za-z0-9]"
)
_LIST_LEFT = re.compile(
    r"[0-9}]\)?\s*[%$]?\s*(?:[,;]|,?\s*\b(?:and|or|to|through|plus|minus|times|over|versus|vs|by)\b)"
    r"\s*[($*]*\Z"
)
_LIST_RIGHT = re.compile(
    r"\s*(?:[,;]\s*)(?:and|or)?\s*[-+$(]*\s*(?:[0-9]|[A-Za-z]\s*=|\\(?:d?frac|sqrt|pi))|\s*,?\s*or\b"
)
_SECOND = re.compile(r"\b(?:and|or)\s+[-+$\\]*[0-9]")
_BLANK_THOUSANDS = re.compile(r"(?<![0-9])[0-9]{1,3} [0-9]{3}(?![0-9])")
_ROOT_OF = re.compile(r"\b(?:root|power|logarithm|log|factorial|square|cube)s?\s+of\s+\Z", re.I)
_MEASURE_LEFT = re.compile(r"[0-9]\s*([A-Za-z]+)\.?,?\s*(?:and\s+)?\Z")
_NEXT_WORD = re.compile(r"(?:[\s*_\"”)$]|\\[,;: ]|\\text\s*\{)*([A-Za-z]+)")
_AND_PARTS = re.compile(
    r"[\s*_\"”)$]*\b(?:and\s+(?:an?|one|two|three)[\s-]+(?:half|third|quarter|fourth|fifth)"
    r"|(?:degrees?\s+)?below)\b",
    re.I,
)
_ODDS = re.compile(r"\s*\b(?:in|out\s+of)\s+[0-9][0-9,]*\W*\Z", re.I)
_ODDS_LEFT = re.compile(r"[0-9]\s+(?:in|out\s+of)\s+\Z", re.I)
_DENIED = re.compile(
    r"(?:\bnot|n['’]t|\bcannot|\bnever|\bthan)\s+(?:(?:be|equal)\s+)?[\s*_\"“($#]*\Z", re.I
)
_ITEM = re.compile(r"\s*(?:[*_#]+\s*)?\(?([0-9]{1,2})[.):]\**\s+[*_]*[A-Za-z]")
_BULLET = re.compile(r"\s*\n\s*[-+]\s")
_LAST_WORD = re.compile(r"([A-Za-z]+)\.?[\s*_\"“($#]*\Z")


def number(text: str, *, anywhere: bool = True) -> Fraction | None:
    r"""Returns the number that a text gives as its answer, exactly; None without an answer.

    Args:
        text: a response.
        anywhere: False accepts only an answer after `####` or in `\boxed{}`.
    """
    text = spoken(numbers.characters(text))
    marked, value = _marked(text)
    if marked or not anywhere:
        return value
    return _unmarked(text)


def truth(text: str) -> Fraction | None:
    r"""Returns a reference answer's number: after `####`, in `\boxed{}`, or of the whole text."""
    text = numbers.characters(text)
    marked, value = _marked(text)
    return value if marked else numbers.parse(text)


def boxed(text: str) -> str | None:
    r"""Returns the contents of the last closed `\boxed{...}`, with inner braces; or None."""
    found = _box(text)
    return found and text[slice(*found)]


def marked(text: str) -> str | None:
    r"""Returns the text after the last `####` or in the last `\boxed{}`, the later one; or None."""
    text = spoken(text)
    box, at = _box(text), text.rfind("####")
    if at > (box[0] if box else -1):
        line = text[at:].lstrip("#").lstrip().partition("\n")[0].strip()
        if line or box is None:
            return line
    return text[slice(*box)] if box else None


def spoken(text: str) -> str:
    """Returns the text after the thoughts of a response."""
    return text.rpartition("</think>")[2]


def _box(text: str) -> tuple[int, int] | None:
    found, opened = None, []
    for brace in _BOX.finditer(text):
        if brace.group() not in ("\\{", "\\}", "}"):
            opened.append((brace.group() != "{", brace.end()))
        elif brace.group() == "}" and opened:
            is_box, begin = opened.pop()
            found = (begin, brace.start()) if is_box else found
    for bare in _BARE_BOX.finditer(text):
        found = bare.span(1) if found is None or bare.start() > found[1] else found
    return found


def _marked(text: str) -> tuple[bool, Fraction | None]:
    """Returns a pair: True if a mark has an answer, and the answer's number."""
    box = _box(text)
    at, low = len(text), box[0] if box else 0
    for _ in range(_TRIES):
        at = text.rfind("####", low, at)
        if at < 0:
            break
        behind = text[at:].lstrip("#").lstrip()
        line, _, rest = behind.partition("\n")
        if line:
            heading = bool(rest.strip())
            if not (heading and _ENUMERATED.match(line)):
                value = _leading(line)[1]
                if value is not None or not heading:
                    return True, value
        at = len(text[:at].rstrip("#"))
    if box is None:
        opened = text.rfind("\\boxed{")
        return opened >= 0, None  # an unclosed box was truncated
    begin = text.rfind("\\", 0, box[0])
    end = box[1] + (text[box[1] : box[1] + 1] == "}")
    left, right = text[max(begin - 40, 0) : begin], text[end : end + 40]
    if _TIED_LEFT.search(left) or _TIED_RIGHT.match(right) or _changed("", right):
        return True, None
    if _SUM_LEFT.search(left) and not re.match(r"\s?=", right):
        return True, None
    return True, numbers.parse(text[slice(*box)])


def _unmarked(text: str) -> Fraction | None:
    """Returns the number of a text without marks."""
    if "<" in text:
        if "<think>" in text:
            return None  # truncated before any answer
        text = _NOTES.sub("", text)
        begin = text.rfind("<answer>")
        if begin >= 0:
            inside, closed, _ = text[begin + 8 :].partition("</answer>")
            return number(inside) if closed else None
        text = _TAGS.sub("\n", text)
    for phrase in [*_PHRASE.finditer(text)][: -_TRIES - 1 : -1]:
        behind = text[phrase.end() :]
        said, value = _leading(behind.lstrip().partition("\n")[0])
        if said and _BULLET.match(behind):
            return None  # "- 7 apples" in a list is not -7
        if said:
            return value
    if len(text) <= _WINDOW and (value := numbers.parse(text)) is not None:
        return value
    return _last(text)


def _leading(line: str) -> tuple[bool, Fraction | None]:
    """Returns a pair: True if a line begins with an answer rather than a word, and its number."""
    line = line[:_WINDOW]
    whole = numbers.parse(line)
    if whole is not None:
        return True, whole
    tokens, breaks = _tokens(line)
    first = 0
    while first < len(tokens) and (breaks[first] or tokens[first].lastgroup == "blank"):
        if tokens[first].lastgroup == "word":
            return False, None
        first += 1
    last = first
    while last < len(tokens) and not breaks[last]:
        last += 1
    if first == last:
        return False, None
    begin = tokens[first].start()
    end = tokens[last - 1].end()
    chunk, rest = _bare(line[:begin], line[begin:end]), line[end:]
    if chunk is None or _LIST_RIGHT.match(rest) or _changed("", rest):
        return True, None
    if _ODDS.match(rest):
        return True, None  # "1 in 6"
    tail = re.split(r"[.;:(]|,(?!\s*[0-9])", rest, maxsplit=1)[0]
    if re.search(r"[0-9]", tail):
        word = _NEXT_WORD.match(tail)
        if word is None or word.group(1).lower() not in words.CLAUSES:
            return True, None
    elif words.of(tail) & {"and", "or"} or _SECOND.search(re.split(r"[.;:]\s", rest)[0]):
        return True, None
    return True, numbers.parse(chunk)


def _last(text: str) -> Fraction | None:
    """Returns the last number of a text, if it stands alone."""
    at = max(text.rfind(digit) for digit in "0123456789")
    if at < 0:
        return None
    begin = text.rfind("\n", 0, at) + 1
    end = text.find("\n", at)
    cut = at - begin > _WINDOW
    begin = max(begin, at - _WINDOW)
    line = text[begin : at + _WINDOW if end < 0 else min(end, at + _WINDOW)]
    quote = re.match(r"\s*(?:>\s*)+", line)
    if quote and not cut:
        line, begin = line[quote.end() :], begin + quote.end()
    if _item(text, line):
        return None
    tokens, breaks = _tokens(line)
    first = last = next(i for i, token in enumerate(tokens) if token.end() > at - begin)
    while first > 0 and not breaks[first - 1]:
        first -= 1
    while last < len(tokens) and not breaks[last]:
        last += 1
    if cut and not first:
        return None
    first += tokens[first].lastgroup == "blank"
    start, stop = tokens[first].start(), tokens[last - 1].end()
    left, chunk, right = line[:start], line[start:stop], line[stop:]
    bare = _bare(left, chunk)
    if bare is None or _beside(left, chunk) or _changed("" if "=" in bare else left, right):
        return None
    if _BLANK_THOUSANDS.search(bare):
        return None  # "12 100 dollar bills"
    chained = "=" in bare and not re.match(r"\s*[A-Za-z]\w*\s*=", bare)
    if not chained and _LIST_LEFT.search(left):
        return None
    return numbers.parse(bare)


def _item(text: str, line: str) -> bool:
    """Returns True if a line is an item of a list, and its number the only one in it."""
    found = _ITEM.match(line)
    if found is None or re.search("[0-9]", line[found.end(1) :]):
        return False
    before = int(found.group(1)) - 1
    return not before or re.search(rf"(?m)^[\s*_#(]{{0,8}}{before}[.):]", text) is not None


def _tokens(line: str) -> tuple[list[re.Match], list[bool]]:
    """Returns the tokens of a line, and for each True if it ends a formula."""
    tokens = list(_TOKEN.finditer(line))
    return tokens, [_breaks(line, tokens, i) for i in range(len(tokens))]


def _breaks(line: str, tokens: list[re.Match], i: int) -> bool:
    token, kind = tokens[i], tokens[i].lastgroup
    before, after = line[: token.start()][-1:], line[token.end() :][:1]
    if kind in ("arrow", "bold"):
        return kind == "arrow" or not (before.isalnum() and after.isalnum())
    if kind == "word":
        tied = before.isdigit() or before in ("^", "_", "\\", "/") if before else False
        return not (tied or after.isdigit() or (after != "" and after in "^_("))
    if kind == "letter":
        near = line[token.end() :].lstrip()[:1]
        alone = (not before or before.isspace()) and (not after or after.isspace())
        return alone and token.group() in "aAI" and not (near and near in _OPERATORS)
    return kind == "other" and _breaks_sign(line, token.start(), before, after)


def _breaks_sign(line: str, at: int, before: str, after: str) -> bool:
    """Returns True if the sign at line[at] ends a formula."""
    sign = line[at]
    if sign == ".":
        return not after.isdigit() and "." not in (before, after)
    if sign == ",":
        return not after.isdigit() and after != "}" and not re.match(r",\s*\\!", line[at : at + 9])
    if sign == ":":
        return not (line[:at].rstrip()[-1:].isdigit() and line[at + 1 :].lstrip()[:1].isdigit())
    if sign == "!":
        return not (before.isdigit() or before in (")", "}", "$"))
    if sign == "'":
        return not before.isdigit()
    if sign == "*":
        return bool(before.strip()) != bool(after.strip(" \n.,;:!?)"))
    if sign == "(":
        return (
            not before.strip() and re.match(r"\s*[A-Za-z]{2}", line[at + 1 : at + 20]) is not None
        )
    if sign == "…":
        return not before.isdigit()
    if sign in ';?"“”‘„«»`—•':
        return True
    return not sign.isascii() and unicodedata.category(sign) == "So"


def _bare(left: str, chunk: str) -> str | None:
    """Strips unmatched brackets, which enclose more than the chunk; None if that is a formula."""
    chunk = chunk.strip()
    while chunk.endswith(")") and chunk.count(")") > chunk.count("("):
        if not re.search(r"\(\s*[A-Za-z]{2}[^()]*\Z", left):
            return None
        chunk = chunk[:-1].rstrip()
    if chunk.startswith("(") and chunk.count("(") > chunk.count(")"):
        chunk = chunk[1:]
    return chunk


def _beside(left: str, chunk: str) -> bool:
    """Returns True if a chunk in the middle of a text continues the text before it."""
    if "=" in chunk:
        return False  # whatever precedes it, the last side is the number
    # A bullet, a dash, or a sum whose first part is a word; "COVID-19".
    if re.match(r"[-+]\s", chunk) or left[-1:].isalnum():
        return True
    if _ROOT_OF.search(left) or _DENIED.search(left) or _ODDS_LEFT.search(left):
        return True
    word = _LAST_WORD.search(left)
    return word is not None and (
        word.group(1).lower() in words.CHANGE | words.LABELS or word.group(1) in words.MONTHS
    )


def _changed(left: str, right: str) -> bool:
    """Returns True if the words after a number change its value."""
    if _AND_PARTS.match(right):
        return True
    word = _NEXT_WORD.match(right)
    if word is None:
        return False
    measure = _MEASURE_LEFT.search(left)
    both = measure and measure.group(1) in words.UNITS and word.group(1) in words.UNITS
    if both or word.group(1) in words.MONTHS:
        return True
    return word.group(1).lower() in words.CHANGE - {"over", "times"}

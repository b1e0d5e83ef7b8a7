"""Compares formulas by math-verify in a process of its own, within bounds that the kernel keeps.

`symbolic` starts this file as a script. SymPy works out what a model wrote, which may take forever
or gigabytes inside one operation; math-verify's own clock is a signal that only a main thread gets
and that no long multiplication hears. Here the kernel ends the process, and only this one.

Protocol: a JSON list a line. First [path of modules, bytes of memory], answered by true once
math-verify is there; then [seconds, truth] (is it understood?) or [seconds, truth, answer] (are
they equal?), answered by true or false.
"""

import functools
import json
import sys
from typing import Any, TextIO

_START = 300.0  # seconds of computing that the imports may take


@functools.lru_cache(maxsize=4096)
def understood(truth: str) -> tuple[Any, ...]:
    """The expressions that math-verify reads in a truth; empty if it understands nothing."""
    import math_verify

    return tuple(
        f for f in math_verify.parse(truth, parsing_timeout=None) if not isinstance(f, str)
    )


def equal(truth: str, answer: str) -> bool:
    """True if math-verify finds the LaTeX of an answer equal to the truth."""
    import math_verify

    only = [math_verify.LatexExtractionConfig()]
    found = math_verify.parse(answer, only, parsing_timeout=None)
    return math_verify.verify(list(understood(truth)), found, timeout_seconds=None)


def serve(questions: TextIO, answers: TextIO) -> None:
    """Answers until the other side closes the stream."""
    sys.path[:], memory = json.loads(questions.readline())
    from jaxrl_eff.beside import bound  # found by the path just read

    clock = bound(memory)
    clock(_START)
    import logging

    logging.disable(logging.CRITICAL)  # that its clock is off
    ready = bool(understood(r"\boxed{\frac{1}{2}}"))  # also builds the grammar
    clock(0)
    print(json.dumps(ready), file=answers, flush=True)
    for line in questions:
        seconds, truth, *answer = json.loads(line)
        clock(seconds)
        try:
            reply = bool(equal(truth, *answer) if answer else understood(truth))
        except (Exception, MemoryError):
            reply = False
        clock(0)
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.stdin, sys.stdout)

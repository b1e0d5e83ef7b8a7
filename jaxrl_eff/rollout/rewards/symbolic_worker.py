"""Comparison of formulas by math-verify in a separate process, with limits set by the kernel.

`symbolic` starts this file as a script. SymPy evaluates a model's output, which can take forever or
gigabytes within one operation; math-verify's own timeout is a signal that only a main thread
receives and that does not interrupt a long multiplication. Here the kernel ends only this process.

Protocol: one JSON list per line. First [path of modules, bytes of memory], answered by true once
math-verify is imported; then [seconds, truth] (can it be parsed?) or [seconds, truth, answer] (are
they equal?), answered by true or false.
"""

import functools
import json
import sys
from typing import Any, TextIO

_START = 300.0  # CPU time limit of the imports, in seconds


@functools.lru_cache(maxsize=4096)
def understood(truth: str) -> tuple[Any, ...]:
    """Returns the expressions that math-verify parses in a truth; empty if it parses none."""
    import math_verify

    return tuple(
        f for f in math_verify.parse(truth, parsing_timeout=None) if not isinstance(f, str)
    )


def equal(truth: str, answer: str) -> bool:
    """Returns True if math-verify finds the LaTeX of an answer equal to the truth."""
    import math_verify

    only = [math_verify.LatexExtractionConfig()]
    found = math_verify.parse(answer, only, parsing_timeout=None)
    return math_verify.verify(list(understood(truth)), found, timeout_seconds=None)


def serve(questions: TextIO, answers: TextIO) -> None:
    """Answers questions until the stream is closed."""
    sys.path[:], memory = json.loads(questions.readline())
    from jaxrl_eff.beside import bound  # found through the path just read

    clock = bound(memory)
    clock(_START)
    import logging

    logging.disable(logging.CRITICAL)  # its warning that the timeout is disabled
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

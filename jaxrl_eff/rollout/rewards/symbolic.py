r"""The reward for answers that are formulas: math-verify, with limits on time and memory.

`symbolic_worker` makes the comparisons in a separate process, so that they work in any thread. One
takes some milliseconds; two numbers are compared in this process, exactly.
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

from jaxrl_eff.beside import Beside, Ended
from jaxrl_eff.rollout.rewards import answers
from jaxrl_eff.rollout.rewards import symbolic_worker as worker

MEMORY = 2**31  # bytes of the whole worker process
LONGEST = 4000  # characters of an answer


def math(*, field: str = "answer", anywhere: bool = True, seconds: float | int = 5.0) -> Callable:
    r"""Returns a reward: 1 if the response's answer equals the field's, else 0.

    Both can be formulas. Two numbers are compared as by `numeric`. Otherwise math-verify compares
    the LaTeX of the answers: formulas, sets, intervals, tuples, equations. A comparison that takes
    too long scores 0.

    Args:
        field: of the example: LaTeX, a number, or a text with its answer after `####` or in
            `\boxed{}`.
        anywhere: True: without `####` or `\boxed{}` in the response, its last LaTeX (or number)
            counts as the answer; False: it has no answer then.
        seconds: CPU time limit of one comparison.

    Raises:
        ImportError: math-verify is missing.
        ValueError: `seconds` is out of range; on use, the field has no answer that can be parsed.
    """
    if not 0 < seconds <= 3600:
        raise ValueError(f"seconds is {seconds}, but must be above 0 and at most 3600.")
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError("the reward 'math' needs math-verify: pip install 'jaxrl_eff[math]'.")

    def reward(example: dict[str, Any], response: str) -> float:
        truth, want = _truth(example, field, seconds)
        found = answers.number(response, anywhere=anywhere)
        if want is not None and found is not None:
            return float(want == found)
        answer = answers.marked(response)
        if answer is not None:
            answer = rf"\boxed{{{answer}}}"
        elif anywhere:
            answer = answers.spoken(response)
        if not answer or len(answer) > LONGEST:
            return 0.0
        return float(_ask([seconds, truth, answer]))

    return reward


def _truth(example: dict[str, Any], field: str, seconds: float) -> tuple[str, Any]:
    """Returns the LaTeX of the example's answer, and its number if it is one.

    Raises:
        ValueError: neither can be parsed.
    """
    if field not in example:
        raise ValueError(f"unknown field {field!r}; expected one of {sorted(map(str, example))}.")
    value = example[field]
    if not isinstance(value, bool) and isinstance(value, str | int | float):
        number = answers.truth(str(value))
        if number is not None:
            top, bottom = number.numerator, number.denominator
            return (
                rf"\boxed{{{top}}}" if bottom == 1 else rf"\boxed{{\frac{{{top}}}{{{bottom}}}}}",
                number,
            )
        said = answers.marked(str(value))
        latex = rf"\boxed{{{value if said is None else said}}}"
        if str(value).strip() and _ask([seconds, latex]):
            return latex, None
    raise ValueError(
        f"field {field!r} holds nothing that math-verify understands: {value!r:.80}; it may be "
        "LaTeX, a number, or a text whose answer stands behind '####' or in '\\boxed{}'."
    )


def _ask(question: list[Any]) -> bool:
    """Returns the worker's answer; False if the question ended the worker."""
    try:
        return _comparer.ask(_line(question), _read)
    except Ended:
        return False


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _read(answers: BinaryIO) -> bool:
    line = answers.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    return json.loads(line)


def _begin(process: subprocess.Popen) -> None:
    try:
        process.stdin.write(_line([sys.path, MEMORY]))
        process.stdin.flush()
        ready = _read(process.stdout)
    except (OSError, EOFError):
        ready = False
    if not ready:
        raise RuntimeError("the process that runs math-verify did not start.")


_comparer = Beside(worker.__file__, _begin)

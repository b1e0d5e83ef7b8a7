"""Strict reading of JSON from other programs: every field is read, known or rejected.

Ignoring a field that affects a model's results would silently give another model. Readers therefore
list every field that they know, and `checked` rejects the others by name. Fields that a caller
chooses to ignore are removed before anything is read.
"""

import json
import math
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

_EMPTY: tuple[Any, ...] = ("", [], {})
_SHOWN = 60  # characters of a value in a message


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no JSON object, or names a field twice with different values.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path.name} in {path.parent}.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be read.") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, but it should hold an object.")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found and found[name] != value:
            raise ValueError(f"{name!r} is {short(found[name])} and {short(value)}")
        found[name] = value
    return found


def short(value: Any) -> str:
    """Formats a value for a message, on one line and truncated."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def without(given: Mapping[str, Any], ignore: Collection[str]) -> dict[str, Any]:
    """Returns the fields that are not ignored; a name with a dot ignores a field of a field."""
    kept = {}
    for name, value in given.items():
        if name in ignore:
            continue
        if isinstance(value, dict):
            inner = [i.removeprefix(f"{name}.") for i in ignore if i.startswith(f"{name}.")]
            value = without(value, inner) if inner else value
        kept[name] = value
    return kept


def checked(
    where: str,
    given: Mapping[str, Any],
    known: Collection[str],
    *,
    only: Mapping[str, tuple[Any, ...]] = {},
    prefix: str = "",
) -> list[str]:
    """Checks the fields of an object against those that its reader knows.

    Args:
        where: source of the fields, for messages.
        known: names that are read, or that are harmless for any value.
        only: names that are supported with these values only.
        prefix: for an object within another: its own name and a dot.

    Returns:
        The unknown fields without effect (null, false, empty); see `warn`.

    Raises:
        ValueError: an unknown field has an effect, or one of `only` has another value.
    """
    idle = []
    for name, value in given.items():
        full = prefix + name
        if name in known:
            continue
        if name in only:
            if not any(_same(value, allowed) for allowed in only[name]):
                raise ValueError(
                    f"{where}: {full}={short(value)} is not supported; it may be "
                    f"{' or '.join(map(repr, only[name]))}. ignore=({full!r},) reads the file as "
                    "if it did not hold it."
                )
        elif value is None or value is False or any(_same(value, e) for e in _EMPTY):
            idle.append(full)
        else:
            raise ValueError(
                f"{where}: {full}={short(value)} is not known here, and may decide what the model "
                f"computes. ignore=({full!r},) goes on without it."
            )
    return idle


def warn(where: str, idle: Collection[str]) -> None:
    """Names unknown fields without effect, all in one warning."""
    if idle:
        warnings.warn(
            f"{where} has fields that are not known here; they say nothing and are passed over: "
            f"{', '.join(idle)}.",
            stacklevel=3,
        )


def _same(a: Any, b: Any) -> bool:
    """Returns True if equal, and both or neither are bools: 0 and 1 are not switches."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def integer(where: str, name: str, value: Any, least: int, most: int) -> int:
    """Returns the value of a field that must be an integer within two bounds.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(
            f"{where}: {name}={short(value)}, but it should be an integer from {least} to {most}."
        )
    return value


def number(
    where: str, name: str, value: Any, least: int | float = -math.inf, *, above: bool = False
) -> int | float:
    """Returns the value of a field that must be a finite number from `least` on, or above it.

    Raises:
        ValueError: it is not.
    """
    real = isinstance(value, int | float) and not isinstance(value, bool)
    # A JSON integer can be too large for a float, on which isfinite would raise.
    fits = real and abs(value) <= 1e300 and (value > least if above else value >= least)
    if not fits:
        bound = "" if least == -math.inf else f" {'above' if above else 'from'} {least:g}"
        raise ValueError(
            f"{where}: {name}={short(value)}, but it should be a finite number{bound}."
        )
    return value


def switch(where: str, name: str, value: Any) -> bool:
    """Returns the value of a field that must be true or false.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{where}: {name}={short(value)}, but it should be true or false.")
    return value


def texts(where: str, name: str, value: Any) -> list[str]:
    """Returns the value of a field that must be a list of strings; null is an empty one.

    Raises:
        ValueError: it is something else.
    """
    value = [] if value is None else value
    if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
        raise ValueError(f"{where}: {name}={short(value)}, but it should be a list of strings.")
    return value


def mapping(where: str, name: str, value: Any) -> dict[str, Any]:
    """Returns the value of a field that must be an object; null is an empty one.

    Raises:
        ValueError: it is something else.
    """
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {name}={short(value)}, but it should be an object.")
    return value

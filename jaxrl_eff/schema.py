"""Dataclasses as schemas: types, ranges, and the function that fills one from a config's section.

A field's annotation defines its allowed values. `Annotated[float, Within(0)]` is a number of at
least 0; a number without a range must be finite. Errors name the value's path.
"""

import contextlib
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from jaxrl_eff import secret

_DEEPEST = 32  # nesting of sections; a self-referencing section never ends


@dataclasses.dataclass(frozen=True)
class Within:
    """The range of a number.

    Attributes:
        low, high: the smallest and the largest value. NaN is in no range.
        above: True if the smallest value itself is not allowed.
        infinite: True if infinite values within the range are allowed.
    """

    low: float | int = -math.inf
    high: float | int = math.inf
    above: bool = False
    infinite: bool = False

    def holds(self, value: float | int) -> bool:
        if isinstance(value, float) and not math.isfinite(value) and not self.infinite:
            return False
        return self.low <= value <= self.high and not (self.above and value == self.low)

    def __str__(self) -> str:
        parts = []
        if self.low > -math.inf:
            parts.append(f"{'above' if self.above else 'at least'} {self.low:g}")
        if self.high < math.inf:
            parts.append(f"at most {self.high:,}")
        return " and ".join(parts) or "finite"


@dataclasses.dataclass(frozen=True)
class Switch:
    """Marks the field that enables its section: without it the other fields are not read."""


@dataclasses.dataclass(frozen=True)
class Regex:
    """Marks text that must be a regular expression."""


Pattern = Annotated[str, Regex()]
Count = Annotated[int, Within(1)]
Natural = Annotated[int, Within(0)]
NonNegative = Annotated[float, Within(0)]
Positive = Annotated[float, Within(0, above=True)]
Share = Annotated[float, Within(0, 1)]
Seed = Annotated[int, Within(0, 2**32 - 1)]

_INTEGERS = Within(-(2**63), 2**63 - 1)
_FLOATS = Within()


def build(cls: type, section: Mapping[Any, Any], path: str) -> Any:
    """Fills a dataclass from a config section.

    Raises:
        ValueError: an unknown key, a missing one, a value of the wrong type or out of range, or
            values in a section whose switch is not given.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in section:
        if key not in fields:
            raise ValueError(f"{path}: {unknown_field(key, fields)}")
    for name, f in fields.items():
        if _default(f) is dataclasses.MISSING and name not in section:
            raise ValueError(f"{path}.{name} is missing.")
    hints = typing.get_type_hints(cls, include_extras=True)
    values = {k: _convert(hints[k], v, f"{path}.{k}") for k, v in section.items()}
    for name, hint in hints.items():
        if name not in section and any(isinstance(m, Switch) for m in _marks(hint)):
            for other, value in values.items():
                if value != _default(fields[other]):
                    raise ValueError(
                        f"{path}.{other} is {secret.told(f'{path}.{other}', value)}, but "
                        f"{path}.{name} is not given, "
                        "without which nothing reads it."
                    )
    try:
        return cls(**values)
    except ValueError as error:
        message = str(error)
        raise ValueError(
            message if message.startswith("config") else f"{path}: {message}"
        ) from None


def unknown_field(key: Any, known: Iterable[str]) -> str:
    """Message about an unknown key, with the known ones and the closest match."""
    known = sorted(known)
    close = difflib.get_close_matches(key, known, n=1) if isinstance(key, str) else []
    message = f"unknown field {key!r:.200}; expected one of {known}."
    return message + (f" Did you mean {close[0]!r}?" if close else "")


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _marks(hint: Any) -> tuple[Any, ...]:
    return hint.__metadata__ if typing.get_origin(hint) is Annotated else ()


def _convert(hint: Any, value: Any, path: str, marks: tuple[Any, ...] = ()) -> Any:
    """Converts `value` to `hint`; integers become floats, lists tuples, numpy scalars Python's."""
    if more := _marks(hint):
        return _convert(typing.get_args(hint)[0], value, path, (*marks, *more))
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return _plain(value, path)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            if isinstance(value, Mapping) and typing.get_origin(option) is not dict:
                continue
            with contextlib.suppress(_WrongType):
                return _convert(option, value, path, marks)
        raise _wrong(hint, value, path)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise _wrong(hint, value, path)
        return build(hint, value, path)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong(hint, value, path)
        return {_name(k, path): _convert(args[1], v, f"{path}.{k}") for k, v in value.items()}
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise _wrong(hint, value, path)
        return tuple(_convert(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    return _scalar(hint, _unwrapped(value), path, marks)


def _scalar(hint: Any, value: Any, path: str, marks: tuple[Any, ...]) -> Any:
    if hint is type(None) and value is None:
        return None
    if hint is float and type(value) is int and not _is_huge(value):
        value = float(value)
    if hint not in (int, float, str, bool) or type(value) is not hint:
        raise _wrong(hint, value, path)
    if hint in (int, float):
        ranges = (m for m in marks if isinstance(m, Within))
        for allowed in (*ranges, _INTEGERS) if hint is int else (next(ranges, _FLOATS),):
            if not allowed.holds(value):
                raise ValueError(f"{path} is {_digits(value)}, but must be {allowed}.")
    if hint is str and any(isinstance(m, Regex) for m in marks):
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{path} is {value!r:.200}, no regular expression: {error}.") from None
    return value


def _digits(value: Any) -> str:
    return f"a number of {value.bit_length()} bits" if _is_huge(value) else f"{value!r}"


def _is_huge(value: Any) -> bool:
    """Returns True for integers of thousands of digits, which Python refuses to print."""
    return isinstance(value, int) and value.bit_length() > 1000


def _plain(value: Any, path: str, depth: int = 0) -> Any:
    """Converts containers to the standard library's; all values must be serializable.

    Raises:
        ValueError: a value of another kind, which no checkpoint could identify; or sections nested
            too deeply.
    """
    if depth > _DEEPEST:
        raise ValueError(f"{path:.200}... is nested more than {_DEEPEST} deep.")
    if isinstance(value, Mapping):
        return {k: _plain(v, f"{path}.{k}", depth + 1) for k, v in value.items()}
    if isinstance(value, tuple | list | set | frozenset):
        items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        return tuple(_plain(v, f"{path}[{i}]", depth + 1) for i, v in enumerate(items))
    value = _unwrapped(value)
    if _is_huge(value):
        raise ValueError(f"{path} is {_digits(value)}, but must be {_INTEGERS}.")
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise ValueError(
        f"{path} is {secret.told(path, value)} ({type(value).__name__}); a config holds text, "
        "numbers, True, False, None, and tuples and dicts of them."
    )


def _unwrapped(value: Any) -> Any:
    """Converts a numpy scalar to Python's."""
    if hasattr(value, "dtype") and getattr(value, "shape", None) == ():
        return value.item()
    return value


def _name(key: Any, path: str) -> str:
    if not isinstance(key, str):
        raise ValueError(f"{path} has the key {key!r:.200} ({type(key).__name__}); keys are text.")
    return key


class _WrongType(ValueError):
    """A value with none of the allowed types."""


def _wrong(hint: Any, value: Any, path: str) -> _WrongType:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        name = " or ".join(_named(a) for a in typing.get_args(hint))
    else:
        name = _named(hint)
    told = _digits(value) if _is_huge(value) else f"{value!r:.200} ({type(value).__name__})"
    return _WrongType(f"{path} is {told}, but it must be {name}.")


def _named(hint: Any) -> str:
    hint = typing.get_args(hint)[0] if _marks(hint) else hint
    return hint.__name__ if type(hint) is type else str(hint)

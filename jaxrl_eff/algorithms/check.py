"""How a configuration refuses a value: it names the field, the value and what is allowed."""

from collections.abc import Sequence
from typing import Any


def require(config: Any, field: str, ok: bool, allowed: str) -> None:
    """Raises ValueError with the field's value and what is allowed, unless `ok`."""
    if not ok:
        name = f"{type(config).__name__}.{field}"
        raise ValueError(f"{name} is {getattr(config, field)!r}; it must be {allowed}.")


def require_one_of(config: Any, field: str, allowed: Sequence[str]) -> None:
    """`require` that the field's value is in `allowed`."""
    require(config, field, getattr(config, field) in allowed, f"one of {', '.join(allowed)}")

"""What configs share: reading the argument after the colon, and small tables."""

from typing import Any


def parse_arg(arg: str | None, **defaults: Any) -> dict[str, Any]:
    """`"model=DIR,steps=5,fast"` -> a dict with the types of the defaults.

    A name without "=" is a switch. Raises ValueError for a name without a default.
    """
    values = dict(defaults)
    for part in filter(None, (arg or "").split(",")):
        name, given, value = part.partition("=")
        if name not in defaults:
            raise ValueError(f"the config has no argument {name!r}; it has {sorted(defaults)}.")
        kind = type(defaults[name])
        if not given and kind is not bool:
            raise ValueError(f"the argument {name!r} needs a value: {name}=...")
        try:
            values[name] = (
                value.lower() not in ("0", "false", "no") if kind is bool else kind(value)
            )
        except ValueError:
            raise ValueError(f"{name}={value!r} is not {kind.__name__}.") from None
    return values

"""Lazy public names of a package: using one imports only its module."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def table(
    package: str, homes: Mapping[str, tuple[str, ...]], modules: Sequence[str] = ()
) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """Returns `__all__`, `__getattr__` and `__dir__` of a package.

    Args:
        package: its `__name__`.
        homes: module of the package -> the names that it exports through the package.
        modules: modules of the package that are public; the last part of each path is its name.
    """
    home = {name: module for module, names in homes.items() for name in names}
    paths = {module.rpartition(".")[2]: module for module in modules}
    names = sorted({*home, *paths})

    def get(name: str) -> Any:
        if name in paths:
            return importlib.import_module(f"{package}.{paths[name]}")
        if name in home:
            return getattr(importlib.import_module(f"{package}.{home[name]}"), name)
        raise AttributeError(f"{package}: unknown name {name!r}; expected one of {names}.")

    return names, get, lambda: names

"""Types and shapes are checked as with jaxtyping's own decorator, in a fraction of the time.

jaxtyping binds the arguments of every call, and checks them twice. Here a signature without arrays
is beartype's alone, and one without annotations costs nothing.
"""

import dataclasses
import functools
import inspect
import typing

import jaxtyping
from jaxtyping import AbstractArray, PyTree

_jaxtyped = jaxtyping.jaxtyped


def decorate(fn=None, *, typechecker):
    """In place of `jaxtyping.jaxtyped`, which the import hook applies to functions and classes."""
    if fn is None:
        return functools.partial(decorate, typechecker=typechecker)
    if isinstance(fn, classmethod | staticmethod):
        return type(fn)(decorate(fn.__func__, typechecker=typechecker))
    if inspect.isclass(fn):
        if dataclasses.is_dataclass(fn) and "__init__" in vars(fn):
            fn.__init__ = decorate(fn.__init__, typechecker=typechecker)
        return fn
    if not inspect.isfunction(fn):
        return _jaxtyped(fn, typechecker=typechecker)
    if not fn.__annotations__:
        return fn
    try:
        hints = typing.get_type_hints(fn, include_extras=True)
    except Exception:  # a name that cannot be resolved (yet)
        return _jaxtyped(fn, typechecker=typechecker)
    if any(map(_has_shapes, hints.values())):
        return _jaxtyped(typechecker(fn), typechecker=None)
    return typechecker(fn)


def _has_shapes(hint):
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return True
    return (
        hint is PyTree
        or getattr(hint, "__module__", "") == "jaxtyping"
        or any(map(_has_shapes, typing.get_args(hint)))
    )

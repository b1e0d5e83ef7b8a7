"""Sources of examples: a source has a length, and `source[i]` is a dict.

Every source here is a frozen pair of a size and a function that reads the i-th example, so sources
nest: a split or a mapping is again a source. `source_files` makes sources over files. A plain list
of dicts is a source too.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np

Example = dict[str, Any]


@runtime_checkable
class Source(Protocol):
    """Interface of the loader's data: any sized, indexable object, without subclassing.

    Example:
        >>> from jaxrl_eff.data import Source
        >>> isinstance([{"prompt": "12>"}], Source)
        True
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex, /) -> Example: ...


@dataclass(frozen=True)
class Examples:
    """A source of `size` examples; `read(i)` returns the i-th, 0 <= i < size.

    `name` is for messages, and so is `place(i)`: the position of the i-th in its file.

    Example:
        >>> from jaxrl_eff.data import Examples
        >>> squares = Examples(3, lambda i: {"square": i**2}, "squares")
        >>> len(squares), squares[2]
        (3, {'square': 4})
    """

    size: int
    read: Callable[[int], Example]
    name: str
    place: Callable[[int], str] | None = None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: SupportsIndex, /) -> Example:
        index = operator.index(index)
        # Negative indices raise: a filler's -1 would otherwise read the last example.
        if not 0 <= index < self.size:
            raise IndexError(f"{self.name} has {self.size} examples, so there is no {index}.")
        return self.read(index)


def python_source(examples: Sequence[Example] | Callable[[], Iterable[Example]]) -> Examples:
    """Makes a source over examples in memory.

    Args:
        examples: a sequence of dicts, or a function without arguments that returns an iterable
            of them; the function is called once, immediately.

    Example:
        >>> from jaxrl_eff.data import python_source
        >>> python_source([{"prompt": "12>"}])[0]
        {'prompt': '12>'}
    """
    rows = list(examples()) if callable(examples) else examples
    return Examples(len(rows), rows.__getitem__, "the Python source", "example {}".format)


def mapped(source: Source, fn: Callable[[Example], Example]) -> Examples:
    """Applies `fn` to every example on access, e.g. to rename or join fields.

    Example:
        >>> from jaxrl_eff.data import mapped
        >>> mapped([{"question": "12"}], lambda example: {"prompt": example["question"] + ">"})[0]
        {'prompt': '12>'}
    """
    return Examples(len(source), lambda index: fn(source[index]), _name(source), _placed(source))


def subset(source: Source, indices: Sequence[int] | np.ndarray) -> Examples:
    """A source of the examples at `indices`, in that order.

    Example:
        >>> from jaxrl_eff.data import subset
        >>> chosen = subset([{"n": n} for n in range(9)], [4, 2])
        >>> len(chosen), chosen[0]
        (2, {'n': 4})
    """
    chosen = np.asarray(indices, np.int64)
    if chosen.size and (chosen.min() < 0 or chosen.max() >= len(source)):
        raise ValueError(
            f"a subset of {len(source)} examples cannot hold {chosen.min()}..{chosen.max()}."
        )
    return Examples(
        chosen.size,
        lambda index: source[int(chosen[index])],
        _name(source),
        lambda index: place(source, int(chosen[index])),
    )


def holdout(source: Source, n: int, *, seed: int) -> tuple[Examples, Examples]:
    """Splits off n examples chosen at random by the seed.

    Returns:
        The rest and the held-out n: disjoint, together everything, each in the source's order.

    Example:
        >>> from jaxrl_eff import holdout
        >>> train, held_out = holdout([{"n": n} for n in range(10)], 2, seed=0)
        >>> len(train), len(held_out)
        (8, 2)
    """
    if not 0 <= n <= len(source):
        raise ValueError(f"cannot hold out {n} of {len(source)} examples.")
    held = np.zeros(len(source), bool)
    held[np.random.default_rng(seed).permutation(len(source))[:n]] = True
    return subset(source, np.flatnonzero(~held)), subset(source, np.flatnonzero(held))


def place(source: Source, index: int) -> str:
    """Position of an example, for messages: file and line (from 1), or row or item (from 0).

    For a subset it is the position in the file, which can hold other examples too.
    """
    if isinstance(source, Examples) and source.place is not None:
        return source.place(index)
    name = getattr(source, "name", "")
    return f"example {index} of {name}" if name else f"example {index}"


def error_message(source: Source, index: int, error: BaseException) -> str:
    """Message of an error about an example, prefixed with the example's position if it lacks it."""
    where = place(source, index)
    text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return text if text.startswith(where) else f"{where}: {text}"


def _placed(source: Source) -> Callable[[int], str]:
    return lambda index: place(source, index)


def _name(source: Source) -> str:
    return source.name if isinstance(source, Examples) else "the source"

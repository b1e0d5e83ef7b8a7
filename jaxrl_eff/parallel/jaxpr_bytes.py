"""Bytes that a program sends over each mesh axis, counted on its jaxpr.

Compiled programs are unsuitable for this: the CPU compiler widens narrow dtypes in collectives and
merges equal ones. A jaxpr contains the collectives as written, with trip counts of loops.

All counts are bytes that one device receives in one execution. A collective over several axes is
assumed to send directly from device to device: every byte counts on the slowest axis in which
sender and receiver differ.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr

# Bytes received from each other device of the group, in units of the operand, by group size.
_SHARES = {
    "all_gather": lambda g: 1.0,
    "all_gather_invariant": lambda g: 1.0,
    "reduce_scatter": lambda g: 1.0 / g,
    "all_to_all": lambda g: 1.0 / g,
    "psum": lambda g: 2.0 / g,
    "psum2": lambda g: 2.0 / g,
    "psum_invariant": lambda g: 2.0 / g,
    "pmax": lambda g: 2.0 / g,
    "pmin": lambda g: 2.0 / g,
}
_FREE = {"axis_index", "pvary", "pcast", "pbroadcast", "preduced", "vary_unreduced_cast"}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """One collective of a program.

    Attributes:
        primitive: its name in the jaxpr.
        dtype: of its operand.
        received: mesh axis -> bytes that a device receives in one execution of the collective.
        times: executions in one execution of the program.
    """

    primitive: str
    dtype: str
    received: Mapping[str, float]
    times: int


def collectives(program: ClosedJaxpr | Jaxpr, sizes: Mapping[str, int]) -> list[Traffic]:
    """Collectives of a jaxpr, including those in loops, calls and differentiated functions.

    For a conditional, the branch with the most bytes is counted.

    Args:
        program: as returned by `jax.make_jaxpr`.
        sizes: mesh axis -> size, the slowest first.

    Raises:
        ValueError: a collective runs over an axis without a size, in a loop of unknown length, or
            is of a kind whose bytes are unknown.
    """
    return list(_walk(program, dict(sizes), 1))


def count(program: ClosedJaxpr | Jaxpr, sizes: Mapping[str, int]) -> dict[str, float]:
    """Mesh axis -> bytes that a device receives over it in one execution; see `collectives`."""
    return _sum(collectives(program, sizes), sizes)


def summed(nbytes: float | int, sizes: Mapping[str, int]) -> dict[str, float]:
    """Traffic of an all-reduce over all these axes, slowest first; as `count` returns it."""
    ways = list(sizes.values())
    share = 2.0 / math.prod(ways) * nbytes
    return {a: share * (n - 1) * math.prod(ways[i + 1 :]) for i, (a, n) in enumerate(sizes.items())}


def contract(
    counted: Mapping[str, float], promised: Mapping[str, float], tolerance: float = 0.02
) -> dict[str, float]:
    """Ratios of counted to expected bytes, by mesh axis.

    Raises:
        ValueError: an axis exceeds its expected bytes by more than the tolerance.
    """
    ratios = {}
    for axis, bytes_ in counted.items():
        limit = promised.get(axis, 0.0)
        ratios[axis] = bytes_ / limit if limit else (math.inf if bytes_ else 1.0)
        if ratios[axis] > 1 + tolerance:
            raise ValueError(
                f"axis {axis!r} carries {bytes_:,.0f} bytes a device, {ratios[axis]:.3f} times the "
                f"{limit:,.0f} it should; at most {1 + tolerance:.2f} times is allowed."
            )
    return ratios


def _sum(traffic: list[Traffic], sizes: Mapping[str, int]) -> dict[str, float]:
    return {axis: math.fsum(t.received.get(axis, 0.0) * t.times for t in traffic) for axis in sizes}


def _walk(program: Any, sizes: dict[str, int], times: int) -> Iterator[Traffic]:
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "cond":
            each = [list(_walk(b, sizes, times)) for b in params["branches"]]
            yield from max(each, key=lambda t: sum(_sum(t, sizes).values()))
        elif name == "while":
            inner = [*_walk(params["cond_jaxpr"], sizes, 1), *_walk(params["body_jaxpr"], sizes, 1)]
            if inner:
                raise ValueError(
                    f"a loop of unknown length runs {inner[0].primitive}; use lax.scan, or "
                    "fori_loop with fixed ends."
                )
        elif name in _FREE:
            continue
        elif name in _SHARES or name == "ppermute":
            for operand in eqn.invars:
                yield Traffic(
                    name, str(operand.aval.dtype), _received(eqn, operand.aval, sizes), times
                )
        else:
            inner = [j for value in params.values() for j in _jaxprs(value)]
            if not inner and _axes(params, sizes):
                raise ValueError(f"{name} runs over {_axes(params, sizes)}; its bytes are unknown.")
            for j in inner:
                yield from _walk(j, sizes, times * params.get("length", 1))


def _jaxprs(value: Any) -> Iterator[Any]:
    if isinstance(value, ClosedJaxpr | Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _jaxprs(one)


def _axes(params: Mapping[str, Any], sizes: dict[str, int]) -> list[str]:
    """Mesh axes that a collective runs over, slowest first."""
    names = params.get("axis_name", params.get("axes", ()))
    names = names if isinstance(names, tuple | list) else (names,)
    names = [n for n in names if isinstance(n, str)]
    missing = [n for n in names if n not in sizes]
    if missing:
        raise ValueError(f"unknown axis {missing[0]!r}; expected one of {[*sizes]}.")
    return sorted(names, key=list(sizes).index)


def _received(eqn: Any, operand: Any, sizes: dict[str, int]) -> dict[str, float]:
    axes, params = _axes(eqn.params, sizes), eqn.params
    nbytes = float(operand.size * operand.dtype.itemsize)
    if eqn.primitive.name == "ppermute":
        written = params["axis_name"]
        written = written if isinstance(written, tuple | list) else (written,)
        return _permuted(params["perm"], [(n, sizes[n]) for n in written], axes, nbytes)
    groups = params.get("axis_index_groups")
    ways = [len(groups[0])] if groups else [sizes[a] for a in axes]
    share = nbytes * _SHARES[eqn.primitive.name](math.prod(ways))
    return {a: share * (ways[i] - 1) * math.prod(ways[i + 1 :]) for i, a in enumerate(axes)}


def _permuted(
    pairs: Any, written: list[tuple[str, int]], axes: list[str], nbytes: float
) -> dict[str, float]:
    """Bytes of a permute by axis crossed; every device receives at most once."""
    crossed = set()
    for source, target in pairs:
        apart = set()
        for name, size in reversed(written):
            if source % size != target % size:
                apart.add(name)
            source, target = source // size, target // size
        crossed |= {next(a for a in axes if a in apart)} if apart else set()
    return dict.fromkeys(crossed, nbytes)

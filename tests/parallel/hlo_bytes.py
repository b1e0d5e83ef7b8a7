"""Collectives of a compiled program and their bytes, parsed from its HLO text.

A resharding plan predicts its traffic; this counts what XLA emits after all of its passes. It works
for any program whose collectives are to be priced or tested.
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any

KINDS = (
    "all-gather",
    "all-to-all",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\]")
_OP = re.compile(
    r"=\s+(?P<type>\(.*?\)|\S+)\s+(?P<kind>" + "|".join(KINDS) + r")(?P<start>-start)?\("
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        kind: as in `KINDS`.
        dtype: element type, as XLA writes it.
        group: devices per replica group.
        received: bytes that all devices together receive in one execution of the program.
        times: executions per execution of the program (trip counts of the enclosing loops).
    """

    kind: str
    dtype: str
    group: int
    received: float
    times: int


def collectives(program: Any) -> list[Collective]:
    """Collectives of a compiled program, or of its text.

    Bytes received by n devices in groups of g, with B bytes of output per device: all-gather,
    all-to-all and collective-broadcast n B (g-1)/g; all-reduce twice that; reduce-scatter n B
    (g-1); collective-permute B for every pair of distinct devices. Every branch of a conditional
    is counted.

    Raises:
        ValueError: a loop around a collective has no known trip count.
    """
    text = program if isinstance(program, str) else program.as_text()
    header = re.search(r"num_partitions=(\d+)", text)
    replicas = re.search(r"replica_count=(\d+)", text)
    n = int(header[1] if header else 1) * int(replicas[1] if replicas else 1)
    found, calls, name = {}, {}, ""
    for line in text.splitlines():
        opened = re.match(r"(?:ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$", line)
        if opened:
            name = opened[1]
        for callee, trips in _called(line):
            calls.setdefault(callee, []).append((name, trips))
        op = _OP.search(line)
        if op:
            found.setdefault(name, []).append(_collective(op, line, n))
    return [
        dataclasses.replace(c, times=t, received=c.received * t)
        for name, ops in found.items()
        for t in [_times(name, calls)]
        for c in ops
    ]


def received(program: Any) -> float:
    """Bytes that all devices of a compiled program receive together."""
    return math.fsum(c.received for c in collectives(program))


def count(programs: Iterable[Any]) -> dict[str, int]:
    """Number of executed collectives by kind."""
    out: dict[str, int] = {}
    for program in programs:
        for c in collectives(program):
            out[c.kind] = out.get(c.kind, 0) + c.times
    return out


def largest(program: Any) -> int:
    """Per-device bytes of the largest array in a compiled program."""
    text = program if isinstance(program, str) else program.as_text()
    return max((int(_bytes(m)) for m in _SHAPE.finditer(text)), default=0)


def _called(line: str) -> list[tuple[str, int | None]]:
    """(computation, trip count) pairs that an instruction runs."""
    body = re.search(r"\bwhile\(.*body=%?([\w.\-]+)", line)
    if body:
        trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
        return [(body[1], int(trips[1]) if trips else None)]
    names = re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", line)
    branches = re.search(r"branch_computations=\{([^}]*)\}", line)
    if branches:
        names += [b.strip().lstrip("%") for b in branches[1].split(",")]
    return [(name, 1) for name in names]


def _times(name: str, calls: dict[str, list[tuple[str, int | None]]]) -> int:
    if name not in calls:
        return 1
    total = 0
    for caller, trips in calls[name]:
        if trips is None:
            raise ValueError(f"the loop of {name} has no known number of trips.")
        total += trips * _times(caller, calls)
    return total


def _bytes(shape: re.Match[str]) -> float:
    name = shape[1]
    digits = re.match(r"[a-z]+(\d+)", name)
    bits = _BITS[name] if name in _BITS else int(digits[1]) if digits else 0
    sizes = [int(s.lstrip("<=")) for s in shape[2].split(",") if s]
    return math.prod(sizes) * bits * (2 if name.startswith("c") else 1) / 8


def _collective(op: re.Match[str], line: str, n: int) -> Collective:
    kind = op["kind"]
    shapes = list(_SHAPE.finditer(op["type"]))
    if op["start"]:  # type is (operands, results, ...); keep the results
        half = [s for s in shapes if s[1] not in ("token",)]
        if kind in ("all-reduce", "all-to-all"):
            shapes = half
        elif kind == "collective-permute":
            shapes = half[1:2]
        else:
            shapes = half[len(half) // 2 :]
    size = sum(_bytes(s) for s in shapes)
    dtype = shapes[0][1] if shapes else ""
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", line)[1]
        moved = sum(a != b for a, b in re.findall(r"(\d+),(\d+)", pairs))
        return Collective(kind, dtype, 2, size * moved, 1)
    g = _group(line, n)
    each = {
        "all-reduce": 2 * size * (g - 1) / g,
        "reduce-scatter": size * (g - 1),
        "collective-broadcast": size * (g - 1) / g,
    }.get(kind, size * (g - 1) / g)
    return Collective(kind, dtype, g, n * each, 1)


def _group(line: str, n: int) -> int:
    """Group size from `{{0,1},{2,3}}`, `[groups,size]<=[...]` or mesh axes; n if unspecified."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:
        return len(listed[1].split(","))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if iota:
        return int(iota[2])
    named = re.search(r"replica_groups=mesh\[(.*?)\]\s*\{(.*?)\}", line)
    if named:
        sizes = {a: int(k) for a, k in re.findall(r"'(\w+)'=(\d+)", named[1])}
        group = 1
        for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2]):
            group *= int(part) if part else sizes[axis]
        return group
    return n

"""The total order of a step's operations, and the proof that no two processes disagree about it.

A plan becomes one list: calls, movements of arrays, reallocations of parameters. Each process runs
the part of it that touches its devices, in the list's order. Collectives that two processes share
then meet in the same order on both, and nothing can wait in a circle. The lists are made by every
process for itself, from its own copy of config and plan; so before anything runs they are compared.
"""

import dataclasses
import graphlib
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np


@dataclasses.dataclass(frozen=True)
class Operation:
    """One thing that some processes do together.

    Attributes:
        kind: "call": a model function call or local call; "move": arrays, from where they were
            written to where a call reads them; "realloc": a model's parameters to where a call
            uses them; "keep": today's parameters, put aside for a call that uses old ones;
            "tell": a call's metrics, to all processes.
        name: unique in a step: the call's name, or "source to call".
        call: the call it belongs to.
        arrays: names of the arrays of a move.
        processes: who takes part, ascending.
    """

    kind: Literal["call", "move", "realloc", "keep", "tell"]
    name: str
    call: str
    processes: tuple[int, ...]
    arrays: tuple[str, ...] = ()


def project(operations: Sequence[Operation], process: int) -> tuple[Operation, ...]:
    """The operations that a process takes part in, in order."""
    return tuple(op for op in operations if process in op.processes)


def check_order(projections: Mapping[int, Sequence[Operation]]) -> None:
    """Checks that processes which run their operations one by one can never wait in a circle.

    Any two must see the operations that they share in the same order. That is not enough: three
    processes of which each two share one operation can wait in a circle too. So the orders of all
    processes together must have no cycle.

    Args:
        projections: process -> the operations it takes part in, in its order.

    Raises:
        ValueError: two processes disagree, or the orders have a cycle; says which, and where.
    """
    processes = sorted(projections)
    for i, a in enumerate(processes):
        for b in processes[i + 1 :]:
            ours = [op.name for op in projections[a] if b in op.processes]
            theirs = [op.name for op in projections[b] if a in op.processes]
            if ours == theirs:
                continue
            at = next(
                (n for n, (x, y) in enumerate(zip(ours, theirs, strict=False)) if x != y),
                min(len(ours), len(theirs)),
            )
            x, y = (names[at] if at < len(names) else "nothing" for names in (ours, theirs))
            raise ValueError(
                f"processes {a} and {b} would wait for each other: as operation {at} that they "
                f"share, process {a} runs {x!r} and process {b} {y!r}. Do all processes have the "
                "same config, plan and code?"
            )
    before: dict[str, set[str]] = {}
    for ops in projections.values():
        for first, second in itertools.pairwise(ops):
            before.setdefault(second.name, set()).add(first.name)
    try:
        graphlib.TopologicalSorter(before).prepare()
    except graphlib.CycleError as error:
        raise ValueError(
            f"processes would wait for each other: {' -> '.join(error.args[1])}."
        ) from None


def meet(key: str, *, seconds: int = 1800) -> None:
    """Waits for all processes. Collectives that start together then find each other in time."""
    import jax

    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        multihost.get_barrier_sync_fn()(key=key, timeout_ms=1000 * seconds)


def texts_of_all(text: str) -> list[str]:
    """What every process says, in their order. Every process must call."""
    every, sizes = _gathered(np.frombuffer(text.encode(), np.uint8))
    return [bytes(row[:n]).decode() for row, n in zip(every, sizes.tolist(), strict=True)]


def _gathered(mine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[processes, most rows, ...], filled with zeros, and how many rows each process has."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return mine[None], np.array([len(mine)])
    sizes = multihost_utils.process_allgather(np.array([len(mine)], np.int32)).reshape(-1)
    padded = np.zeros((int(sizes.max()), *mine.shape[1:]), mine.dtype)
    padded[: len(mine)] = mine
    every = multihost_utils.process_allgather(padded)
    return every.reshape(len(sizes), *padded.shape), sizes


def digest(operations: Sequence[Operation]) -> np.ndarray:
    """`[n, 2]` uint32: one row an operation, equal for equal ones."""
    rows = [
        hashlib.sha256(repr((op.kind, op.name, op.arrays, op.processes)).encode()).digest()[:8]
        for op in operations
    ]
    return np.frombuffer(b"".join(rows), np.uint32).reshape(-1, 2)


def agree(operations: Sequence[Operation]) -> None:
    """Checks with all processes of the job that they have the same list. Every process must call.

    Raises:
        ValueError: the lists differ, on every process.
    """
    import jax

    check_order({p: project(operations, p) for p in range(jax.process_count())})
    if jax.process_count() == 1:
        return
    every, lengths = _gathered(digest(operations))
    differs = (every != every[0]).any(-1)
    if len(set(lengths.tolist())) > 1 or differs.any():
        process = int(differs.any(-1).argmax())
        at = int(differs[process].argmax())
        known = operations[at].name if at < len(operations) else "nothing"
        raise ValueError(
            f"processes 0 and {process} would wait for each other: their operation {at} differs "
            f"(here it is {known!r}). Do all processes have the same config, plan and code?"
        )

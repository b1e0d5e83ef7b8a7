"""The total order of a step's operations, and the check that all processes agree on it.

A plan becomes one list: calls, moves of arrays, reallocations of parameters. Each process runs the
operations that involve its devices, in the list's order. Collectives shared by two processes then
occur in the same order on both, so there is no deadlock. Every process builds the list from its own
copy of config and plan, so the lists are compared before anything runs.
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
    """One operation that some processes run together.

    Attributes:
        kind: "call": a model function call or local call; "move": arrays, from where they were
            written to where a call reads them; "realloc": a model's parameters to a call that uses
            them; "keep": the current parameters, stored for a call that uses old ones; "tell": a
            call's metrics, to all processes.
        name: unique in a step: the call's name, or "source to call".
        call: the call it belongs to.
        arrays: names of the arrays of a move.
        processes: participating processes, ascending.
    """

    kind: Literal["call", "move", "realloc", "keep", "tell"]
    name: str
    call: str
    processes: tuple[int, ...]
    arrays: tuple[str, ...] = ()


def project(operations: Sequence[Operation], process: int) -> tuple[Operation, ...]:
    """Returns the operations that a process takes part in, in order."""
    return tuple(op for op in operations if process in op.processes)


def check_order(projections: Mapping[int, Sequence[Operation]]) -> None:
    """Checks that processes that run their operations sequentially cannot deadlock.

    Any two processes must see the operations that they share in the same order. This is not
    sufficient: three processes can deadlock even if each two share only one operation. So the union
    of all processes' orders must be acyclic.

    Args:
        projections: process -> the operations it takes part in, in its order.

    Raises:
        ValueError: two processes disagree, or the orders have a cycle; the message names them.
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
    """Waits for all processes, so that collectives started afterwards do not time out."""
    import jax

    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        multihost.get_barrier_sync_fn()(key=key, timeout_ms=1000 * seconds)


def texts_of_all(text: str) -> list[str]:
    """Returns the text of every process, in process order. Every process must call."""
    every, sizes = _gathered(np.frombuffer(text.encode(), np.uint8))
    return [bytes(row[:n]).decode() for row, n in zip(every, sizes.tolist(), strict=True)]


def _gathered(mine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns arrays `[processes, max rows, ...]`, zero-padded, and each process's row count."""
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
    """Returns `[n, 2]` uint32: one row per operation, equal for equal operations."""
    rows = [
        hashlib.sha256(repr((op.kind, op.name, op.arrays, op.processes)).encode()).digest()[:8]
        for op in operations
    ]
    return np.frombuffer(b"".join(rows), np.uint32).reshape(-1, 2)


def agree(operations: Sequence[Operation]) -> None:
    """Checks that all processes of the job have the same list. Every process must call.

    Raises:
        ValueError: the lists differ; raised on every process.
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

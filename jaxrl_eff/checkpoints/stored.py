"""Reading and writing of a checkpoint's arrays with orbax, and short forms of its errors."""

import functools
import logging
import math
import os
import re
import sys
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_eff import files
from jaxrl_eff.checkpoints import manifest
from jaxrl_eff.parallel.processes.agreement import everywhere
from jaxrl_eff.tree import flat
from jaxrl_eff.types import Array

# Statuses of errors caused by the machine rather than by a checkpoint.
_MACHINE = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "ABORTED", "CANCELLED")


def writer() -> Any:
    """Returns Orbax' checkpointer that writes in the background."""
    import orbax.checkpoint as ocp

    if not os.environ.get("JAXRL_EFF_TRACEBACK"):
        _keep_quiet()
    options = ocp.AsyncOptions(create_directories_asynchronously=False)
    return ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(), async_options=options)


@functools.cache
def _keep_quiet() -> None:
    """Suppresses what threads of a failed save print; the error itself is still raised."""
    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).addFilter(_raised_elsewhere)
    before = sys.unraisablehook

    def hook(args: Any) -> None:
        # After the first failed write, tensorstore ends others on a loop that orbax has closed.
        if str(args.exc_value) != "Event loop is closed":
            before(args)

    sys.unraisablehook = hook


def _raised_elsewhere(record: logging.LogRecord) -> bool:
    """Filters out log records with stack traces of errors that orbax also raises.

    asyncio logs those of the many other writes that fail together with the first one.
    """
    orbax = "orbax" in Path(record.pathname).parts
    return not (record.exc_info and (orbax or "never retrieved" in record.getMessage()))


def table(state: Any) -> dict[str, Array]:
    """Returns the leaves of a tree by name.

    Raises:
        TypeError: a leaf is not a jax.Array.
        ValueError: there is nothing to save.
    """
    leaves = flat(state)
    for name, leaf in leaves.items():
        if not isinstance(leaf, jax.Array):
            raise TypeError(f"{name} is a {type(leaf).__name__}; only jax.Arrays can be saved.")
    if not any(x.size for x in leaves.values()):
        raise ValueError("the state holds no array to save.")
    return leaves


def unchanged(table: dict[str, Array], saved: Mapping[str, weakref.ref[Array]]) -> frozenset[str]:
    """Returns names of the arrays that the last save also had; all processes agree."""
    names = sorted(name for name, x in table.items() if x.size)
    same = np.array([n in saved and saved[n]() is table[n] for n in names])
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        same = multihost_utils.process_allgather(same).all(axis=0)
    if same.all():  # nothing would be left for the other part
        return frozenset()
    return frozenset(name for name, s in zip(names, same, strict=True) if s)


def tried(
    path: Path, target: Any, written: Mapping[str, str], still: frozenset[str]
) -> tuple[Any, str | None]:
    """Returns the arrays from `load`, or the reason for a failed restore; all processes agree.

    Raises:
        OSError, jax.errors.JaxRuntimeError, MemoryError: the failure is not due to the checkpoint.
    """
    state, reason = None, None
    try:
        state = load(path, target, written, still)
    except Exception as error:
        if _is_of_the_machine(error):
            error.add_note(f"while reading the checkpoint {path}")
            raise
        reason = f"it cannot be restored: {reason_of(error)}"
    if everywhere(reason is None):
        return state, None
    return None, reason or "another process cannot restore it"


def load(path: Path, target: Any, written: Mapping[str, str], still: frozenset[str]) -> Any:
    """Loads the arrays of a checkpoint as the tree `target`.

    Args:
        path: of the checkpoint.
        target: jax.ShapeDtypeStructs with their shardings, on any mesh.
        written: name of a leaf of `target` -> its name in the checkpoint.
        still: names in the checkpoint of the leaves that its unchanged part holds.

    Raises:
        Exception: orbax cannot read them; of various types.
    """
    import orbax.checkpoint as ocp

    table = {written[name]: _placed(x) for name, x in flat(target).items()}
    wanted = {name: x for name, x in table.items() if math.prod(x.shape)}
    args = {
        name: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype)
        for name, x in wanted.items()
    }
    handler = ocp.PyTreeCheckpointHandler()  # has no barrier with processes that may have failed
    arrays: dict[str, Array] = {}
    with jax.transfer_guard("allow"), files.plainly(path) as way:
        for part, names in (("state", wanted.keys() - still), ("still", wanted.keys() & still)):
            if not names:
                continue
            arrays |= handler.restore(
                way / part,
                args=ocp.args.PyTreeRestore(
                    item={name: wanted[name] for name in names},
                    restore_args={name: args[name] for name in names},
                    partial_restore=True,
                ),
            )
        leaves = [
            _fresh(arrays.pop(name)) if name in wanted else _empty(x) for name, x in table.items()
        ]
    return jax.tree.unflatten(jax.tree.structure(target), leaves)


def _placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = getattr(x, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _fresh(x: Array) -> Array:
    """Copies, since restored buffers can alias host memory and cannot be donated (jax#18617)."""
    return _copy(x.sharding)(x)


@functools.cache
def _copy(sharding: jax.sharding.Sharding) -> Callable[[Array], Array]:
    return jax.jit(jnp.copy, out_shardings=sharding)


def _empty(x: jax.ShapeDtypeStruct) -> Array:
    return jax.jit(lambda: jnp.zeros(x.shape, x.dtype), out_shardings=x.sharding)()


def difference(saved: dict[str, Any], target: Any, partial: bool) -> str | None:
    """Describes the first difference between saved and requested leaves."""
    wanted = {name: [list(x.shape), str(x.dtype)] for name, x in flat(target).items()}
    if missing := sorted(set(wanted) - set(saved)):
        return f"it lacks {manifest.few(missing)}"
    if not partial and (extra := sorted(set(saved) - set(wanted))):
        return f"it holds {manifest.few(extra)}, which this run has no place for"
    for name, (shape, dtype) in wanted.items():
        if saved[name] != [shape, dtype]:
            old_shape, old_dtype = saved[name]
            return f"{name} is {old_dtype}{old_shape} in it and {dtype}{shape} in this run"
    return None


def reason_of(error: BaseException) -> str:
    """Describes an error briefly, using the system's message for system errors."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    found = re.search(r"\[OS error (\d+)|os_error_code=.(\d+)", str(error))
    return os.strerror(int(found[1] or found[2])) if found else manifest.first_line(error)


def _is_of_the_machine(error: Exception) -> bool:
    """Returns True if a read failed for a reason outside the file: no memory, no permission."""
    kinds = (jax.errors.JaxRuntimeError, MemoryError, PermissionError)
    return isinstance(error, kinds) or str(error).startswith(_MACHINE)

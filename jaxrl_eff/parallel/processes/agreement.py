"""Agreement between the processes of a run on values that only some of them know."""

from collections.abc import Callable

import numpy as np


def first_says(ask: Callable[[], int], failure: str) -> int:
    """Broadcasts process 0's answer to all processes; an error there is raised on all.

    Args:
        ask: called on process 0 only; returns an integer of at least -1.
        failure: start of the other processes' error message if it raises.

    Raises:
        OSError: on the other processes, if `ask` raises on process 0.
    """
    import jax  # late, so that commands are parsed before JAX is imported

    if jax.process_count() == 1:
        return ask()
    from jax.experimental import multihost_utils

    answer, error = -2, None
    if jax.process_index() == 0:
        try:
            answer = ask()
        except Exception as e:
            error = e
    answer = int(multihost_utils.broadcast_one_to_all(np.int32(answer)))
    if error is not None:
        raise error
    if answer == -2:
        raise OSError(f"{failure} by process 0, which says why.")
    return answer


def everywhere(good: bool) -> bool:
    """True if `good` is true on every process."""
    import jax

    if jax.process_count() == 1:
        return good
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array([good])).all())

"""Agreement between processes of one run on things that only some of them can know."""

from collections.abc import Callable

import numpy as np


def first_says(ask: Callable[[], int], failure: str) -> int:
    """Process 0's answer, on all; an error there ends all.

    Args:
        ask: called on process 0 alone; its answer is at least -1.
        failure: what the others say where it raises.
    """
    import jax  # late: commands are understood before

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
    """True if it is so on every process."""
    import jax

    if jax.process_count() == 1:
        return good
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array([good])).all())

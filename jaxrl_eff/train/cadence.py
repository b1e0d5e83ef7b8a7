"""Timing of checkpoints: every so many steps, or every so many minutes."""

import time

import jax

from jaxrl_eff.parallel.processes.agreement import first_says


class Cadence:
    """Decides after which steps to save.

    With several processes the first one's clock decides. To avoid communication at every step, it
    is asked only when half of the remaining time should have passed.
    """

    def __init__(self, every: int, minutes: float):
        """Starts the clock.

        Args:
            every: steps between two saves; 0: by time.
            minutes: time between two saves, if `every` is 0; 0: never.
        """
        self._every, self._seconds = every, 60.0 * minutes
        self.saved()

    def saved(self) -> None:
        """Restarts the clock."""
        self._began, self._steps, self._look = time.monotonic(), 0, 2

    def due(self, step: int) -> bool:
        """Returns True if the run must be saved after this step (from 1). Call once per step."""
        if self._every:
            return step % self._every == 0
        if not self._seconds:
            return False
        self._steps += 1
        if jax.process_count() == 1:
            return time.monotonic() - self._began >= self._seconds
        if self._steps < self._look:
            return False
        steps = first_says(self._steps_to_next_look, "the clock of checkpoints could not be read")
        self._look = self._steps + steps
        return steps == 0

    def _steps_to_next_look(self) -> int:
        """Returns half of the steps that fit in the time left, at least 1; 0 if none is left."""
        gone = time.monotonic() - self._began
        half = (self._seconds - gone) * self._steps / max(gone, 1e-9) / 2
        return 0 if half <= 0 else max(1, int(min(half, 2**30)))

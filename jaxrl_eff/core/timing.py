"""When each call of a step ran, found out without making the step wait.

Dispatch is asynchronous, so the loop knows only when it asked for a call. Background threads wait
for one small output of each and note when it was there. A call is taken to start once it was
dispatched, the calls whose arrays it reads were done, and its devices were free.
"""

import collections
import dataclasses
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Span:
    """One call on its devices; seconds from the start of its step."""

    call: str
    devices: tuple[int, ...]
    start: float
    end: float


class StepTimes:
    """The calls of one step, being timed."""

    def __init__(self, pool: ThreadPoolExecutor):
        self._pool, self._origin = pool, time.perf_counter()
        self._pending: list[tuple[str, tuple[int, ...], tuple, tuple, float, Future]] = []

    def now(self) -> float:
        """Seconds since the step began."""
        return time.perf_counter() - self._origin

    def add(
        self,
        call: str,
        devices: tuple[int, ...],
        reads: tuple[str, ...],
        writes: tuple[str, ...],
        dispatched: float,
        token: Any,
    ) -> None:
        """Notes a call that was just dispatched; `token` is one of its outputs, not donated."""
        self._pending.append(
            (call, devices, reads, writes, dispatched, self._pool.submit(self._wait, token))
        )

    def _wait(self, token: Any) -> float:
        if token is not None:
            jax.block_until_ready(token)
        return self.now()

    @property
    def origin(self) -> float:
        """When the step began, on `time.perf_counter`."""
        return self._origin

    def spans(self, *, after: float = 0.0) -> list[Span]:
        """Waits until the step is over and returns its calls in dispatch order.

        Args:
            after: seconds from the step's begin until which the devices were still busy with
                an earlier step.
        """
        out: list[Span] = []
        done: dict[str, float] = {}
        for call, devices, reads, writes, dispatched, future in self._pending:
            end = future.result()
            start = max([after, dispatched, *(done.get(k, 0.0) for k in reads)])
            # An accelerator runs one program at a time; simulated devices share the cores.
            free = max((s.end for s in out if set(s.devices) & set(devices)), default=0.0)
            start = free if start < free < end else start
            out.append(Span(call, devices, min(start, end), end))
            done |= dict.fromkeys(writes, end)
        return out


class Timeline:
    """Times of the last steps."""

    def __init__(self, steps: int = 8):
        self._lock, self._pool = threading.Lock(), None
        self._steps: collections.deque[StepTimes] = collections.deque(maxlen=steps)

    def begin(self) -> StepTimes:
        """Starts timing a step."""
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(16, thread_name_prefix="timeline")
            step = StepTimes(self._pool)
            self._steps.append(step)
        return step

    @property
    def newest(self) -> StepTimes:
        """The step that was dispatched last."""
        return self._steps[-1]

    def last(self) -> list[Span]:
        """The calls of the newest step; waits for it to end."""
        return self._steps[-1].spans() if self._steps else []

    def seconds(self) -> dict[str, float]:
        """Seconds a call of the newest step."""
        return {s.call: s.end - s.start for s in self.last()}

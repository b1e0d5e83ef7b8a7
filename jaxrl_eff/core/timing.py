"""Times of each call of a step, measured without blocking the step.

Dispatch is asynchronous, so the loop knows only when it dispatched a call. Background threads wait
for one small output of each call and record when it was ready. A call is assumed to start once it
was dispatched, the calls whose arrays it reads were done, and its devices were free.
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
    """The time of one call on its devices, in seconds from the start of its step."""

    call: str
    devices: tuple[int, ...]
    start: float
    end: float


class StepTimes:
    """Timings of the calls of one step."""

    def __init__(self, pool: ThreadPoolExecutor):
        self._pool, self._origin = pool, time.perf_counter()
        self._pending: list[tuple[str, tuple[int, ...], tuple, tuple, float, Future]] = []

    def now(self) -> float:
        """Returns seconds since the step began."""
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
        """Records a call that was just dispatched; `token` is a non-donated output of it."""
        self._pending.append(
            (call, devices, reads, writes, dispatched, self._pool.submit(self._wait, token))
        )

    def _wait(self, token: Any) -> float:
        if token is not None:
            jax.block_until_ready(token)
        return self.now()

    @property
    def origin(self) -> float:
        """Start of the step, on `time.perf_counter`."""
        return self._origin

    def spans(self, *, after: float = 0.0) -> list[Span]:
        """Waits until the step is over and returns its calls in dispatch order.

        Args:
            after: seconds from the step's start until which an earlier step occupied the devices.
        """
        out: list[Span] = []
        done: dict[str, float] = {}
        for call, devices, reads, writes, dispatched, future in self._pending:
            end = future.result()
            start = max([after, dispatched, *(done.get(k, 0.0) for k in reads)])
            # An accelerator runs one program at a time; simulated devices share CPU cores.
            free = max((s.end for s in out if set(s.devices) & set(devices)), default=0.0)
            start = free if start < free < end else start
            out.append(Span(call, devices, min(start, end), end))
            done |= dict.fromkeys(writes, end)
        return out


class Timeline:
    """Timings of the last steps."""

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
        """The most recently dispatched step."""
        return self._steps[-1]

    def last(self) -> list[Span]:
        """Returns the calls of the newest step, waiting for it to end."""
        return self._steps[-1].spans() if self._steps else []

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of each call of the newest step."""
        return {s.call: s.end - s.start for s in self.last()}

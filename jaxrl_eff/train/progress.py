"""Metrics and rates of finished steps, and the check that they are finite."""

import collections
import dataclasses
import math
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrl_eff import core
from jaxrl_eff.core.timing import StepTimes
from jaxrl_eff.models import params
from jaxrl_eff.parallel import devices
from jaxrl_eff.train.assembly import Stage
from jaxrl_eff.train.replan import Calibration

# Metrics on the console: (label, metric name); the first two present are shown.
WATCHED = (
    ("reward", "score"), ("KL", "ref_kl"), ("accuracy", "accuracy"), ("loss", "loss"),
)  # fmt: skip
# Rates are averaged over a few steps, since the time of a single one includes the scheduling of a
# thread.
RATE_STEPS = 5
# The reported counts of a loader.
COUNTED = ("examples", "epochs", "dropped", "empty", "truncated")


class NonFinite(ArithmeticError):
    """A loss, gradient or other metric was NaN or infinite."""


class Volume(NamedTuple):
    """Number of tokens of some sequences, and sum of the squares of their lengths."""

    tokens: float
    squares: float

    @property
    def context(self) -> float:
        """Average number of keys that a token sees."""
        return self.squares / self.tokens / 2 if self.tokens else 0.0


@dataclasses.dataclass(frozen=True)
class Dispatched:
    """A dispatched step.

    Attributes:
        step: its number in the stage, from 1.
        metrics: on devices.
        times: of its calls.
        lengths: `[N]`, tokens of the sequences (sft, pairs) or prompts in this process's share of
            its batch.
        counts: examples used, dropped and so on up to this batch, as in `Loader.stats`.
    """

    step: int
    metrics: dict[str, jax.Array]
    times: StepTimes
    lengths: np.ndarray
    counts: Mapping[str, float] = dataclasses.field(default_factory=dict)


def lengths(batch: Any) -> np.ndarray:
    """Returns the tokens of every sequence, or prompt, of a batch from a loader, `[N]`."""
    if "segment" not in batch:
        return np.asarray(batch["prompt_length"], np.int64)
    segment = np.asarray(batch["segment"], np.int64)
    rows = np.arange(len(segment))[:, None] * (segment.max(initial=0) + 1)
    counts = np.bincount((segment + rows)[segment > 0])
    return counts[counts > 0]


class StepLog:
    """Logs the metrics of finished steps; stops the run at a non-finite one.

    Attributes:
        spans: timed calls of the last step.
        last: metrics of the last step.
        withheld: train call -> number of steps in which an update was skipped as non-finite.
    """

    def __init__(
        self,
        stage: Stage,
        out: Any,
        offset: int,
        nonfinite: str,
        seen: Calibration | None,
        *,
        withheld: Mapping[str, int] = MappingProxyType({}),
    ):
        """Does not write yet.

        Args:
            stage: the running stage.
            out: `train.Outlets`.
            offset: steps of all earlier stages.
            nonfinite: "stop" raises at a non-finite number, "skip" warns.
            seen: receives every step's times; None if plans do not change.
            withheld: call -> steps, of this stage before the run was resumed.
        """
        self._stage, self._out, self._offset, self._nonfinite = stage, out, offset, nonfinite
        self._calibration = seen
        # (end, tokens, FLOPs) of the last steps.
        self._window = collections.deque([(time.perf_counter(), 0.0, 0.0)], maxlen=RATE_STEPS + 1)
        self.spans: list[Any] = []
        self.last: dict[str, float] = {}
        self.withheld = dict(withheld)
        kinds = {d.device_kind for d in jax.devices()}
        peak = devices.peak_flops_per_s(kinds.pop(), self._dtype()) if len(kinds) == 1 else None
        self._peak = peak * jax.device_count() if peak else None

    def _dtype(self) -> str:
        return next(iter(self._stage.lms.values())).dtype

    def restart(self, stage: Stage) -> None:
        """Continues with another plan."""
        self._stage = stage
        self.pause()

    def pause(self) -> None:
        """Excludes the time since the last step (saving, evaluating) from all rates."""
        self._window.clear()
        self._window.append((time.perf_counter(), 0.0, 0.0))

    def __call__(self, done: Dispatched) -> None:
        """Waits for a step and logs it.

        Raises:
            NonFinite: unless such updates are skipped.
        """
        busy = max(self._window[-1][0] - done.times.origin, 0.0)
        self.spans = done.times.spans(after=busy)
        values = {k: float(v) for k, v in jax.device_get(done.metrics).items()}
        end = done.times.origin + max((s.end for s in self.spans), default=0.0)
        for role, schedule in self._stage.schedules.items():
            update = (done.step - 1) * self._stage.updates(role)
            values[f"{role}/lr"] = float(schedule(update))
        volumes = self._volumes(done, values)
        tokens, flops = _tokens(self._stage, volumes), self._flops(volumes)
        self._window.append((max(end, self._window[-1][0]), tokens, flops))
        values |= {f"data/{k}": float(done.counts[k]) for k in COUNTED if k in done.counts}
        elapsed = self._window[-1][0] - self._window[0][0]
        tokens, flops = (sum(row[i] for row in list(self._window)[1:]) for i in (1, 2))
        # Steps of microseconds can appear to end together, and then have no rate.
        tokens_per_s, flops_per_s = (
            n / elapsed if elapsed > 1e-6 else None for n in (tokens, flops)
        )
        seconds = {s.call: s.end - s.start for s in self.spans}
        trained = [c.name for c in self._stage.step.packs.calls if c.kind == "train"]
        if mine := [seconds[name] for name in trained if name in seconds]:  # on its devices
            values["schedule/measured_seconds"] = sum(mine)
        if self._calibration is not None:
            step = self._window[-1][0] - self._window[-2][0]
            self._calibration.see(self.spans, _response(values), step)
        self._out.writer.step(
            self._offset + done.step,
            self._stage.name,
            values,
            seconds=seconds,
            tokens_per_s=tokens_per_s,
            flops_per_s=flops_per_s,
            mfu=flops_per_s / self._peak if self._peak and flops_per_s else None,
        )
        self.last = values
        self._out.console.step(
            done.step, _watched(values), tokens_per_s=tokens_per_s, seconds=seconds
        )
        self._check(done.step, values)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Writes samples of a step and shows two of them."""
        self._out.writer.samples(self._offset + step, self._stage.name, rows)
        self._out.console.samples(f"samples at step {step}", rows[:2])

    def _volumes(self, done: Any, values: Mapping[str, float]) -> dict[str, Volume]:
        """Returns the volume of sequences that each call reads or makes, over all processes.

        Responses count with the mean length of the step; a greedy answer (ReMax) is assumed to be
        as long as a sampled one.
        """
        n = done.lengths.astype(float)
        share = self._stage.step.share[1]
        sampling = self._stage.sampling
        if sampling is None:
            every = Volume(share * n.sum(), share * (n * n).sum())
            return {c.name: every for c in self._stage.step.calls}
        n = n + (_response(values) or 0.0)
        prompts = Volume(share * n.sum(), share * (n * n).sum())
        kept = next((v for k, v in values.items() if k.endswith("/kept")), 1.0)
        out = {}
        for c in self._stage.step.calls:
            rows = float(sampling.samples)
            if any(name.startswith("best_") for name in c.reads):  # winners of groups
                rows = kept
            elif any(name.startswith("greedy_") for name in (*c.reads, *c.writes)):
                rows = 1.0
            out[c.name] = Volume(rows * prompts.tokens, rows * prompts.squares)
        return out

    def _flops(self, volumes: Mapping[str, Volume]) -> float:
        """Returns useful FLOPs: a forward pass costs 1, a train pass 3 or less, padding nothing."""
        total = 0.0
        for c in self._stage.step.calls:
            if c.of in self._stage.lms:
                lm, volume = self._stage.lms[c.of], volumes[c.name]
                way = self._stage.step.specs[c.of].tx
                products = way.passes if isinstance(way, core.Adaptation) else 3
                passes = products * c.epochs if c.kind == "train" else 1
                total += passes * volume.tokens * params.flops_per_token(lm, volume.context)
        return total

    def _check(self, step: int, values: dict[str, float]) -> None:
        """Reports non-finite metrics.

        Raises:
            NonFinite: unless such updates are skipped. Statistics of the schedule only warn.
        """
        warn = self._out.console.warn
        for k in [k for k, v in values.items() if k.endswith("/sync_drifted") and v > 0]:
            warn(
                f"weights of {k.partition('/')[0]} were not what had been sent at step {step}; "
                "they were sent again as a whole"
            )
        bad = [k for k, v in values.items() if not math.isfinite(v)]
        for k in [k for k in bad if k.startswith("schedule/")]:
            warn(f"{k} is {values[k]} at step {step}; no update depends on it")
            bad.remove(k)
        withheld = [
            k.removesuffix("/finite") for k, v in values.items() if k.endswith("/finite") and v == 0
        ]
        for call in withheld:
            self.withheld[call] = self.withheld.get(call, 0) + 1
        if not bad and not withheld:
            return
        first = bad[0] if bad else f"{withheld[0]}/grad_norm"
        call, _, metric = first.partition("/")
        text = (
            f"{metric} of {call} is {values.get(first, float('nan'))} at step {step} of stage "
            f"{self._stage.name}"
        )
        if self._nonfinite == "stop":
            fate = "was withheld" if withheld else "was made, since its gradient was finite"
            raise NonFinite(
                f"{text}. The update {fate}; checkpoints hold finite parameters. "
                "Set config.nonfinite='skip' to go on past such steps."
            )
        warn(f"{text}; the update was {'skipped' if withheld else 'made'}")


def _tokens(stage: Stage, volumes: Mapping[str, Volume]) -> float:
    """Returns the tokens of a step: sampled tokens, or else those of the first train call."""
    kind = "generate" if stage.sampling is not None else "train"
    calls = [c for c in stage.step.calls if c.kind == kind]
    return sum(volumes[c.name].tokens for c in (calls if stage.sampling else calls[:1]))


def _response(values: Mapping[str, float]) -> float | None:
    """Returns the mean tokens of a response, if the step sampled."""
    return next((v for k, v in values.items() if k.endswith("/length")), None)


def _watched(values: dict[str, float]) -> dict[str, float]:
    """Returns the two main metrics."""
    found = {}
    for label, name in WATCHED:
        match = next((v for k, v in values.items() if k.split("/")[-1] == name), None)
        if match is not None and len(found) < 2:
            found[label] = match
    return found

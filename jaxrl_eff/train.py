"""The one training loop: every stage of every algorithm runs through it.

A step is dispatched before the numbers of the one before it are looked at, so the devices never
wait for the log. A step is a function of the parameters, the batch and two integers (seed and
step), so a run that is killed and resumed ends where one that was never stopped ends.
"""

import collections
import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from jaxrl_eff import dataflow, evaluate, hardware, packed, state
from jaxrl_eff.calibrate import Calibration
from jaxrl_eff.checkpoint import Checkpoints
from jaxrl_eff.console import Console
from jaxrl_eff.data.schedules import Schedule, quality
from jaxrl_eff.metrics import Writer
from jaxrl_eff.models import params
from jaxrl_eff.parallel import Route
from jaxrl_eff.planner import profile
from jaxrl_eff.stages import Assembled, Stage, words
from jaxrl_eff.timeline import StepTimes

# What the console shows of a step: (label, metric name), the first two that are there.
WATCHED = (
    ("reward", "score"), ("KL", "ref_kl"), ("accuracy", "accuracy"), ("loss", "loss"),
)  # fmt: skip


RATE_STEPS = 5


class NonFinite(ArithmeticError):
    """A loss, gradient or other metric was NaN or infinite."""


class Stopped(Exception):
    """The run was asked to stop (SIGTERM) and has saved its state."""


@dataclasses.dataclass(frozen=True)
class Outlets:
    """Where a run's words, numbers and checkpoints go."""

    console: Console
    writer: Writer
    checkpoints: Checkpoints
    every: int  # steps between checkpoints; 0: only at the end of a stage


@dataclasses.dataclass
class Position:
    """Where the run is; changes as it goes."""

    index: int
    step: int  # steps taken in this stage
    offset: int  # steps of all earlier stages
    results: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Finished:
    """The end of a run.

    Attributes:
        results: "stage/eval" and "stage/eval_before" -> mean held-out reward.
        samples: the same keys -> rows of prompt, completion, reward.
        models, stage: of the last stage.
        summary: stage -> last metrics.
    """

    results: dict[str, float]
    samples: dict[str, list[dict[str, Any]]]
    models: state.Models
    stage: Stage
    summary: dict[str, dict[str, float]]


def fit(assembled: Assembled, out: Outlets) -> Finished:
    """Runs all stages, from the newest good checkpoint if there is one.

    Raises:
        NonFinite: see there, unless the run skips such updates.
        Stopped: after SIGTERM.
    """

    def saved(record: dict[str, Any]) -> Any:
        return state.shared_layout(state.abstract(assembled, _index(assembled, record["stage"])))

    restored = out.checkpoints.restore(saved, partial=True)
    for message in out.checkpoints.messages:
        out.console.warn(message)
    models, shelf = None, {}
    at = Position(0, 0, 0, {})
    if restored is not None:
        record = restored.record
        index = _index(assembled, record["stage"])
        home = Route(restored.state, state.abstract(assembled, index), donate=True)(restored.state)
        models, shelf = home["models"], home["shelf"]
        offset = sum(s.settings.steps for s in assembled.stages[:index])
        at = Position(index, record["step"], offset, dict(record["results"]))
        assembled.stages[index].loader.restore(record["data"])
        out.console.line(f"resumed at stage {record['stage']}, step {record['step']}")
    samples: dict[str, list] = {}
    summary: dict[str, dict] = {}
    with _stop_signal() as stopping:
        while True:
            stage = assembled.stages[at.index]
            models = _run_stage(assembled, out, at, models, shelf, stopping, samples, summary)
            if at.index + 1 == len(assembled.stages):
                break
            shelf = state.shelve(assembled, at.index, models, shelf)
            at.index, at.step, at.offset = at.index + 1, 0, at.offset + stage.settings.steps
            models = None
    out.checkpoints.wait()
    return Finished(at.results, samples, models, stage, summary)


def _index(assembled: Assembled, name: str) -> int:
    return [s.name for s in assembled.stages].index(name)


def _run_stage(
    assembled: Assembled,
    out: Outlets,
    at: Position,
    models: state.Models | None,
    shelf: state.Shelf,
    stopping: threading.Event,
    samples: dict[str, list],
    summary: dict[str, dict],
) -> state.Models:
    stage = assembled.stages[at.index]
    name, total, run = stage.name, stage.settings.steps, assembled.run
    resumed = models is not None
    began = time.perf_counter()
    with (
        _cache_hits() as hits,
        getting_ready(stage) if at.step < total else contextlib.nullcontext(),
    ):
        if not resumed:
            models = state.initial(assembled, stage, shelf)
    if at.step < total:
        _announce(stage, out, time.perf_counter() - began, hits)
    measure = _measure(out, at, samples)
    calibration = _calibration(stage, at.step)
    if not resumed and stage.evaluation is not None and stage.settings.evaluate.before:
        measure(stage, models, "eval_before")

    def save(score: float | None = None) -> None:
        record = {
            "stage": name,
            "step": at.step,
            "data": data_state,
            "results": at.results,
        }
        whole = state.shared({"models": models, "shelf": shelf})
        out.checkpoints.save(at.offset + at.step, whole, record, score=score)
        stage.step.saved()

    out.console.stage(name, total, start=at.step)
    log = _Log(stage, out, at.offset, run.nonfinite, calibration)
    every = stage.settings.evaluate.every if stage.evaluation is not None else 0
    last = at.index + 1 == len(assembled.stages)
    pending = None
    while at.step < total:
        batch = next(stage.loader)
        data_state = stage.loader.state()
        with jax.transfer_guard("disallow"):
            models, data, metrics = stage.step(
                models, batch, words(run.seed, name, at.step), reselect=stage.step.due(at.step)
            )
        at.step += 1
        schedule = getattr(stage.loader, "schedule", None)
        times = stage.step.timeline.newest
        step = _Dispatched(at.step, metrics, times, _tokens(batch), schedule)
        if pending is not None:
            log(pending)
        pending = step
        show = stage.settings.samples_every
        if data and show and (at.step % show == 0 or at.step == total):
            log(pending)
            pending = None
            shown = stage.step.shown(data)
            log.samples(at.step, evaluate.responses(shown, stage.source, assembled.tokenizer, 16))
        score = None
        if (every and at.step % every == 0) or (at.step == total and stage.evaluation is not None):
            if pending is not None:
                log(pending)
                pending = None
            score = measure(stage, models, "eval")
            log.pause()
        stop = _asked_to_stop(stopping, at.step)
        if at.step == total or stop or (out.every and at.step % out.every == 0):
            if pending is not None:
                log(pending)
                pending = None
            save(score)
            log.pause()
        if stop and (at.step < total or not last):
            out.checkpoints.wait()
            raise Stopped(f"stage {name}, step {at.step} of {total}")
        if calibration is not None and at.step < total and calibration.due(at.step):
            if pending is not None:
                log(pending)
                pending = None
            stage, models = _replanned(stage, models, calibration, out)
            log.restart(stage)
    out.console.end_stage()
    if log.spans:
        spans = [dataclasses.asdict(s) for s in log.spans]
        out.writer.document("timeline", {name: spans}, merge=True)
    summary[name] = log.last
    stage.loader.close()
    return models


@contextlib.contextmanager
def getting_ready(stage: Stage) -> Iterator[None]:
    """Compiles a stage's calls and opens its data while the body runs; waits for both at its end.

    The body is where the models are read, which takes the disk rather than the cores.
    """
    pool = ThreadPoolExecutor(2)
    try:
        started = pool.submit(stage.step.build, stage.batch), pool.submit(stage.loader.prepare)
        yield
        for one in started:
            one.result()
    finally:  # an error in the body is told at once
        pool.shutdown(wait=False, cancel_futures=True)


def _announce(stage: Stage, out: Outlets, seconds: float, hits: dict[str, int]) -> None:
    planned = max((v["bytes"] for v in stage.step.analysis().values()), default=0)
    cache = (
        "warm"
        if hits["hits"] and not hits["misses"]
        else "cold"
        if not hits["hits"]
        else "partly warm"
    )
    out.console.line(
        f"{stage.name}: {len(stage.step.calls)} calls compiled in {seconds:.1f} s ({cache} cache), "
        f"at most {planned / 1e6:,.0f} MB a device"
    )
    for call, traffic in stage.step.traffic.items():
        out.console.line(f"  {call}: {traffic}")
    for call, notes in stage.step.notes.items():
        for note in notes:
            out.console.line(f"  {call}: {note}")


def _calibration(stage: Stage, step: int) -> Calibration | None:
    every = stage.settings.search.calibrate
    return Calibration(stage.searched, step + every) if stage.searched and every else None


def _replanned(
    stage: Stage, models: state.Models, calibration: Calibration, out: Outlets
) -> tuple[Stage, state.Models]:
    """Corrects the cost model by what was measured; takes up a better plan if there is one."""
    new = calibration.corrected()
    gain = calibration.gain(new)
    out.console.line(f"{stage.name}: predicted and measured seconds")
    for line in profile.text(calibration.rows).splitlines():
        out.console.line(f"  {line}")
    rows = [row._asdict() for row in calibration.rows]
    out.writer.document("calibration", {stage.name: rows}, merge=True)
    if gain <= stage.settings.search.threshold:
        out.console.line(f"{stage.name}: no plan saves more than {max(gain, 0.0):.0%}; it stays")
        calibration.keep(new)
        return stage, models
    out.console.line(f"{stage.name}: {new}; saves {gain:.0%}")
    try:
        step = stage.placed(new.plan)
    except ValueError as error:  # of packed rows: no room in the memory that programs really need
        out.console.line(f"{stage.name}: it cannot run: {error}")
        calibration.keep(new)
        return stage, models
    step.build(stage.batch)
    models = state.moved(models, stage.step, step)
    out.console.line(f"{stage.name}: taken up")
    calibration.take(new)
    stage.loader.share(step.share)
    out.writer.document("plan", {stage.name: step.plan_table()}, merge=True)
    return dataclasses.replace(stage, step=step, searched=new), models


def _measure(out: Outlets, at: Position, samples: dict[str, list]):
    """A function that evaluates a stage's actor and notes the result."""

    def measure(stage: Stage, models: state.Models, kind: str) -> float:
        held_out = stage.evaluation
        home = jax.tree.map(lambda x: x.sharding, stage.step.home("actor").params)
        there = jax.tree.map(lambda x: x.sharding, held_out.step.home("actor").params)
        score, rows = held_out(Route(home, there)(models["actor"].params))
        key = f"{stage.name}/{kind}"
        at.results[key], samples[key] = score, rows
        step = at.offset + at.step
        out.writer.step(step, stage.name, {kind: score})
        out.writer.samples(step, stage.name, [{**r, "held_out": True} for r in rows[:16]])
        out.console.line(f"{stage.name}: held-out reward {score:.3f} after {at.step} steps")
        return score

    return measure


@dataclasses.dataclass(frozen=True)
class _Dispatched:
    """A step on its way: its number, metrics, times, and tokens of its batch."""

    step: int
    metrics: dict[str, jax.Array]
    times: StepTimes
    tokens: int
    schedule: Schedule | None = None


def _tokens(batch: Any) -> int:
    """Tokens of a batch from the source: of packed rows, or of prompts. This process's."""
    if isinstance(batch, list):
        return sum(_tokens(rows) for micro in batch for rows in micro.values())
    if "segment" in batch:
        return int((batch["segment"] > 0).sum())
    return int(batch["prompt_length"].sum())


class _Log:
    """Turns finished steps into lines of numbers; stops the run at one that is not finite."""

    def __init__(
        self, stage: Stage, out: Outlets, offset: int, nonfinite: str, seen: Calibration | None
    ):
        self._stage, self._out, self._offset, self._nonfinite = stage, out, offset, nonfinite
        self._calibration, self._scheduled = seen, False
        # (end, tokens, FLOPs) of the last steps: rates over a few of them, since the clock of a
        # single step waits for a thread to be scheduled.
        self._window = collections.deque([(time.perf_counter(), 0.0, 0.0)], maxlen=RATE_STEPS + 1)
        self.spans: list[Any] = []
        self.last: dict[str, float] = {}
        kinds = {d.device_kind for d in jax.devices()}
        peak = hardware.peak_flops_per_s(kinds.pop(), self._dtype()) if len(kinds) == 1 else None
        self._peak = peak * jax.device_count() if peak else None

    def _dtype(self) -> str:
        return next(iter(self._stage.lms.values())).dtype

    def restart(self, stage: Stage) -> None:
        """Goes on with another plan."""
        self._stage = stage
        self.pause()

    def pause(self) -> None:
        """What was done since the last step (saving, evaluating) is not part of any rate."""
        self._window.clear()
        self._window.append((time.perf_counter(), 0.0, 0.0))

    def __call__(self, done: _Dispatched) -> None:
        busy = max(self._window[-1][0] - done.times.origin, 0.0)
        self.spans = done.times.spans(after=busy)
        values = {k: float(v) for k, v in jax.device_get(done.metrics).items()}
        end = done.times.origin + max((s.end for s in self.spans), default=0.0)
        for role, schedule in self._stage.schedules.items():
            update = (done.step - 1) * self._stage.updates(role)
            values[f"{role}/lr"] = float(schedule(update))
        tokens = self._all_tokens(done.tokens, values)
        flops = self._flops(tokens, done.schedule)
        self._window.append((max(end, self._window[-1][0]), tokens, flops))
        if done.schedule is not None:
            values |= self._of_schedule(done.schedule)
        elapsed = self._window[-1][0] - self._window[0][0]
        tokens, flops = (sum(row[i] for row in list(self._window)[1:]) for i in (1, 2))
        # Steps of microseconds can seem to end together, and have no rate then.
        tokens_per_s, flops_per_s = (
            n / elapsed if elapsed > 1e-6 else None for n in (tokens, flops)
        )
        seconds = {s.call: s.end - s.start for s in self.spans}
        if isinstance(self._stage.step, packed.Packed):
            trained = [c.name for c in self._stage.step.packed if c.kind == "train"]
            mine = [seconds[name] for name in trained if name in seconds]
            if mine:  # of this process's devices
                values["schedule/measured_seconds"] = sum(mine)
        if self._calibration is not None:
            length = next((v for k, v in values.items() if k.endswith("/length")), None)
            step = self._window[-1][0] - self._window[-2][0]
            self._calibration.see(self.spans, length, step)
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
        """Writes samples of a step and shows two."""
        self._out.writer.samples(self._offset + step, self._stage.name, rows)
        self._out.console.samples(f"samples at step {step}", rows[:2])

    def _all_tokens(self, tokens: int, values: dict[str, float]) -> float:
        """Tokens of the step over all processes, sampled ones included."""
        total = float(tokens * self._stage.step.share[1])
        if self._stage.sampling is not None:
            samples = self._stage.sampling.samples
            length = values.get("advantage/length", values.get("select/length", 0.0))
            total = samples * (total + length * self._stage.settings.batch)
        return total

    def _of_schedule(self, schedule: Schedule) -> dict[str, float]:
        """A schedule in numbers; tells the loader how long it took."""
        seconds = self._window[-1][0] - self._window[-2][0] if len(self._window) > 1 else 0.0
        if self._scheduled:  # the first step has more to do
            self._stage.loader.measured(schedule, seconds)
        self._scheduled = True
        found = quality(schedule)
        return {
            "schedule/padding": found.padding,
            "schedule/balance": found.time_balance,
            "schedule/distributed": found.distributed,
            "schedule/micro_steps": float(found.steps),
            "schedule/planned_seconds": found.seconds,
            "schedule/measured_seconds": seconds,
        }

    def _flops(self, tokens: float, schedule: Schedule | None) -> float:
        """Useful FLOPs: a forward pass costs 1, a train pass 3 or less, padding nothing."""
        total = 0.0
        for c in self._stage.step.calls:
            if c.of in self._stage.lms:
                lm = self._stage.lms[c.of]
                way = self._stage.step.specs[c.of].tx
                products = way.passes if isinstance(way, dataflow.Adaptation) else 3
                passes = products * c.epochs if c.kind == "train" else 1
                length = self._stage.settings.data.length or self._stage.settings.data.prompt_length
                if schedule is not None:  # the mean a token looks back
                    n = schedule.lengths.astype(float)
                    length = float((n * n).sum() / n.sum())
                total += passes * tokens * params.flops_per_token(lm, length / 2)
        return total

    def _check(self, step: int, values: dict[str, float]) -> None:
        for k in [k for k, v in values.items() if k.endswith("/sync_drifted") and v > 0]:
            self._out.console.warn(
                f"weights of {k.partition('/')[0]} were not what had been sent at step {step}; "
                "they were sent again as a whole"
            )
        bad = [k for k, v in values.items() if not math.isfinite(v)]
        withheld = [k for k, v in values.items() if k.endswith("/finite") and v == 0]
        if not bad and not withheld:
            return
        first = bad[0] if bad else withheld[0].replace("/finite", "/grad_norm")
        call, _, metric = first.partition("/")
        text = (
            f"{metric} of {call} is {values.get(first, float('nan'))} at step {step} of stage "
            f"{self._stage.name}"
        )
        if self._nonfinite == "stop":
            raise NonFinite(
                f"{text}. The update was withheld; checkpoints hold finite parameters. "
                "Set config.nonfinite='skip' to go on past such steps."
            )
        self._out.console.warn(f"{text}; the update was skipped")


def _watched(values: dict[str, float]) -> dict[str, float]:
    """The two numbers worth a glance."""
    found = {}
    for label, name in WATCHED:
        match = next((v for k, v in values.items() if k.split("/")[-1] == name), None)
        if match is not None and len(found) < 2:
            found[label] = match
    return found


@contextlib.contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """Set by SIGTERM while the block runs."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield event  # several processes agree through JAX's own preemption notice
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


def _asked_to_stop(event: threading.Event, step: int) -> bool:
    if jax.process_count() == 1:
        return event.is_set()
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def _cache_hits() -> Iterator[dict[str, int]]:
    """Counts what the persistent compilation cache had and lacked."""
    counts = {"hits": 0, "misses": 0}

    def listen(event: str, **_: Any) -> None:
        for kind in counts:
            if event == f"/jax/compilation_cache/cache_{kind}":
                counts[kind] += 1

    jax.monitoring.register_event_listener(listen)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_listener(listen)

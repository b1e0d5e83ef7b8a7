"""The training loop, which runs every stage of every algorithm.

A step is dispatched before the metrics of the previous one are read, so the devices never wait for
logging. A step is a function of the parameters, the batch and two integers (seed and step), so a
run that is killed and resumed gives the same results as an uninterrupted one.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from jaxrl_eff.checkpoints.run import Checkpoints
from jaxrl_eff.parallel import Route
from jaxrl_eff.planner import measured
from jaxrl_eff.train import evaluate, resume, state
from jaxrl_eff.train.assembly import Assembled, Stage, words
from jaxrl_eff.train.cadence import Cadence
from jaxrl_eff.train.console import Console
from jaxrl_eff.train.interrupts import Interrupts, Stopped
from jaxrl_eff.train.progress import COUNTED, Dispatched, StepLog, lengths
from jaxrl_eff.train.replan import Calibration
from jaxrl_eff.train.writer import Writer


@dataclasses.dataclass(frozen=True)
class Outlets:
    """Destinations of a run's messages, metrics and checkpoints, and its stop signals.

    Attributes:
        changed: True if the run is resumed with an accepted change of its config or files.
    """

    console: Console
    writer: Writer
    checkpoints: Checkpoints
    interrupts: Interrupts
    changed: bool = False


@dataclasses.dataclass(frozen=True)
class Finished:
    """Results of a run.

    Attributes:
        results: "stage/eval" and "stage/eval_before" -> mean held-out reward.
        samples: the same keys -> rows of prompt, completion, reward.
        models, stage: of the last stage.
        summary: stage -> last metrics.
        withheld: "stage/call" -> number of steps whose update was skipped as non-finite.
        counts: stage -> counts of its examples, see `progress.COUNTED`.
    """

    results: dict[str, float]
    samples: dict[str, list[dict[str, Any]]]
    models: state.Models
    stage: Stage
    summary: dict[str, dict[str, float]]
    withheld: dict[str, int]
    counts: dict[str, dict[str, float]]


def fit(assembled: Assembled, out: Outlets) -> Finished:
    """Runs all stages, from the newest good checkpoint if there is one.

    Raises:
        NonFinite: see there, unless the run skips such updates.
        Stopped: a signal arrived.
    """
    models, shelf, at = resume.restored(assembled, out)
    samples: dict[str, list] = {}
    summary: dict[str, dict] = {}
    while True:
        stage = assembled.stages[at.index]
        models = _run_stage(assembled, out, at, models, shelf, samples, summary)
        if at.index + 1 == len(assembled.stages):
            break
        shelf = state.shelve(assembled, at.index, models, shelf)
        at.index, at.step, at.offset = at.index + 1, 0, at.offset + stage.settings.steps
        models = None
    out.checkpoints.wait()
    return Finished(at.results, samples, models, stage, summary, at.withheld, at.counts)


def _run_stage(
    assembled: Assembled,
    out: Outlets,
    at: resume.Position,
    models: state.Models | None,
    shelf: state.Shelf,
    samples: dict[str, list],
    summary: dict[str, dict],
) -> state.Models:
    stage = assembled.stages[at.index]
    name, total, run = stage.name, stage.settings.steps, assembled.run
    out.interrupts.phase = f"the start of stage {name}"
    out.interrupts.check()
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

    def evaluate_held_out(saved: bool) -> None:
        """Evaluates the actor; on failure saves first, so that nothing is lost."""
        try:
            score = measure(stage, models, "eval")
        except Exception:
            if not saved:
                save()
            out.checkpoints.wait()
            raise
        at.evaluated = True
        if saved:
            out.checkpoints.note({"results": at.results, "evaluated": True}, score=score)

    if not at.evaluated:  # the previous run ended between a save and its evaluation
        evaluate_held_out(saved=True)

    def save() -> None:
        record = {
            "stage": name,
            "step": at.step,
            "data": data_state,
            "results": at.results,
            "evaluated": at.evaluated,
            "withheld": at.withheld | {f"{name}/{c}": n for c, n in log.withheld.items()},
            "counts": at.counts | {name: _counts(stage)},
        }
        whole = state.shared(state.saved(assembled, at.index, models, shelf))
        out.checkpoints.save(at.offset + at.step, whole, record)
        cadence.saved()

    out.console.stage(name, total, start=at.step)
    earlier = {k.partition("/")[2]: n for k, n in at.withheld.items() if k.startswith(f"{name}/")}
    log = StepLog(stage, out, at.offset, run.nonfinite, calibration, withheld=earlier)
    cadence = Cadence(run.checkpoint.every, run.checkpoint.minutes)
    last = at.index + 1 == len(assembled.stages)
    pending = None

    def flush() -> None:
        """Logs the step that was dispatched last, which waits for it to finish."""
        nonlocal pending
        if pending is not None:
            log(pending)
            pending = None

    with out.interrupts.training():
        while at.step < total:
            batch = next(stage.loader)
            data_state = stage.loader.state()
            with jax.transfer_guard("disallow"):
                models, data, metrics = stage.step(
                    models, batch, words(run.seed, name, at.step), reselect=stage.step.due(at.step)
                )
            at.step += 1
            done = _dispatched(stage, at.step, metrics, batch)
            flush()
            pending = done
            show = stage.settings.samples_every
            if data and show and (at.step % show == 0 or at.step == total):
                flush()
                shown = stage.step.shown(data)
                rows = evaluate.responses(shown, stage.source, assembled.tokenizer, 16)
                log.samples(at.step, rows)
            at.evaluated = not _evaluates(stage, at.step)
            stop = out.interrupts.asked(at.offset + at.step)
            due = cadence.due(at.step) or at.step == total or stop
            if due or not at.evaluated:
                flush()  # raises on non-finite metrics before they are saved or evaluated
            if due:
                save()
                log.pause()
            if not at.evaluated and not stop:
                evaluate_held_out(saved=due)
                log.pause()
            if stop and (at.step < total or not last or not at.evaluated):
                out.checkpoints.wait()
                raise Stopped(f"stage {name}, step {at.step} of {total}")
            if calibration is not None and at.step < total and calibration.due(at.step):
                flush()
                stage, models = _replanned(stage, models, calibration, out)
                log.restart(stage)
    out.console.end_stage()
    if log.spans:
        spans = [dataclasses.asdict(s) for s in log.spans]
        out.writer.document("timeline", {name: spans}, merge=True)
    summary[name] = log.last
    at.withheld |= {f"{name}/{call}": n for call, n in log.withheld.items()}
    at.counts[name] = _counts(stage)
    stage.loader.close()
    return models


def _dispatched(stage: Stage, step: int, metrics: Any, batch: Any) -> Dispatched:
    times = stage.step.timeline.newest
    return Dispatched(step, metrics, times, lengths(batch), _counts(stage))


def _counts(stage: Stage) -> dict[str, float]:
    """Returns counts of a stage's examples up to the newest batch."""
    return {k: v for k, v in stage.loader.stats().items() if k in COUNTED}


def _evaluates(stage: Stage, step: int) -> bool:
    """Returns True if held-out problems are evaluated after a step."""
    if stage.evaluation is None:
        return False
    every = stage.settings.evaluate.every
    return step == stage.settings.steps or bool(every and step % every == 0)


@contextlib.contextmanager
def getting_ready(stage: Stage) -> Iterator[None]:
    """Context that compiles a stage's calls and opens its data in the background.

    It waits for both at its end. Its body reads the models, which is limited by the disk rather
    than the cores.
    """
    pool = ThreadPoolExecutor(2)
    try:
        started = pool.submit(stage.step.build, stage.batch), pool.submit(stage.loader.prepare)
        yield
        for one in started:
            one.result()
    finally:  # an error in the body is raised without waiting
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
    """Corrects the cost model by measurements; switches to a better plan if there is one."""
    new = calibration.corrected()
    gain = calibration.gain(new)
    out.console.line(f"{stage.name}: predicted and measured seconds")
    for line in measured.text(calibration.rows).splitlines():
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
    except ValueError as error:  # for packed rows: real programs leave no room in memory
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


def _measure(out: Outlets, at: resume.Position, samples: dict[str, list]):
    """Returns a function that evaluates a stage's actor and records the result."""

    def measure(stage: Stage, models: state.Models, kind: str) -> float:
        held_out = stage.evaluation
        home = jax.tree.map(lambda x: x.sharding, stage.step.home("actor").params)
        there = jax.tree.map(lambda x: x.sharding, held_out.step.home("actor").params)
        score, rows = held_out(Route(home, there)(models["actor"].params))
        key = f"{stage.name}/{kind}"
        at.results[key], samples[key] = score, rows
        step = at.offset + at.step
        few = {f"{kind}_problems": held_out.problems} if held_out.of_how_many else {}
        out.writer.step(step, stage.name, {kind: score, **few})
        out.writer.samples(step, stage.name, [{**r, "held_out": True} for r in rows[:16]])
        told = f"held-out reward {score:.3f}{held_out.of_how_many}"
        out.console.line(f"{stage.name}: {told} after {at.step} steps")
        return score

    return measure


@contextlib.contextmanager
def _cache_hits() -> Iterator[dict[str, int]]:
    """Context that counts hits and misses of the persistent compilation cache."""
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

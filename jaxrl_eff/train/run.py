"""A whole run, from a config to trained weights."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxrl_eff import secret
from jaxrl_eff.train import config_file, identity, interrupts, settings, startup
from jaxrl_eff.train.workdir import check_workdir, held


def run(
    config: settings.Run | Mapping[str, Any],
    workdir: str | Path,
    *,
    quiet: bool = False,
    accept_changes: bool = False,
) -> bool:
    """Trains as a config says; the command without a command line, and without its report.

    Call it before JAX is used: the number of simulated devices and the compilation cache are set
    first. Processes of a cluster that JAX knows find each other.

    Args:
        config: the settings, or what a config file's `get_config` returns, as nested mappings.
        workdir: directory of the results; a run in it is continued.
        quiet: True prints only the final table and verdict.
        accept_changes: True continues a run even if the config or the data have changed.

    Returns:
        True if the config's expectation was met, or the run was stopped and saved.

    Raises:
        ValueError, FileNotFoundError, ImportError: found before anything long starts.

    Example:
        >>> from jaxrl_eff import run
        >>> shape = dict(layers=1, width=4, heads=1, kv_heads=1, head_dim=4, ffn=8)
        >>> data = dict(source="reverse", length=16, options=dict(digits=2))
        >>> sft = dict(algorithm="sft", steps=1, batch=2, data=data, optim=dict(actor={}))
        >>> sft["plan"] = dict(default=dict(devices=1))
        >>> config = dict(model=dict(shape=shape), tokenizer="chars:0123456789>")
        >>> config |= dict(stages=("sft",), sft=sft)
        >>> run(config, "workdir", quiet=True)
        <BLANKLINE>
        result
        ...
        True
    """
    if not isinstance(config, settings.Run):
        config = settings.run(config)
    with startup.started(config):
        return train(config, Path(workdir), quiet=quiet, accept_changes=accept_changes)


def train(
    config: settings.Run,
    workdir: Path,
    *,
    quiet: bool = False,
    accept_changes: bool = False,
    draw: Callable[[Path], Path] | None = None,
    began: float | None = None,
) -> bool:
    """`run` in a process that `startup` has prepared.

    Args:
        draw: draws the page of a workdir, and returns its path; None: no page.
        began: `time.perf_counter()` when the command started, for the seconds in all; None: now.
    """
    import jax

    from jaxrl_eff.train import loop
    from jaxrl_eff.train.console import Console
    from jaxrl_eff.train.progress import NonFinite

    began = time.perf_counter() if began is None else began
    check_workdir(workdir)
    first = jax.process_index() == 0
    with contextlib.ExitStack() as closing:
        lock = closing.enter_context(held(workdir))
        stream = None
        if not first:  # only the first process speaks
            stream = closing.enter_context(open(os.devnull, "w", encoding="utf-8"))
        console = closing.enter_context(Console(quiet=quiet or not first, stream=stream))
        heard = closing.enter_context(interrupts.listening())
        try:
            assembled, out = _opened(
                config, workdir, accept_changes, lock.check, console, heard, closing
            )
            done = loop.fit(assembled, out)
            return _conclude(assembled, done, workdir, out, draw, began)
        except interrupts.Stopped as stop:
            console.end_stage()
            console.final(f"stopped at {stop}; the same command continues")
            return True
        except NonFinite as error:
            console.end_stage()
            console.final(f"error: {error}")
            return False
        finally:
            heard.over()


def _opened(
    config: settings.Run,
    workdir: Path,
    accept_changes: bool,
    guard: Callable[[], None],
    console: Any,
    heard: interrupts.Interrupts,
    closing: contextlib.ExitStack,
) -> tuple[Any, Any]:
    """Assembles a run and opens its files, which `closing` closes; prints the header."""
    import jax

    from jaxrl_eff.checkpoints.run import Checkpoints
    from jaxrl_eff.train import assembly, balanced, loop, resume, state, summary
    from jaxrl_eff.train.writer import Writer

    assembled = assembly.assemble(config)
    me = identity.identify(config, workdir, accept_changes=accept_changes)
    checkpoints = Checkpoints(
        workdir / "checkpoints",
        keep=config.checkpoint.keep,
        fingerprint=me.fingerprint,
        accepted=me.accepted,
        renamed=state.renamed,
        guard=guard,
    )
    closing.callback(checkpoints.close)
    record = checkpoints.peek()
    found = "none" if record is None else f"stage {record['stage']}, step {record['step']}"
    startup.agree("workdir", {f"the checkpoint in {workdir}": found})  # and all are assembled
    kept = resume.written(record, assembled.stages)
    first = jax.process_index() == 0
    writer = Writer(workdir, **kept, wandb=config.wandb or None, enabled=first, guard=guard)
    closing.callback(writer.close)
    writer.document("identity", me.document())
    writer.document("config", secret.redacted(dataclasses.asdict(config)))
    writer.document("plan", {s.name: s.step.plan_table() for s in assembled.stages})
    scheduled = [s for s in assembled.stages if s.settings.schedule.name == "skrull"]
    if scheduled:
        found = {s.name: balanced.describe(s.step, s.lengths) for s in scheduled}
        writer.document("schedule", found)
    console.header(f"jaxrl_eff: {' → '.join(config.stages)}", summary.facts(assembled, workdir))
    for stage in assembled.stages:
        for note in stage.notes:
            console.warn(f"{stage.name}: {note}")
    for change in me.changes:
        console.warn(f"this run goes on although {change}")
    heard.phase = "restoring"
    return assembled, loop.Outlets(console, writer, checkpoints, heard, bool(me.accepted))


def _conclude(
    assembled: Any,
    done: Any,
    workdir: Path,
    out: Any,
    draw: Callable[[Path], Path] | None,
    began: float,
) -> bool:
    """Prints the table, exports, draws the report; returns whether the expectation was met."""
    import jax

    from jaxrl_eff.train import export, summary

    config, console, writer = assembled.run, out.console, out.writer
    seconds = time.perf_counter() - began
    console.table("result", ["", "value"], summary.table(assembled, done, seconds))
    summary.show_change(done, console)
    untrained = summary.untrained(config, done.withheld)
    passed = summary.expectation(config, done.results) and not untrained
    result = {
        "results": done.results,
        "withheld": done.withheld,
        "data": summary.data(assembled, done),
        "notes": {s.name: list(s.notes) for s in assembled.stages if s.notes},
        "expected": dataclasses.asdict(config.expect),
        "passed": passed,
        "seconds": seconds,
        "export": None,
    }
    # Written before the export too: an export that fails loses no number.
    writer.document("result", result)
    if config.export:
        out.interrupts.phase = "the export"
        result["export"] = str(export.write(assembled, done, workdir, console))
        console.final(f"exported: {result['export']}")
        writer.document("result", result)
    if jax.process_index() == 0:
        out.interrupts.phase = "the report"
        writer.close()
        try:
            if draw is not None:
                console.final(f"report: {draw(workdir)}")
        except Exception as error:  # a page that cannot be drawn does not decide about the run
            console.warn(f"the report could not be drawn: {config_file.said(error)}")
        summary.verdict(config, done, console, passed)
    return passed

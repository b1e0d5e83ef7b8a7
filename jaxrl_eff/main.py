r"""Trains a language model as a config says.

  python -m jaxrl_eff.main --config=configs/quickstart.py --workdir=runs/quickstart
  python -m jaxrl_eff.main --config=configs/grpo_gsm8k.py:model=DIR,data=DIR --config.grpo.steps=50

A config is a Python file in configs/ with a docstring that says what it does; any of its values
can be changed on the command line (--config.a.b=c), and --help with a config shows them all. A run
resumes by itself from its workdir. Clusters that JAX knows (SLURM, TPU pods, ...) start several
processes by themselves; elsewhere give --coordinator, --processes and --process.

Exit codes: 0 done, and the config's expectation met, or stopped by SIGTERM or Ctrl-C with all of it
saved; 1 the expectation was missed, or a number was not finite; 2 anything else that went wrong, in
one line (JAXRL_EFF_TRACEBACK=1 shows where); 130 Ctrl-C before there was anything to save.
"""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from jaxrl_eff import secret
from jaxrl_eff.parallel import host
from jaxrl_eff.train import config_file, identity, interrupts, settings, startup
from jaxrl_eff.train.workdir import check_workdir, held

_CONFIG = flags.DEFINE_string("config", None, "A file of configs/, FILE[:argument].")
_CHANGES = flags.DEFINE_multi_string(config_file.FLAG, [], "--config.a.b=c sets a value of it.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where results go; resumes what is there.")
_QUIET = flags.DEFINE_bool("quiet", False, "Print only the final table and verdict.")
_ACCEPT_CHANGES = flags.DEFINE_bool(
    "accept_changes", False, "Go on with the run of the workdir although config or data changed."
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are.")
_PROCESS = flags.DEFINE_integer("process", None, "Which one this is, from 0.")
_WAIT = flags.DEFINE_float("wait", startup.WAIT, "Seconds until a silent process is given up.")
# What must agree for a run to be continued, as one short text.
fingerprint = identity.fingerprint
# For the seconds of a whole run.
_BEGAN = time.perf_counter()


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # libraries say a lot at the level below
    interrupts.outlast_readers()
    if len(argv) > 1:
        config_file.fail(f"unknown arguments {argv[1:]}; flags begin with --, see --help.")
    for flag, example in ((_CONFIG, "configs/quickstart.py"), (_WORKDIR, "runs/first")):
        if not flag.value:
            config_file.fail(f"--{flag.name} is missing, e.g. --{flag.name}={example}; see --help.")
    with config_file.explained():
        run = settings.run(config_file.load(_CONFIG.value, _CHANGES.value))
        given = (f.value for f in (_COORDINATOR, _PROCESSES, _PROCESS, _WAIT))
        alike = {"--accept_changes": str(_ACCEPT_CHANGES.value)}
        with startup.started(run, startup.Processes(*given), alike):
            check_workdir(Path(_WORKDIR.value))
            startup.check_shared(Path(_WORKDIR.value))
            passed = train(
                run, Path(_WORKDIR.value), quiet=_QUIET.value, accept_changes=_ACCEPT_CHANGES.value
            )
    sys.exit(0 if passed else 1)


def _parse(argv: list[str]) -> list[str]:
    """Absl's parsing, after the config's own flags are made readable for it; and --help."""
    with config_file.explained():
        argv = config_file.rewrite(argv)
        if {"--help", "-help", "-h"} & set(argv):
            print(_help(argv))
            sys.exit(0)
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        config_file.fail(f"{' '.join(str(error).split())}; see --help.")


def _help(argv: list[str]) -> str:
    """Text of --help: the command, its flags, and the configs at hand or the values of one."""
    lines = [__doc__ or "", "Flags:"]
    for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0]):
        shown = f"--{flag.name}" if flag.name != config_file.FLAG else "--config.NAME"
        lines.append(f"  {shown:15} {flag.help}")
    spec = next((a.partition("=")[2] for a in argv if a.startswith("--config=")), "")
    if spec:
        run = dataclasses.asdict(settings.run(config_file.load(spec)))
        run |= run.pop("stage")
        return "\n".join(
            [*lines, "", f"Values of {spec}:", *map("  --{}".format, config_file.flat(run))]
        )
    return "\n".join([*lines, "", "Configs:", config_file.describe()])


def train(
    run: settings.Run, workdir: Path, *, quiet: bool = False, accept_changes: bool = False
) -> bool:
    """Runs the whole of it; returns whether the expectation was met.

    Args:
        run: the settings.
        workdir: where results go; a run that is there is continued.
        quiet: print only the final table and verdict.
        accept_changes: continue it even if it computed something else until now.

    Raises:
        ValueError, FileNotFoundError, ImportError: found before anything long starts.
    """
    import jax

    from jaxrl_eff.train import loop
    from jaxrl_eff.train.console import Console
    from jaxrl_eff.train.progress import NonFinite

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
                run, workdir, accept_changes, lock.check, console, heard, closing
            )
            return _conclude(assembled, loop.fit(assembled, out), workdir, out)
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
    run: settings.Run,
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
    from jaxrl_eff.train import assembly, loop, resume, summary
    from jaxrl_eff.train.writer import Writer

    assembled = assembly.assemble(run)
    me = identity.identify(run, workdir, accept_changes=accept_changes)
    checkpoints = Checkpoints(
        workdir / "checkpoints",
        keep=run.checkpoint.keep,
        fingerprint=me.fingerprint,
        accepted=me.accepted,
        guard=guard,
    )
    closing.callback(checkpoints.close)
    record = checkpoints.peek()
    found = "none" if record is None else f"stage {record['stage']}, step {record['step']}"
    startup.agree("workdir", {f"the checkpoint in {workdir}": found})  # and all are assembled
    kept = resume.written(record, assembled.stages)
    first = jax.process_index() == 0
    writer = Writer(workdir, **kept, wandb=run.wandb or None, enabled=first, guard=guard)
    closing.callback(writer.close)
    writer.document("identity", me.document())
    writer.document("config", secret.redacted(dataclasses.asdict(run)))
    writer.document("plan", {s.name: s.step.plan_table() for s in assembled.stages})
    scheduled = [s for s in assembled.stages if s.settings.schedule.name == "skrull"]
    if scheduled:
        writer.document("schedule", {s.name: s.describe() for s in scheduled})
    console.header(f"jaxrl_eff: {' → '.join(run.stages)}", summary.facts(assembled, workdir))
    for stage in assembled.stages:
        for note in stage.notes:
            console.warn(f"{stage.name}: {note}")
    for change in me.changes:
        console.warn(f"this run goes on although {change}")
    heard.phase = "restoring"
    return assembled, loop.Outlets(console, writer, checkpoints, heard, bool(me.accepted))


def _conclude(assembled: Any, done: Any, workdir: Path, out: Any) -> bool:
    """Prints the table, exports, draws the report; returns whether the expectation was met."""
    import jax

    from jaxrl_eff.cli import report
    from jaxrl_eff.train import export, summary

    run, console, writer = assembled.run, out.console, out.writer
    seconds = time.perf_counter() - _BEGAN
    console.table("result", ["", "value"], summary.table(assembled, done, seconds))
    summary.show_change(done, console)
    untrained = summary.untrained(run, done.withheld)
    passed = summary.expectation(run, done.results) and not untrained
    result = {
        "results": done.results,
        "withheld": done.withheld,
        "data": summary.data(assembled, done),
        "notes": {s.name: list(s.notes) for s in assembled.stages if s.notes},
        "expected": dataclasses.asdict(run.expect),
        "passed": passed,
        "seconds": seconds,
        "export": None,
    }
    # Written before the export too: an export that fails loses no number.
    writer.document("result", result)
    if run.export:
        out.interrupts.phase = "the export"
        result["export"] = str(export.write(assembled, done, workdir, console))
        console.final(f"exported: {result['export']}")
        writer.document("result", result)
    if jax.process_index() == 0:
        out.interrupts.phase = "the report"
        writer.close()
        try:
            console.final(f"report: {report.write(workdir)}")
        except Exception as error:  # a page that cannot be drawn does not decide about the run
            console.warn(f"the report could not be drawn: {config_file.said(error)}")
        summary.verdict(run, done, console, passed)
    return passed


if __name__ == "__main__":
    host.use_huge_pages()
    app.run(main, flags_parser=_parse)

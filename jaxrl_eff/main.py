r"""Trains a language model as a config says.

  python -m jaxrl_eff.main --config=configs/quickstart.py --workdir=runs/quickstart
  python -m jaxrl_eff.main --config=configs/grpo_gsm8k.py:model=DIR,data=DIR --config.grpo.steps=50

A config is a Python file in configs/ with a docstring that says what it does; any of its values
can be changed on the command line (--config.a.b=c), and --help with a config shows them all. A run
resumes by itself from its workdir. Clusters that JAX knows (SLURM, TPU pods, ...) start several
processes by themselves; elsewhere give --coordinator, --processes and --process.

Exit codes: 0 done, and the config's expectation met, or stopped by SIGTERM with everything saved;
1 the expectation was missed, or a number was not finite; 2 something in the command is wrong.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from jaxrl_eff import arguments, host, settings, startup

_CONFIG = flags.DEFINE_string("config", None, "A file of configs/, FILE[:argument].")
_CHANGES = flags.DEFINE_multi_string(arguments.FLAG, [], "--config.a.b=c sets a value of it.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where results go; resumes what is there.")
_QUIET = flags.DEFINE_bool("quiet", False, "Print only the final table and verdict.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are.")
_PROCESS = flags.DEFINE_integer("process", None, "Which one this is, from 0.")

# What may differ between a run and its continuation: where it runs, and how often it reports.
_FREE = (
    "plan", "search", "sync", "evaluate", "samples_every", "path", "simulate_devices", "checkpoint",
    "expect", "wandb", "export", "nonfinite",
)  # fmt: skip


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # libraries say a lot at the level below
    if len(argv) > 1:
        _fail(f"unknown arguments {argv[1:]}; flags begin with --, see --help.")
    for flag, example in ((_CONFIG, "configs/quickstart.py"), (_WORKDIR, "runs/first")):
        if not flag.value:
            _fail(f"--{flag.name} is missing, e.g. --{flag.name}={example}; see --help.")
    try:
        run = settings.run(arguments.load(_CONFIG.value, _CHANGES.value))
        check_workdir(Path(_WORKDIR.value))
        startup.prepare(
            run, startup.Processes(*(f.value for f in (_COORDINATOR, _PROCESSES, _PROCESS)))
        )
        passed = train(run, Path(_WORKDIR.value), quiet=_QUIET.value)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("JAXRL_EFF_TRACEBACK"):
            raise
        _fail(str(error))
    sys.exit(0 if passed else 1)


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _parse(argv: list[str]) -> list[str]:
    """Absl's parsing, after the config's own flags are made readable for it; and --help."""
    try:
        argv = arguments.rewrite(argv)
        if {"--help", "-help", "-h"} & set(argv):
            print(_help(argv))
            sys.exit(0)
    except ValueError as error:
        _fail(str(error))
    return app.parse_flags_with_usage(argv)


def _help(argv: list[str]) -> str:
    """What the command does, its flags, and the configs at hand or the values of the one given."""
    lines = [__doc__ or "", "Flags:"]
    for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0]):
        shown = f"--{flag.name}" if flag.name != arguments.FLAG else "--config.NAME"
        lines.append(f"  {shown:15} {flag.help}")
    spec = next((a.partition("=")[2] for a in argv if a.startswith("--config=")), "")
    if spec:
        run = dataclasses.asdict(settings.run(arguments.load(spec)))
        run |= run.pop("stage")
        return "\n".join(
            [*lines, "", f"Values of {spec}:", *map("  --{}".format, arguments.flat(run))]
        )
    return "\n".join([*lines, "", "Configs:", arguments.describe()])


def train(run: settings.Run, workdir: Path, *, quiet: bool = False) -> bool:
    """Runs the whole of it; returns whether the expectation was met.

    Raises:
        ValueError, FileNotFoundError, ImportError: found before anything long starts.
    """
    import jax

    from jaxrl_eff import stages
    from jaxrl_eff import train as loop
    from jaxrl_eff.checkpoint import Checkpoints
    from jaxrl_eff.console import Console
    from jaxrl_eff.metrics import Writer

    began = time.perf_counter()
    check_workdir(workdir)
    assembled = stages.assemble(run)
    first = jax.process_index() == 0
    checkpoints = Checkpoints(
        workdir / "checkpoints", keep=run.checkpoint.keep, fingerprint=fingerprint(run)
    )
    _check_same_run(run, workdir)
    record = checkpoints.peek()
    resume_step, resume_stage = 0, ""
    if record is not None:
        names = [s.name for s in assembled.stages]
        before = assembled.stages[: names.index(record["stage"])]
        resume_stage = record["stage"]
        resume_step = sum(s.settings.steps for s in before) + record["step"]
    writer = Writer(
        workdir,
        resume_step=resume_step,
        resume_stage=resume_stage,
        wandb=run.wandb or None,
        enabled=first,
    )
    # Only the first process speaks.
    stream = None if first else open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    with contextlib.ExitStack() as closing:
        if stream is not None:
            closing.enter_context(stream)
        closing.callback(writer.close)
        closing.callback(checkpoints.close)
        console = closing.enter_context(Console(quiet=quiet or not first, stream=stream))
        writer.document("config", dataclasses.asdict(run))
        writer.document("plan", {s.name: s.step.plan_table() for s in assembled.stages})
        scheduled = [s for s in assembled.stages if s.settings.schedule.name == "skrull"]
        if scheduled:
            writer.document("schedule", {s.name: s.told() for s in scheduled})
        console.header(f"jaxrl_eff: {' → '.join(run.stages)}", _facts(assembled, workdir))
        out = loop.Outlets(console, writer, checkpoints, run.checkpoint.every)
        try:
            done = loop.fit(assembled, out)
        except loop.Stopped as stop:
            console.final(f"stopped at {stop}; the same command continues")
            return True
        except loop.NonFinite as error:
            console.end_stage()
            console.final(f"error: {error}")
            return False
        passed = _conclude(assembled, done, workdir, writer, console, time.perf_counter() - began)
        if first:
            from jaxrl_eff import report

            writer.close()
            console.final(f"report: {report.write(workdir)}")
            _verdict(run, done, console, passed)
    return passed


def check_workdir(workdir: Path) -> None:
    """Makes the directory. Every process does, so that all of them fail where one would."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(f"--workdir={workdir}: there is a file of that name.") from None
    if not os.access(workdir, os.W_OK | os.X_OK):
        raise PermissionError(f"--workdir={workdir} cannot be written to.")


def fingerprint(run: settings.Run) -> str:
    """What must agree for a checkpoint to be this run's: all that changes what is computed."""
    text = json.dumps(_essence(dataclasses.asdict(run)), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _essence(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _essence(v) for k, v in value.items() if k not in _FREE}
    return value


def _check_same_run(run: settings.Run, workdir: Path) -> None:
    """A run of another config in the workdir must not be overwritten by mistake.

    Raises:
        ValueError: naming the first values that differ.
    """
    from jaxrl_eff.metrics import encodable

    metrics = workdir / "metrics.jsonl"
    if not metrics.is_file() or not metrics.stat().st_size:
        return
    try:
        before = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    now = _essence(encodable(dataclasses.asdict(run)))
    was, now = (
        dict(line.split(" = ", 1) for line in arguments.flat(v)) for v in (_essence(before), now)
    )
    names = [k for k in sorted(was | now) if was.get(k) != now.get(k)]
    if names:
        told = [f"{k} was {was.get(k, 'unset')}, is {now.get(k, 'unset')}" for k in names[:3]]
        raise ValueError(
            f"--workdir={workdir} holds a run of another config ({'; '.join(told)}). Give this one "
            "its own directory, or delete that one."
        )


def _facts(assembled: Any, workdir: Path) -> dict[str, str]:
    """The header: devices, meshes, parameters, cache, workdir."""
    import jax

    from jaxrl_eff import footprint
    from jaxrl_eff.models import attention, count
    from jaxrl_eff.parallel import spread

    kind, n = jax.devices()[0].device_kind, jax.device_count()
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    facts = {"devices": f"{n} x {kind}{processes} (jax {jax.__version__})"}
    base = assembled.base
    facts["model"] = (
        f"{count(base):,} parameters, {base.family}, {base.dtype} compute, {base.param_dtype} "
        f"parameters, {attention.choose(base).__name__} attention"
    )
    plans = [p for stage in assembled.stages for p in stage.step.plan.values()]
    scheduled = any(s.settings.schedule.name == "skrull" for s in assembled.stages)
    if spread.for_whole_rows() and spread.fits_whole_rows(base.head_dim, base.dtype):
        facts["model"] += f" to a cache, by {spread.kernel().name} elsewhere"
    elif scheduled or any(p.seq > 1 for p in plans):
        facts["model"] += f", over a mesh by {spread.kernel().name}"
    for stage in assembled.stages:
        held: dict[int, int] = {}
        for role in stage.step.graph.models:
            mine = footprint.planned(stage.step, role)
            for device in stage.step.plan[stage.step.graph.home(role).name].devices:
                held[device] = held.get(device, 0) + mine.parameters + mine.state
        meshes: dict[str, list[str]] = {}
        for c in stage.step.calls:
            if c.of is not None:
                meshes.setdefault(str(stage.step.plan[c.name]), []).append(c.name)
        text = "; ".join(f"{', '.join(calls)} on {place}" for place, calls in meshes.items())
        memory = max(held.values()) / 1e6
        facts[stage.name] = f"{text}; models and optimizers about {memory:,.1f} MB a device"
        if stage.settings.schedule.name == "skrull":
            facts[f"{stage.name}/schedule"] = _scheduled(stage.told())
        for role, part in stage.settings.adapt.items():
            ours, all_ = (f(stage.step, role) for f in (footprint.planned, footprint.whole))
            facts[f"{stage.name}/{role}"] = (
                f"{part.name}: {ours}; trained whole with Adam {all_.total / 1e6:,.2f}"
            )
    directory = jax.config.jax_compilation_cache_dir
    if directory is None:
        facts["compile cache"] = "off: nothing can be written; JAX_COMPILATION_CACHE_DIR says where"
    else:
        warm = Path(directory).is_dir() and any(Path(directory).iterdir())
        told = "in use" if warm else "empty: first compilation"
        facts["compile cache"] = f"{directory} ({told})"
    facts["workdir"] = str(workdir)
    return facts


def _scheduled(told: dict[str, Any]) -> str:
    """What schedules are made for, in words; see `Stage.told`."""
    places, out = told.get("places", [told]), []
    for place in places:
        # One device shares with nobody.
        alone = place["parts"] == 1
        shapes = ", ".join(
            f"{own + shared}" if alone else f"{own}+{shared}" for own, shared in place["shapes"]
        )
        kinds = "tokens" if alone else "(own + shared)"
        calls = f"{', '.join(place['calls'])}: " if len(places) > 1 else ""
        out.append(f"{calls}{place['room']:,} tokens a device; micro-batches of {shapes} {kinds}")
    return "; ".join(out)


def _conclude(
    assembled: Any, done: Any, workdir: Path, writer: Any, console: Any, seconds: float
) -> bool:
    """Exports, prints the table, writes what the report needs."""
    from jaxrl_eff import footprint

    run = assembled.run
    rows: list[list[Any]] = []
    for key, value in done.results.items():
        name, _, when = key.partition("/")
        rows.append([f"held-out reward {'before' if 'before' in when else 'after'} {name}", value])
    for name, values in done.summary.items():
        for metric, label in (
            ("ref_kl", "KL to the reference, nats a response"),
            ("logp_gap_max", "sampler - trainer log-prob, max"),
            ("accuracy", "accuracy on training pairs"),
        ):
            found = [v for k, v in values.items() if k.split("/")[-1] == metric]
            if found:
                rows.append([f"{label}, {name}", found[0]])
    held, kind = footprint.used()
    rows.append([f"MB on a device, {kind}", round(held / 1e6, 2)])
    rows.append(["seconds in all", round(seconds, 1)])
    console.table("result", ["", "value"], rows)
    _show_change(done, console)
    passed = expectation(run, done.results)
    export = workdir / "export"
    if run.export:
        _export(assembled, done, workdir, console)
        console.final(f"exported: {export}")
    writer.document(
        "result",
        {
            "results": done.results,
            "expected": dataclasses.asdict(run.expect),
            "passed": passed,
            "seconds": seconds,
            "export": str(export) if run.export else None,
        },
    )
    return passed


def _export(assembled: Any, done: Any, workdir: Path, console: Any) -> None:
    """The last trained model, adapters merged; and LoRA in PEFT's format, with its base model if
    that is in no directory yet.

    A quantised base is dequantised, not read again from where it came: adapters were trained beside
    its codes and make up for some of what these lose.
    """
    from jaxrl_eff import adapt, state
    from jaxrl_eff.models import lora, save_hf
    from jaxrl_eff.models.peft import save_peft

    stage, role = done.stage, done.stage.trained
    lm, part = stage.lms[role], stage.settings.adapt.get(role)
    trained = state.shared(done.models[role].params)
    save_hf(workdir / "export", lm, state.merged(lm, trained))
    if _first():
        assembled.tokenizer.save(workdir / "export")
    if part is None:
        return
    kind, name = stage.origins[role]
    base = {"base": assembled.run.model.path, "directory": name}.get(kind, "")
    if part.name not in lora.METHODS:
        if base and not part.rank and _first():
            _export_delta(base, workdir, part.name, console)
        return
    if not base:
        base = str(workdir / "base")
        save_hf(base, lm, state.merged(lm, lora.base(trained)))
        if _first():
            assembled.tokenizer.save(workdir / "base")
    whole = adapt.whole_names(part, lm)
    save_peft(workdir / "adapter", lm, trained, base_model=base, whole=whole)
    console.final(f"adapter: {workdir / 'adapter'}, of {base}")


def _export_delta(base: str, workdir: Path, method: str, console: Any) -> None:
    """What a sparse change did to the base, as a file that `jaxrl_eff.delta` takes back."""
    from jaxrl_eff import deltas

    before, after = (deltas.read_directory(d) for d in (base, workdir / "export"))
    if {k: v.dtype for k, v in before.items()} != {k: v.dtype for k, v in after.items()}:
        console.final(
            "no delta file: the base model has other dtypes than config.model.param_dtype"
        )
        return
    delta = deltas.diff(before, after, method=method)
    size = deltas.save(delta, workdir / "delta.safetensors")
    console.final(
        f"delta: {workdir / 'delta.safetensors'}, {delta.count:,} entries in {size:,} bytes; "
        f"python -m jaxrl_eff.delta remove --model={workdir / 'export'} --delta=... gives the base"
    )


def _first() -> bool:
    import jax

    return jax.process_index() == 0


def _show_change(done: Any, console: Any) -> None:
    """The same held-out prompts, answered after the first and the last evaluation."""
    keys = list(done.samples)
    if not keys:
        return
    before = {r["example"]: r for r in done.samples[keys[0]]}
    rows = []
    for row in done.samples[keys[-1]][:4]:
        old = before.get(row["example"], {})
        cells = [row["prompt"], old.get("completion", ""), row["completion"]]
        rows.append([c[-60:] for c in cells] if len(keys) > 1 else [cells[0][-60:], cells[2][-60:]])
    columns = ["prompt", keys[0], keys[-1]] if len(keys) > 1 else ["prompt", keys[0]]
    console.table("held-out samples", columns, rows)


def expectation(run: settings.Run, results: dict[str, float]) -> bool:
    """Whether the results are what the config promised."""
    e = run.expect
    if not e.metric:
        return True
    value = results[e.metric]
    rise = value - results[e.rises_over] >= e.rise if e.rises_over else True
    return value >= e.at_least and rise


def _verdict(run: settings.Run, done: Any, console: Any, passed: bool) -> None:
    e = run.expect
    if not e.metric:
        console.verdict(True, f"{len(run.stages)} stages done")
        return
    text = f"{e.metric} {done.results[e.metric]:.3f}"
    wanted = []
    if e.at_least > float("-inf"):
        wanted.append(f"at least {e.at_least:g}")
    if e.rises_over:
        text += f", {e.rises_over} {done.results[e.rises_over]:.3f}"
        wanted.append(f"a rise of at least {e.rise:g} over {e.rises_over}")
    console.verdict(passed, f"{text}; expected {' and '.join(wanted)}")


if __name__ == "__main__":
    host.use_huge_pages()
    app.run(main, flags_parser=_parse)

"""Plans where each call of a config runs on a cluster, and predicts how fast, without the cluster.

  python -m jaxrl_eff plan --config=configs/ppo.py --cluster=h100:16x8
  python -m jaxrl_eff plan --config=configs/grpo_gsm8k.py:model=DIR --cluster=v5p:4x4x4 --stage=grpo

No accelerator, weights or data are needed: sizes come from the config and from a checkpoint's
config.json. For every stage the command prints the plan, its predicted time and memory, what plans
made by simple rules would take, where the time goes, and how much faster the best plan could be at
most. It writes plan.json (the tables that config.STAGE.plan takes), timeline.html, and trace.json
for ui.perfetto.dev. --config.a.b=c changes a value of the config, as in training.

Exit codes: 0 planned; 2 the command cannot be done, or no plan fits.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxrl_eff.cli import parser
from jaxrl_eff.cli.pages import devices
from jaxrl_eff.train import config_file, settings
from jaxrl_eff.train.console import Console, number


class Outline(NamedTuple):
    """A stage without its data.

    Attributes:
        name: as in the config.
        graph: its calls.
        lms: role -> shape of its model.
        origins: role -> where its shape comes from: "base" or a checkpoint's directory.
        specs: role -> `Spec`, with the optimizer.
        batch: name -> global shape and dtype of the graph's inputs.
        sampling: of its generate calls, if any.
        packed: call -> what is expected of its rows, for those that a schedule packs.
    """

    name: str
    graph: Any
    lms: dict[str, Any]
    origins: dict[str, str]
    specs: dict[str, Any]
    batch: dict[str, Any]
    sampling: Any
    packed: dict[str, Any]

    @property
    def trained(self) -> str:
        """The role that a later stage means by this stage's name."""
        return next(c.of for c in self.graph.calls if c.kind == "train")


def outlines(run: settings.Run) -> list[Outline]:
    """The stages of a run from its settings alone.

    Raises:
        ValueError, FileNotFoundError: a setting is wrong, or a model's config.json is missing.
    """
    from jaxrl_eff.train import assembly, parts

    with parts.at_path("config.model"):
        tokenizer = _tokenizer(run)
        base = assembly.base_model(run, tokenizer)
    out: list[Outline] = []
    for name in run.stages:
        with parts.at_path(f"config.{name}"):
            out.append(_outline(run, name, tokenizer, base, out))
    return out


def _outline(
    run: settings.Run, name: str, tokenizer: Any, base: Any, earlier: list[Outline]
) -> Outline:
    import numpy as np

    from jaxrl_eff.algorithms import Rollout
    from jaxrl_eff.train import balanced, parts, unused

    s = run.stage[name]
    algorithm = parts.algorithm_of(s)
    unused.check(s)
    cfg = parts.loss_of(s, name)
    given = _origins(s, earlier)
    _, lms = parts.roles_of(dataclasses.replace(s, models=given), base, [])
    sampling, rollout = parts.sampling_of(s, name, tokenizer), None
    if sampling is not None:
        rollout = Rollout(sampling, None if s.reward.name == "model" else _unread)
    graph = parts.graph_of(s, cfg, lms, rollout)
    lms = {role: lm for role, lm in lms.items() if role in graph.models}
    origins = {role: given.get(role) or given["actor"] for role in lms}
    specs, _ = parts.model_specs(s, graph, lms, name)
    with parts.at_path(f"config.{name}.zero"):
        specs = {role: parts.sent(s, spec, lms.get(role)) for role, spec in specs.items()}
    shapes, packed = parts.batch_shapes(s, algorithm.batch), {}
    if s.schedule.name == "skrull":  # the data is not read: prompts are as long as they may be
        before, most = 0, s.data.length
        if sampling is not None:
            before, most = s.data.prompt_length, sampling.max_tokens
        guess = np.concatenate(balanced.guessed([0], most))
        packed = balanced.expected(s.schedule, graph, guess, before=before)
    return Outline(name, graph, lms, origins, specs, shapes, sampling, packed)


def _origins(s: settings.StageSettings, earlier: list[Outline]) -> dict[str, str]:
    """The stage's `models` with earlier stages replaced by what they started from."""
    from jaxrl_eff.train import parts

    by_name, out = {e.name: e for e in earlier}, {next(iter(parts.algorithm_of(s).roles)): "base"}
    for role, where in s.models.items():
        stage, _, of = where.partition("/")
        if stage in by_name:
            origins, of = by_name[stage].origins, of or by_name[stage].trained
            if of not in origins:
                raise ValueError(
                    f"models.{role} is {where!r}, but {stage!r} has {sorted(origins)}."
                )
            where = origins[of]
        out[role] = where
    return out


def _unread(*_: Any) -> dict:
    """Stands where a reward function will be."""
    raise AssertionError("planning runs no call")


def _tokenizer(run: settings.Run) -> Any:
    """The run's tokenizer or, where its files are missing but the vocabulary is known, any other:
    sizes are all that a plan depends on."""
    from jaxrl_eff.data.tokenizer import CharTokenizer
    from jaxrl_eff.train import assembly

    try:
        return assembly.tokenizer_of(run)
    except (ValueError, OSError, ImportError):
        if run.model.path or "vocab" in run.model.shape:
            return CharTokenizer("0")
        raise


def problem(outline: Outline, **options: Any) -> Any:
    """The planner's problem of a stage; more options as in `from_graph.works`."""
    from jaxrl_eff.planner import from_graph

    return from_graph.works(
        outline.graph,
        outline.lms,
        outline.batch,
        sampling=outline.sampling,
        specs=outline.specs,
        **{**from_graph.expecting(outline.packed), **options},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    # Sizes are computed with JAX, on no device: an accelerator would be taken from its user.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    words = parser.command("plan", __doc__)
    add = words.option
    add("--config", "FILE[:ARG]", "the config of a run")
    changes = "written --config.NAME=VALUE: changes a value of the config"
    add(f"--{config_file.FLAG}", "NAME=VALUE", changes, default=[], dest="changes", action="append")
    add("--cluster", "NAME:SIZES", "e.g. h100:16x8 or v5p:4x4x4; local: the devices here")
    add("--stage", "NAME", "the stage to plan (default: all with more than one call)", default="")
    add("--workdir", "DIR", "where the files are written", default="runs/plan")
    seconds, tried = "time to search for a stage's plan", "plans to try instead of a time limit"
    add("--seconds", "S", seconds, parser.number(float, 0), 20.0)
    add("--evaluations", "N", tried, parser.COUNT, None)
    add("--seed", "N", parser.SEED_OF, parser.SEED, 0)
    add("--smallest", "N", "smallest number of devices of a call", parser.COUNT, 1)
    return words.run(argv, _run)


def _run(options: argparse.Namespace) -> None:
    plan_all(settings.run(config_file.load(options.config, options.changes)), options)


def plan_all(run: settings.Run, options: argparse.Namespace) -> None:
    """Plans the stages that the options name, prints each, and writes the files."""
    from jaxrl_eff.cli.pages import plan_page, trace
    from jaxrl_eff.planner import clusters
    from jaxrl_eff.planner.search import search
    from jaxrl_eff.train import parts

    cluster = clusters.parse(options.cluster)
    chosen = _chosen(outlines(run), options.stage)
    plans = []
    with Console(terminal=False) as console:
        for outline in chosen:
            step = problem(outline)
            with parts.at_path(outline.name):
                found = search(
                    step,
                    cluster,
                    seconds=options.seconds,
                    evaluations=options.evaluations,
                    seed=options.seed,
                    smallest=options.smallest,
                )
            plans.append(plan_page.Planned(outline.name, step, cluster, found))
            _print(plans[-1], console)
        folder = Path(options.workdir)
        folder.mkdir(parents=True, exist_ok=True)
        tables = {p.stage: plan_page.table(p.found.plan) for p in plans}
        title = f"Plan of {Path(options.config.partition(':')[0]).stem} on {cluster.name}"
        for name, text in (
            ("plan.json", json.dumps(tables, indent=1)),
            ("timeline.html", plan_page.page(title, plans)),
            ("trace.json", trace.trace_text(plans)),
        ):
            (folder / name).write_text(text + "\n", encoding="utf-8")
        console.final(f"written: {folder / 'timeline.html'}, plan.json, trace.json")


def _chosen(found: list[Outline], stage: str) -> list[Outline]:
    if stage:
        names = [o.name for o in found]
        if stage not in names:
            raise ValueError(f"--stage: unknown stage {stage!r}; expected one of {names}.")
        return [o for o in found if o.name == stage]
    several = [o for o in found if sum(c.of is not None for c in o.graph.calls) > 1]
    return several or found


def _print(planned: Any, console: Any) -> None:
    from jaxrl_eff.cli.pages import plan_page
    from jaxrl_eff.planner import zero_advice

    done = planned.found.schedule
    console.header(f"{planned.stage} on {planned.cluster.name}", _facts(planned))
    columns = [c for c in plan_page.COLUMNS if c not in ("kind", "model")]
    rows = [(name, *row) for name, _, _, *row in plan_page.calls(planned)]
    console.table("plan", columns, rows)
    console.table(
        "against plans made by rule", ["rule", "step", "the plan's gain"], _rules(planned)
    )
    console.table(
        "where the time goes", ["call", "seconds", "of the step", "for"], _where_time_goes(planned)
    )
    for one in zero_advice.advice(planned.problem, planned.cluster):
        console.line(f"between nodes: {one.text()}")
    gib = plan_page.gib
    rows = [
        (
            devices.device_range(g.devices),
            *map(gib, (g.bytes, g.static_bytes, g.active_bytes)),
            g.busiest,
        )
        for g in done.groups
    ]
    console.table(
        "memory of a device", ["devices", "peak", "always", "at most besides", "in"], rows
    )


def _facts(planned: Any) -> dict[str, str]:
    from jaxrl_eff.cli.pages import plan_page

    found, gib = planned.found, plan_page.gib
    fullest = max(found.schedule.groups, key=lambda g: g.bytes)
    return {
        "step": f"{number(found.schedule.seconds)} s, predicted",
        "memory": (
            f"{gib(fullest.bytes)} of {gib(planned.cluster.memory_bytes)} on devices "
            f"{devices.device_range(fullest.devices)}: {gib(fullest.static_bytes)} always, "
            f"{gib(fullest.active_bytes)} in {fullest.busiest}"
        ),
        "certificate": _certificate(found),
        "search": f"{found.evaluated:,} plans in {found.seconds:.1f} s",
        **plan_page.packed(planned),
    }


def _rules(planned: Any) -> list[tuple[str, str, str]]:
    best = planned.found.schedule.seconds
    return [
        (name, "-", said)
        if isinstance(said, str)
        else (name, f"{number(said.seconds)} s", f"{said.seconds / best:.2f}x")
        for name, said in planned.found.heuristics.items()
    ]


def _where_time_goes(planned: Any) -> list[tuple[str, str, str, str]]:
    from jaxrl_eff.cli.pages import plan_page

    done, rows = planned.found.schedule, []
    for w in planned.problem.works:
        seconds = done.costs[w.name].seconds
        spent = plan_page.time_parts(done, w.name)
        told = ", ".join(f"{what} {share:.0%}" for what, share in spent[:4] if share >= 0.01)
        rows.append((w.name, number(seconds), f"{seconds / done.seconds:.0%}", told))
    for name, seconds in plan_page.moved(done):
        kind = "reallocation" if name.partition("->")[0] in planned.problem.roles else "transfer"
        rows.append((name, number(seconds), f"{seconds / done.seconds:.1%}", kind))
    return rows


def _certificate(found: Any) -> str:
    if found.proven:
        return "proven: every plan was tried or excluded, and none is faster"
    return (
        f"at most {found.gap:.1%} slower than the best plan can be: no plan takes less than "
        f"{found.bound.seconds:.4g} s, because {found.bound.reason}"
    )

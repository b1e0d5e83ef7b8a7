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
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrl_eff.cli import parser
from jaxrl_eff.cli.pages import devices
from jaxrl_eff.train import config_file, settings
from jaxrl_eff.train.console import Console, number


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
    from jaxrl_eff.train.outline import outlines

    cluster = clusters.parse(options.cluster)
    chosen = _chosen(outlines(run), options.stage)
    plans = []
    with Console(terminal=False) as console:
        for outline in chosen:
            with parts.at_path(f"config.{outline.name}"):
                step = outline.problem(outline.batch())
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


def _chosen(found: list[Any], stage: str) -> list[Any]:
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

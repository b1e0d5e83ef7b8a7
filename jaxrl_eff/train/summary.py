"""The header of a run, its final table and its verdict."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxrl_eff.models import attention, count
from jaxrl_eff.parallel.attention import sequence
from jaxrl_eff.train import balanced, settings
from jaxrl_eff.train import memory as footprint


def facts(assembled: Any, workdir: Path) -> dict[str, str]:
    """Returns the header's lines: devices, meshes, parameters, cache, workdir."""
    kind, n = jax.devices()[0].device_kind, jax.device_count()
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    lines = {"devices": f"{n} x {kind}{processes} (jax {jax.__version__})"}
    base = assembled.base
    lines["model"] = (
        f"{count(base):,} parameters, {base.family}, {base.dtype} compute, {base.param_dtype} "
        f"parameters, {attention.choose(base).__name__} attention"
    )
    plans = [p for stage in assembled.stages for p in stage.step.plan.values()]
    scheduled = any(s.settings.schedule.name == "skrull" for s in assembled.stages)
    if sequence.for_whole_rows() and sequence.fits_whole_rows(base.head_dim, base.dtype):
        lines["model"] += f" to a cache, by {sequence.kernel().name} elsewhere"
    elif scheduled or any(p.seq > 1 for p in plans):
        lines["model"] += f", over a mesh by {sequence.kernel().name}"
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
        lines[stage.name] = f"{text}; models and optimizers about {memory:,.1f} MB a device"
        if stage.settings.schedule.name == "skrull":
            lines[f"{stage.name}/schedule"] = scheduled_rows(balanced.describe(stage.step, ()))
        for role, part in stage.settings.adapt.items():
            ours, all_ = (f(stage.step, role) for f in (footprint.planned, footprint.whole))
            lines[f"{stage.name}/{role}"] = (
                f"{part.name}: {ours}; trained whole with Adam {all_.total / 1e6:,.2f}"
            )
    directory = jax.config.jax_compilation_cache_dir
    if directory is None:
        cache = "off: nothing can be written; JAX_COMPILATION_CACHE_DIR says where"
    else:
        warm = Path(directory).is_dir() and any(Path(directory).iterdir())
        cache = f"{directory} ({'in use' if warm else 'empty: first compilation'})"
    lines["compile cache"] = cache
    lines["workdir"] = str(workdir)
    return lines


def scheduled_rows(told: dict[str, Any]) -> str:
    """Describes the shapes of schedules; see `balanced.describe`."""
    places, out = told["places"], []
    for place in places:
        # A single device has no shared rows.
        alone = place["parts"] == 1
        shapes = ", ".join(
            f"{own + shared}" if alone else f"{own}+{shared}" for own, shared in place["shapes"]
        )
        kinds = "tokens" if alone else "(own + shared)"
        calls = f"{', '.join(place['calls'])}: " if len(places) > 1 else ""
        out.append(f"{calls}{place['room']:,} tokens a device; micro-batches of {shapes} {kinds}")
    return "; ".join(out)


def data(assembled: Any, done: Any) -> dict[str, dict[str, float]]:
    """Returns counts of each stage's examples, and of the problems in held-out rewards.

    Returns:
        stage -> `examples`, `epochs`, `dropped`, ... as in `Loader.stats`; and, if the stage is
        evaluated, `problems`, the number requested, and `problems_asked`.
    """
    out = {name: dict(counts) for name, counts in done.counts.items()}
    for stage in assembled.stages:
        if (e := stage.evaluation) is not None:
            asked = {"problems": e.wanted, "problems_asked": e.problems}
            out[stage.name] = out.get(stage.name, {}) | asked
    return out


def table(assembled: Any, done: Any, seconds: float) -> list[list[Any]]:
    """Returns rows of the final table: held-out rewards, last metrics, memory, time."""
    rows: list[list[Any]] = []
    of = {s.name: s.evaluation.of_how_many for s in assembled.stages if s.evaluation is not None}
    for key, value in done.results.items():
        name, _, when = key.partition("/")
        when = "before" if "before" in when else "after"
        rows.append([f"held-out reward {when} {name}{of.get(name, '')}", value])
    for name, counts in done.counts.items():
        for what in ("dropped", "truncated"):
            if counts[what]:
                rows.append([f"examples {what}, {name}", int(counts[what])])
    for name, values in done.summary.items():
        for metric, label in (
            ("ref_kl", "KL to the reference, nats a response"),
            ("logp_gap_max", "sampler - trainer log-prob, max"),
            ("accuracy", "accuracy on training pairs"),
        ):
            found = [v for k, v in values.items() if k.split("/")[-1] == metric]
            if found:
                rows.append([f"{label}, {name}", found[0]])
    for call, n in done.withheld.items():
        rows.append([f"steps with an update withheld, {call}", n])
    held, kind = footprint.used()
    rows.append([f"MB on a device, {kind}", round(held / 1e6, 2)])
    rows.append(["seconds in all", round(seconds, 1)])
    return rows


def show_change(done: Any, console: Any) -> None:
    """Shows answers to the same held-out prompts in the first and the last evaluation."""
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
    """Returns True if the results meet the config's expectations."""
    e = run.expect
    if not e.metric:
        return True
    value = results[e.metric]
    rise = value - results[e.rises_over] >= e.rise if e.rises_over else True
    return value >= e.at_least and rise


def untrained(run: settings.Run, withheld: Mapping[str, int]) -> list[str]:
    """Returns train calls, "stage/call", that learned nothing: every step skipped an update."""
    return [call for call, n in withheld.items() if n >= run.stage[call.partition("/")[0]].steps]


def verdict(run: settings.Run, done: Any, console: Any, passed: bool) -> None:
    """Prints the last line."""
    e = run.expect
    if calls := untrained(run, done.withheld):
        said = ", ".join(f"{call}: {done.withheld[call]}" for call in calls)
        console.verdict(False, f"an update was withheld in every step ({said})")
        return
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

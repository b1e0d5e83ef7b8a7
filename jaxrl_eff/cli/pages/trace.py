"""Simulated steps in the Trace Event Format, which Perfetto opens."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl_eff.cli.pages.devices import HOST, by_device, device_range
from jaxrl_eff.cli.pages.plan_page import Planned, places
from jaxrl_eff.planner.simulate import Span


def trace(plans: Sequence[Planned]) -> dict[str, Any]:
    """All simulated steps in the Trace Event Format: a process a stage, a thread a row."""
    events: list[dict[str, Any]] = []
    for pid, planned in enumerate(plans, start=1):
        schedule = planned.found.schedule
        spans = [s for s in schedule.spans if s.end > s.start]
        calls = [s for s in spans if s.kind != "move"]
        rows = by_device(places(planned, calls))
        lanes = _lanes([s for s in spans if s.kind == "move"])
        names = [text if text == HOST else f"devices {text}" for text, _ in rows]
        names += [f"transfers {i}" for i in range(1, len(lanes) + 1)]
        named = f"{planned.stage} on {planned.cluster.name}"
        events.append({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": named}})
        for tid, name in enumerate(names):
            thread = {"ph": "M", "pid": pid, "tid": tid}
            events.append({**thread, "name": "thread_name", "args": {"name": name}})
            events.append({**thread, "name": "thread_sort_index", "args": {"sort_index": tid}})
        for i, s in enumerate(calls):
            args: dict[str, Any] = {"step": s.iteration, "devices": device_range(s.devices)}
            if s.name in schedule.costs:
                args |= {f"{k}_s": v for k, v in schedule.costs[s.name].parts.items()}
            events += [_event(s, pid, tid, args) for tid, (_, here) in enumerate(rows) if i in here]
        for tid, lane in enumerate(lanes, start=len(rows)):
            events += [_event(s, pid, tid, {"step": s.iteration}) for s in lane]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _lanes(spans: Sequence[Span]) -> list[list[Span]]:
    """Spans that may overlap, in as few threads as keep those of one apart."""
    lanes: list[list[Span]] = []
    for s in sorted(spans, key=lambda s: s.start):
        free = next((lane for lane in lanes if lane[-1].end <= s.start), None)
        if free is None:
            lanes.append(free := [])
        free.append(s)
    return lanes


def _event(s: Span, pid: int, tid: int, args: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": s.name,
        "cat": s.kind,
        "ph": "X",
        "ts": s.start * 1e6,
        "dur": (s.end - s.start) * 1e6,
        "pid": pid,
        "tid": tid,
        "args": dict(args),
    }


def trace_text(plans: Sequence[Planned]) -> str:
    """`trace` as the text of a file."""
    return json.dumps(trace(plans))

"""The message of a search whose plans do not fit into memory."""

from collections.abc import Sequence

from jaxrl_eff.parallel.mesh import OFFLOADS, Placement, span
from jaxrl_eff.planner import rules
from jaxrl_eff.planner.choices import Judge, choices
from jaxrl_eff.planner.clusters import Cluster
from jaxrl_eff.planner.problem import Plan, Problem


def explain(judge: Judge, *, executable: bool, smallest: int, offloads: Sequence[str]) -> str:
    """Message that says what is short, where, by how much, and the nearest setup that would fit."""
    t, state = judge.table, min(judge.known, key=lambda s: judge(s).over_bytes)
    done = judge.schedule(state)
    group = max(done.groups, key=lambda g: g.bytes)
    held: dict[str, float] = {}
    for w, p in zip(t.works, t.plan(state).values(), strict=True):
        if set(p.devices) & set(group.devices):
            held[w.model] = max(held.get(w.model, 0.0), done.costs[w.name].static_bytes)
    most = sorted(((b, m) for m, b in held.items() if b >= 1e-3 * group.bytes), reverse=True)
    models = ", ".join(f"{m} {_gib(b)}" for b, m in most)
    text = (
        f"no plan fits into the {_gib(t.cluster.memory_bytes)} a device of {t.cluster.name}. The "
        f"thriftiest one found needs {_gib(group.bytes)} on devices {span(group.devices)}, "
        f"{_gib(done.over_bytes)} too much: {_gib(group.static_bytes)} all the time ({models}) and "
        f"{_gib(group.active_bytes)} while {group.busiest} runs."
    )
    options = {"executable": executable, "smallest": smallest, "corrections": t.corrections}
    if set(offloads) < set(OFFLOADS):
        found = _some_plan(t.problem, t.cluster, offloads=OFFLOADS, **options)
        if found is not None:
            return f"{text} It fits with {_offloaded(found)} in the hosts' memory."
    for wider in _larger(t.cluster):
        found = _some_plan(t.problem, wider, offloads=offloads, **options)
        if found is not None:
            name = max(found, key=lambda n: done.costs[n].static_bytes + done.costs[n].active_bytes)
            return (
                f"{text} It fits on {wider.name}, {wider.devices} devices; there {name} runs on "
                f"{found[name]}."
            )
    return f"{text} No cluster of this kind with up to {wider.devices} devices fits it either."


def _some_plan(problem: Problem, cluster: Cluster, **options) -> dict[str, Placement] | None:
    """A plan that fits, from two quick attempts; None if both fail."""
    try:
        table = choices(problem, cluster, **options)
    except ValueError:
        return None
    judge = Judge(table)
    for state in (rules.colocated(table), rules.frugal(table)):
        if judge.best is None and state is not None:
            judge(rules.repaired(judge, state))
    return table.plan(judge.best[0]) if judge.best is not None else None


def _larger(c: Cluster) -> list[Cluster]:
    """Clusters of the same devices, each a little larger than the one before."""
    out, kind = [], c.name.partition(":")[0]
    torus = c.domain > c.per_host  # a slice, priced as one domain
    per_host, hosts = c.per_host, c.hosts
    while len(out) < 24 and per_host * hosts < 16_384:
        if hosts == 1 and per_host < 8 and not torus:
            per_host *= 2
        else:
            hosts += max(1, hosts // 4)
        n = per_host * hosts
        name = f"{kind}:{n}" if torus or hosts == 1 else f"{kind}:{hosts}x{per_host}"
        out.append(c.with_(name=name, devices=n, per_host=per_host, domain=n if torus else 0))
    return out


def _offloaded(plan: Plan) -> str:
    words = {"opt": "the optimizer states of {}", "params": "the weights of {}"}
    found: dict[str, list[str]] = {}
    for name, p in plan.items():
        if p.offload:
            found.setdefault(p.offload, []).append(name)
    return " and ".join(words[k].format(", ".join(names)) for k, names in found.items())


def _gib(value: float) -> str:
    return f"{value / 2**30:,.1f} GiB"

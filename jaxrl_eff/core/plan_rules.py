"""Plans from named rules or from a config's table, and what makes a plan valid."""

from collections.abc import Mapping
from typing import Any

from jaxrl_eff.core.graph import Graph, Plan, order
from jaxrl_eff.parallel import Placement
from jaxrl_eff.parallel.mesh import mesh

RULES = ("all", "fsdp", "halves")
_KEYS = ("devices", "dcn", "data", "fsdp", "seq", "tensor", "stage", "microbatches", "offload")


def plan(
    rule: str | Mapping[str, Mapping[str, Any]], graph: Graph, devices: int, nodes: int = 1
) -> dict[str, Placement]:
    """Returns a placement for every call of the graph that has a model.

    Args:
        rule: "all": every call on all devices, rows sharded, parameters replicated;
            "fsdp": the same with parameters and optimizer state sharded too;
            "halves": the actor's calls on the first half of the devices, the others on the second;
            or a table call -> `Placement`'s fields. In a table, `devices` is a list, or a number n
            for the first n; default: all. The row "default" is for calls without their own row.
        graph: the calls.
        devices: number of devices.
        nodes: number of nodes (dcn) of a train call. A rule then shards the call's parameters over
            all of them; a table sets dcn itself.

    Raises:
        ValueError: an unknown rule, call or field, or axes that do not fit the devices.
    """
    if not isinstance(rule, Mapping):
        found = _by_rule(rule, graph, devices)
        if nodes == 1:
            return found
        train = {c.name for c in graph.calls if c.kind == "train"}
        split = found if rule == "fsdp" else train  # one layout for all calls stays one
        return {k: _on_nodes(k, p, nodes) if k in split else p for k, p in found.items()}
    names = {c.name for c in graph.calls}
    if unknown := sorted(set(rule) - names - {"default"}):
        raise ValueError(f"the plan: unknown call {unknown[0]!r}; expected one of {sorted(names)}.")
    table = {}
    for c in graph.calls:
        row = rule.get(c.name, rule.get("default") if c.of is not None else None)
        if row is not None:
            table[c.name] = _placement(c.name, row, devices)
        elif c.of is not None:
            raise ValueError(f"the plan has no row for {c.name}, and no row 'default'.")
    return table


def check_plan(graph: Graph, plan: Plan) -> dict[str, Placement]:
    """Returns a placement for every call, including local ones.

    Local calls missing from the plan run on the mesh of the first train call, else of the first
    call.

    Raises:
        ValueError: a call has no placement, a placement has no call, a device does not exist, or a
            call offloads state that it does not have.
    """
    names = {c.name for c in graph.calls}
    if unknown := sorted(set(plan) - names):
        raise ValueError(f"the plan: unknown call {unknown[0]!r}; expected one of {sorted(names)}.")
    full = dict(plan)
    calls = order(graph)
    anchor = next((c for c in calls if c.kind == "train"), calls[0])
    for c in calls:
        if c.kind == "local" and anchor.name in plan:
            full.setdefault(c.name, plan[anchor.name].bare)
        if c.name not in full:
            raise ValueError(f"the plan has no placement for {c.name}; it has {sorted(plan)}.")
        place = full[c.name]
        mesh(place)
        if place.offload and place.offload != ("opt" if c.kind == "train" else "params"):
            raise ValueError(f"{c.name} is a {c.kind} call and cannot offload {place.offload!r}.")
        if place.offload == "params" and any(d.kind == "train" for d in graph.of(c.of or "")):
            raise ValueError(f"{c.name} offloads the parameters of {c.of}, which is trained.")
    return full


def _by_rule(rule: str, graph: Graph, devices: int) -> dict[str, Placement]:
    calls = [c for c in order(graph) if c.of is not None]
    everywhere = Placement(tuple(range(devices)))
    if rule == "all":
        return {c.name: everywhere for c in calls}
    if rule == "fsdp":
        sharded = Placement(tuple(range(devices)), fsdp=devices)
        return {c.name: sharded for c in calls}
    if rule == "halves":
        if devices < 2:
            raise ValueError("the plan 'halves' needs at least 2 devices; there is 1.")
        half = devices // 2
        first, second = Placement(tuple(range(half))), Placement(tuple(range(half, 2 * half)))
        return {c.name: first if c.of == "actor" else second for c in calls}
    raise ValueError(f"unknown plan {rule!r}; expected one of {[*RULES]} or a table.")


def _on_nodes(call: str, place: Placement, nodes: int) -> Placement:
    """Spreads a placement's devices over nodes, with parameters sharded over all of them."""
    count = len(place.devices)
    if count % nodes:
        raise ValueError(f"{call} has {count} devices, which do not divide into {nodes} nodes.")
    return Placement(place.devices, dcn=nodes, fsdp=count // nodes)


def _placement(call: str, row: Mapping[str, Any], devices: int) -> Placement:
    if unknown := sorted(set(row) - set(_KEYS)):
        raise ValueError(
            f"the plan of {call}: unknown field {unknown[0]!r}; expected one of {[*_KEYS]}."
        )
    row = dict(row)
    chosen = row.pop("devices", devices)
    if type(chosen) is int:
        if not 1 <= chosen <= devices:
            raise ValueError(
                f"the plan of {call}: devices is {chosen}, but must be 1 to {devices}."
            )
        chosen = range(chosen)
    if not isinstance(chosen, list | tuple | range):
        raise ValueError(
            f"the plan of {call}: devices is {chosen!r}, but must be a list or number."
        )
    for name, value in row.items():
        if type(value) is not (str if name == "offload" else int):
            raise ValueError(f"the plan of {call}: {name} is {value!r}, of the wrong type.")
    bad = [d for d in chosen if type(d) is not int or not 0 <= d < devices]
    if bad:
        raise ValueError(
            f"the plan of {call} names devices {bad}; there are {devices}, 0 to {devices - 1}."
        )
    try:
        return Placement(tuple(chosen), **row)
    except ValueError as error:
        raise ValueError(f"the plan of {call}: {error}") from None

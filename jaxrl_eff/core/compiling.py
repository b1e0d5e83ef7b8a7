"""`compile`: a graph, a plan and the specs of its models, checked and made a `Step`."""

import dataclasses
from collections.abc import Mapping

from jaxrl_eff.core import packed
from jaxrl_eff.core.graph import Graph, Plan, order
from jaxrl_eff.core.plan_rules import check_plan
from jaxrl_eff.core.specs import Spec
from jaxrl_eff.core.step import Step
from jaxrl_eff.parallel import SyncConfig


def compile(
    graph: Graph,
    plan: Plan,
    specs: Mapping[str, Spec],
    *,
    keep: str = "",
    sync: SyncConfig | None = None,
    pack: int = 0,
) -> Step:
    """Compiles a graph and a plan into `step(models, batch, key) -> (models, data, metrics)`.

    Args:
        graph: the calls.
        plan: one placement per call.
        specs: a `Spec` for every model of the graph.
        keep: names of arrays to return in `data`; others are dropped after their last reader.
        sync: how trained parameters are sent to the calls that borrow them, as changes; None sends
            them in full.
        pack: 0 computes rows as they are. Otherwise calls that infer or train on rows of tokens
            pack them, in micro-batches chosen by length (see `packed`): the maximum number of
            segments in a row, 1, or 2 for rows that hold both sides of a pair. Call
            `Step.scheduled` between `check` and `build`.

    Raises:
        ValueError: the plan does not fit the graph or the devices, a spec is missing, or there is
            nothing to pack.

    Example:
        >>> from jaxrl_eff import Graph, Placement, Spec, compile, core
        >>> def loss(params, batch, key):
        ...     return ((params["w"] * batch["x"] - 1) ** 2).sum(), jnp.float32(batch["x"].size), {}
        >>> graph = Graph("x", (core.train("fit", of="line", loss=loss, reads="x"),))
        >>> spec = Spec({"w": jax.ShapeDtypeStruct((), jnp.float32)}, {"w": ()}, optax.sgd(0.1))
        >>> step = compile(graph, {"fit": Placement((0,))}, {"line": spec})
        >>> home = step.home("line").params["w"].sharding
        >>> models = {"line": step.init("line", {"w": jax.device_put(jnp.float32(0), home)})}
        >>> key = np.zeros(2, np.uint32)
        >>> models, data, metrics = step(models, {"x": np.ones(4, np.float32)}, key)
        >>> round(float(models["line"].params["w"]), 3), float(metrics["fit/loss"])
        (0.2, 1.0)
    """
    missing = [m for m in graph.models if m not in specs]
    if missing:
        raise ValueError(f"no spec for the models {missing}; there are {sorted(specs)}.")
    for c in graph.calls:
        if c.kind == "train" and specs[c.of].tx is None:
            raise ValueError(f"{c.name} trains '{c.of}', whose spec has no optimizer (tx).")
    made = {k for c in graph.calls for k in c.writes} | set(graph.inputs.split())
    if unknown := sorted(set(keep.split()) - made):
        raise ValueError(f"keep names {unknown}, but the arrays are {sorted(made)}.")
    full = check_plan(graph, plan)
    if pack:
        calls = [c for c in order(graph) if packed.prefix_of(c) is not None]
        if not calls:
            raise ValueError(
                f"none of {[c.name for c in order(graph)]} infers or trains on tokens, segment and "
                "position, so there is nothing to be packed."
            )
        for c in calls:
            if c.kind == "train":
                packed.check_trained(c)
            full[c.name] = dataclasses.replace(full[c.name], microbatches=1)
    return Step(graph, full, specs, tuple(keep.split()), sync, pack)

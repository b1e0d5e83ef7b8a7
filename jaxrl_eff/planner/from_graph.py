"""Builds the planner's problem from a graph, its models and a batch's shapes, without tracing."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_eff import tree
from jaxrl_eff.core.glossary import EDGES
from jaxrl_eff.core.graph import Call, Graph, order
from jaxrl_eff.core.specs import Adaptation, Spec
from jaxrl_eff.models import LMConfig, abstract
from jaxrl_eff.peft import quantized, weights
from jaxrl_eff.planner.problem import ExpectedRows, Lengths, Nodes, Problem, Role, Work
from jaxrl_eff.rollout.sampling import Sampling

# Stands for a model of a few parameters, e.g. an adaptive coefficient.
_TINY = LMConfig(
    vocab=1, layers=1, width=1, heads=1, kv_heads=1, head_dim=2, ffn=1, head="value"
)  # fmt: skip


def role(lm: LMConfig | None, spec: Spec | None, trained: bool) -> Role:
    """A model and, if a call trains it, the bytes of optimizer state that optax would hold."""
    found, read = Role(lm or _TINY), _read(spec)
    if lm is not None and quantized.inside(read):
        held = tree.nbytes(weights.base(read)) / tree.size(abstract(lm))
        found = dataclasses.replace(found, param_bytes=held)
    if not trained:
        return found
    opt, grad, passes = 8.0, float(found.param_bytes), 3.0
    if spec is not None and spec.tx is not None:
        state = jax.eval_shape(spec.tx.init, spec.shapes)
        plain = jax.eval_shape(lambda x: quantized.dequantized(x, jnp.float32), read)
        size = max(1, tree.size(plain))
        opt = tree.nbytes(state) / size
        if isinstance(spec.tx, Adaptation):
            grad = tree.nbytes(jax.eval_shape(spec.tx.leaves, spec.shapes, state)) / size
            passes = spec.tx.passes
    return dataclasses.replace(
        found, opt_bytes=float(opt), grad_bytes=grad, passes=passes, nodes=_nodes(spec)
    )


def _nodes(spec: Spec | None) -> Nodes | None:
    """Returns how a trained model is sent between nodes, with what `core.zero_leaves` demands."""
    if spec is None or spec.sends is None:
        return None
    names = jax.tree.leaves(spec.axes, is_leaf=lambda x: isinstance(x, tuple))
    partly = isinstance(spec.tx, Adaptation)
    return Nodes(
        count=max(1, spec.sends.nodes),
        level=spec.sends.rung,
        frozen=any("node_embed" in axes for axes in names),
        partly=partly,
        tensor=not (partly and spec.tx.reselect is not None),
    )


def _read(spec: Spec | None) -> Any:
    """Returns shapes of the parameters that functions of calls read."""
    if spec is None or spec.view is None:
        return spec and spec.shapes
    return spec.view(spec.shapes)


def works(
    graph: Graph,
    lms: Mapping[str, LMConfig],
    batch: Mapping[str, Any],
    *,
    sampling: Sampling | None = None,
    specs: Mapping[str, Spec] | None = None,
    responses: Lengths | None = None,
    staleness: Mapping[str, int] | None = None,
    seconds: Mapping[str, float | int] | None = None,
    packed: Mapping[str, ExpectedRows] | None = None,
) -> Problem:
    """Describes the graph's calls as amounts of work.

    Args:
        lms: model -> its config; a model that is left out counts as a few numbers.
        batch: name -> anything with `shape`: the graph's inputs, rows of all processes.
        sampling: of the generate calls; one that writes `greedy_...` takes one sample per prompt.
        specs: model -> its spec, for the bytes of optimizer state; without one, 8 per parameter.
        responses: distribution of response lengths; None: all have `sampling.max_tokens`.
        staleness: generate call -> how many updates old its weights are allowed to be; default:
            the graph's value.
        seconds: local call -> seconds, for those that take any.
        packed: call -> expected rows, for calls that compute their rows packed.

    Raises:
        ValueError: a generate call has no `sampling` or no prompts, or a name is not a call's.
    """
    staleness, seconds = dict(staleness or {}), dict(seconds or {})
    names = {c.name: c.kind for c in graph.calls}
    for given, kind in ((staleness, "generate"), (seconds, "local")):
        for name in given:
            if names.get(name) != kind:
                fit = sorted(n for n, k in names.items() if k == kind)
                raise ValueError(f"unknown {kind} call {name!r}; expected one of {fit}.")
    sizes = {k: _size(v.shape) for k, v in batch.items()}
    size_bytes = {k: 4.0 * np.prod(v.shape) for k, v in batch.items()}
    out = []
    for c in order(graph):
        made = (
            _generate(c, sizes, sampling, responses) if c.kind == "generate" else _other(c, sizes)
        )
        made = dataclasses.replace(
            made,
            staleness=staleness.get(c.name, c.staleness),
            weights=c.weights,
            seconds=seconds.get(c.name, 0.0),
            packed=(packed or {}).get(c.name),
        )
        out.append(made)
        for k in c.writes:
            edge = EDGES.get(k.removeprefix("greedy_"))
            long = edge is not None and "T" in edge.axes.split()
            sizes[k] = (made.rows, made.length if long else 1)
            size_bytes[k] = 4.0 * sizes[k][0] * sizes[k][1]
    trained = {c.of for c in graph.calls if c.kind == "train"}
    roles = {m: role(lms.get(m), (specs or {}).get(m), m in trained) for m in graph.models}
    return Problem(tuple(out), roles, size_bytes)


def expecting(packed: Mapping[str, ExpectedRows]) -> dict[str, Any]:
    """Options of `works` for a stage with packed calls; sampled lengths are assumed to match."""
    first = next(iter(packed.values()), None)
    return {} if first is None else {"packed": packed, "responses": first.responses}


def _size(shape_: tuple[int, ...]) -> tuple[int, int]:
    return (shape_[0], shape_[1] if len(shape_) > 1 else 1) if shape_ else (1, 1)


def _generate(
    c: Call,
    sizes: Mapping[str, tuple[int, int]],
    sampling: Sampling | None,
    responses: Lengths | None,
) -> Work:
    if sampling is None:
        raise ValueError(f"{c.name} generates, but sampling is None.")
    if not c.reads:
        raise ValueError(f"{c.name} generates, but reads no prompts.")
    prompts, prompt = max((sizes[k] for k in c.reads), key=lambda s: s[1])
    samples = 1 if all(k.startswith("greedy_") for k in c.writes) else sampling.samples
    return Work(
        c.name,
        c.kind,
        c.of,
        prompts * samples,
        c.reads,
        c.writes,
        prompts=prompts,
        prompt=prompt,
        length=prompt + sampling.max_tokens,
        max_new=sampling.max_tokens,
        responses=responses,
        growths=sampling.growths,
        compactions=sampling.compactions,
    )


def _other(c: Call, sizes: Mapping[str, tuple[int, int]]) -> Work:
    read = [sizes[k] for k in c.reads] or [(1, 1)]
    return Work(
        c.name,
        c.kind,
        c.of,
        max(rows for rows, _ in read),
        c.reads,
        c.writes,
        length=max(length for _, length in read),
        epochs=c.epochs,
        minibatches=c.minibatches,
        host=c.host,
    )

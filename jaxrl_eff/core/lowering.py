"""Compilation of a graph's call into a program for its devices: traced once, then compiled."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp

from jaxrl_eff.core import programs
from jaxrl_eff.core.graph import Call
from jaxrl_eff.core.shardings import Shardings
from jaxrl_eff.core.specs import Adaptation


class Traced(NamedTuple):
    """The jaxpr of a call; one trace serves both the shape check and the program.

    Attributes:
        operands: shapes and shardings of the model or its parameters, the arrays, the key.
        out: shapes of the results: the model or the arrays, and metrics.
    """

    jaxpr: jax.extend.core.ClosedJaxpr
    operands: tuple
    out: Any

    def function(self) -> Callable:
        """Returns the call as a function. Replaying a jaxpr is far faster than retracing."""
        flat, structure = jax.extend.core.jaxpr_as_fun(self.jaxpr), jax.tree.structure(self.out)

        def run(*operands):
            return jax.tree.unflatten(structure, flat(*jax.tree.leaves(operands)))

        return run

    @property
    def still(self) -> Any:
        """For a call that updates its model: a tree of bools, True where a leaf is unchanged."""
        leaves, structure = jax.tree.flatten(self.operands[0])
        ends = zip(self.jaxpr.jaxpr.invars, self.jaxpr.jaxpr.outvars, strict=False)
        return structure.unflatten([a is b for (a, b), _ in zip(ends, leaves, strict=False)])


class Lowered(NamedTuple):
    """A lowered program, and a function to apply to the compiled result."""

    lowered: Any
    finish: Callable[[Any], Any] = lambda program: program

    def compile(self) -> Any:
        return self.finish(self.lowered.compile())


class Update(NamedTuple):
    """A compiled program `(model, arrays, key) -> (model, metrics)`.

    Leaves that change are donated; the others are returned as the same arrays, so that holders of a
    copy can see that it is still current.
    """

    program: Any
    still: tuple[bool, ...]

    def __call__(self, model: Any, arrays: Any, key: Any) -> tuple[Any, Any]:
        leaves, structure = jax.tree.flatten(model)
        del model  # no reference to donated arrays may remain
        kept, rest = _divided(leaves, self.still)
        del leaves
        new, metrics = self.program(rest, kept, arrays, key)
        return structure.unflatten(_joined(kept, new, self.still)), metrics

    def memory_analysis(self) -> Any:
        return self.program.memory_analysis()

    def cost_analysis(self) -> Any:
        return self.program.cost_analysis()

    def as_text(self) -> str:
        return self.program.as_text()


def _divided(leaves: Sequence[Any], still: Sequence[bool]) -> tuple[list[Any], list[Any]]:
    pairs = list(zip(leaves, still, strict=True))
    return [x for x, s in pairs if s], [x for x, s in pairs if not s]


def _joined(kept: Sequence[Any], rest: Sequence[Any], still: Sequence[bool]) -> list[Any]:
    ours, others = iter(kept), iter(rest)
    return [next(ours if s else others) for s in still]


def trace(
    layouts: Shardings, c: Call, args: Mapping[str, Any], seen: Callable[[], None] = lambda: None
) -> Traced:
    """Traces a call.

    Args:
        args: arrays that the call reads, with shapes and shardings.
        seen: called whenever the call's function is traced.
    """
    place = layouts.plan[c.name]
    if c.kind == "train":
        model = layouts.home(c.of)._replace(stale=())
        tx, away = layouts.specs[c.of].tx, place.offload == "opt"
        sharded = layouts.sharded.get(c.name)
        program = functools.partial(
            programs.train_program, c, tx, place.microbatches, away, sharded
        )
    else:
        model = None if c.of is None else layouts.borrowed(c)
        axes = layouts.specs[c.of].axes if place.offload == "params" else None
        program = functools.partial(programs.apply_program, c, place.microbatches, axes)

    def counted(*operands):
        seen()
        return program(*operands)

    return traced(layouts, c, counted, model, dict(args))


def lower(layouts: Shardings, c: Call, found: Traced, made: Mapping[str, Any]) -> Lowered:
    """Lowers the traced call with the shardings of its results.

    Args:
        made: arrays that the call writes, with shapes and shardings.
    """
    if c.kind == "train":
        return update(layouts, c, found)
    where = {k: v.sharding for k, v in made.items()}
    return lowered(layouts, c, found, (where, layouts.whole(c)))


def lowered(
    layouts: Shardings, c: Call, found: Traced, where: Any, *, donate: tuple[int, ...] = ()
) -> Lowered:
    """Lowers a traced program with output shardings `where`.

    Args:
        donate: indices of donated operands.
    """
    run = found.function()
    run.__name__ = c.name
    with layouts.context(c):
        jitted = jax.jit(run, out_shardings=where, donate_argnums=donate)
        return Lowered(jitted.lower(*found.operands))


def reselects(layouts: Shardings, c: Call) -> bool:
    """Returns True if a call trains a part of its model that is reselected periodically."""
    tx = layouts.specs[c.of].tx if c.kind == "train" else None
    return isinstance(tx, Adaptation) and tx.due is not None


def lower_reselection(layouts: Shardings, c: Call, args: Mapping[str, Any]) -> Lowered:
    """Lowers the program that reselects a call's trained part: an `Update` without metrics."""
    model = layouts.home(c.of)._replace(stale=())
    away = layouts.plan[c.name].offload == "opt"
    run = functools.partial(programs.reselect_program, c, layouts.specs[c.of].tx, away)
    return update(layouts, c, traced(layouts, c, lambda *x: (run(*x), {}), model, dict(args)))


def traced(
    layouts: Shardings, c: Call, run: Callable, model: Any, args: Any, local: int | None = None
) -> Traced:
    """Traces a program of a call, `run(model, args, key)`, in the call's context.

    Args:
        local: see `Shardings.context`.
    """
    key = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=layouts.whole(c))
    operands = (model, args, key)
    with layouts.context(c, local):
        jaxpr, out = jax.make_jaxpr(run, return_shape=True)(*operands)
    return Traced(jaxpr, operands, out)


def update(layouts: Shardings, c: Call, found: Traced) -> Lowered:
    """Lowers a traced program that updates its model, as an `Update`."""
    model, args, key = found.operands
    leaves, structure = jax.tree.flatten(model)
    still = tuple(jax.tree.leaves(found.still))
    kept, rest = _divided(leaves, still)
    call = found.function()

    def run(rest, kept, args, key):
        new, metrics = call(structure.unflatten(_joined(kept, rest, still)), args, key)
        return _divided(jax.tree.leaves(new), still)[1], metrics

    run.__name__ = c.name
    where = [x.sharding for x in rest]
    with layouts.context(c):
        jitted = jax.jit(run, out_shardings=(where, layouts.whole(c)), donate_argnums=(0,))
        lowered = jitted.lower(rest, kept, args, key)
    return Lowered(lowered, lambda program: Update(program, still))


def analysis(program: Any) -> dict[str, float]:
    """Returns XLA's analysis of a program: `bytes` needed per device and `flops` executed.

    `flops` counts a loop's body once, so it is too low for generation and scanned layers.
    """
    m, cost = program.memory_analysis(), program.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    peak = 0
    if m is not None:
        peak = (
            m.argument_size_in_bytes
            + m.output_size_in_bytes
            - m.alias_size_in_bytes
            + m.temp_size_in_bytes
        )
    return {"bytes": float(peak), "flops": float(cost.get("flops", 0.0))}

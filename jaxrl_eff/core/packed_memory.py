"""Memory that packed calls need for micro-batches of given shapes."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jaxrl_eff.core import lowering
from jaxrl_eff.core.graph import Call
from jaxrl_eff.core.shardings import held
from jaxrl_eff.core.step import Step
from jaxrl_eff.data.balance.assignment import Shape
from jaxrl_eff.parallel import Placement
from jaxrl_eff.parallel.mesh import mesh


def needs(step: Step, place: Placement, shapes: Sequence[Shape]) -> float:
    """Returns the bytes per device of the packed call on a mesh that needs most.

    Args:
        step: checked.
        shapes: of micro-batches.
    """
    most = 0.0
    for c in [c for c in step.packs.calls if step.plan[c.name].bare == place]:
        lowered = step.runners[c.name].lower_shapes(shapes, step.made[c.name])
        with ThreadPoolExecutor(4) as pool:
            compiled = pool.map(lambda one: one.compile(), lowered.values())
            own = max(lowering.analysis(program)["bytes"] for program in compiled)
        others = held(beside(step, c))
        fullest = max(others.get(d, 0) for d in mesh(place).devices.flat)
        most = max(most, fullest + own)
    return most


def beside(step: Step, c: Call) -> list[Any]:
    """Returns arrays that are on devices while a packed call runs but are not its operands."""
    out: dict[Any, Any] = {}  # parameters borrowed by calls before it
    shardings = step.shardings
    for other in step.calls:
        if other is c:
            break
        if other.kind == "train":
            out = {key: x for key, x in out.items() if key[0] != other.of}
        elif other.of is not None and not other.staleness and not step.weights(other).alias:
            out[shardings.key(other)] = shardings.borrowed(other)
    out.pop(shardings.key(c), None)
    for model in step.graph.models:
        home = step.home(model)
        if model == c.of and c.kind == "train":
            home = home._replace(params=(), opt=(), error_feedback=(), node_copy=())
        elif model == c.of and step.weights(c).alias:
            home = home._replace(params=())
        out[model] = home
    return [*out.values()]

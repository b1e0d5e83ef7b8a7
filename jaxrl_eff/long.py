"""Stages over sequences of many lengths: from settings to a schedule's cost, room and shapes."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_eff import mixed, schedule_cost, tree
from jaxrl_eff.data import loader
from jaxrl_eff.data.lattice import lattice
from jaxrl_eff.data.scheduled import Scheduled
from jaxrl_eff.data.schedules import Shape
from jaxrl_eff.data.skrull_cost import Cost
from jaxrl_eff.dataflow import Graph, Placement, Spec
from jaxrl_eff.models import LMConfig
from jaxrl_eff.planner.hardware import Cluster
from jaxrl_eff.settings import ScheduleSettings

TRIES = 6  # sizes at which room is looked for
SHARE = 0.9  # of a device's memory that may be planned for
BLOCK = 128  # tokens: columns of micro-batches are multiples of it


@dataclasses.dataclass(frozen=True)
class Long:
    """What a scheduled stage needs.

    Attributes:
        step: checked for micro-batches of all shapes.
        shapes, room: tokens of a device: of micro-batches, and at most.
        cost: by which schedules are judged at first.
        batch: a micro-batch of every shape, shapes and dtypes alone.
        lengths: of some units.
    """

    step: mixed.Mixed
    shapes: tuple[Shape, ...]
    room: int
    cost: Cost
    batch: list[dict[str, dict[str, jax.ShapeDtypeStruct]]]
    lengths: list[int]

    def batches(self, source: loader.Loader, *, pad: int) -> Scheduled:
        """Its loader, from one that gives an example a row."""
        place = next(iter(self.step.plan.values()))
        return Scheduled(
            source, groups=place.row_shards, parts=place.seq, room=self.room, cost=self.cost,
            shapes=self.shapes, lengths=self.lengths, pad=pad,
        )  # fmt: skip


def prepared(
    s: ScheduleSettings,
    graph: Graph,
    plan: Mapping[str, Placement],
    specs: Mapping[str, Spec],
    lm: LMConfig,
    lengths: Sequence[int],
    *,
    batch: int,
    longest: int,
    cluster: Cluster,
) -> Long:
    """Finds room and shapes, and checks the step.

    Args:
        lm: of the model that is trained.
        lengths: of some units.
        batch: units a step.
        longest: tokens of a unit, at most; 0: what fits.
        cluster: rates of the devices.

    Raises:
        ValueError: the graph or the plan cannot be scheduled, nothing fits into memory, or units
            may be longer than fits.
    """
    step = mixed.compile(graph, plan, specs)
    place = next(iter(step.plan.values()))
    names = graph.inputs.split()
    room = s.room
    if not room:
        most = _useful(lengths, place, batch=batch, longest=longest)
        make = functools.partial(mixed.compile, graph, plan, specs)
        room = found_room(make, names, place, cluster.memory_bytes, most)
    most = room * place.seq
    if longest > most:
        raise ValueError(
            f"data.length is {longest}, but {place.seq} devices of a seq axis with room for {room} "
            f"tokens each hold {most}."
        )
    cost = cost_on(cluster, place, lm)
    fits = [n for n in lengths if n <= (longest or most)]
    if not fits:
        raise ValueError(f"no example has at most {longest or most} tokens.")
    shapes = lattice(
        fits, groups=place.row_shards, parts=place.seq, room=room, batch=batch, cost=cost,
        shapes=s.shapes, batches=16, multiple=min(BLOCK, room),
    )  # fmt: skip
    micro = [of_shape(names, shape, place) for shape in shapes]
    step.check(micro)
    return Long(step, shapes, room, cost, micro, fits)


def cost_on(cluster: Cluster, place: Placement, lm: LMConfig) -> Cost:
    """Estimated seconds of a training micro-step where a call runs."""
    return schedule_cost.cost_on(
        cluster, schedule_cost.model_of(lm), seq=place.seq, tensor=place.tensor,
        itemsize=jnp.dtype(lm.dtype).itemsize,
    )  # fmt: skip


def of_shape(
    names: Sequence[str], shape: Shape, place: Placement
) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """A micro-batch of a shape: shapes and dtypes alone."""
    sizes = {
        "local": (place.row_shards * place.seq, shape.local),
        "shared": (place.row_shards, shape.distributed * place.seq),
    }
    dtype = {k: jnp.float32 if k == "mask" else jnp.int32 for k in names}
    return {
        side: {k: jax.ShapeDtypeStruct(size, dtype[k]) for k in names}
        for side, size in sizes.items()
    }


def _useful(lengths: Sequence[int], place: Placement, *, batch: int, longest: int) -> int:
    """Tokens of a device beyond which a step would not have fewer micro-steps."""
    ranks = place.row_shards * place.seq
    fair = 1.25 * batch * float(np.mean(lengths)) / ranks
    need = max(fair, (longest or max(lengths)) / place.seq, 1.0)
    return BLOCK * -(-int(np.ceil(need)) // BLOCK)


def found_room(
    make: Callable[[], mixed.Mixed],
    names: Sequence[str],
    place: Placement,
    capacity: float,
    most: int,
) -> int:
    """Tokens that a device holds while it trains, by the memory that compiled programs need.

    Args:
        make: a step that is not checked yet.
        capacity: bytes of a device.
        most: tokens beyond which there is no use.

    Raises:
        ValueError: there is no room for one block of tokens.
    """
    budget = SHARE * capacity

    def need(tokens: int) -> float:
        shapes = [Shape(tokens, 0), Shape(0, tokens)][: 1 if place.seq == 1 else 2]
        micro = [of_shape(names, shape, place) for shape in shapes]
        step = make().build(micro)
        return max(v["bytes"] for v in step.analysis().values()) + _beside(step)

    room = most
    for _ in range(TRIES):
        bytes_ = need(room)
        if bytes_ <= budget:
            return room
        # Memory is nearly a line through the static part; what a token takes shows at two sizes.
        smaller = max(BLOCK, room // 2)
        each = (bytes_ - need(smaller)) / max(room - smaller, 1)
        static = bytes_ - each * room
        fit = int((budget - static) / each) if each > 0 else 0
        room = BLOCK * (min(fit, room - 1) // BLOCK)
        if room < BLOCK:
            break
    raise ValueError(
        f"a device of {capacity / 1e9:.2f} GB has no room for {BLOCK} tokens beside the model and "
        f"its optimizer, which take {static / 1e9:.2f} GB; a token takes {each / 1e3:.1f} kB."
    )


def _beside(step: mixed.Mixed) -> float:
    """Bytes of a device for models that its calls only read, while another is trained."""
    place = next(iter(step.plan.values()))
    trained = {c.of for c in step.calls if c.kind == "train"}
    others = [step.home(m).params for m in step.graph.models if m not in trained]
    return tree.nbytes(others) / (place.weight_shards * place.tensor)


def lengths_of(source: Any, encode: Callable[[Any], Any], kind: str, count: int) -> list[int]:
    """Tokens of some examples, evenly from the whole source."""
    at = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).astype(int))
    out = []
    for i in at:
        found = encode(source[int(i)])
        segments = found if kind == "preference" else (found,)
        out.append(max(1, sum(len(ids) for ids, _ in segments)))
    return out

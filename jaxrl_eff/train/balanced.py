"""Stages over sequences of many lengths: cost, room and shapes of their schedules, from settings.

Lengths are those of examples (`prepared`), or guesses of what will be sampled (`rollouts`). The
*room* is the maximum number of tokens on a device in a micro-batch.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_eff import tree
from jaxrl_eff.core import Graph, Placement, Spec, mixed, packed, program_order
from jaxrl_eff.data import loader
from jaxrl_eff.data.balance.assignment import Shape
from jaxrl_eff.data.balance.balanced_loader import BalancedLoader
from jaxrl_eff.data.balance.cost import Cost
from jaxrl_eff.data.balance.shapes import fitted, lattice
from jaxrl_eff.models import LMConfig
from jaxrl_eff.parallel import global_arrays, processes
from jaxrl_eff.parallel.sharding import replicated
from jaxrl_eff.planner import packed_rows, problem
from jaxrl_eff.planner.clusters import Cluster
from jaxrl_eff.train.settings import ScheduleSettings

TRIES = 6  # sizes tried when searching for the room
SHARE = 0.9  # fraction of a device's memory to plan for
DRAWN = 3  # batches per pool of guessed lengths and number of sequences
BLOCK = 128  # tokens: columns of micro-batches are multiples of it


@dataclasses.dataclass(frozen=True)
class Long:
    """Components of a scheduled stage.

    Attributes:
        step: checked for micro-batches of all shapes.
        shapes, room: tokens per device: shapes of micro-batches, and the maximum.
        cost: initial cost of schedules.
        batch: a micro-batch of every shape, as shapes and dtypes.
        lengths: of some units.
        measure: True if measured steps correct the cost.
    """

    step: mixed.Mixed
    shapes: tuple[Shape, ...]
    room: int
    cost: Cost
    batch: list[dict[str, dict[str, jax.ShapeDtypeStruct]]]
    lengths: list[int]
    measure: bool = True

    def batches(self, source: loader.Loader, *, pad: int) -> BalancedLoader:
        """Returns the stage's loader, given one with an example per row."""
        place = next(iter(self.step.plan.values()))
        # Processes that cannot exchange schedules plan identically, by a fixed cost.
        group = processes.group()
        alike = jax.process_count() == 1 or group is not None
        return BalancedLoader(
            source, groups=place.row_shards, parts=place.seq, capacity=self.room, cost=self.cost,
            shapes=self.shapes, lengths=self.lengths, pad=pad, group=group,
            measure=self.measure and alike,
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
        lm: config of the trained model.
        lengths: of some units.
        batch: units per step.
        longest: maximum tokens of a unit; 0: what fits.
        cluster: rates of the devices.

    Raises:
        ValueError: the graph or the plan cannot be scheduled, nothing fits into memory, or units
            can be longer than fits.
    """
    step = mixed.compile(graph, plan, specs)
    place = next(iter(step.plan.values()))
    names = graph.inputs.split()
    room = s.room
    if not room:
        most = _useful(lengths, place, batch=batch, longest=longest)
        make = functools.partial(mixed.compile, graph, plan, specs)
        need = functools.partial(needed, make, names, place)
        room = found_room(need, place, cluster.memory_bytes, most)
    most = room * place.seq
    if longest > most:
        raise ValueError(
            f"data.length is {longest}, but {place.seq} devices of a seq axis with room for {room} "
            f"tokens each hold {most}."
        )
    cost = packed_rows.cost_on(cluster, lm, seq=place.seq, tensor=place.tensor)
    fits = [n for n in lengths if n <= (longest or most)]
    if not fits:
        raise ValueError(f"no example has at most {longest or most} tokens.")
    shapes = lattice(
        fits, groups=place.row_shards, parts=place.seq, capacity=room, batch=batch, cost=cost,
        shapes=s.shapes, batches=16, multiple=min(BLOCK, room),
    )  # fmt: skip
    micro = [of_shape(names, shape, place) for shape in shapes]
    step.check(micro)
    return Long(step, shapes, room, cost, micro, fits, s.measure)


def of_shape(
    names: Sequence[str], shape: Shape, place: Placement
) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Returns a micro-batch of a shape, as shapes and dtypes."""
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
    """Returns the tokens per device above which a step has no fewer micro-steps."""
    ranks = place.row_shards * place.seq
    fair = 1.25 * batch * float(np.mean(lengths)) / ranks
    need = max(fair, (longest or max(lengths)) / place.seq, 1.0)
    return BLOCK * -(-int(np.ceil(need)) // BLOCK)


def rollouts(
    s: ScheduleSettings,
    step: packed.Packed,
    lms: Mapping[str, LMConfig],
    prompts: Sequence[int] | np.ndarray,
    answer: int,
    *,
    cluster: Cluster,
) -> packed.Packed:
    """Finds room and shapes for sequences to be sampled, separately on every mesh.

    With several processes the first one on a mesh decides for all; every process must call.

    Args:
        step: checked.
        lms: role -> config of its model. A mesh's cost is that of a model trained there, if any.
        prompts: lengths of some prompts.
        answer: maximum tokens of a response.
        cluster: rates of the devices.

    Raises:
        ValueError: nothing fits into memory, or rows are longer than fits.
    """
    pools = guessed(prompts, answer)
    mine: dict[str, Any] = {}
    try:
        for i, place in enumerate(step.places):
            if global_arrays.here(replicated(place)):
                found = _packing(s, step, place, lms, pools, cluster)
                mine[str(i)] = found.shapes, found.room, dataclasses.asdict(found.cost)
    except ValueError as error:
        if jax.process_count() == 1:
            raise
        mine["error"] = str(error)
    # Every process measures the rates of CPUs itself, so they can differ.
    said: dict[str, Any] = {}
    for text in reversed(program_order.texts_of_all(json.dumps(mine))):
        said |= json.loads(text)
    if "error" in said:
        raise ValueError(said["error"])
    return step.scheduled({p: _from_json(*said[str(i)]) for i, p in enumerate(step.places)})


def _from_json(shapes: Any, room: int, cost: Mapping[str, Any]) -> packed.Packing:
    return packed.Packing(tuple(Shape(*shape) for shape in shapes), room, Cost(**cost))


def _packing(
    s: ScheduleSettings,
    step: packed.Packed,
    place: Placement,
    lms: Mapping[str, LMConfig],
    pools: Sequence[np.ndarray],
    cluster: Cluster,
) -> packed.Packing:
    """Returns the arguments of schedules on one mesh."""
    sizes = step.sizes(place)
    longest = max(length for _, length in sizes.values())
    counts = sorted({count for count, _ in sizes.values()})
    room = s.room
    if not room:
        most = _useful(pools[-1], place, batch=counts[-1], longest=longest)
        need = functools.partial(step.needs, place)
        room = found_room(need, place, cluster.memory_bytes, most)
    first = min(step.on(place), key=lambda c: c.kind != "train")
    cost = packed_rows.cost_on(cluster, lms[first.of], seq=place.seq, tensor=place.tensor)
    shapes = (Shape(0, room),)
    if room * place.seq >= longest:  # otherwise `scheduled` raises
        rng = np.random.default_rng(0)
        drawn = [rng.choice(pool, n) for _ in range(DRAWN) for n in counts for pool in pools]
        shapes = fitted(
            [drawn[i] for i in rng.permutation(len(drawn))],
            groups=place.row_shards, parts=place.seq, capacity=room, cost=cost, longest=longest,
            shapes=s.shapes, multiple=min(BLOCK, room),
        )  # fmt: skip
    return packed.Packing(shapes, room, cost)


def guessed(
    prompts: Sequence[int] | np.ndarray, answer: int, *, count: int = 512
) -> list[np.ndarray]:
    """Guesses lengths of sequences before sampling, from short responses to truncated ones.

    Every pool has the given prompts, repeated. Responses have exponential lengths, cut off at the
    limit, with means that double from a 32nd of it; in the last pool all are cut off.

    Args:
        prompts: tokens of each.
        answer: maximum tokens of a response.
        count: sequences per pool.
    """
    rng = np.random.default_rng(0)
    before = np.resize(np.asarray(prompts), count)
    means = answer / 2.0 ** np.arange(5, 0, -1)
    drawn = [np.clip(np.ceil(rng.exponential(m, count)), 1, answer) for m in means]
    return [before + x.astype(int) for x in (*drawn, np.full(count, answer))]


def expected(
    s: ScheduleSettings, graph: Graph, prompts: Sequence[int] | np.ndarray, answer: int
) -> dict[str, problem.ExpectedRows]:
    """Returns the expected rows of the calls to be packed, for a planner.

    All pools of `guessed` have equal weight.

    Args:
        prompts: tokens of some prompts.
        answer: maximum tokens of a response.
    """
    responses = packed_rows.guessed(np.concatenate(guessed([0], answer)))
    prompt = round(float(np.mean(np.asarray(prompts))))
    found = problem.ExpectedRows(prompt, responses, s.room)
    return {c.name: found for c in graph.calls if packed.prefix_of(c) is not None}


def found_room(
    need: Callable[[list[Shape]], float], place: Placement, capacity: float, most: int
) -> int:
    """Finds the tokens a device can hold in training, from the memory of compiled programs.

    Args:
        need: shapes of micro-batches -> bytes per device.
        place: where they run.
        capacity: bytes of a device.
        most: maximum useful number of tokens.

    Raises:
        ValueError: there is no room for one block of tokens.
    """
    budget = SHARE * capacity

    def bytes_of(tokens: int) -> float:
        return need([Shape(tokens, 0), Shape(0, tokens)][: 1 if place.seq == 1 else 2])

    room = most
    for _ in range(TRIES):
        bytes_ = bytes_of(room)
        if bytes_ <= budget:
            return room
        # Memory is nearly linear in tokens, plus a static part; two sizes determine both.
        smaller = max(BLOCK, room // 2)
        each = (bytes_ - bytes_of(smaller)) / max(room - smaller, 1)
        static = bytes_ - each * room
        fit = int((budget - static) / each) if each > 0 else 0
        room = BLOCK * (min(fit, room - 1) // BLOCK)
        if room < BLOCK:
            break
    raise ValueError(
        f"a device of {capacity / 1e9:.2f} GB has no room for {BLOCK} tokens beside the model and "
        f"its optimizer, which take {static / 1e9:.2f} GB; a token takes {each / 1e3:.1f} kB."
    )


def needed(
    make: Callable[[], mixed.Mixed],
    names: Sequence[str],
    place: Placement,
    shapes: Sequence[Shape],
) -> float:
    """Returns bytes per device for micro-batches of these shapes, the maximum over processes.

    Args:
        make: returns a step that is not checked yet.
        names: of the graph's inputs.
    """
    step = make().build([of_shape(names, shape, place) for shape in shapes])
    mine = max(v["bytes"] for v in step.analysis().values()) + _beside(step)
    return max(
        map(float, program_order.texts_of_all(repr(float(mine))))
    )  # all try the same sizes next


def _beside(step: mixed.Mixed) -> float:
    """Returns bytes per device of models that calls only read, while another is trained."""
    place = next(iter(step.plan.values()))
    trained = {c.of for c in step.calls if c.kind == "train"}
    others = [step.home(m).params for m in step.graph.models if m not in trained]
    return tree.nbytes(others) / (place.weight_shards * place.tensor)


def lengths_of(source: Any, encode: Callable[[Any], Any], kind: str, count: int) -> list[int]:
    """Returns the tokens of some examples, evenly spaced over the whole source."""
    at = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).astype(int))
    out = []
    for i in at:
        found = encode(source[int(i)])
        if kind == "prompts":
            out.append(max(1, len(found)))
            continue
        segments = found if kind == "preference" else (found,)
        out.append(max(1, sum(len(ids) for ids, _ in segments)))
    return out

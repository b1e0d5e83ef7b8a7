"""Stages over sequences of many lengths: from settings to a schedule's cost, room and shapes.

Lengths are those of examples (`prepared`), or of what will be sampled (`rollouts`), which are
guessed.
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
from jaxrl_eff.planner import packed_rows, problem, schedule_cost
from jaxrl_eff.planner.clusters import Cluster
from jaxrl_eff.train.settings import ScheduleSettings

TRIES = 6  # sizes at which room is looked for
SHARE = 0.9  # of a device's memory that may be planned for
DRAWN = 3  # batches of each pool of guessed lengths and each number of sequences
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
        measure: whether measured steps correct the cost.
    """

    step: mixed.Mixed
    shapes: tuple[Shape, ...]
    room: int
    cost: Cost
    batch: list[dict[str, dict[str, jax.ShapeDtypeStruct]]]
    lengths: list[int]
    measure: bool = True

    def batches(self, source: loader.Loader, *, pad: int) -> BalancedLoader:
        """Its loader, from one that gives an example a row."""
        place = next(iter(self.step.plan.values()))
        # Processes that cannot tell each other their schedules plan alike by a cost that stays.
        group = processes.group()
        alike = jax.process_count() == 1 or group is not None
        return BalancedLoader(
            source, groups=place.row_shards, parts=place.seq, room=self.room, cost=self.cost,
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
        need = functools.partial(needed, make, names, place)
        room = found_room(need, place, cluster.memory_bytes, most)
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
    return Long(step, shapes, room, cost, micro, fits, s.measure)


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


def rollouts(
    s: ScheduleSettings,
    step: packed.Packed,
    lms: Mapping[str, LMConfig],
    prompts: Sequence[int] | np.ndarray,
    answer: int,
    *,
    cluster: Cluster,
) -> packed.Packed:
    """Finds room and shapes for sequences that will be sampled, on every mesh for itself.

    Of several processes the first one on a mesh decides for all; every process must call.

    Args:
        step: checked.
        lms: role -> shape of its model. A mesh is judged by one that is trained there, if any is.
        prompts: lengths of some.
        answer: tokens of a response, at most.
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
    # Rates of CPUs are measured, by every process for itself.
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
    """What schedules on one mesh are made for."""
    sizes = step.sizes(place)
    longest = max(length for _, length in sizes.values())
    counts = sorted({count for count, _ in sizes.values()})
    room = s.room
    if not room:
        most = _useful(pools[-1], place, batch=counts[-1], longest=longest)
        need = functools.partial(step.needs, place)
        room = found_room(need, place, cluster.memory_bytes, most)
    first = min(step.on(place), key=lambda c: c.kind != "train")
    cost = cost_on(cluster, place, lms[first.of])
    shapes = (Shape(0, room),)
    if room * place.seq >= longest:  # or `scheduled` says so
        rng = np.random.default_rng(0)
        drawn = [rng.choice(pool, n) for _ in range(DRAWN) for n in counts for pool in pools]
        shapes = fitted(
            [drawn[i] for i in rng.permutation(len(drawn))],
            groups=place.row_shards, parts=place.seq, room=room, cost=cost, longest=longest,
            shapes=s.shapes, multiple=min(BLOCK, room),
        )  # fmt: skip
    return packed.Packing(shapes, room, cost)


def guessed(
    prompts: Sequence[int] | np.ndarray, answer: int, *, count: int = 512
) -> list[np.ndarray]:
    """Lengths of sequences that nobody has sampled yet, from short responses to cut-off ones.

    Every pool has the given prompts, repeated. Responses have exponential lengths, cut off at the
    limit, of means that double from a 32nd of it; in the last pool all are cut off.

    Args:
        prompts: tokens of each.
        answer: tokens of a response, at most.
        count: of a pool.
    """
    rng = np.random.default_rng(0)
    before = np.resize(np.asarray(prompts), count)
    means = answer / 2.0 ** np.arange(5, 0, -1)
    drawn = [np.clip(np.ceil(rng.exponential(m, count)), 1, answer) for m in means]
    return [before + x.astype(int) for x in (*drawn, np.full(count, answer))]


def expected(
    s: ScheduleSettings, graph: Graph, prompts: Sequence[int] | np.ndarray, answer: int
) -> dict[str, problem.ExpectedRows]:
    """What a planner may expect of the rows of the calls that will be packed.

    All pools of `guessed` count alike.

    Args:
        prompts: tokens of some.
        answer: tokens of a response, at most.
    """
    responses = packed_rows.guessed(np.concatenate(guessed([0], answer)))
    prompt = round(float(np.mean(np.asarray(prompts))))
    found = problem.ExpectedRows(prompt, responses, s.room)
    return {c.name: found for c in graph.calls if packed.prefix_of(c) is not None}


def found_room(
    need: Callable[[list[Shape]], float], place: Placement, capacity: float, most: int
) -> int:
    """Tokens that a device holds while it trains, by the memory that compiled programs need.

    Args:
        need: shapes of micro-batches -> bytes of a device.
        place: where they run.
        capacity: bytes of a device.
        most: tokens beyond which there is no use.

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
        # Memory is nearly a line through the static part; what a token takes shows at two sizes.
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
    """Bytes that a device needs for micro-batches of these shapes, the most of any process.

    Args:
        make: a step that is not checked yet.
        names: of the graph's inputs.
    """
    step = make().build([of_shape(names, shape, place) for shape in shapes])
    mine = max(v["bytes"] for v in step.analysis().values()) + _beside(step)
    return max(
        map(float, program_order.texts_of_all(repr(float(mine))))
    )  # all try the same sizes next


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
        if kind == "prompts":
            out.append(max(1, len(found)))
            continue
        segments = found if kind == "preference" else (found,)
        out.append(max(1, sum(len(ids) for ids, _ in segments)))
    return out

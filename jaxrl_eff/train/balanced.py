"""Stages whose rows are packed by length: cost, room and shapes of their schedules, from settings.

Lengths are those of examples (`lengths_of`), or guesses of what will be sampled (`guessed`). The
*room* is the maximum number of tokens on a device in a micro-batch.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxrl_eff.core import Graph, Packing, Placement, Step, packed, packed_memory, program_order
from jaxrl_eff.data.balance.assignment import Shape
from jaxrl_eff.data.balance.cost import Cost
from jaxrl_eff.data.balance.shapes import fitted
from jaxrl_eff.models import LMConfig
from jaxrl_eff.parallel import global_arrays
from jaxrl_eff.parallel.sharding import replicated
from jaxrl_eff.planner import packed_rows, problem
from jaxrl_eff.planner.clusters import Cluster
from jaxrl_eff.train.settings import ScheduleSettings

TRIES = 6  # sizes tried when searching for the room
SHARE = 0.9  # fraction of a device's memory to plan for
DRAWN = 18  # batches per number of rows, over all pools of lengths
BLOCK = 128  # tokens: columns of micro-batches are multiples of it


def longest(lengths: Sequence[int], limit: int) -> int:
    """Returns the tokens of the longest row to expect: `limit`, or if it is 0 what examples need.

    Raises:
        ValueError: no example is within the limit.
    """
    if limit and lengths and min(lengths) > limit:
        raise ValueError(f"no example has at most {limit} tokens.")
    return limit or max(2, *lengths)


def scheduled(
    s: ScheduleSettings,
    step: Step,
    lms: Mapping[str, LMConfig],
    pools: Sequence[np.ndarray],
    *,
    cluster: Cluster,
) -> Step:
    """Finds room and shapes for the packed rows of a step, separately on every mesh.

    With several processes the first one on a mesh decides for all; every process must call.

    Args:
        step: checked.
        lms: role -> config of its model. A mesh's cost is that of a model trained there, if any.
        pools: lengths of rows to expect, equally likely; the longest ones in the last pool.
        cluster: rates of the devices.

    Raises:
        ValueError: nothing fits into memory, or rows are longer than fits.
    """
    mine: dict[str, Any] = {}
    try:
        for i, place in enumerate(step.packs.places):
            if global_arrays.here(replicated(place)):
                found = _packing(s, step, place, lms, pools, cluster)
                mine[str(i)] = found.shapes, found.room, dataclasses.asdict(found.cost)
    except ValueError as error:
        if jax.process_count() == 1:
            raise
        mine["error"] = str(error)
    # Every process measures the rates of CPUs itself, so they can differ.
    agreed: dict[str, Any] = {}
    for text in reversed(program_order.texts_of_all(json.dumps(mine))):
        agreed |= json.loads(text)
    if "error" in agreed:
        raise ValueError(agreed["error"])
    return step.scheduled({p: _from_json(*agreed[str(i)]) for i, p in enumerate(step.packs.places)})


def _from_json(shapes: Any, room: int, cost: Mapping[str, Any]) -> Packing:
    return Packing(tuple(Shape(*shape) for shape in shapes), room, Cost(**cost))


def _packing(
    s: ScheduleSettings,
    step: Step,
    place: Placement,
    lms: Mapping[str, LMConfig],
    pools: Sequence[np.ndarray],
    cluster: Cluster,
) -> Packing:
    """Returns the arguments of schedules on one mesh."""
    sizes = step.packs.sizes(place)
    longest = max(length for _, length in sizes.values())
    counts = sorted({count for count, _ in sizes.values()})
    room = s.room
    if not room:
        most = _useful(pools[-1], place, batch=counts[-1], longest=longest)
        need = functools.partial(packed_memory.needs, step, place)
        room = found_room(need, place, cluster.memory_bytes, most)
    here = [c for c in step.packs.calls if c.name in sizes]
    first = min(here, key=lambda c: c.kind != "train")
    cost = packed_rows.cost_on(cluster, lms[first.of], seq=place.seq, tensor=place.tensor)
    shapes = (Shape(0, room),)
    if room * place.seq >= longest:  # otherwise `Step.scheduled` raises
        rng = np.random.default_rng(0)
        each = range(-(-DRAWN // len(pools)))
        drawn = [rng.choice(pool, n) for _ in each for n in counts for pool in pools]
        shapes = fitted(
            [drawn[i] for i in rng.permutation(len(drawn))],
            groups=place.row_shards, parts=place.seq, capacity=room, cost=cost, longest=longest,
            shapes=s.shapes, multiple=min(BLOCK, room),
        )  # fmt: skip
    return Packing(shapes, room, cost)


def _useful(lengths: np.ndarray, place: Placement, *, batch: int, longest: int) -> int:
    """Returns the tokens per device above which a step has no fewer micro-steps."""
    ranks = place.row_shards * place.seq
    fair = 1.25 * batch * float(np.mean(lengths)) / ranks
    need = max(fair, (longest or max(lengths)) / place.seq, 1.0)
    return BLOCK * -(-int(np.ceil(need)) // BLOCK)


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
    s: ScheduleSettings, graph: Graph, lengths: Sequence[int] | np.ndarray, *, before: int = 0
) -> dict[str, problem.ExpectedRows]:
    """Returns the expected rows of the calls to be packed, for a planner.

    Args:
        lengths: of responses or whole rows, all equally likely.
        before: tokens in front of each, of prompts.
    """
    found = problem.ExpectedRows(before, packed_rows.guessed(np.asarray(lengths)), s.room)
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


def describe(step: Step, lengths: Sequence[int]) -> dict[str, Any]:
    """Describes what a step's schedules are made for, as plain data.

    Args:
        lengths: of some rows, if they are known in advance.

    Returns:
        "places": for every mesh its calls, groups, parts, room and shapes; "lengths": a list of
        (most tokens, share of rows), in bins that double.
    """
    places = [
        {
            "calls": [*step.packs.sizes(place)],
            "groups": place.row_shards,
            "parts": place.seq,
            "room": packing.room,
            "shapes": [list(shape) for shape in packing.shapes],
        }
        for place, packing in step.packs.packings.items()
    ]
    edges = 2 ** np.arange(1, max(2, max(lengths, default=2).bit_length() + 1))
    share = np.bincount(np.searchsorted(edges, lengths), minlength=len(edges))[: len(edges)]
    bins = zip(edges, share / max(1, len(lengths)), strict=True)
    histogram = [[int(e), round(float(n), 6)] for e, n in bins] if len(lengths) else []
    return {"places": places, "lengths": histogram}


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

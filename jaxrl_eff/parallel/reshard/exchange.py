"""Messages between devices, in code that runs on every device of a program.

Small messages of several tensors are fused: a collective on them is a coroutine that yields its
messages as a `Post`, and `together` runs coroutines side by side and joins posts of one key.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxrl_eff.parallel.reshard.collectives import Exchange, Permute, Round
from jaxrl_eff.parallel.reshard.layout import Coords

AXIS = "d"
# Bytes below which messages of one kind are fused. Fusing costs a copy, which is slow on CPUs.
SMALL = {"cpu": 64 << 10, "gpu": 1 << 20, "tpu": 1 << 20}


class Post(NamedTuple):
    """Small messages of one or more tensors, to be fused with others of the same key.

    Attributes:
        key: identifies a collective and its devices.
        lead: number of leading dimensions that `send` can change; it leaves the others unchanged.
        send: the collective.
        messages: its operands.
    """

    key: Any
    lead: int
    send: Callable[[Any], Any]
    messages: list[Any]


# Coroutine that returns a step's results; it yields posts and receives their results.
Running = Generator[Post, list[Any], list[Any]]


def together(runs: Sequence[Running]) -> list[list[Any]]:
    """Runs coroutines and returns their results; concurrent posts of one key are fused."""
    ends: dict[int, list[Any]] = {}
    replies: dict[int, Any] = dict.fromkeys(range(len(runs)))
    while replies:
        posts: dict[Any, list[tuple[int, Post]]] = {}
        for i, reply in replies.items():
            try:
                post = runs[i].send(reply)
                posts.setdefault(post.key, []).append((i, post))
            except StopIteration as end:
                ends[i] = end.value
        replies = {}
        for same in posts.values():
            first = same[0][1]
            messages = [m for _, post in same for m in post.messages]
            got = _joined(messages, first.lead, first.send)
            for i, post in same:
                replies[i] = [got.pop(0) for _ in post.messages]
    return [ends[i] for i in range(len(runs))]


def _joined(messages: list[Any], lead: int, send: Callable[[Any], Any]) -> list[Any]:
    """Applies `send` to messages, fused into one per dtype."""
    out: list[Any] = [None] * len(messages)
    kinds: dict[Any, list[int]] = {}
    for i, m in enumerate(messages):
        kinds.setdefault(m.dtype, []).append(i)
    for members in kinds.values():
        rows = [messages[i].reshape(*messages[i].shape[:lead], -1) for i in members]
        got = send(jnp.concatenate(rows, axis=lead))
        ends = np.cumsum([r.shape[lead] for r in rows])[:-1]
        for i, part in zip(members, jnp.split(got, ends, axis=got.ndim - 1), strict=True):
            out[i] = part.reshape(*got.shape[:-1], *messages[i].shape[lead:])
    return out


def each(
    values: list[Any],
    key: Any,
    send: Callable[[Any], Any],
    *,
    alone: Callable[[Any], Any] | None = None,
    lead: int = 0,
    before: Callable[[Any], Any] = lambda x: x,
    after: Callable[[Any], Any] = lambda x: x,
) -> Running:
    """Sends small values in a `Post`, and large ones individually with `alone`, or else `send`.

    `before` and `after` convert small values to messages and back.
    """
    most = SMALL.get(jax.devices()[0].platform, 1 << 20)
    small = [x.size * x.dtype.itemsize < most for x in values]
    out = [None if s else (alone or send)(x) for x, s in zip(values, small, strict=True)]
    if any(small):
        messages = [before(x) for x, s in zip(values, small, strict=True) if s]
        got = iter((yield Post(key, lead, send, messages)))
        out = [after(next(got)) if s else x for x, s in zip(out, small, strict=True)]
    return out


def mine(devices: tuple[int, ...], values: dict[int, Any], default: Any) -> Any:
    """This device's entry in a table."""
    rows = np.array([values.get(d, default) for d in devices], np.int32)
    if (rows == rows[0]).all():
        return jnp.asarray(rows[0])
    return jnp.asarray(rows)[lax.axis_index(AXIS)]


def sent(pairs: Sequence[tuple[int, int]], devices: tuple[int, ...], values: list[Any]) -> Running:
    """Sends values from each pair's first device to its second."""
    place = {d: i for i, d in enumerate(devices)}
    ends = sorted((place[a], place[b]) for a, b in pairs)
    return each(values, (Permute, tuple(ends)), lambda m: lax.ppermute(m, AXIS, ends))


def exchange(step: Exchange, devices: tuple[int, ...], values: list[Any]) -> Running:
    """Cuts, sends and places each box individually."""
    units = [ratios(x.shape, step.units) for x in values]
    out: list[Any] = [None] * len(values)
    for r in step.kept:
        out = placed(step, r, devices, units, out, taken(r, devices, units, values))
    for r in step.rounds:
        got = yield from sent(r.pairs, devices, taken(r, devices, units, values))
        out = placed(step, r, devices, units, out, got)
    return out


def ratios(shape: Sequence[int], units: Sequence[int]) -> tuple[int, ...]:
    return tuple(n // u for n, u in zip(shape, units, strict=True))


def _times(units: Sequence[Any], by: Sequence[int]) -> tuple[Any, ...]:
    return tuple(u * b for u, b in zip(units, by, strict=True))


def _offsets(devices: tuple[int, ...], at: dict[int, Coords]) -> list[Any]:
    """This device's offsets, in units; where a device has none, those of the first that has."""
    first = next(iter(at.values()))
    return [mine(devices, {d: c[i] for d, c in at.items()}, n) for i, n in enumerate(first)]


def taken(r: Round, devices: tuple[int, ...], units: list[Any], values: list[Any]) -> list[Any]:
    """Parts that a device sends in a round."""
    at = _offsets(devices, {b.source: b.start for b in r.boxes})
    sizes = [_times(r.size, unit) for unit in units]
    return [
        x if x.shape == size else lax.dynamic_slice(x, _times(at, unit), size)
        for x, unit, size in zip(values, units, sizes, strict=True)
    ]


def received(r: Round, devices: tuple[int, ...], units: list[Any], wholes: list[Any]) -> list[Any]:
    """Parts of shards at which a device places what it receives in a round."""
    at = _offsets(devices, {b.target: b.put for b in r.boxes})
    return [
        lax.dynamic_slice(x, _times(at, unit), _times(r.size, unit))
        for x, unit in zip(wholes, units, strict=True)
    ]


def placed(
    step: Exchange,
    r: Round,
    devices: tuple[int, ...],
    units: list[Any],
    out: list[Any],
    got: list[Any],
) -> list[Any]:
    """Places what was received in a round; devices that received nothing keep their values."""
    targets = {b.target: 1 for b in r.boxes}
    everyone = all(d in targets for d in step.receivers)
    got_some = mine(devices, targets, 0) == 1
    at = _offsets(devices, {b.target: b.put for b in r.boxes})

    def one(whole: Any, part: Any, unit: tuple[int, ...]) -> Any:
        if r.size == step.out_units:
            return part if everyone or whole is None else jnp.where(got_some, part, whole)
        if whole is None:
            whole = jnp.zeros(_times(step.out_units, unit), part.dtype)
        start = _times(at, unit)
        if not everyone:
            part = jnp.where(got_some, part, lax.dynamic_slice(whole, start, part.shape))
        return lax.dynamic_update_slice(whole, part, start)

    return [one(w, p, u) for w, p, u in zip(out, got, units, strict=True)]

"""Point-to-point messages, in rounds, between two layouts on arbitrary devices.

Every device of the target fetches exactly the parts that it lacks, each from one of its holders:
itself if possible (no message), otherwise the holder that would finish sending first. Messages of
one shape are then edge-colored so that no device sends or receives two of a color. A color is a
round, which is one collective permute, and there are as many rounds as the busiest device has
messages (Kőnig's theorem).
"""

import functools
import itertools
import math

from jaxrl_eff.parallel.reshard.collectives import Box, Copies, Exchange, Round
from jaxrl_eff.parallel.reshard.layout import Coords, DeviceLayout, Network, Units


@functools.cache
def exchange(source: DeviceLayout, target: DeviceLayout, network: Network) -> Exchange:
    """Messages from one layout to another."""
    units = Units.of(source, target)
    kept, moved = _boxes(source, target, units, network)
    shapes = sorted({size for size, _ in moved}, reverse=True)
    rounds = [
        Round(size, boxes)
        for size in shapes
        for boxes in _colored([box for s, box in moved if s == size])
    ]
    at_home = sorted({size for size, _ in kept}, reverse=True)
    shares = tuple(math.prod(r.size) / units.volume for r in rounds)
    got: dict[int, int] = {}
    for size, box in moved:
        got[box.target] = got.get(box.target, 0) + math.prod(size)
    return Exchange(
        units.source,
        units.target,
        tuple(Round(size, tuple(b for s, b in kept if s == size)) for size in at_home),
        tuple(rounds),
        target.devices,
        share=max(got.values(), default=0) / units.volume,
        total=sum(got.values()) / units.volume,
        round_shares=shares,
    )


def copies(source: DeviceLayout, target: DeviceLayout, network: Network) -> Copies | None:
    """Equivalent device-to-device copies, if legal and only entire shards move; otherwise None."""
    if source.counts != target.counts or not network.copies:
        return None
    plan = exchange(source, target, network)
    boxes = [b for r in (*plan.kept, *plan.rounds) for b in r.boxes]
    whose = {b.target: b.source for b in boxes}
    return Copies(tuple((whose[d], d) for d in target.devices), plan.share, plan.total)


def _boxes(
    source: DeviceLayout, target: DeviceLayout, units: Units, network: Network
) -> tuple[list[tuple[Coords, Box]], list[tuple[Coords, Box]]]:
    """(shape, box) lists of what devices keep and of what is sent."""
    kept, wanted = [], []
    for device, at in target.coords.items():
        ranges = [
            range(c * t // s, ((c + 1) * t - 1) // s + 1)
            for c, t, s in zip(at, units.target, units.source, strict=True)
        ]
        for cell in itertools.product(*ranges):
            size, start, put = _cut(cell, at, units)
            if source.coords.get(device) == cell:
                kept.append((size, Box(device, start, device, put)))
            else:
                wanted.append((source.holders[cell], size, start, device, put))
    # Boxes with few holders first, then large ones, for a better balance.
    wanted.sort(key=lambda w: (len(w[0]), -math.prod(w[1])))
    busy: dict[int, float] = {}
    moved = []
    for holders, size, start, device, put in wanted:
        n = math.prod(size)
        ends = {h: busy.get(h, 0.0) + n / network.rate(h, device) for h in holders}
        chosen = min(holders, key=ends.__getitem__)
        busy[chosen] = ends[chosen]
        moved.append((size, Box(chosen, start, device, put)))
    return kept, moved


def _cut(cell: Coords, at: Coords, units: Units) -> tuple[Coords, Coords, Coords]:
    """Overlap of a source shard and a target shard: its size and its offsets inside both."""
    sizes, starts, puts = [], [], []
    for i, j, s, t in zip(cell, at, units.source, units.target, strict=True):
        low, high = max(i * s, j * t), min((i + 1) * s, (j + 1) * t)
        sizes.append(high - low)
        starts.append(low - i * s)
        puts.append(low - j * t)
    return tuple(sizes), tuple(starts), tuple(puts)


def _colored(boxes: list[Box]) -> list[tuple[Box, ...]]:
    """Splits messages into the minimum number of rounds.

    A message gets the first round that is free at its source. If that is taken at its target, the
    path of messages that alternates between it and the first round free at the target is flipped.
    """
    sends: dict[tuple[int, int], int] = {}  # (device, round) -> message
    gets: dict[tuple[int, int], int] = {}
    color: dict[int, int] = {}
    for e, box in enumerate(boxes):
        a = _first_free(sends, box.source)
        b = _first_free(gets, box.target)
        if a != b and (box.target, a) in gets:
            _flip(boxes, sends, gets, color, box.target, a, b)
        chosen = a
        sends[box.source, chosen] = gets[box.target, chosen] = e
        color[e] = chosen
    rounds: dict[int, list[Box]] = {}
    for e, c in color.items():
        rounds.setdefault(c, []).append(boxes[e])
    return [tuple(rounds[c]) for c in sorted(rounds)]


def _first_free(taken: dict[tuple[int, int], int], device: int) -> int:
    return next(c for c in itertools.count() if (device, c) not in taken)


def _flip(boxes, sends, gets, color, target: int, a: int, b: int) -> None:
    """Frees round `a` at a receiver that is free in round `b`, by swapping a and b on a path."""
    path, at_target, device, c = [], True, target, a
    while ((device, c) in gets) if at_target else ((device, c) in sends):
        e = gets[device, c] if at_target else sends[device, c]
        path.append(e)
        device = boxes[e].source if at_target else boxes[e].target
        at_target, c = not at_target, b if c == a else a
    for e in path:
        del sends[boxes[e].source, color[e]]
        del gets[boxes[e].target, color[e]]
    for e in path:
        color[e] = b if color[e] == a else a
        sends[boxes[e].source, color[e]] = gets[boxes[e].target, color[e]] = e

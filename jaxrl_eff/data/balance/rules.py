"""Rules that keep sequences of a micro-batch whole on one rank or distribute them over all ranks.

A place is a rank, or -1: distributed. All rules satisfy, for every rank j,

    sum_k P_kj S_k + D_k ceil(S_k / N) <= C                             (Skrull, equation 7)

where a distributed sequence's share is rounded up to whole stripes. They are deterministic, ties go
to the lower rank, and they return None if they find no such places.

`pooled` places the sequences of all groups of a micro-step at once, the other rules those of one.
"""

import heapq
from collections.abc import Sequence

SLACK = 0.1  # by how much of its fair load a rank can exceed it

Places = list[int]


def balanced(
    lengths: Sequence[int],
    stripes: Sequence[int],
    seconds: Sequence[float],
    *,
    parts: int,
    capacity: int,
    local: int,
    shared: int,
) -> Places | None:
    """Distributes what exceeds a rank's fair load W = sum seconds / N, and balances the rest.

    The rest are placed longest first, each on the least loaded rank that has capacity for it and
    stays within (1 + SLACK) W. If there is none it is distributed, and if that is full too, placed
    on the least loaded rank with capacity.

    Args:
        lengths: tokens of each sequence, longest first.
        stripes: tokens of each on every rank if it is distributed, ceil(length / parts).
        seconds: of each on one rank.
        parts, capacity: N and C.
        local, shared: most tokens that local and distributed sequences can take of a rank.
    """
    limit = (1 + SLACK) * sum(seconds) / parts
    used, load = [0] * parts, [0.0] * parts
    spread, share, fullest = 0, 0.0, 0
    space = min(local, capacity)
    out = []
    for s, c, w in zip(lengths, stripes, seconds, strict=True):
        least = min(load)
        t = -1
        if s <= space and least + share + w <= limit:
            t = load.index(least)
            if used[t] + s > space:
                t = _with_capacity(used, load, space - s, limit - share - w)
        if t < 0:
            if spread + c <= shared and fullest + spread + c <= capacity:
                spread += c
                share += w / parts
                space = min(local, capacity - spread)
                out.append(-1)
                continue
            t = _with_capacity(used, load, space - s, float("inf"))
            if t < 0:
                return None
        used[t] += s
        load[t] += w
        if used[t] > fullest:
            fullest = used[t]
        out.append(t)
    return out


def _with_capacity(used: list[int], load: list[float], most: int, lightest: float) -> int:
    """The least loaded rank within `most` tokens and `lightest` seconds, or -1."""
    fitting = [
        (w, t)
        for t, (n, w) in enumerate(zip(used, load, strict=True))
        if n <= most and w <= lightest
    ]
    return min(fitting)[1] if fitting else -1


def pooled(
    lengths: Sequence[int],
    stripes: Sequence[int],
    *,
    groups: int,
    parts: int,
    capacity: int,
    shared: int,
) -> list[tuple[int, int]] | None:
    """Fills the distributed part of every group evenly, and balances the rest over all ranks.

    All groups run one shape, the most local and the most distributed tokens of any, so a group
    that has fewer of either wastes columns. Longest first, a sequence is distributed over the
    group with the fewest tokens in its distributed part, if that stays within `shared`; otherwise
    it goes to the rank, of any group, with the fewest tokens. The shortest sequences come last and
    even out the ranks.

    Args:
        lengths, stripes: as in `balanced`.
        groups: G.
        shared: capacity of a rank's distributed part, in tokens.

    Returns:
        For every sequence its group, and its rank or -1.
    """
    spread = [(0, g) for g in range(groups)]
    used = [(0, t) for t in range(groups * parts)]
    out = []
    for s, c in zip(lengths, stripes, strict=True):
        load, g = spread[0]
        if load + c <= shared:
            heapq.heapreplace(spread, (load + c, g))
            out.append((g, -1))
            continue
        load, t = used[0]
        if load + s + shared > capacity:
            return None
        heapq.heapreplace(used, (load + s, t))
        out.append(divmod(t, parts))
    return out


def printed(
    lengths: Sequence[int],
    stripes: Sequence[int],
    seconds: Sequence[float],
    *,
    parts: int,
    capacity: int,
) -> Places | None:
    """Skrull's Algorithm 1 with its roll-back repaired.

    Shortest first: a sequence goes to the least loaded rank, else to the one with most capacity
    left, else it is distributed; if the fullest rank cannot take its share, a local sequence there,
    the first placed, is distributed instead, and it is tried again.

    As printed, a roll-back subtracts S - S / N from the rank's capacity where it should add it, and
    charges the other ranks nothing for their shares. Here all are charged; a rank that this
    overfills rolls back in turn.

    Args:
        lengths, stripes, seconds, parts, capacity: as in `balanced`, but shortest first.
    """
    left, load = [capacity] * parts, [0.0] * parts
    mine: list[list[int]] = [[] for _ in range(parts)]  # sequences of a rank, valid from `first`
    first = [0] * parts
    out = [-1] * len(lengths)

    def spread(k: int) -> None:
        out[k], c, w = -1, stripes[k], seconds[k] / parts
        for j in range(parts):
            left[j] -= c
            load[j] += w

    def roll_back(t: int) -> bool:
        """Distributes a local sequence of rank t, and of ranks without capacity for its share."""
        while True:
            if first[t] == len(mine[t]):
                return False
            k = mine[t][first[t]]
            first[t] += 1
            left[t] += lengths[k]
            load[t] -= seconds[k]
            spread(k)
            tight = min(left)
            if tight >= 0:
                return True
            t = left.index(tight)

    for k, (s, c, w) in enumerate(zip(lengths, stripes, seconds, strict=True)):
        while True:
            t = load.index(min(load))
            if left[t] < s:
                t = left.index(max(left))
            if left[t] >= s:
                out[k] = t
                left[t] -= s
                load[t] += w
                mine[t].append(k)
                break
            t = left.index(min(left))
            if left[t] >= c:
                spread(k)
                break
            if not roll_back(t):
                return None
    return out

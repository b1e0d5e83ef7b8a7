"""Choice of a resharding plan: the fastest of those that receive little more than the minimum.

Candidates: nothing (same layout); plain copies (one process, entire shards); collectives on one set
of devices (`chain`); messages (`messages`), either direct or, if the target replicates shards, of
parts that the target then all-gathers among its own devices, so that every byte crosses the slow
link once.
"""

import functools
import itertools
import math

from jaxrl_eff.parallel.reshard.chain import chain
from jaxrl_eff.parallel.reshard.collectives import Phase, RoutePlan, seconds
from jaxrl_eff.parallel.reshard.layout import DeviceLayout, Network, missing
from jaxrl_eff.parallel.reshard.messages import copies, exchange

MOST = 1.25  # limit on received bytes, relative to the minimum


def room(shape: tuple[int, ...], source: DeviceLayout, target: DeviceLayout) -> tuple[int, ...]:
    """Number that the split of each dimension must divide; plans use no more of a shape."""
    n = math.lcm(len(source.devices), len(target.devices))
    return tuple(math.gcd(size, n) if size else n for size in shape)


def way(
    source: DeviceLayout,
    target: DeviceLayout,
    room: tuple[int, ...],
    nbytes: float | int,
    network: Network,
) -> RoutePlan:
    """Plan for tensors of `nbytes` bytes in total.

    Args:
        source, target: the layouts.
        room: of the tensors, see `room`.
        nbytes: weighs bandwidth against latency; rounded up to a power of two.
        network: bandwidths and latencies.
    """
    return _way(source, target, room, 2.0 ** math.ceil(math.log2(max(nbytes, 1.0))), network)


@functools.cache
def _way(
    source: DeviceLayout,
    target: DeviceLayout,
    room: tuple[int, ...],
    nbytes: float | int,
    network: Network,
) -> RoutePlan:
    if source.same(target):
        return RoutePlan(source, target, (), 0.0, 0.0)
    least = math.fsum(missing(source, target).values())
    found = []
    for stages in _candidates(source, target, room, nbytes, network):
        steps = [s for stage in stages for s in stage.steps]
        total = math.fsum(s.total for s in steps)
        if total <= MOST * least * (1 + 1e-9):
            time = math.fsum(seconds(s, nbytes, network) for s in steps)
            found.append((time, total, len(found), stages))
    time, total, _, stages = min(found)  # never empty: direct messages receive the minimum
    return RoutePlan(source, target, stages, time, total)


def _candidates(source, target, room, nbytes, network):
    """Yields candidate lists of stages."""
    plain = copies(source, target, network)
    if plain is not None:
        yield (Phase(target.devices, (plain,)),)
    together = set(source.devices) == set(target.devices)
    if together:
        for thrifty in (False, True):
            steps = chain(source, target, room, nbytes, network, thrifty=thrifty)
            if steps is not None:
                yield (Phase(tuple(sorted(source.devices)), steps),)
    union = tuple(sorted({*source.devices, *target.devices}))
    yield (Phase(union, (exchange(source, target, network),)),)
    for part in _parted(source, target, room):
        steps = chain(part, target, room, nbytes, network)
        if steps is None:
            continue
        gather = Phase(tuple(sorted(target.devices)), steps)
        if source.same(part):
            yield (gather,)
            continue
        plain = copies(source, part, network)
        if plain is not None:
            yield (Phase(target.devices, (plain,)), gather)
        messages = exchange(source, part, network)
        if union == gather.devices:
            yield (Phase(union, (messages, *steps)),)
        else:
            yield (Phase(union, (messages,)), gather)


def _parted(source, target, room):
    """Yields the target's layout with replicated shards split further over its replica axes."""
    axes = target.replica_axes
    many = len(target.devices) > 64  # planning them takes long
    for k in range(len(axes), 0, -1):
        for some in itertools.combinations(axes, k):
            ways = math.prod(target.mesh[a] for a in some)
            fits = [i for i, c in enumerate(target.counts) if room[i] % (c * ways) == 0]
            # Prefer dimensions that the source splits equally, so that entire shards can be sent.
            fits.sort(key=lambda i, n=ways: source.counts[i] != target.counts[i] * n)
            if fits:
                i = fits[0]
                spec = (*target.spec[:i], target.spec[i] + some, *target.spec[i + 1 :])
                yield DeviceLayout(target.devices, target.mesh, spec)
        if many:
            return

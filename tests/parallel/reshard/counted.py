"""What a route's compiled programs move."""

import math

import hlo_bytes


def counted(route, tree=None):
    """(bytes that all devices receive, number of collectives of each kind and of copies)."""
    programs = route.programs(tree)
    steps, received = hlo_bytes.count(programs), math.fsum(map(hlo_bytes.received, programs))
    plan = route._plan
    for bucket in plan.buckets:
        for phase in bucket.phases:
            for i, pairs in zip(phase.members, phase.pairs, strict=False):
                moved = sum(a != b for b, a in pairs.items())
                steps["copy"] = steps.get("copy", 0) + moved * bucket.parts
                size = plan.moves[i].nbytes / math.prod(plan.moves[i].target.counts)
                received += size * moved
    return received, steps

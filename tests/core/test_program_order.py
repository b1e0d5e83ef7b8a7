"""The proof that no two processes wait for each other, without processes."""

import itertools
import random

import numpy as np
import pytest

from jaxrl_eff.core import program_order
from jaxrl_eff.core.program_order import Operation


def _random(rng, processes=6, length=20):
    """A total order over random groups of processes."""
    return tuple(
        Operation("call", f"op{i}", f"op{i}", tuple(sorted(rng.sample(range(processes), k))))
        for i, k in enumerate(rng.randint(1, processes) for _ in range(length))
    )


def _deadlocks(projections):
    """The slow twin: runs all processes; True if some wait for each other for ever.

    An operation starts once it is the next one of every process that takes part.
    """
    queues = {p: list(ops) for p, ops in projections.items()}
    while any(queues.values()):
        ready = next(
            (
                q[0]
                for q in queues.values()
                if q and all(queues[p] and queues[p][0].name == q[0].name for p in q[0].processes)
            ),
            None,
        )
        if ready is None:
            return True
        for p in ready.processes:
            queues[p].pop(0)
    return False


def test_a_projected_total_order_never_waits():
    for seed in range(50):
        ops = _random(random.Random(seed))
        projections = {p: program_order.project(ops, p) for p in range(6)}
        program_order.check_order(projections)
        assert not _deadlocks(projections)


def test_whatever_deadlocks_is_refused():
    refused = stuck = 0
    for seed in range(200):
        rng = random.Random(seed)
        ops = _random(rng)
        projections = {p: list(program_order.project(ops, p)) for p in range(6)}
        mine = projections[rng.randrange(6)]
        if len(mine) > 1:
            i = rng.randrange(len(mine) - 1)
            mine[i], mine[i + 1] = mine[i + 1], mine[i]
        try:
            program_order.check_order(projections)
            bad = False
        except ValueError:
            bad = True
        assert bad or not _deadlocks(projections)
        refused, stuck = refused + bad, stuck + _deadlocks(projections)
    assert refused >= stuck > 100


def test_three_processes_in_a_circle_are_refused_though_any_two_agree():
    a, b, c = (Operation("call", n, n, p) for n, p in (("a", (0, 1)), ("b", (1, 2)), ("c", (0, 2))))
    with pytest.raises(ValueError, match="wait for each other: "):
        program_order.check_order({0: [a, c], 1: [b, a], 2: [c, b]})


def test_a_planted_inversion_is_named():
    ops = [Operation("call", n, n, (0, 1)) for n in "abcd"]
    swapped = [ops[0], ops[2], ops[1], ops[3]]
    with pytest.raises(ValueError, match=r"processes 0 and 1 .* runs 'b' and process 1 'c'"):
        program_order.check_order({0: ops, 1: swapped})
    with pytest.raises(ValueError, match="process 0 runs 'd' and process 1 'nothing'"):
        program_order.check_order({0: ops, 1: ops[:3]})


def test_equal_lists_and_only_those_have_equal_digests():
    ops = _random(random.Random(0), length=8)
    seen = {program_order.digest(p).tobytes() for p in itertools.permutations(ops, 8)}
    assert len(seen) == 40320
    assert program_order.digest(ops).dtype == np.uint32
    np.testing.assert_array_equal(program_order.digest(ops), program_order.digest(tuple(ops)))

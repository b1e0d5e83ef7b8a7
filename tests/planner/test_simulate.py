"""Schedules against a slow scheduler, against sums on serial plans, and relations."""

import itertools
import random

import pytest
from test_cost import random_placement
from workload import LM, ROUND, everywhere, on, ppo, steady

from jaxrl_eff.planner import simulate, transfer
from jaxrl_eff.planner.corrections import Corrections
from jaxrl_eff.planner.shares import params
from jaxrl_eff.planner.simulate import Simulator

FREE = ROUND.with_(link_bytes_per_s=1e18, nic_bytes_per_s=1e18)  # moving takes no time
WIRED = ROUND.with_(link_latency=1e-9, nic_latency=2e-9, move_seconds=1e-8, launch=1e-9)


def slowly(simulator, plan):
    """`Simulator._times` with sets of devices, no queue: starts and ends by (iteration, node)."""
    nodes, edges = simulator._graph(simulator._placed(plan))
    todo = {(i, k) for i in range(simulator._count) for k in range(len(nodes))}
    end, start, free = {}, {}, {}
    bits = [{d for d in range(64) if n.mask >> d & 1} for n in nodes]
    while todo:
        best = None
        for i, k in todo:
            before = [
                (end.get((i - e.lag, e.writer)), e.delay)
                for e in edges
                if e.reader == k and i - e.lag >= 0
            ]
            if any(at is None for at, _ in before):
                continue
            ready = max([at + delay for at, delay in before], default=0.0)
            best = min(best or (float("inf"),), (ready, i, k))
        ready, i, k = best
        start[i, k] = max([ready, *(free.get(d, 0.0) for d in bits[k])])
        end[i, k] = start[i, k] + nodes[k].seconds
        free |= dict.fromkeys(bits[k], end[i, k])
        todo.remove((i, k))
    return start, end


def random_plan(rng, problem):
    return {w.name: random_placement(rng) for w in problem.works}


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_the_schedule_is_that_of_the_slow_scheduler(staleness):
    p, rng = ppo(rows=64, staleness=staleness), random.Random(staleness)
    sim = Simulator(p, WIRED)
    for _ in range(12):
        plan = random_plan(rng, p)
        nodes, edges = sim._graph(sim._placed(plan))
        start, end = sim._times(nodes, edges)
        want_start, want_end = slowly(sim, plan)
        for (i, k), at in want_start.items():
            assert start[i * len(nodes) + k] == pytest.approx(at, abs=1e-15)
            assert end[i * len(nodes) + k] == pytest.approx(want_end[i, k], abs=1e-15)


def test_nothing_overlaps_on_a_device_and_everything_waits_for_what_it_reads():
    p, rng = ppo(rows=64), random.Random(3)
    writer = {k: w.name for w in p.works for k in w.writes}
    for _ in range(10):
        plan = random_plan(rng, p)
        schedule = simulate.simulate(p, plan, WIRED)
        calls = {(s.name, s.iteration): s for s in schedule.spans}
        busy = [s for s in schedule.spans if s.kind != "move"]
        for a, b in itertools.combinations(busy, 2):
            if set(a.devices) & set(b.devices):
                assert a.end <= b.start + 1e-15 or b.end <= a.start + 1e-15
        for w in p.works:
            for k in w.reads:
                assert calls[writer[k], 2].end <= calls[w.name, 2].start + 1e-15
        assert calls["actor_train", 1].end <= calls["actor_gen", 2].start


def test_a_serial_plan_takes_the_sum_of_its_calls():
    p = ppo(rows=64)
    plan = everywhere(p, on(0, 8, fsdp=2))
    schedule = simulate.simulate(p, plan, WIRED)
    assert schedule.seconds == pytest.approx(sum(c.seconds for c in schedule.costs.values()))
    assert not schedule.edges


def test_a_step_of_another_layout_takes_its_reallocation_too():
    p = ppo(rows=64)
    plan = everywhere(p, on(0, 8, fsdp=8)) | {"actor_gen": on(0, 8, tensor=2)}
    schedule = simulate.simulate(p, plan, WIRED)
    assert schedule.edges["actor->actor_gen"] == pytest.approx(
        transfer.realloc_cost(p, "actor", on(0, 8, fsdp=8), on(0, 8, tensor=2), WIRED)
    )
    total = sum(c.seconds for c in schedule.costs.values()) + schedule.edges["actor->actor_gen"]
    # Rows lie otherwise too, so what generation wrote moves, once on the way to the next call.
    assert schedule.edges["actor_gen->rew_inf"] > 0
    moves = [t for name, t in schedule.edges.items() if name.startswith("actor_gen->")]
    assert total < schedule.seconds <= total + max(moves) * (1 + 1e-9)


def test_calls_on_disjoint_devices_run_at_once():
    p = ppo(rows=64)
    plan = everywhere(p, on(0, 4)) | {
        "actor_train": on(0, 2), "critic_train": on(2, 2), "critic_inf": on(2, 2),
    }  # fmt: skip
    schedule = simulate.simulate(p, plan, FREE)
    spans = steady(schedule)
    a, c = spans["actor_train"], spans["critic_train"]
    assert a.start < c.end and c.start < a.end
    assert schedule.seconds < sum(x.seconds for x in schedule.costs.values())


def test_one_update_late_hides_the_shorter_half():
    times = []
    for staleness in (0, 1, 2, 3):
        p = ppo(rows=64, staleness=staleness)
        plan = everywhere(p, on(4, 4)) | {"actor_gen": on(0, 4)}
        schedule = simulate.simulate(p, plan, FREE)
        times.append(schedule.seconds)
    generate = schedule.costs["actor_gen"].seconds
    rest = sum(c.seconds for n, c in schedule.costs.items() if n != "actor_gen")
    assert times[0] == pytest.approx(generate + rest)
    assert times[1:] == pytest.approx([max(generate, rest)] * 3)


def test_fresher_weights_are_never_faster():
    rng = random.Random(11)
    plans = [random_plan(rng, ppo()) for _ in range(20)]
    for plan in plans:
        times = [
            simulate.simulate(ppo(rows=64, staleness=s), plan, WIRED).seconds for s in (0, 1, 2)
        ]
        assert times[0] >= times[1] * (1 - 1e-3) and times[1] >= times[2] * (1 - 1e-3)


@pytest.mark.parametrize("name", ["link_bytes_per_s", "nic_bytes_per_s", "flops32_per_s"])
def test_better_hardware_is_never_slower_on_common_plans(name):
    p = ppo(rows=64)
    base = everywhere(p, on(0, 8, fsdp=8))
    plans = [
        base,
        base | {"actor_gen": on(0, 8, tensor=2)},
        base | {"actor_gen": on(0, 8), "actor_train": on(0, 4), "critic_train": on(4, 4)},
        everywhere(p, on(4, 4)) | {"actor_gen": on(0, 4)},
    ]
    for plan in plans:
        before = float("inf")
        for times in (1, 2, 8, 64):
            cluster = WIRED.with_(**{name: getattr(WIRED, name) * times})
            now = simulate.simulate(p, plan, cluster).seconds
            assert now <= before * (1 + 1e-9)
            before = now


def test_transfers_through_one_card_wait_for_each_other():
    # Two halves of a host send to two halves of the other at the same time.
    slow = ROUND.with_(nic_bytes_per_s=1e3)
    p = ppo(rows=64)
    plan = everywhere(p, on(0, 2)) | {
        "actor_gen": on(0, 2), "rew_inf": on(4, 2), "ref_inf": on(6, 2), "critic_inf": on(2, 2),
    }  # fmt: skip
    spans = steady(simulate.simulate(p, plan, slow))
    first, second = spans["actor_gen->rew_inf"], spans["actor_gen->ref_inf"]
    assert second.start >= first.end or first.start >= second.end
    assert "actor_gen->critic_inf" not in spans  # inside the host it only takes time


def test_memory_counts_copies_once_and_the_busiest_call():
    p = ppo(rows=64)
    n, value = params(LM), params(p.roles["critic"].lm)
    one = everywhere(p, on(0, 8))
    schedule = simulate.simulate(p, one, ROUND)
    (group,) = schedule.groups
    assert group.devices == tuple(range(8))
    assert group.static_bytes == pytest.approx(n * (12 + 4) + value * (12 + 4))
    assert group.active_bytes == max(c.active_bytes for c in schedule.costs.values())
    two = simulate.simulate(p, one | {"actor_gen": on(0, 4)}, ROUND)
    sizes = {g.devices: g.static_bytes for g in two.groups}
    assert sizes[0, 1, 2, 3] == pytest.approx(group.static_bytes + 4 * n)
    assert sizes[4, 5, 6, 7] == pytest.approx(group.static_bytes)


def test_what_does_not_fit_is_said_by_how_much():
    p = ppo(rows=64)
    plan = everywhere(p, on(0, 8))
    (group,) = simulate.simulate(p, plan, ROUND).groups
    need = group.bytes
    tight = ROUND.with_(memory_bytes=need - 100)
    assert simulate.simulate(p, plan, tight).over_bytes == pytest.approx(100)
    assert simulate.simulate(p, plan, ROUND.with_(memory_bytes=need)).over_bytes == 0


def test_the_score_is_the_schedules_and_prices_are_kept():
    p, rng = ppo(rows=64), random.Random(7)
    sim = Simulator(p, WIRED)
    for _ in range(10):
        plan = random_plan(rng, p)
        score, schedule = sim.score(plan), sim.run(plan)
        assert score == (schedule.seconds, schedule.over_bytes)
        assert (
            sim.score({k: on(v.devices[0], len(v.devices), **_axes(v)) for k, v in plan.items()})
            == score
        )
        assert simulate.simulate(p, plan, WIRED) == schedule


def _axes(p):
    return {**p.axes, "microbatches": p.microbatches}


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_the_slope_does_not_depend_on_how_long_it_is_taken(staleness):
    p, rng = ppo(rows=64, staleness=staleness), random.Random(5)
    for _ in range(8):
        plan = random_plan(rng, p)
        short, long = (simulate.simulate(p, plan, WIRED, iterations=n).seconds for n in (0, 60))
        assert short == pytest.approx(long, rel=2e-3)


def test_corrections_reach_calls_and_edges():
    p = ppo(rows=64)
    plan = everywhere(p, on(0, 8, fsdp=8)) | {"actor_gen": on(0, 8)}
    plain = simulate.simulate(p, plan, WIRED)
    c = Corrections({"ref_inf": 2.0, "actor->actor_gen": 3.0, "*move": 5.0})
    found = simulate.simulate(p, plan, WIRED, c)
    assert found.costs["ref_inf"].seconds == pytest.approx(2 * plain.costs["ref_inf"].seconds)
    for name, seconds in plain.edges.items():
        factor = {"actor->actor_gen": 3.0}.get(name, 5.0 if "gen->" in name else 1.0)
        assert found.edges[name] == pytest.approx(factor * seconds), name


def test_plans_that_lack_calls_or_devices_are_refused():
    p = ppo()
    with pytest.raises(ValueError, match="no placement for actor_gen"):
        simulate.simulate(p, {}, ROUND)
    with pytest.raises(ValueError, match="names device 8, but round has 8, 0 to 7"):
        simulate.simulate(p, everywhere(p, on(0, 9)), ROUND)


def test_devices_that_share_cores_gain_nothing_from_being_apart():
    one = FREE.with_(per_host=8, domain=8, memory_bytes_per_s=1e30)
    shared = one.with_(shared_compute=1.0)
    p = ppo(rows=64)
    plan = everywhere(p, on(0, 8))
    apart = plan | {"actor_train": on(0, 4), "critic_train": on(4, 4), "critic_inf": on(4, 4)}
    together, split = (simulate.simulate(p, x, shared).seconds for x in (plan, apart))
    assert split == pytest.approx(together, rel=1e-6)
    assert together == pytest.approx(simulate.simulate(p, plan, one).seconds, rel=1e-6)
    # Devices that hardly share are as good as their own.
    own = simulate.simulate(p, apart, one).seconds
    assert simulate.simulate(p, apart, one.with_(shared_compute=1e-6)).seconds == pytest.approx(own)


def test_a_lone_call_on_shared_cores_is_quicker_than_one_among_others():
    shared = FREE.with_(per_host=8, domain=8, shared_compute=1.0)
    p = ppo(rows=64)
    plan = everywhere(p, on(0, 4)) | {"actor_gen": on(4, 4), "ref_inf": on(4, 4)}
    schedule = simulate.simulate(p, plan, shared)
    spans = steady(schedule)
    alone = schedule.costs["ref_inf"].seconds
    assert spans["ref_inf"].end - spans["ref_inf"].start > 1.5 * alone  # rew_inf runs beside it
    gen = spans["actor_gen"]
    assert gen.end - gen.start == pytest.approx(schedule.costs["actor_gen"].seconds)

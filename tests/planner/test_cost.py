"""Prices against numbers worked out by hand, relations that must hold, and slow twins."""

import itertools
import math
import random

import pytest
from workload import LAYER, LM, ROUND, on, ppo

from jaxrl_eff.parallel.mesh import Placement
from jaxrl_eff.planner import clusters, collectives, cost_generate, transfer
from jaxrl_eff.planner.corrections import Corrections
from jaxrl_eff.planner.cost import call_cost
from jaxrl_eff.planner.problem import Lengths, Problem, Role, Work
from jaxrl_eff.planner.shares import params

# A forward pass of one row of 8 tokens, each seeing 4.5 on average, with logits.
FORWARD = 2 * 2 * LAYER * 8 + 4 * 2 * 2 * 4.5 * 2 * 8 + 2 * 4 * 16 * 8


def parts(problem, call, where, cluster=ROUND, **options):
    return call_cost(problem, problem.work(call), where, cluster, **options).parts


def test_inference_counts_products_attention_and_head():
    p = ppo()
    found = call_cost(p, p.work("ref_inf"), on(0, 1), ROUND)
    assert found.parts["compute"] == pytest.approx(16 * FORWARD / 1e12)
    assert found.seconds == pytest.approx(sum(found.parts.values()))
    value = parts(p, "critic_inf", on(0, 1))["compute"]
    assert value == pytest.approx(16 * (FORWARD - 2 * 4 * 15 * 8) / 1e12)


def test_training_is_three_passes_and_four_with_recomputation():
    p = ppo(minibatches=2, epochs=3)
    assert parts(p, "actor_train", on(0, 1))["compute"] == pytest.approx(9 * 16 * FORWARD / 1e12)
    again = ppo(lm=LM.replace(remat="full"))
    found = parts(again, "actor_train", on(0, 1))["compute"]
    assert found == pytest.approx(4 * 16 * FORWARD / 1e12)


@pytest.mark.parametrize("axis", ["data", "fsdp"])
@pytest.mark.parametrize("call", ["actor_gen", "ref_inf", "actor_train"])
def test_twice_the_devices_halve_the_computing(call, axis):
    p = ppo()
    one, two, four = (parts(p, call, on(0, n, **{axis: n}))["compute"] for n in (1, 2, 4))
    assert one == pytest.approx(2 * two) == pytest.approx(4 * four)


def test_tensor_parallelism_splits_what_divides_and_sums_twice_a_layer():
    p = ppo()
    found = parts(p, "ref_inf", on(0, 2, tensor=2))
    # One key/value head stays whole: half of everything else.
    layer = (LAYER + 4 * 2 * 2) / 2
    flops = 2 * 2 * layer * 8 + 4 * 2 * 1 * 4.5 * 2 * 8 + 2 * 4 * 8 * 8
    assert found["compute"] == pytest.approx(16 * flops / 1e12)
    # 2 sums a layer of [16 * 8, 4] float32, each 2 (n - 1) / n of that a device.
    assert found["tensor"] == pytest.approx(2 * 2 * (16 * 8 * 4 * 4) / 1e9)


def test_a_sum_over_hosts_goes_through_every_card():
    two_hosts = collectives.all_reduce(800.0, collectives.Axis(8, 2), ROUND)
    inside = 2 * 800 * 3 / 4 / 1e9
    assert two_hosts == pytest.approx(inside + 2 * (800 / 4) / 2 / 1e8)
    assert collectives.gather(800.0, collectives.Axis(4, 1), ROUND) == pytest.approx(inside / 2)
    slow = ROUND.with_(link_latency=1.0, nic_latency=10.0)
    assert collectives.all_reduce(0.0, collectives.Axis(8, 2), slow) == pytest.approx(2 * 1 + 10)


def test_axes_know_which_hosts_they_span():
    c = clusters.parse("h100:2x8")
    g = collectives.grid(on(0, 16, data=2, tensor=8), c)
    assert (g.tensor, g.data) == (collectives.Axis(8, 1), collectives.Axis(2, 2))
    g = collectives.grid(on(4, 8, data=2, tensor=4), c)
    assert (g.tensor, g.data) == (collectives.Axis(4, 1), collectives.Axis(2, 2))
    strided = Placement(tuple(i // 2 + 8 * (i % 2) for i in range(16)), data=8, tensor=2)
    g = collectives.grid(strided, c)
    assert (g.tensor, g.data) == (collectives.Axis(2, 2), collectives.Axis(8, 1))


def test_gradients_are_summed_over_data_and_scattered_over_fsdp():
    p = ppo()
    n = params(LM)
    data = parts(p, "actor_train", on(0, 2))["data"]
    assert data == pytest.approx(2 * n * 4 / 2 / 1e9)
    sharded = parts(p, "actor_train", on(0, 2, fsdp=2))["data"]
    assert sharded == pytest.approx(3 * n * 4 / 2 / 1e9)  # two gathers and a scatter
    twice = parts(p, "actor_train", on(0, 2, fsdp=2, microbatches=2))["data"]
    assert twice == pytest.approx(2 * sharded)
    hidden = ROUND.with_(overlap=1.0, flops32_per_s=1e3)
    assert "data" not in parts(p, "actor_train", on(0, 2), hidden)


def test_a_pipeline_idles_while_it_fills():
    p = ppo()
    one = parts(p, "actor_train", on(0, 1))["compute"]
    found = parts(p, "actor_train", on(0, 2, stage=2, microbatches=4))
    assert found["compute"] == pytest.approx(one / 2)
    assert found["bubble"] == pytest.approx(one / 2 / 4)
    # Five hand-overs each way of a microbatch's [4 * 8, 4] float32.
    assert found["pipeline"] == pytest.approx(2 * 5 * (4 * 8 * 4 * 4) / 1e9)
    infer = parts(p, "ref_inf", on(0, 2, stage=2, microbatches=2))
    assert infer["bubble"] == pytest.approx(infer["compute"] / 2)


def test_decoding_reads_weights_and_cache_each_step():
    slow = ROUND.with_(memory_bytes_per_s=1e9, flops32_per_s=1e30)
    p = ppo()
    found = parts(p, "actor_gen", on(0, 1), slow)
    weights = 4 * (2 * LAYER + 4 * 16)
    cache = 16 * 2 * (4 + 2) * 2 * 2 * 4  # rows, layers, slots on average, k and v, head_dim, bytes
    drawing = 4 * 4 * 16 * 16
    prefill = 2 * LAYER * 4
    assert found["memory"] == pytest.approx((4 * (weights + cache + drawing) + prefill) / 1e9)


def test_the_loop_ends_with_the_longest_row():
    lengths = Lengths((1, 2, 4), (0.5, 0.25, 0.25))
    assert cost_generate.longest(lengths, 1) == pytest.approx(2.0)
    for n in (2, 3):
        mean = sum(
            max(lengths.tokens[i] for i in draw) * math.prod(lengths.share[i] for i in draw)
            for draw in itertools.product(range(3), repeat=n)
        )
        assert cost_generate.longest(lengths, n) == pytest.approx(mean)
    assert cost_generate.longest(Lengths.all(7), 100) == 7


def test_compaction_leaves_work_only_for_rows_that_are_not_done():
    lengths = Lengths((2, 8), (0.75, 0.25))
    work = Work("g", "generate", "actor", 64, max_new=8, responses=lengths, compactions=1)
    assert cost_generate.phases(work, 64) == [
        (1.0, 0.0, 2.0),
        (0.5, 2.0, pytest.approx(8.0, abs=1e-6)),
    ]
    plain = Work("g", "generate", "actor", 64, max_new=8, responses=lengths)
    assert cost_generate.phases(plain, 64) == [(1.0, 0.0, pytest.approx(8.0, abs=1e-6))]


def test_a_growing_cache_is_read_as_far_as_it_has_grown():
    work = Work("g", "generate", "actor", 4, prompt=10, max_new=8, growths=2)
    assert cost_generate._slots(work, 0, 8) == 10 + (4 + 8) / 2
    assert cost_generate._slots(work, 0, 6) == pytest.approx(10 + (4 * 4 + 2 * 8) / 6)
    assert cost_generate._slots(Work("g", "generate", "actor", 4, prompt=10, max_new=8), 0, 8) == 14


def test_a_window_of_all_layers_shortens_the_ring():
    """Rows of 8 tokens on 4 devices: of pieces of 2 a window of 3 reaches one back, not three."""

    def seconds(**window):
        role = Role(LM.replace(**window))
        p = Problem((ppo().work("ref_inf"),), {"ref": role})
        return parts(p, "ref_inf", on(0, 4, seq=4))["seq"]

    whole = seconds()
    assert whole > 0
    assert seconds(window=3, windowed=(True, True)) == pytest.approx(whole / 3)
    assert seconds(window=3, windowed=(True, False)) == whole
    assert seconds(window=8, windowed=(True, True)) == whole


def test_windows_shorten_attention():
    local = LM.replace(window=2, windowed=(True, False))
    p = Problem((ppo().work("ref_inf"),), {"ref": Role(local)})
    less = 4 * 2 * 2 * (4.5 - 2) * 8
    assert parts(p, "ref_inf", on(0, 1))["compute"] == pytest.approx(16 * (FORWARD - less) / 1e12)


def test_memory_of_a_trainer():
    p = ppo()
    n = params(LM)
    price = call_cost(p, p.work("actor_train"), on(0, 1), ROUND)
    assert price.static_bytes == pytest.approx(n * (4 + 8))
    assert price.active_bytes > n * 4
    half = call_cost(p, p.work("actor_train"), on(0, 2, fsdp=2), ROUND)
    assert half.static_bytes == pytest.approx(price.static_bytes / 2)
    zero = Problem(p.works, {**p.roles, "actor": Role(LM, 8, 4, zero=True)})
    split = call_cost(zero, p.work("actor_train"), on(0, 2), ROUND)
    assert split.static_bytes == pytest.approx(n * (4 + 4))
    less = call_cost(p, p.work("actor_train"), on(0, 1, microbatches=4), ROUND)
    assert less.active_bytes < price.active_bytes + n * 4


def test_the_cache_is_the_generators_memory():
    big = ppo(rows=1024)
    price = call_cost(big, big.work("actor_gen"), on(0, 1), ROUND)
    cache = 2 * 1024 * 8 * 2 * 1 * 2 * 4
    assert price.active_bytes >= cache
    assert price.static_bytes == pytest.approx(params(LM) * 4)


def test_offloaded_weights_come_in_behind_the_computing():
    p = ppo()
    rested = on(0, 1, offload="params")
    price = call_cost(p, p.work("ref_inf"), rested, ROUND)
    assert price.static_bytes == 0
    way = params(LM) * 4 / 1e9
    computing = 16 * FORWARD / 1e12
    assert price.parts["offload"] == pytest.approx(way / 2 + max(0, way / 2 - computing))
    opt = call_cost(p, p.work("actor_train"), on(0, 1, offload="opt"), ROUND)
    assert opt.static_bytes == pytest.approx(params(LM) * 4)
    assert opt.seconds > call_cost(p, p.work("actor_train"), on(0, 1), ROUND).seconds


FASTER = (
    "flops_per_s", "flops32_per_s", "memory_bytes_per_s", "link_bytes_per_s", "nic_bytes_per_s",
    "host_bytes_per_s",
)  # fmt: skip
SLOWER = ("link_latency", "nic_latency", "launch", "layer_seconds", "stage_seconds")


def random_placement(rng, devices=8):
    count = rng.choice([n for n in (1, 2, 4, 8) if n <= devices])
    start = rng.choice(range(0, devices - count + 1, count))
    axes, left = {}, count
    for axis in rng.sample(["stage", "fsdp", "tensor", "data"], 4):
        n = rng.choice([k for k in (1, 2, 4, 8) if left % k == 0])
        axes[axis], left = n, left // n
    axes["data"] *= left
    return on(start, count, microbatches=rng.choice([1, 2, 4]), **axes)


@pytest.mark.parametrize("call", ["actor_gen", "ref_inf", "critic_inf", "actor_train"])
def test_better_hardware_is_never_slower(call):
    p, rng = ppo(rows=64), random.Random(0)
    base = ROUND.with_(
        memory_bytes_per_s=1e10, link_latency=1e-6, nic_latency=1e-6, layer_seconds=1e-7,
        stage_seconds=1e-7, overlap=0.5,
    )  # fmt: skip
    for _ in range(40):
        where = random_placement(rng)
        now = call_cost(p, p.work(call), where, base).seconds
        for name in FASTER:
            better = base.with_(**{name: 2 * getattr(base, name)})
            assert call_cost(p, p.work(call), where, better).seconds <= now * (1 + 1e-12)
        for name in SLOWER:
            worse = base.with_(**{name: 2 * getattr(base, name) + 1e-9})
            assert call_cost(p, p.work(call), where, worse).seconds >= now * (1 - 1e-12)


def test_corrections_multiply():
    p = ppo()
    plain = call_cost(p, p.work("ref_inf"), on(0, 1), ROUND)
    c = Corrections({"ref_inf": 3.0})
    found = call_cost(p, p.work("ref_inf"), on(0, 1), ROUND, c)
    assert found.seconds == pytest.approx(3 * plain.seconds) == sum(found.parts.values())
    assert found.active_bytes == plain.active_bytes
    c = Corrections({"a": 2.0, "*move": 0.5})
    assert c.edge("x->y", "move") == 0.5 and c.edge("x->y", "realloc") == 1.0


# Reallocation


def cells(p, ways):
    """What each device holds, as sets of unit cells of a grid of stage, fsdp and tensor."""
    out = {}
    sizes = (p.stage, p.data, p.fsdp, p.seq, p.tensor)
    for d, index in zip(p.devices, itertools.product(*map(range, sizes)), strict=True):
        at = (index[0], index[2], index[4])
        ranges = [
            range(i * w // n, (i + 1) * w // n)
            for i, n, w in zip(at, (p.stage, p.fsdp, p.tensor), ways, strict=True)
        ]
        out[d] = set(itertools.product(*ranges))
    return out


def moved_slowly(a, b, domain):
    """`transfer.moved` with sets."""
    ways = (8, 8, 8)
    total = 8.0**3
    have, need = cells(a, ways), cells(b, ways)
    received = max(len(need[d] - have.get(d, set())) for d in need) / total
    union = lambda held, h: set().union(*(s for d, s in held.items() if d // domain == h))  # noqa: E731
    hosts = {d // domain for d in need}
    imported = max(len(union(need, h) - union(have, h)) for h in hosts) / total
    homes = {d // domain for d in have}
    far = set().union(*(s for d, s in need.items() if d // domain not in homes), set())
    return received, imported, len(far) / total


def test_moved_bytes_are_those_of_sets():
    rng = random.Random(1)
    for _ in range(150):
        a, b = random_placement(rng), random_placement(rng)
        if rng.random() < 0.3:
            a = Placement(tuple(rng.sample(a.devices, len(a.devices))), **a.axes)
        found = transfer.moved(a, b, 4)
        assert found[:3] == pytest.approx(moved_slowly(a, b, 4)), (a, b)


def test_reallocation_costs_what_its_slowest_part_does():
    p = ppo()
    size = params(LM) * 4
    same = on(0, 4, fsdp=4)
    assert transfer.realloc_cost(p, "actor", same, on(0, 4, fsdp=4, microbatches=2), ROUND) == 0
    assert transfer.realloc_cost(p, "actor", same, on(0, 4), ROUND) == pytest.approx(
        3 / 4 * size / 1e9
    )
    # To the other host: four cards carry it out and in once, links carry a whole copy each.
    far = transfer.realloc_cost(p, "actor", same, on(4, 4), ROUND)
    assert far == pytest.approx(max(size / 1e9, size / (4 * 1e8)))
    back = transfer.realloc_cost(p, "actor", on(4, 4), same, ROUND.with_(move_seconds=1.0))
    assert back == pytest.approx(1.0 + max(size / 4 / 1e9, size / (4 * 1e8)))
    assert transfer.realloc_bytes(p, "actor", same, same) == 0
    assert transfer.realloc_bytes(p, "actor", same, on(0, 4)) == pytest.approx(2 * size)


@pytest.mark.parametrize(("weights", "ratio"), [("int8", 66 / 256), ("int4", 34 / 256)])
def test_rounded_weights_cost_their_codes(weights, ratio):
    p, same, far = ppo(), on(0, 4, fsdp=4), on(4, 4)
    size = params(LM) * 4
    for target in (far, on(0, 4)):
        whole = transfer.realloc_cost(p, "actor", same, target, ROUND)
        found = transfer.realloc_cost(p, "actor", same, target, ROUND, weights=weights)
        assert found == pytest.approx(ratio * whole)
    codes = ratio * size  # held until they are decoded, also at home
    assert transfer.realloc_cost(p, "actor", far, far, ROUND, weights=weights) == 0
    assert transfer.realloc_bytes(p, "actor", far, far, weights=weights) == pytest.approx(codes)
    found = transfer.realloc_bytes(p, "actor", same, far, weights=weights)
    assert found == pytest.approx(3 * codes)


def test_copies_may_lie_in_data_or_seq():
    assert transfer.layout(on(0, 8, data=4, tensor=2)) == transfer.layout(
        on(0, 8, data=2, seq=2, tensor=2)
    )
    assert transfer.layout(on(0, 8, data=4, fsdp=2)) != transfer.layout(
        on(0, 8, fsdp=2, seq=4, data=1)
    )
    assert transfer.layout(on(0, 4)) != transfer.layout(on(4, 4))


def test_transfers_cost_the_slower_wire():
    a, b, far = on(0, 2), on(2, 2), on(4, 2)
    assert transfer.move_cost(1000.0, a, on(0, 2), ROUND) == 0
    assert transfer.move_cost(1000.0, a, b, ROUND) == pytest.approx(500 / 1e9)
    assert transfer.move_cost(1000.0, a, far, ROUND) == pytest.approx(500 / 1e8)
    assert not transfer.crosses(a, b, ROUND) and transfer.crosses(a, far, ROUND)


def test_fewer_devices_of_a_shared_machine_work_faster_each():
    shared = ROUND.with_(per_host=8, domain=8, shared_compute=1.0)
    p = ppo()
    one, eight = (parts(p, "ref_inf", on(0, n), shared)["compute"] for n in (1, 8))
    assert one == pytest.approx(eight)
    half = ROUND.with_(per_host=8, domain=8, shared_compute=0.5)
    assert half.demand(2) == pytest.approx(0.25 + 0.75 * 0.5)
    assert parts(p, "ref_inf", on(0, 8), half)["compute"] == pytest.approx(eight)

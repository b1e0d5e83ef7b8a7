"""Train calls that send their model between nodes: which plans they can have, and what is sent."""

import dataclasses

import pytest
from steps import ppo as real_ppo
from workload import LM, ROUND, on, ppo

from jaxrl_eff.parallel.zero.levels import LADDER, zero_level
from jaxrl_eff.planner import clusters, space, zero_advice
from jaxrl_eff.planner.cost import call_cost
from jaxrl_eff.planner.problem import Nodes
from jaxrl_eff.planner.search import search
from jaxrl_eff.planner.shares import params


def sending(step, name="exact", count=2, **how):
    """The step with its trained models sent between nodes."""
    nodes = Nodes(count, zero_level(name), **how)
    roles = {
        k: dataclasses.replace(r, nodes=nodes) if r.grad_bytes else r for k, r in step.roles.items()
    }
    return dataclasses.replace(step, roles=roles)


def cost(step, where, cluster=ROUND):
    return call_cost(step, step.work("actor_train"), where, cluster)


def test_train_calls_have_nodes_and_other_calls_have_none():
    step, cluster = sending(real_ppo(), count=4), clusters.parse("h100:4x8")
    for work in step.works:
        if work.model is None:
            continue
        found = space.candidates(
            step, work, cluster, lambda w, where: call_cost(step, w, where, cluster), smallest=4
        )
        for c in (c for cs in found.values() for c in cs):
            place = c.at(0)
            assert place.dcn == (4 if work.kind == "train" else 1)
            assert 4096 % place.weight_shards == 0 and work.rows % place.row_shards == 0


def test_what_is_trained_in_entries_is_not_sharded_over_tensor():
    nodes = Nodes(2, zero_level("int8"), partly=True, tensor=False)
    assert {s.tensor for s in space.strategies(16, nodes=nodes)} == {1}
    assert space.strategies(9, nodes=nodes) == ()
    assert {s.seq for s in space.strategies(16, nodes=nodes, length=4096)} > {1}


@pytest.mark.parametrize("level", [level.name for level in LADDER])
def test_a_model_crosses_the_slow_axis_as_often_as_the_advice_says(level):
    """Two nodes of one device: half of each collective's bytes over a link."""
    found = cost(sending(ppo(), level), on(0, 2, dcn=2)).parts["data"]
    passes = zero_advice.volume(zero_level(level))
    assert found == pytest.approx(passes * 2 * params(LM) / 2 / 1e9)


def test_devices_of_a_node_gather_all_of_the_model_for_every_microbatch():
    n, step = params(LM), sending(ppo(), "int8")
    slow = 2 * n / 2 / 2 / 1e8  # codes of weights and gradients of half a node each, over a card
    fast = (2 * n + 4 * n) / 2 / 1e9
    for m in (1, 2):
        where = on(2, 4, dcn=2, fsdp=2, microbatches=m)
        assert cost(step, where).parts["data"] == pytest.approx(slow + m * fast)
    copies = cost(step, on(0, 8, dcn=2, data=2, fsdp=2)).parts["data"]
    assert copies == pytest.approx(slow + fast + 2 * 4 * n / 2 / 2 / 1e9)


def test_frozen_weights_are_in_every_node_and_only_adapters_are_sent():
    n, where = params(LM), on(0, 2, dcn=2)
    step = sending(ppo(), "int4_delta", frozen=True, partly=True)
    role = dataclasses.replace(step.roles["actor"], grad_bytes=0.1, opt_bytes=0.0)
    step = dataclasses.replace(step, roles={**step.roles, "actor": role})
    found = cost(step, where)
    assert found.parts["data"] == pytest.approx(2 * 0.1 * n / 2 / 1e9)
    assert found.static_bytes == pytest.approx(4 * n)  # all parameters, in float32


def test_copies_of_weights_and_residuals_take_memory():
    plain, fed, held = (
        cost(sending(ppo(), name), on(0, 4, dcn=2, fsdp=2)).static_bytes
        for name in ("int8", "int4", "int4_delta")
    )
    assert fed - plain == pytest.approx(4 * params(LM) / 2)
    assert held - fed == pytest.approx(2 * params(LM) / 2)


def test_a_searched_plan_has_the_nodes():
    step, cluster = sending(real_ppo(), "int4"), clusters.parse("h100:2x8")
    found = search(step, cluster, evaluations=300)
    for work in step.works:
        if work.model is not None:
            assert found.plan[work.name].dcn == (2 if work.kind == "train" else 1)
    slow = cluster.with_(nic_bytes_per_s=cluster.nic_bytes_per_s / 100)
    exact, int4 = (
        search(sending(real_ppo(), name), slow, evaluations=100, smallest=16).schedule.seconds
        for name in ("exact", "int4")
    )
    assert int4 < exact

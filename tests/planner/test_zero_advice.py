"""When sending less between nodes pays: published figures, limits, and the command's words."""

import pytest
from steps import ppo

from jaxrl_eff.parallel.zero.levels import zero_level
from jaxrl_eff.planner import clusters, zero_advice


def v100(links):
    """24 DGX-2 with so many links of 100 Gb/s: ZeRO++'s machine, at the 50 TFLOP/s it reached."""
    return clusters.parse("a100:24x8").with_(
        devices=384, per_host=16, domain=16, flops_per_s=50e12, train_efficiency=1.0,
        nic_bytes_per_s=links * 12.5e9 / 16, nic_efficiency=1.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "passes"),
    [("exact", 3), ("int8", 1), ("int4", 0.75), ("qgz", 0.75), ("int4_delta", 0.5)],
)
def test_volumes_are_those_of_the_ladder(name, passes):
    assert zero_advice.volume(zero_level(name)) == passes


def test_one_slow_link_a_node_needs_4000_tokens_and_four_a_thousand():
    """Published: 2.2 times faster with 1,024 tokens over one link, 1.8 to 1.9 with 2,048."""
    one, four = (zero_advice.break_even(v100(n), zero_level("exact")) for n in (1, 4))
    assert one == pytest.approx(4000, rel=0.05) and four == pytest.approx(one / 4)
    assert zero_advice.break_even(v100(1), zero_level("qgz")) == pytest.approx(one / 4)
    assert zero_advice.break_even(v100(1), zero_level("exact"), passes=4) == pytest.approx(
        0.75 * one
    )


def test_faster_networks_and_fewer_nodes_need_less():
    two, many = (clusters.parse(f"h100:{n}x8") for n in (2, 64))
    assert zero_advice.break_even(two, zero_level("exact")) < zero_advice.break_even(
        many, zero_level("exact")
    )
    assert zero_advice.break_even(clusters.parse("h100:8"), zero_level("exact")) == 0


def test_advice_says_when_not_to():
    step, cluster = ppo(), clusters.parse("h100:2x8")
    told = zero_advice.advice(step, cluster)
    assert [a.call for a in told] == ["actor_train", "critic_train"]
    assert {a.tokens for a in told} == {512 * 512 / 4 / 16}
    slow = {a.call: a for a in zero_advice.advice(step, cluster.with_(nic_bytes_per_s=1e8))}
    assert "zero.name=" in slow["actor_train"].text()
    assert slow["actor_train"].gain["int4"] > slow["actor_train"].gain["int8"] > 1
    fast = {a.call: a for a in zero_advice.advice(step, cluster.with_(nic_bytes_per_s=1e13))}
    assert fast["actor_train"].text().endswith("send exactly")
    assert max(fast["actor_train"].gain.values()) == 1
    assert zero_advice.advice(step, clusters.parse("h100:8")) == []

"""Clusters by name, and the one at hand."""

import jax
import pytest

from jaxrl_eff.planner import clusters


@pytest.mark.parametrize(
    ("text", "devices", "per_host", "domain"),
    [
        ("h100:8", 8, 8, 8),
        ("h100:16x8", 128, 8, 8),
        ("A100:2x4", 8, 4, 4),
        ("b200:1x1", 1, 1, 1),
        ("v5p:4x4x4", 64, 4, 64),
        ("v5e:16", 16, 4, 16),
        ("v6e:2*4x4", 32, 4, 16),
    ],
)
def test_names_of_clusters(text, devices, per_host, domain):
    c = clusters.parse(text)
    assert (c.devices, c.per_host, c.domain) == (devices, per_host, domain)
    assert c.hosts == devices // per_host


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("h300:8", "unknown hardware 'h300'"),
        ("h100", "sizes are missing or wrong"),
        ("h100:8x", "sizes are missing or wrong"),
        ("h100:16", "at most 8 GPUs; write h100:2x8"),
        ("h100:2x2x2", "GPUs are hosts x GPUs of a host"),
        ("h100:2*8", "GPUs are hosts x GPUs of a host"),
        ("h100:0x8", "at least 1"),
        ("v5e:16x32", "up to 256"),
        ("v5e:2x2x2", "fewer dimensions"),
        ("v4:9", "by 4"),
        ("local:8", "without sizes"),
    ],
)
def test_what_is_no_cluster_is_refused(text, said):
    with pytest.raises(ValueError, match="cluster") as error:
        clusters.parse(text)
    assert said in str(error.value)


def test_every_name_of_the_table_is_a_cluster():
    for name in clusters.NAMES:
        if name != "local":
            c = clusters.parse(f"{name}:8")
            assert c.peak(2) >= c.peak(4) > 1e12 > c.nic_bytes_per_s
            assert c.memory_bytes < 200 * clusters.GIB


def test_devices_must_fill_their_hosts():
    with pytest.raises(ValueError, match="10 devices cannot be in hosts of 4"):
        clusters.parse("h100:8").with_(devices=10, per_host=4)


def test_the_cpu_at_hand_is_measured():
    c = clusters.local()
    assert c is clusters.parse("local")
    assert c.devices == c.per_host == jax.device_count()
    assert 0 < c.shared_compute <= 1
    assert 1e8 < c.flops_per_s < 1e13 and 1e7 < c.memory_bytes_per_s < 1e13
    assert 0 < c.train_efficiency <= 1

"""Bytes counted on jaxprs."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zero_layers
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from launch import ROOT

from jaxrl_eff.parallel import jaxpr_bytes
from jaxrl_eff.parallel.codec import Blocks
from jaxrl_eff.parallel.zero.levels import ZeroConfig, ZeroLevel, zero_level

SIZES = {"dcn": 2, "ici": 4}
BOTH = ("dcn", "ici")
B = 8 * 4  # bytes of a device's operand


def counted(fn, dtype=jnp.float32, check_vma=False):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), BOTH)
    fn = jax.shard_map(fn, mesh=mesh, in_specs=P(BOTH), out_specs=P(BOTH), check_vma=check_vma)
    return jaxpr_bytes.count(jax.make_jaxpr(fn)(jnp.zeros((64,), dtype)), SIZES)


def bytes_(dcn=0.0, ici=0.0):
    return {"dcn": dcn, "ici": ici}


@pytest.mark.parametrize(
    ("fn", "want"),
    [
        (lambda x: lax.all_gather(x, "ici"), bytes_(ici=3 * B)),
        (lambda x: lax.all_gather(x, "dcn"), bytes_(dcn=B)),
        (lambda x: lax.psum(x, "ici"), bytes_(ici=2 * B * 3 / 4)),
        (lambda x: lax.pmax(x, "ici"), bytes_(ici=2 * B * 3 / 4)),
        (lambda x: lax.psum_scatter(x, "ici", tiled=True), bytes_(ici=B * 3 / 4)),
        (lambda x: lax.all_to_all(x, "ici", 0, 0, tiled=True), bytes_(ici=B * 3 / 4)),
        (lambda x: lax.ppermute(x, "ici", [(0, 1), (2, 2)]), bytes_(ici=B)),
        (lambda x: lax.ppermute(x, "ici", [(2, 2)]), bytes_()),
        # Of seven others four are on the other node.
        (lambda x: lax.all_gather(x, BOTH), bytes_(4 * B, 3 * B)),
        (lambda x: lax.psum(x, BOTH), bytes_(2 * B * 4 / 8, 2 * B * 3 / 8)),
        (lambda x: lax.ppermute(x, BOTH, [(0, 1), (1, 4)]), bytes_(B, B)),
        (lambda x: lax.psum(x, "ici", axis_index_groups=[[0, 1], [2, 3]]), bytes_(ici=B)),
        (lambda x: x + lax.axis_index("ici").astype(x.dtype), bytes_()),
    ],
)
def test_one_collective(fn, want):
    assert counted(fn) == want


def test_narrow_numbers_count_as_what_they_are():
    assert counted(lambda x: lax.psum(x, "ici"), jnp.bfloat16) == bytes_(ici=B * 3 / 4)
    assert counted(lambda x: lax.psum(x, "ici"), check_vma=True) == bytes_(ici=2 * B * 3 / 4)


def one(x):
    return lax.ppermute(x, "ici", [(0, 1)])


@jax.custom_vjp
def backward_sends_twice(x):
    return one(x)


backward_sends_twice.defvjp(lambda x: (one(x), None), lambda _, g: (one(one(g)),))


@pytest.mark.parametrize(
    ("fn", "times"),
    [
        (lambda x: lax.scan(lambda y, _: (one(y), None), x, None, length=5)[0], 5),
        (lambda x: lax.fori_loop(0, 3, lambda _, y: one(one(y)), x), 6),
        (lambda x: lax.cond(x[0] > 0, lambda y: one(one(y)), one, x), 2),
        (jax.jit(one), 1),
        (backward_sends_twice, 1),
        (jax.grad(lambda x: backward_sends_twice(x).sum()), 3),
        # Recomputed backward: the first permutation again, and the transposes of both.
        (jax.grad(jax.checkpoint(lambda x: one(jnp.sin(one(x))).sum())), 2 + 1 + 2),
    ],
)
def test_programs_count_as_often_as_they_run(fn, times):
    assert counted(fn) == bytes_(ici=times * B)


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="unknown length"):
        counted(lambda x: lax.while_loop(lambda y: y[0] > 0, one, x))
    assert counted(lambda x: lax.while_loop(lambda y: y[0] > 0, lambda y: y - 1, x)) == bytes_()
    jaxpr = jax.make_jaxpr(lambda x: lax.psum(x, "other"), axis_env=[("other", 2)])(1.0)
    with pytest.raises(ValueError, match="unknown axis 'other'"):
        jaxpr_bytes.count(jaxpr, SIZES)


def test_a_contract_allows_two_percent():
    assert jaxpr_bytes.contract(bytes_(102.0, 50), bytes_(100.0, 100)) == bytes_(1.02, 0.5)
    with pytest.raises(ValueError, match="'dcn' carries 103 bytes"):
        jaxpr_bytes.contract(bytes_(103.0), bytes_(100.0))
    with pytest.raises(ValueError, match="'ici'"):
        jaxpr_bytes.contract(bytes_(ici=1.0), bytes_())


def test_closed_forms():
    """2 nodes of 4 devices, shards of 512 elements: by hand, from the paper's table."""
    plain = zero_layers.expected(ZeroConfig(ZeroLevel("", 16, 16, slow_only=False)), 512, 2, 4)
    assert plain == bytes_(3 * 1024, 3 * 3 * 2 * 1024)
    zero = zero_layers.expected(
        ZeroConfig(zero_level("qgz"), block=512), 512, 2, 4, weights=3, batches=2
    )
    assert zero == bytes_(6 * (514 + 258), 6 * 3 * 2 * (2 * 514 + 258))
    deltas = zero_layers.expected(
        ZeroConfig(ZeroLevel("", 16, 4), block=512),
        512,
        2,
        4,
        batches=2,
        hoisted=True,
        deltas=Blocks(4, 512),
    )
    assert deltas == bytes_(258 + 258, 2 * 3 * 2 * (2 * 1024 + 2048))


def test_the_table_of_volumes_holds():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.zeropp.volumes"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| hoisted, deltas | 0.1250 |" in done.stdout

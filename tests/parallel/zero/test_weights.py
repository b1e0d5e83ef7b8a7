"""Shards of matrices as flat vectors and back, against slices of the whole."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxrl_eff.parallel import jaxpr_bytes
from jaxrl_eff.parallel.zero.levels import ZeroConfig, ZeroLevel
from jaxrl_eff.parallel.zero.weights import NodeWeight, ShardedWeight, ShardLayout

NODES, DEVICES, LAYERS = 2, 4, 3
PLAN = ZeroConfig(ZeroLevel("exact", 32, 32, secondary=True), slow="dcn", fast="fsdp")
# Of a whole weight of one layer, its split axis, and axes that are kept apart.
WEIGHTS = [((16, 3, 5), 0, ()), ((3, 5, 16), 2, ()), ((6, 16), 1, (0,)), ((4, 16, 2), 1, (0, 2))]


def cut(shape, axis, apart, **changes):
    own = list(shape)
    own[axis] //= NODES * DEVICES
    return ShardLayout(tuple(own), axis, PLAN, apart, **changes)


def on_devices(fn, *specs, out):
    mesh = Mesh(np.array(jax.devices()).reshape(NODES, DEVICES), ("dcn", "fsdp"))
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False))


def spec(shape, axis, lead=1):
    split = [None] * (lead + len(shape))
    split[lead + axis] = ("dcn", "fsdp")
    return P(*split)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("shape", "axis", "apart"), WEIGHTS)
def test_flat_shards_one_after_the_other_are_the_whole(shape, axis, apart):
    one, w = cut(shape, axis, apart), numbers(LAYERS, *shape)
    parts = np.split(w, NODES * DEVICES, axis=1 + axis)
    flat = [np.asarray(one.flat(jnp.asarray(p))) for p in parts]
    assert flat[0].shape == (LAYERS, *(shape[i] for i in apart), one.m)
    np.testing.assert_array_equal(np.concatenate(flat, -1), one.flat(jnp.asarray(w)))
    for x in (parts[1], w):
        np.testing.assert_array_equal(one.shaped(one.flat(jnp.asarray(x))), x)


@pytest.mark.parametrize(("shape", "axis", "apart"), WEIGHTS)
def test_what_is_left_over_lies_beside_the_axis_that_is_split(shape, axis, apart):
    one = cut(shape, axis, apart)
    parts = [numbers(LAYERS, *one.shape, seed=n) for n in range(NODES)]
    left = jnp.asarray(np.stack(parts, axis=1 + axis))
    flat = one.flat_by_node(left)
    for n, part in enumerate(parts):
        np.testing.assert_array_equal(flat[..., n, :], one.flat(jnp.asarray(part)))
    np.testing.assert_array_equal(one.shaped_left(flat), left)


@pytest.mark.parametrize(("shape", "axis", "apart"), WEIGHTS)
def test_what_a_node_holds_is_the_weight_once_differences_were_sent(shape, axis, apart):
    rung = ZeroLevel("differences", 32, 32, delta_bits=32)
    one = dataclasses.replace(cut(shape, axis, apart), plan=dataclasses.replace(PLAN, rung=rung))
    w, old = numbers(LAYERS, *shape), numbers(LAYERS, *shape, seed=1)
    sizes = (LAYERS, *shape[:axis], NODES, shape[axis] // NODES, *shape[axis + 1 :])
    part = [None] * len(sizes)
    part[2 + axis] = "fsdp"

    def run(x, held):
        new = one.renewed(x, held)
        late = [NodeWeight(stage, None, one).materialize() for stage in one.near(x, new)]
        return new, one.gathered(x, new), jnp.stack(late)

    held, *got = on_devices(run, spec(shape, axis), P(*part), out=(P(*part), P(), P()))(
        w, old.reshape(sizes)
    )
    np.testing.assert_allclose(np.asarray(held).reshape(w.shape), w, rtol=1e-6, atol=1e-6)
    for x in got:
        np.testing.assert_array_equal(x, np.asarray(held).reshape(w.shape))


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize(("shape", "axis", "apart"), WEIGHTS)
def test_every_way_to_gather_gives_the_whole(shape, axis, apart, raw):
    one, w = cut(shape, axis, apart, raw=raw), numbers(LAYERS, *shape)

    def run(x):
        late = [ShardedWeight(layer, None, one, trained=False).materialize() for layer in x]
        held = [NodeWeight(stage, None, one).materialize() for stage in one.near(x)]
        return one.gathered(x), jnp.stack(late), jnp.stack(held)

    for got in on_devices(run, spec(shape, axis), out=P())(w):
        np.testing.assert_array_equal(got, w)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize(("shape", "axis", "apart"), WEIGHTS)
def test_what_every_node_has_is_gathered_within_it(shape, axis, apart, raw):
    own = list(shape)
    own[axis] //= DEVICES
    one, w = ShardLayout(tuple(own), axis, PLAN, apart, raw, local=True), numbers(LAYERS, *shape)
    part = [None] * (1 + len(shape))
    part[1 + axis] = "fsdp"

    def run(x):
        late = [ShardedWeight(layer, None, one, trained=False).materialize() for layer in x]
        held = [NodeWeight(stage, None, one).materialize() for stage in one.near(x)]
        return one.gathered(x), jnp.stack(late), jnp.stack(held)

    program = on_devices(run, P(*part), out=P())
    for got in program(w):
        np.testing.assert_array_equal(got, w)
    assert (
        jaxpr_bytes.count(jax.make_jaxpr(program)(w), {"dcn": NODES, "fsdp": DEVICES})["dcn"] == 0
    )


@pytest.mark.parametrize(("shape", "axis", "apart"), WEIGHTS)
def test_gradients_are_sums_over_devices_wherever_they_are_reduced(shape, axis, apart):
    one, w, x = cut(shape, axis, apart), numbers(*shape), numbers(8, *shape, seed=1)

    def run(shard, x):
        late = jax.grad(
            lambda s: jnp.sum(ShardedWeight(s, None, one, trained=True).materialize() * x[0])
        )(shard)
        slot = jnp.zeros((*(one.shape[i] for i in apart), NODES, one.m))
        held = functools.partial(NodeWeight, one.near(shard), cut=one)
        slot = jax.grad(lambda slot: jnp.sum(held(slot=slot).materialize() * x[0]))(slot)
        return late, one.reduced(x[0], None)[0], one.reduced_slow(slot, None)[0]

    part = spec(shape, axis, lead=0)
    for got in on_devices(run, part, P(("dcn", "fsdp")), out=part)(w, x):
        np.testing.assert_allclose(got, x.sum(0), rtol=1e-5, atol=1e-5)

"""Weights gathered and gradients reduced over two mesh axes, against one device."""

import dataclasses
import functools

import hlo_bytes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zero_layers
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxrl_eff.parallel import jaxpr_bytes
from jaxrl_eff.parallel.codec import Blocks, decode, encode
from jaxrl_eff.parallel.zero import collectives
from jaxrl_eff.parallel.zero.levels import LADDER, ZeroConfig, ZeroLevel, zero_level

BOTH = ("dcn", "ici")
LAYERS, WIDTH = 2, 16
M = WIDTH * WIDTH // 8
EXACT = ZeroConfig(ZeroLevel("exact", 32, 32))
SIZES = {"dcn": 2, "ici": 4}


def mapped(fn, specs, out, *, shape=(2, 4), **options):
    mesh = Mesh(np.array(jax.devices()).reshape(shape), BOTH)
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=out, **options))


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@jax.jit(static_argnums=1)
def _rounded(x, blocks):
    return decode(encode(x, blocks), x.shape[-1], blocks, jnp.float32)


def rounded(x, blocks):
    return np.asarray(_rounded(x, blocks))


def layer(w, x):
    return jnp.tanh(x @ w.reshape(WIDTH, WIDTH))


def loss(plan, shards, feedback, x):
    def body(x, layers):
        shard, feedback = layers
        return zero_layers.sharded_apply(layer, shard, x, plan, feedback=feedback), None

    return jnp.sum(lax.scan(body, x, (shards, feedback))[0] ** 2)


def whole_loss(ws, x):
    for w in ws:
        x = layer(w, x)
    return jnp.sum(x**2)


SHARDS, FEEDBACK, ROWS = P(None, BOTH), P(None, None, BOTH), P(BOTH)
WS, XS = numbers(LAYERS, 8 * M, seed=1) / 4, numbers(16, WIDTH, seed=2)


def gradients(plan, ws, x):
    """Of the shards, by `sharded_apply`; without feedback."""
    fn = mapped(
        lambda s, x: jax.grad(loss, 1)(plan, s, None, x), (SHARDS, ROWS), SHARDS, check_vma=True
    )
    return np.asarray(fn(ws, x))


@pytest.mark.parametrize("shape", [(2, 4), (4, 2)])
@pytest.mark.parametrize("secondary", [False, True])
def test_without_rounding_training_is_that_of_one_device(shape, secondary):
    plan = ZeroConfig(ZeroLevel("exact", 32, 32, secondary=secondary))
    step = mapped(
        lambda s, x: s - 0.01 * jax.grad(loss, 1)(plan, s, None, x),
        (SHARDS, ROWS), SHARDS, shape=shape,
    )  # fmt: skip
    one = jax.jit(lambda ws, x: ws - 0.01 * jax.grad(whole_loss)(ws, x))
    got, want = WS, WS
    for k in range(3):
        x = numbers(16, WIDTH, seed=k)
        got, want = step(got, x), one(want, x)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert np.abs(want - WS).max() > 1e-2


def naive(w):
    """Rounding of one block that is differentiated as it is written."""
    scale = jnp.max(jnp.abs(w)) / 127
    return jnp.round(w / scale) * scale


def test_gradients_pass_straight_through_the_rounding():
    """Differentiating through the rounding reaches one weight of a block."""
    plan = ZeroConfig(ZeroLevel("rough weights", 8, 32), block=M)
    w = numbers(M, seed=3)
    reached = jax.grad(lambda w: jnp.sum(naive(w) * numbers(M)))(w)
    assert np.count_nonzero(reached) == 1
    received = rounded(WS.reshape(LAYERS, 8, M), Blocks(8, M)).reshape(WS.shape)
    assert not np.array_equal(received, WS)
    got = gradients(plan, WS, XS)
    np.testing.assert_allclose(got, jax.grad(whole_loss)(received, XS), atol=1e-4)
    assert np.count_nonzero(got) == got.size


@pytest.mark.parametrize(("bits", "near"), [(32, 1e-6), (16, 3e-2)])
def test_slow_traffic_may_be_hoisted_out_of_microbatches(bits, near):
    plan = ZeroConfig(
        ZeroLevel("hoisted", bits, bits), dtype="float32" if bits == 32 else "bfloat16"
    )

    def fn(shards, x):
        stage = jnp.moveaxis(collectives.gather_slow(shards, plan), 0, 1)
        slot = jnp.zeros((LAYERS, 2, M))

        def one(slot, x):
            def body(x, layers):
                return zero_layers.held_apply(layer, *layers, x, plan), None

            y = lax.scan(body, x[None].astype(plan.dtype), (stage, slot))[0]
            return jnp.sum(y.astype(jnp.float32) ** 2)

        def batch(total, x):
            return total + jax.grad(one)(slot, x), None

        return collectives.reduce_slow(lax.scan(batch, slot, x)[0], None, plan)[0]

    got = mapped(fn, (SHARDS, ROWS), SHARDS, check_vma=False)(WS, XS)
    want = jax.grad(whole_loss)(WS, XS)
    assert np.linalg.norm(got - want) < near * np.linalg.norm(want)


def test_a_layer_with_feedback_returns_the_next_feedback_as_its_gradient():
    plan = ZeroConfig(dataclasses.replace(zero_level("int4"), weight_bits=32), block=16)
    before = numbers(LAYERS, 2, 8 * M, seed=4) / 10

    def both(shards, feedback, x):
        def plain(w):
            w = jnp.moveaxis(lax.all_gather(w, BOTH), 0, 1).reshape(LAYERS, -1)
            return w, jax.grad(whole_loss)(w, x)

        by_hand = collectives.reduce_gradients(plain(shards)[1], feedback, plan)
        return jax.grad(loss, (1, 2))(plan, shards, feedback, x), by_hand

    out = (SHARDS, FEEDBACK)
    got, want = mapped(both, (SHARDS, FEEDBACK, ROWS), (out, out))(WS, before, XS)
    # A number between two codes may fall either way: the sums differ in their last bits.
    for g, w in zip(got, want, strict=True):
        assert np.mean(np.abs(g - w) > 1e-5) < 0.01
    assert np.abs(got[1] - before).max() > 0.05


def reduced(g, plan, shape):
    """Slow twin: g [W, W m] of all devices -> [W m]; a device's own part stays exact."""
    nodes, devices = shape
    g = g.reshape(nodes, devices, nodes, devices, -1)
    near = np.zeros((nodes, devices, nodes, g.shape[-1]), np.float32)
    for d, i, j in np.ndindex(nodes, devices, devices):
        part = g[d, j, :, i]
        near[d, i] += part if i == j or plan.rung.slow_only else rounded(part, plan.fast_gradients)
    out = np.zeros((nodes, devices, g.shape[-1]), np.float32)
    for d, i, e in np.ndindex(nodes, devices, nodes):
        out[d, i] += near[d, i, d] if d == e else rounded(near[e, i, d], plan.gradients)
    return out.reshape(-1)


@functools.cache
def reducing(plan, shape):
    def fn(g, feedback):
        return collectives.reduce_gradients(g[0], feedback, plan)

    some = P(None, BOTH) if plan.rung.feedback else None
    return mapped(fn, (P(BOTH), some), (P(BOTH), some), shape=shape)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("exact", (2, 4)), ("int8", (4, 2)), ("qgz", (2, 4)), ("qgz", (8, 1)), ("qgz", (1, 8))],
)
def test_reductions_are_those_of_the_slow_twin(name, shape):
    plan = ZeroConfig(zero_level(name), block=16)
    g = numbers(8, 8 * 37)
    got, _ = reducing(plan, shape)(g, None)
    want = reduced(g, plan, shape)
    assert np.mean(np.abs(got - want) > 1e-5) < 0.01
    off = np.linalg.norm(want - g.sum(0)) / np.linalg.norm(g.sum(0))
    assert off < {"exact": 3e-3, "int8": 1e-2, "qgz": 0.2}[name]


def test_rounding_once_is_better_than_twice():
    g = numbers(8, 8 * 256)
    exact = g.sum(0)
    plans = [ZeroConfig(ZeroLevel("", 8, 4, slow_only=s), block=64) for s in (True, False)]
    once, twice = (np.linalg.norm(reducing(p, (2, 4))(g, None)[0] - exact) for p in plans)
    assert once < 0.8 * twice


def test_nothing_is_lost_with_feedback():
    """What arrived so far and what every sender still holds are all there was."""
    plan = ZeroConfig(zero_level("int4"), block=16)
    left, total, want = np.zeros((2, 8 * M), np.float32), 0, 0
    for k in range(20):
        g = numbers(8, 8 * M, seed=k) + 1
        arrived, left = reducing(plan, (2, 4))(g, left)
        total, want = total + np.asarray(arrived), want + g.sum(0)
    # [node that sent's target, node that sent, device, m] -> a shard of each target.
    rest = np.asarray(left).reshape(2, 2, 4, M).sum(1).reshape(-1)
    np.testing.assert_allclose(total + rest, want, rtol=1e-4)
    assert np.linalg.norm(rest) > 1e-3 * np.linalg.norm(want)


def test_a_gradient_that_is_not_finite_shows_and_is_forgotten():
    plan = ZeroConfig(zero_level("int4"), block=16)
    g = numbers(8, 8 * M)
    g[3, 40] = np.nan  # of the second shard
    arrived, left = reducing(plan, (2, 4))(g, np.zeros((2, 8 * M), np.float32))
    bad = np.isnan(np.asarray(arrived)).reshape(8, M).any(1)
    assert bad.tolist() == [k == 1 for k in range(8)]
    assert np.isfinite(left).all()


def test_all_nodes_hold_the_same_weights_after_many_deltas():
    deltas = Blocks(4, 16)

    def run(shard, steps):
        def body(held, step):
            shard, held = held
            shard = shard + step
            return (shard, collectives.send_deltas(shard, held, EXACT, deltas)), None

        held = zero_layers.refresh(shard, EXACT)
        (shard, held), _ = lax.scan(body, (shard, held), steps)
        return shard, held[None]

    steps = 1e-3 * numbers(50, 8 * M, seed=5)
    # [node that holds, node it is of, devices' parts]
    out = (P(BOTH), P("dcn", None, "ici"))
    shard, held = mapped(run, (P(BOTH), SHARDS), out, check_vma=False)(WS[0], steps)
    held = np.asarray(held)
    np.testing.assert_array_equal(held[0].view(np.uint32), held[1].view(np.uint32))

    @jax.jit
    def twin(w):
        """One sender and one receiver a shard."""

        def body(carry, step):
            w, r = carry
            w = w + step
            return (w, r + decode(encode(w - r, deltas), M, deltas, jnp.float32)), None

        parts = w.reshape(8, M)
        return lax.scan(body, (parts, parts), steps.reshape(50, 8, M))[0][1].reshape(2, 4 * M)

    np.testing.assert_allclose(held[0], twin(WS[0]), atol=1e-7)
    off = np.linalg.norm(held[0].reshape(-1) - shard) / np.linalg.norm(shard)
    assert 0 < off < 2e-3


@functools.cache
def lowered(name):
    """A step of four layers: with the gathers kept, the stage kept, or nothing."""
    plan = ZeroConfig(dataclasses.replace(zero_level("qgz"), secondary=name == "stage"))
    wide, rows = 4, P(BOTH)

    def fn(shards, x):
        def body(x, shard):
            if name == "all":
                return layer(collectives.gather_weights(shard, None, plan), x), None
            return zero_layers.sharded_apply(layer, shard, x, plan), None

        return jax.grad(lambda s: jnp.sum(lax.scan(body, x, s)[0]))(shards)

    args = jnp.zeros((wide, 8 * M)), jnp.zeros((8, WIDTH))
    step = mapped(fn, (SHARDS, rows), SHARDS, check_vma=False)
    return jax.make_jaxpr(step)(*args), step.lower(*args).compile(), plan, wide


def test_memory_of_a_kept_stage_lies_between_all_and_nothing():
    nothing, stage, all_ = (
        lowered(n)[1].memory_analysis().temp_size_in_bytes for n in ("nothing", "stage", "all")
    )
    assert nothing < stage < all_


@pytest.mark.parametrize("name", ["stage", "nothing"])
def test_compiled_programs_send_bytes_and_as_many_as_counted(name):
    jaxpr, compiled, plan, layers = lowered(name)
    assert {c.dtype for c in hlo_bytes.collectives(compiled)} == {"u8"}
    assert set(hlo_bytes.count([compiled])) == {"all-gather", "all-to-all"}
    counted = jaxpr_bytes.count(jaxpr, SIZES)
    assert hlo_bytes.received(compiled) == 8 * sum(counted.values())
    assert counted == zero_layers.expected(plan, M, 2, 4, weights=layers)


def test_a_ladder_of_names_and_what_is_refused():
    assert [zero_level(r.name) for r in LADDER] == list(LADDER)
    with pytest.raises(ValueError, match="exact"):
        zero_level("int3")
    with pytest.raises(ValueError, match="two mesh axes"):
        ZeroConfig(slow="x", fast="x")
    with pytest.raises(ValueError, match="float32"):
        ZeroConfig(dtype="float16")
    with pytest.raises(ValueError, match="delta_bits is 4 with weight_bits=8, but"):
        ZeroConfig(ZeroLevel("", 8, 4, delta_bits=4))

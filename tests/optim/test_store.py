"""Stores of 16-bit weights: what is applied is what was predicted, and nothing is lost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from programs import AS_SHIPPED

from jaxrl_eff import optim
from jaxrl_eff.optim import codecs, mcf

BF16 = jnp.bfloat16
LOSSLESS = ("bf16x2", "int16", "int8")


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def adversarial(n=200_000, seed=0):
    """Weights, and changes: tiny, tied, as large, cancelling, far larger; zeros in both."""
    rng = np.random.default_rng(seed)
    p = rng.normal(size=n) * 2.0 ** rng.integers(-20, 20, n)
    p = np.array(jnp.asarray(p, jnp.float32).astype(BF16).astype(jnp.float32))
    change = p * 2.0 ** rng.uniform(-30, 20, n) * rng.choice([-1, 1], n)
    change[: n // 8] = -p[: n // 8] * (1 + 2.0 ** rng.uniform(-30, -1, n // 8))
    change[n // 8 : n // 4] = p[n // 8 : n // 4] * 2.0**-8  # near half a unit in the last place
    p[-n // 16 :] = 0
    change[: n // 32] = 0
    return jnp.asarray(p).astype(BF16), jnp.asarray(change, jnp.float32)


@pytest.mark.parametrize("codec", list(codecs.WEIGHTS))
@pytest.mark.parametrize("together", [True, False])
def test_what_is_applied_is_what_was_predicted(codec, together):
    """hi + lo after the step is hi + lo before it plus the change, as well as the codec can say it.

    Were another hi applied than the state assumes, the sum would be off by a unit in its last
    place.
    """
    p, change = adversarial()
    tx = optim.store_weights(codec)
    state = tx.init(p)

    def step(p, state):
        u, state = tx.update(change, state, p)
        return (optax.apply_updates(p, u) if together else u), state

    new, after = jax.jit(step)(p, state)
    if not together:
        new = optax.apply_updates(p, new)  # op by op, outside any program
    want = np.float64(p.astype(jnp.float32)) + np.float64(change)
    if codec in LOSSLESS:
        got = np.float64(optim.full_precision_params(new, after))
        # float32's own rounding where a sum is stored in it; int8 keeps 16 significant bits.
        bits = {"bf16x2": 16, "int16": 24, "int8": 15}[codec]
        size = np.maximum(np.abs(want), np.abs(np.float64(change)) * 2.0**-8)
        if codec == "bf16x2":  # what is kept has 8 bits of its own, also after a cancellation
            size = np.maximum(np.abs(np.float64(p.astype(jnp.float32))), np.abs(want))
            size = np.maximum(size, np.abs(np.float64(change)))
        far = np.abs(np.float64(change)) > 2.0**15 * np.abs(np.float64(new.astype(jnp.float32)))
        assert (np.abs(got - want) <= size * 2.0**-bits + 1e-30)[~far].all()
    else:
        step_ = np.maximum(np.abs(want), np.abs(np.float64(p.astype(jnp.float32)))) * 2.0**-7
        near = np.abs(np.float64(new.astype(jnp.float32)) - want) <= step_ * 1.01 + 1e-30
        assert near.mean() > 0.999


def test_sixteen_more_bits_are_a_float32_master_bit_for_bit():
    """300 steps of AdamW through int16 are 300 steps of float32."""
    rng = np.random.default_rng(0)
    start = jnp.asarray(rng.normal(size=(64, 64)) * 0.02, jnp.float32)
    grads = jnp.asarray(rng.normal(size=(300, 64, 64)), BF16)
    inner = optax.adamw(1e-5, weight_decay=0.1)
    low = optim.lowp_chain(inner, store="int16")
    params = mcf.store(start, BF16)
    params, state = optim.set_full_precision_params(start, low.init(params))

    @functools.partial(jax.jit, compiler_options=AS_SHIPPED)
    def run_low(params, state):
        def body(carry, g):
            params, state = carry
            u, state = low.update(g, state, params)
            return (optax.apply_updates(params, u), state), None

        return jax.lax.scan(body, (params, state), grads)[0]

    @functools.partial(jax.jit, compiler_options=AS_SHIPPED)
    def run_master(w, state):
        def body(carry, g):
            w, state = carry
            u, state = inner.update(g.astype(jnp.float32), state, w)
            return (w + u, state), None

        return jax.lax.scan(body, (w, state), grads)[0]

    params, state = run_low(params, state)
    want, _ = run_master(start, inner.init(start))
    got = optim.full_precision_params(params, state)
    np.testing.assert_array_equal(got, want)
    assert np.abs(np.asarray(params.astype(jnp.float32)) - want).max() <= 2.0**-8 * 0.125
    # Nearest but for ties, which go away from zero.
    differ = np.asarray(params) != np.asarray(want).astype(jnp.dtype(BF16))
    assert differ.mean() < 1e-3


@pytest.mark.parametrize("codec", LOSSLESS)
def test_small_steps_add_up_where_bfloat16_alone_stands_still(codec):
    params = jnp.ones(128, BF16)
    runs = {}
    for store in (codec, "none"):
        tx = optim.lowp_chain(optax.sgd(1.0), store=store)

        @jax.jit
        def run(params, tx=tx):
            def body(carry, _):
                params, state = carry
                u, state = tx.update(jnp.full(128, -1e-4, BF16), state, params)
                return (optax.apply_updates(params, u), state), None

            return jax.lax.scan(body, (params, tx.init(params)), None, 2000)[0]

        runs[store] = run(params)
    got = optim.full_precision_params(*runs[codec])
    # The same change each time, so the rounding of what is kept may add up: half a unit a step.
    unit = {"bf16x2": 2.0**-16, "int16": 2.0**-23, "int8": 2.0**-15}[codec]
    np.testing.assert_allclose(got, 1 + 2000 * float(BF16(1e-4)), atol=2000 * unit / 2, rtol=0)
    assert (runs["none"][0] == 1).all()


def test_stochastic_rounding_moves_weights_on_average():
    params = jnp.ones(4096, BF16)
    tx = optim.lowp_chain(optax.sgd(1.0), store="sr")
    state = tx.init(params)
    assert not jax.tree.leaves(state.store.low)

    @jax.jit
    def run(params, state):
        def body(carry, _):
            params, state = carry
            u, state = tx.update(jnp.full(4096, -1e-4, BF16), state, params)
            return (optax.apply_updates(params, u), state), None

        return jax.lax.scan(body, (params, state), None, 500)[0]

    params, _ = run(params, state)
    moved = np.asarray(params.astype(jnp.float32)).mean() - 1
    assert moved == pytest.approx(500 * float(BF16(1e-4)), rel=0.05)


def test_float16_weights_keep_what_rounding_lost():
    p = jnp.asarray(np.random.default_rng(0).normal(size=2000) * 0.05, jnp.float16)
    tx = optim.lowp_chain(optax.sgd(1.0), store="int8")
    state, params = tx.init(p), p
    for _ in range(50):
        u, state = jax.jit(tx.update)(jnp.full(2000, -1e-6), state, params)
        params = optax.apply_updates(params, u)
    got = np.asarray(optim.full_precision_params(params, state)) - np.asarray(p, np.float32)
    np.testing.assert_allclose(got, 5e-5, rtol=0.1)
    with pytest.raises(ValueError, match=r"float16, which 'bf16x2' is not for.*'int8'"):
        optim.store_weights("bf16x2").init(p)


def test_masked_entries_stay_bit_for_bit():
    """A mask goes before the store; then frozen entries keep their bits, and nothing else."""
    rng = np.random.default_rng(0)
    p = jnp.asarray(rng.normal(size=(32, 32)) * (rng.random((32, 32)) < 0.8), BF16)  # -0.0 too
    mask = jnp.asarray(rng.random((32, 32)) < 0.1)
    freeze = optax.stateless(lambda u, _: jax.tree.map(lambda x: jnp.where(mask, x, 0), u))
    tx = optim.lowp_chain(optax.adam(1e-4), freeze, store="bf16x2")
    params, state = p, tx.init(p)
    for i in range(5):
        g = jnp.asarray(rng.normal(size=(32, 32)), BF16)
        u, state = tx.update(g, state, params)
        changed = optim.visible_change_mask(params, u)
        new = optax.apply_updates(params, u)
        np.testing.assert_array_equal(changed, np.asarray(new) != np.asarray(params), err_msg=i)
        params = new
    frozen = ~np.asarray(mask)
    assert (np.signbit(np.asarray(p)) & (np.asarray(p) == 0)).any()
    np.testing.assert_array_equal(bits(params)[frozen], bits(p)[frozen])
    assert not np.asarray(state.store.low.astype(jnp.float32))[frozen].any()
    assert np.asarray(state.store.low.astype(jnp.float32))[~frozen].any()


def bits(x):
    return np.asarray(jax.lax.bitcast_convert_type(x, jnp.uint16))


@pytest.mark.parametrize("codec", list(codecs.WEIGHTS))
def test_no_change_changes_no_bit_of_either_zero(codec):
    """Pruned weights may be -0.0, 2^31 away from 0.0 as an integer, and subnormal ones are 0."""
    p = jnp.asarray([-0.0, 0.0, 1.0, -1.0, 2.0**-126, -(2.0**-126), 0.02, -0.02], BF16)
    tx = optim.lowp_chain(optax.sgd(1.0), store=codec)

    @jax.jit
    def step(params, state, g):
        u, state = tx.update(g, state, params)
        return optax.apply_updates(params, u), state

    params, state = p, tx.init(p)
    for zero in (0.0, -0.0, 0.0):
        params, state = step(params, state, jnp.full_like(p, zero))
        np.testing.assert_array_equal(bits(params), bits(p))
        full = optim.full_precision_params(params, state)
        np.testing.assert_array_equal(full, np.asarray(p.astype(jnp.float32)))
    for g in (params, jnp.full_like(p, 2.0**-130), -jnp.full_like(p, 2.0**-127)):  # to 0 and past
        params, state = step(params, state, g)
    full = np.asarray(optim.full_precision_params(params, state))
    assert (np.abs(full) <= 2.0**-126).all(), full


def descent(tx, store=None, steps=20):
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=(64, 64)), BF16)
    state = tx.init(params)

    @jax.jit
    def step(params, state, g):  # the update, its application and its measure as one program
        u, state = tx.update(g, state, params)
        return optax.apply_updates(params, u), state

    seen = []
    for _ in range(steps):
        params, state = step(params, state, jnp.asarray(rng.normal(size=(64, 64)), BF16))
        seen.append({k: float(v) for k, v in optim.precision_metrics(state).items()})
    return {k: np.mean([s[k] for s in seen]) for k in seen[0]}


def test_descent_says_what_was_lost():
    """Excess precision in the compiler must not make plain bfloat16 look lossless."""
    plain = descent(optim.watch_descent(optim.in_float32(optax.adam(1e-4))))
    assert plain["lost"] > 0.8 and plain["stored"] == plain["visible"]
    kept = descent(optim.lowp_chain(optax.adam(1e-4), store="bf16x2", metrics=True))
    assert kept["stored"] == pytest.approx(1, abs=1e-3)
    assert kept["lost"] < 0.02
    exact = descent(optim.lowp_chain(optax.adam(1e-4), store="int16", metrics=True))
    assert exact["stored"] == pytest.approx(1, abs=1e-4) and exact["lost"] < 1e-3
    none = descent(optim.lowp_chain(optax.adam(1e-4), store="none", metrics=True))
    assert none["lost"] == pytest.approx(plain["lost"], abs=0.02)
    assert not optim.precision_metrics(optax.adam(1e-4).init(jnp.ones(3)))


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match=r"unknown codec 'bf17'.*'bf16x2'"):
        optim.store_weights("bf17")
    with pytest.raises(ValueError, match="link 0 stores weights already"):
        optim.lowp_chain(optim.collage_adamw(1e-3), optax.clip(1.0))
    tx = optim.lowp_chain(optax.sgd(1.0))
    p = jnp.ones(3, BF16)
    with pytest.raises(ValueError, match="needs params"):
        tx.update(p, tx.init(p))
    with pytest.raises(ValueError, match="stores weights 0 times"):
        optim.full_precision_params(p, optax.adam(1.0).init(p))


def test_float32_leaves_pass_through():
    params = {"a": jnp.ones(4, BF16), "b": jnp.ones(4, jnp.float32)}
    tx = optim.lowp_chain(optax.sgd(0.5), store="int16")
    state = tx.init(params)
    u, state = tx.update(params, state, params)
    new = optax.apply_updates(params, u)
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, params)
    np.testing.assert_array_equal(new["b"], 0.5)
    assert isinstance(state.store.low["b"], optax.MaskedNode)


@pytest.mark.parametrize("codec", LOSSLESS)
def test_full_precision_in_and_out(codec):
    w = {"a": jnp.asarray(np.random.default_rng(0).normal(size=(16, 16)), jnp.float32)}
    tx = optim.lowp_chain(optax.adam(1e-3), store=codec)
    state = tx.init(jax.tree.map(functools.partial(mcf.store, dtype=BF16), w))
    params, state = optim.set_full_precision_params(w, state)
    assert params["a"].dtype == BF16
    got = optim.full_precision_params(params, state)["a"]
    tolerance = {"bf16x2": 2.0**-17, "int16": 0, "int8": 2.0**-15}[codec]
    np.testing.assert_allclose(got, w["a"], rtol=tolerance, atol=0)


def test_full_precision_goes_into_weights_like_those_given():
    like = {"a": jnp.ones(8, BF16), "b": jnp.ones(8, jnp.float32), "c": jnp.ones(8, jnp.float16)}
    tx = optax.masked(optim.lowp_chain(optax.sgd(1.0)), {"a": True, "b": True, "c": False})
    full = {k: jnp.linspace(0.1, 0.9, 8, dtype=jnp.float32) for k in like}
    params, state = optim.set_full_precision_params(full, tx.init(like), like=like)
    assert {k: v.dtype for k, v in params.items()} == {k: v.dtype for k, v in like.items()}
    np.testing.assert_array_equal(params["b"], full["b"])
    np.testing.assert_array_equal(params["c"], full["c"].astype(jnp.float16))
    got = optim.full_precision_params(params, state)["a"]
    np.testing.assert_allclose(got, full["a"], rtol=2.0**-17, atol=0)

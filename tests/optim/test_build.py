"""Optimizers by name, frozen parts, float32 state, schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_eff.optim import in_float32, optimizer, optimizer_names, warmup_then

PARAMS = {"a": {"kernel": jnp.ones((3, 2))}, "norm": {"scale": jnp.ones(2)}}
GRADS = jax.tree.map(lambda x: 0.5 * x, PARAMS)


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def _step(tx, params=PARAMS, grads=GRADS):
    updates, state = tx.update(grads, tx.init(params), params)
    return optax.apply_updates(params, updates), state


def test_it_is_the_optax_function_of_that_name():
    want = _step(optax.adamw(0.1, weight_decay=0.0))[0]
    got = _step(optimizer("adamw", 0.1))[0]
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert {"adamw", "sgd", "lion", "adafactor", "rmsprop"} <= set(optimizer_names())


def test_gradients_are_clipped_to_the_global_norm():
    got, _ = _step(optimizer("sgd", 1.0, clip_norm=1e-3))
    moved = jax.tree.map(lambda a, b: a - b, got, PARAMS)
    np.testing.assert_allclose(optax.global_norm(moved), 1e-3, rtol=1e-4)


def test_frozen_parts_stay_and_have_no_state():
    got, state = _step(optimizer("adamw", 0.1, frozen=("a/.*",)))
    np.testing.assert_array_equal(got["a"]["kernel"], PARAMS["a"]["kernel"])
    assert (got["norm"]["scale"] != 1).all()
    assert not [x for x in jax.tree.leaves(state) if x.shape == (3, 2)]


def test_frozen_zeros_keep_their_sign():
    params = {"a": jnp.asarray([-0.0, 0.0], jnp.bfloat16), "b": jnp.ones(2, jnp.bfloat16)}
    got, _ = _step(optimizer("adamw", 0.1, frozen=("a",)), params, params)
    np.testing.assert_array_equal(np.signbit(np.asarray(got["a"])), [True, False])


def test_scales_and_biases_are_not_decayed():
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    got, _ = _step(optimizer("adamw", 0.1, weight_decay=0.5), grads=zero)
    assert (got["norm"]["scale"] == 1).all() and (got["a"]["kernel"] < 1).all()


def test_state_is_float32_for_bfloat16_parameters():
    params = {"w": jnp.full(4, 0.01, jnp.bfloat16)}
    tx = in_float32(optax.adam(1e-3))
    state = tx.init(params)
    for _ in range(400):  # in bfloat16 nu would stop near 1/256 of its limit
        _, state = tx.update({"w": jnp.ones(4, jnp.bfloat16)}, state, params)
    assert state[0].nu["w"].dtype == jnp.float32
    np.testing.assert_allclose(state[0].nu["w"], 1 - 0.999**400, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "admw"}, "unknown optimizer 'admw'; expected one of"),
        ({"name": "sgd", "weight_decay": 0.1}, "no weight decay"),
        ({"name": "sgd", "options": {"b1": 1}}, "unknown option 'b1'"),
        ({"name": "sgd", "store": "int4"}, "unknown store 'int4'; expected one of"),
        ({"name": "collage_adamw", "store": "int8"}, "must be set by its variant"),
        ({"name": "collage_adamw", "options": {"variant": "l"}}, "unknown variant 'l'"),
    ],
)
def test_what_optax_does_not_have_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        optimizer(learning_rate=0.1, **arguments)


def test_schedules_by_hand():
    lr = warmup_then("linear", peak=1.0, updates=6, warmup=2, final=0.5)
    np.testing.assert_allclose([lr(i) for i in range(7)], [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5])
    assert warmup_then("constant", peak=0.3, updates=9)(5) == np.float32(0.3)
    np.testing.assert_allclose(warmup_then("cosine", peak=2.0, updates=4)(2), 1.0, rtol=1e-6)
    with pytest.raises(ValueError, match="warmup is 7"):
        warmup_then("linear", peak=1.0, updates=6, warmup=7)
    with pytest.raises(ValueError, match="unknown schedule 'lin'"):
        warmup_then("lin", peak=1.0, updates=6)

"""Finite gradients of any size in every layout: all stays finite, and other entries do not notice.

Row i of a matrix of groups has one entry with an extreme gradient; the last rows are ordinary.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_eff import optim
from jaxrl_eff.optim import codecs, mcf, sparse
from jaxrl_eff.optim.collage import VARIANTS

BF16 = jnp.bfloat16
TOP = float(np.finfo(np.float32).max)
SIZES = (1e19, 1e22, 1e30, 3e38, TOP, 1e-18, 1e-30, 1e-40, 0.0)
LR = 1e-3


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def layouts():
    found = {name: optim.collage_adamw(LR, variant=name, metrics=True) for name in VARIANTS}
    for name in ("light", "plus"):
        found[f"{name} faithful"] = optim.collage_adamw(LR, variant=name, faithful=True)
    for b2 in (0.95, 0.9999999):
        found[f"plus {b2}"] = optim.collage_adamw(LR, b2=b2, weight_decay=0.1)
        found[f"flash8 {b2}"] = optim.collage_adamw(LR, b2=b2, weight_decay=0.1, variant="flash8")
    for store in codecs.WEIGHTS:
        found[f"adamw {store}"] = optim.lowp_chain(optax.adamw(LR), store=store, metrics=True)
        found[f"sgd {store}"] = optim.lowp_chain(optax.sgd(1.0), store=store, metrics=True)
    found["adamw"] = optim.optimizer("adamw", LR, descent=True)
    return found


LAYOUTS = layouts()


def gradients(dtype=jnp.float32):
    """Ordinary, extreme, opposite: float[2 * sizes + 2, 64] with two groups of 32 a row."""
    signed = jnp.asarray([*SIZES, *(-x for x in SIZES)], jnp.float32)
    top = float(jnp.finfo(dtype).max)
    signed = jnp.clip(signed, -top, top).astype(dtype)
    ordinary = jnp.full((len(signed) + 2, 64), 1e-2, dtype)
    at = jnp.arange(len(signed))
    return ordinary, ordinary.at[at, 0].set(signed), ordinary.at[at, 0].set(-signed)


def finite(tree):
    """Whether all floats are finite."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return all(np.isfinite(np.asarray(x.astype(jnp.float32))).all() for x in floats)


ORDER = (0, 1, 0, 1, 1, 2, 0, 0)  # which of the gradients in each step


@pytest.fixture(scope="module")
def runs():
    """Name -> after every step the weights and state, with extreme gradients and without."""
    kinds = gradients()
    ordinary = kinds[0]
    params = {k: jnp.full(ordinary.shape, 0.5, BF16) for k in LAYOUTS}

    @jax.jit
    def step(params, states, g):
        out, new = {}, {}
        for k, tx in LAYOUTS.items():
            u, new[k] = tx.update(g, states[k], params[k])
            out[k] = optax.apply_updates(params[k], u)
        return out, new

    def run(order):
        p, s, seen = params, {k: tx.init(params[k]) for k, tx in LAYOUTS.items()}, []
        for kind in order:
            p, s = step(p, s, kinds[kind])
            seen.append((p, s))
        return seen

    with jax.numpy_dtype_promotion("standard"):
        return run(ORDER), run([0] * len(ORDER))


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_finite_gradients_leave_everything_finite(runs, name):
    for i, (params, states) in enumerate(runs[0]):
        assert finite((params[name], states[name])), i


def weights(run, name, at=-1):
    params, states = run[at]
    if name == "adamw":
        return np.asarray(params[name], np.float64)
    return np.asarray(optim.full_precision_params(params[name], states[name]), np.float64)


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_other_groups_do_not_notice(runs, name):
    """Bit for bit; and they move on with ordinary gradients."""
    with_, without = (weights(run, name) for run in runs)
    np.testing.assert_array_equal(with_[:, 32:], without[:, 32:])
    np.testing.assert_array_equal(with_[-2:], without[-2:])
    if "none" not in name and name != "adamw":  # rounded to the nearest
        share = 0.1 if "sr" in name else 0.9
        assert (weights(runs[0], name, -2) != with_)[:, 32:].mean() > share


def adam64(gradients, b2):
    """What Adam in float64 moves an entry by, for one sequence of gradients."""
    m = v = moved = 0.0
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, b2 * v + (1 - b2) * g * g
        moved -= LR * m / (1 - 0.9**t) / (np.sqrt(v / (1 - b2**t)) + 1e-8)
    return moved


@pytest.mark.parametrize("name", [*VARIANTS, "light faithful", "plus faithful", "adamw int16"])
def test_an_extreme_entry_moves_as_in_float64(runs, name):
    moved = weights(runs[0], name)[:, 0] - 0.5
    kinds = [np.asarray(g, np.float64)[:, 0] for g in gradients()]
    for i, size in enumerate([*SIZES, *(-x for x in SIZES)]):
        want = adam64([kinds[kind][i] for kind in ORDER], 0.999)
        slack = 0.25 * LR if "8" in name else 0.05 * LR  # of 8 steps; eight bits have few codes
        assert abs(moved[i] - want) < slack, (size, moved[i], want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_largest_gradients_of_16_bits(dtype):
    _, extreme, _ = gradients(jnp.dtype(dtype))
    names = ("plus", "flash8", "int16_8bit", "exact")
    params = {k: jnp.full(extreme.shape, 0.5, BF16) for k in names}
    states = {k: LAYOUTS[k].init(params[k]) for k in names}

    @jax.jit
    def step(params, states):
        out, new = {}, {}
        for k in names:
            u, new[k] = LAYOUTS[k].update(extreme, states[k], params[k])
            out[k] = optax.apply_updates(params[k], u)
        return out, new

    for _ in range(3):
        params, states = step(params, states)
        assert finite((params, states))


def test_after_clipping_by_the_global_norm():
    """A norm that overflows leaves no gradient in that step, and the next one is ordinary."""
    ordinary, extreme, _ = gradients()
    for name in ("collage_adamw", "adamw", "sgd"):
        tx = optim.optimizer(name, LR, clip_norm=1.0, descent=True)
        params = jnp.full(ordinary.shape, 0.5, BF16)
        state, step = tx.init(params), jax.jit(tx.update)
        for g in (ordinary, extreme, ordinary):
            u, state = step(g, state, params)
            before, params = params, optax.apply_updates(params, u)
            assert finite((params, state)), name
        assert name == "collage_adamw" or np.asarray(u).any()
        assert np.asarray(params.astype(jnp.float32)).min() > 0.4, before


@pytest.mark.parametrize("inner", [optax.adam(1.0), sparse.SM3()], ids=["adam", "sm3"])
def test_sparse_training(inner):
    """Active entries with extreme gradients; SM3's rows and columns stay an order to grow by."""
    params = {"w": jnp.full((16, 16), 0.5, BF16)}
    grows = isinstance(inner, sparse.SM3)
    schedule = sparse.Spiel(2, first=False) if grows else None
    adapt = sparse.sparse_adapt(inner, density=0.25, learning_rate=LR, schedule=schedule)
    state = adapt.init(params)
    g = jnp.full(state.active["w"].index.shape, 1e-2)
    hard = g.at[..., : len(SIZES)].set(jnp.asarray(SIZES))
    step = jax.jit(lambda g, s, p: adapt.update({"w": g}, s, p))
    for tap in (g, hard, hard, hard, hard, hard, -hard, g):
        updates, state = step(tap, state, params)
        before, params = params, adapt.apply(params, updates)
        assert finite((params, state))
    moved = (before["w"] != params["w"]).sum() if not grows else g.size
    assert moved >= 0.5 * (g.size - len(SIZES)) or not grows
    if grows:
        chosen, _ = adapt.reselect(params, state)
        assert finite(chosen)
        active = state.active["w"]
        found = inner.grown(active.inner, active.index, adapt.layout("w", params["w"]))
        assert finite(found) and (np.diff(np.asarray(found)[0, 0, 2]) <= 0).all()


def test_a_master_with_infinite_moments_becomes_finite():
    w = {"w": jnp.ones((2, 32))}
    moments = [{"w": jnp.full((2, 32), x)} for x in (1e30, np.inf)]
    for variant in ("exact", "plus", "flash8"):  # each codec of moments
        tx = optim.collage_adamw(LR, variant=variant)
        params, state = optim.from_master(
            tx, optim.Master(w, *moments, jnp.int32(5)), variant=variant
        )
        assert finite((params, state)), variant


def test_gradients_are_cut_where_squares_would_overflow_and_nans_stay():
    x = jnp.asarray([1.0, -0.0, 2.0**62, TOP, -TOP, np.inf, np.nan])
    got = np.asarray(mcf.gradients(x))
    np.testing.assert_array_equal(got, [1, 0, 2.0**62, 2.0**63, -(2.0**63), 2.0**63, np.nan])
    assert np.signbit(got[1])
    np.testing.assert_array_equal(mcf.gradients(x.astype(BF16)).dtype, jnp.float32)


def test_faithful_arithmetic_refuses_float16_where_its_epsilon_is_0():
    tx = optim.collage_adamw(LR, faithful=True)
    with pytest.raises(ValueError, match="'w' is float16, which faithful=True is not for"):
        tx.init({"w": jnp.ones(3, jnp.float16)})

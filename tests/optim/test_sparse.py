"""The laws of sparse training on its own: against dense optax, and what must not change."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_eff.optim import sparse
from jaxrl_eff.optim.sparse import selectors

SHAPES = {"a": (3, 16, 24), "b": (8, 12)}


def make(dtype="float32", seed=0):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES) + 1)
    params = {
        n: jax.random.normal(k, s).astype(dtype)
        for k, (n, s) in zip(keys, SHAPES.items(), strict=False)
    }
    return params | {"bias": jnp.ones(5, dtype)}


def loss(params, target):
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    return sum(
        jnp.sum((x - t) ** 2)
        for x, t in zip(jax.tree.leaves(wide), jax.tree.leaves(target), strict=True)
    )


def train(adapt, params, steps, target, state=None):
    state = adapt.init(params) if state is None else state

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss)(params, target)
        taps = sparse.dense_to_sparse(grads, state, adapt.layout)
        updates, state = adapt.update(taps, state, params)
        return adapt.apply(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@pytest.mark.parametrize("block", [(1, 1), (4, 4), (1, 0), (0, 1)])
@pytest.mark.parametrize("grid", [(1, 1), (2, 4)])
def test_gather_and_scatter_are_the_matrix_at_the_units(block, grid):
    x = jnp.arange(2 * 16 * 48, dtype=jnp.float32).reshape(2, 16, 6, 8)
    t = sparse.tiling(x.shape, 0.3, stack=1, grid=grid, block=block)
    index = selectors.select("x", "random", x, t, seed=0)
    assert index.shape == t.index_shape(x.shape) and (jnp.diff(index, axis=-1) > 0).all()
    values = jax.jit(sparse.gather, static_argnums=2)(x, index, t)
    assert values.shape == t.value_shape(x.shape)
    matrix, tile = np.asarray(x).reshape(2, 16, 48), t.tile
    at, there = np.asarray(index), np.asarray(values)
    for s, r, c, k in np.ndindex(*at.shape):
        i = int(at[s, r, c, k])
        row = r * tile[0] + i // t.units[1] * t.block[0]
        column = c * tile[1] + i % t.units[1] * t.block[1]
        want = matrix[s, row : row + t.block[0], column : column + t.block[1]]
        np.testing.assert_array_equal(there[s, r, c, k].reshape(want.shape), want)
    changed = sparse.scatter(x, index, values + 0.5, t)
    assert int((changed != x).sum()) == values.size
    np.testing.assert_array_equal(sparse.gather(changed, index, t), values + 0.5)


def test_full_density_is_dense_adam():
    params, target = make(), make(seed=1)
    adapt = sparse.sparse_adapt(optax.adam(0.05), density=1.0)
    ours, _ = train(adapt, params, 5, target)
    tx = optax.multi_transform(
        {"on": optax.adam(0.05), "off": optax.set_to_zero()},
        {"a": "on", "b": "on", "bias": "off"},
    )
    theirs, state = params, tx.init(params)
    with jax.numpy_dtype_promotion("standard"):
        update = jax.jit(lambda p, state: tx.update(jax.grad(loss)(p, target), state))
        for _ in range(5):
            updates, state = update(theirs, state)
            theirs = optax.apply_updates(theirs, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), ours, theirs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_only_active_entries_change_and_revert_restores_every_bit(dtype, block):
    params, target = make(dtype), make(seed=1)
    adapt = sparse.sparse_adapt(optax.adam(0.05), density=0.1, block=block)
    after, state = train(adapt, params, 4, target)
    np.testing.assert_array_equal(after["bias"], params["bias"])
    for name in SHAPES:
        t = adapt.layout(name, params[name])
        active = sparse.scatter(
            jnp.zeros(params[name].shape), state.active[name].index,
            jnp.ones(t.value_shape(params[name].shape)), t,
        )  # fmt: skip
        changed = after[name] != params[name]
        assert int(changed.sum()) > 0 and not (changed & (active == 0)).any()
    back = adapt.revert(after, state)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_half_precision_is_trained_as_float32_is():
    """Steps far below bfloat16's resolution arrive, to the last bit of a float32 twin."""
    narrow = {"w": jax.random.normal(jax.random.key(0), (16, 16)).astype(jnp.bfloat16)}
    wide = {"w": narrow["w"].astype(jnp.float32)}
    adapt = sparse.sparse_adapt(optax.adam(3e-5), density=0.1)
    states = [adapt.init(narrow), adapt.init(wide)]
    index, t = states[0].active["w"].index, adapt.layout("w", narrow["w"])
    taps = 1 + jax.random.normal(jax.random.key(1), (50, *index.shape))

    @jax.jit
    def run(params, state):
        def step(carry, tap):
            params, state = carry
            updates, state = adapt.update({"w": tap}, state, params)
            return (adapt.apply(params, updates), state), None

        return jax.lax.scan(step, (params, state), taps)[0]

    (narrow, state), (wide, _) = run(narrow, states[0]), run(wide, states[1])
    exact = sparse.gather(wide["w"], index, t)
    shown = sparse.gather(narrow["w"], index, t)
    assert (shown == exact.astype(jnp.bfloat16)).all()
    assert 0 < int((shown != state.active["w"].original).sum()) < shown.size
    bits = jax.lax.bitcast_convert_type(shown.astype(jnp.float32), jnp.int32)
    whole = bits + state.active["w"].remainder.astype(jnp.int32)
    np.testing.assert_array_equal(jax.lax.bitcast_convert_type(whole, jnp.float32), exact)


def test_it_drops_into_an_ordinary_optax_loop():
    params, target = make(), make(seed=1)
    adapt = sparse.sparse_adapt(optax.adam(0.05), density=0.1)
    ours, _ = train(adapt, params, 3, target)
    tx = optax.chain(optax.clip_by_global_norm(1e9), sparse.from_dense(adapt))
    theirs, state = params, tx.init(params)
    update = jax.jit(lambda p, state: tx.update(jax.grad(loss)(p, target), state, p))
    for _ in range(3):
        updates, state = update(theirs, state)
        theirs = optax.apply_updates(theirs, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), ours, theirs)


def test_every_unit_has_the_age_of_its_own():
    """A unit that joins late takes the step that dense Adam takes first."""
    params = {"w": jnp.ones((4, 8))}
    adapt = sparse.sparse_adapt(
        optax.adam(0.1, b2=0.999), density=0.25, selector="gradient", schedule=sparse.Periodic(5)
    )
    state = adapt.init(params)
    index = jnp.arange(8, dtype=jnp.int32).reshape(1, 1, 8)

    def found(units):
        rows, columns = units // 8, units % 8
        score = jnp.ones_like(units)
        return {"w": jnp.stack([rows, columns, score], -2).astype(jnp.float32)}

    params, state = adapt.reselect(params, state, found(index))
    taps = {"w": jnp.ones((1, 1, 8))}
    update = jax.jit(adapt.update)
    for _ in range(5):
        updates, state = update(taps, state, params)
        params = adapt.apply(params, updates)
    params, state = adapt.reselect(params, state, found(index + 4))
    np.testing.assert_array_equal(state.active["w"].index, index + 4)
    np.testing.assert_array_equal(params["w"][0, :4], 1.0)  # reverted
    count = jax.tree.leaves(state.active["w"].inner)[0]
    np.testing.assert_array_equal(count[0, 0], [5] * 4 + [0] * 4)
    before = params["w"]
    updates, state = adapt.update(taps, state, params)
    moved = (adapt.apply(params, updates)["w"] - before).reshape(-1)
    np.testing.assert_allclose(moved[8:12], -0.1, rtol=1e-4)


def spiel_twin(index, change, found, score, exchanged):
    """SpIEL's drop and grow as the authors' code reads, for one tile."""
    order = np.argsort(change, kind="stable")
    dropped, kept = set(index[order[:exchanged]]), set(index[order[exchanged:]])
    grown = [u for u, s in zip(found, score, strict=True) if u not in kept and s > 0]
    grown = grown[:exchanged]
    spare = [u for u in index[order[:exchanged]][::-1] if u not in grown]
    assert dropped | kept == set(index)
    return sorted([*kept, *grown, *spare[: len(index) - len(kept) - len(grown)]])


def test_spiel_drops_the_smallest_changes_and_grows_the_largest_gradients():
    rng = np.random.default_rng(0)
    schedule = sparse.Spiel(every=10, share=0.5, updates=100)
    choose = jax.jit(schedule.choose)
    for trial in range(20):
        index = np.sort(rng.choice(60, 12, replace=False))
        change = rng.random(12).astype(np.float32)
        found = rng.choice(60, 12, replace=False)
        score = np.sort(rng.random(12).astype(np.float32))[::-1].copy()
        score[12 - trial % 5 :] = 0
        updates = [0, 50][trial % 2]
        got = choose(*map(jnp.asarray, (index, change, found, score)), jnp.int32(updates))
        exchanged = 12 if updates == 0 else 3
        assert list(got) == spiel_twin(index, change, found, score, exchanged)


def sm3_twin(w, masks, grads, exchanged):
    """SpIEL-MA on dense float32 arrays of one tile: a choice with that many before each update."""
    row, column = np.zeros(w.shape[0], np.float32), np.zeros(w.shape[1], np.float32)
    start, mask = w.copy(), masks.copy()
    for g, count in zip(grads, exchanged, strict=True):
        active, change = np.flatnonzero(mask), np.abs(w - start).reshape(-1)
        score = np.outer(row, column).reshape(-1) * ~mask.reshape(-1)
        best = [u for u in np.argsort(-score, kind="stable")[:count] if score[u] > 0]
        gone = active[np.argsort(change[active], kind="stable")[: len(best)]]
        mask.reshape(-1)[gone], mask.reshape(-1)[best] = False, True
        w = np.where(mask, w, start)
        v = np.where(mask, np.minimum(row[:, None], column[None]) + g * g, 0)
        row, column = np.maximum(row, v.max(1)), np.maximum(column, v.max(0))
        w = np.where(mask, w - np.float32(0.05) * g / np.sqrt(np.where(v > 0, v, 1)), w)
    return w, mask, row, column


@pytest.mark.parametrize("grid", [(1, 1), (2, 3)])
def test_spiel_ma_is_a_dense_twin(grid):
    """Updates on the support, accumulators, and what is dropped and grown, tile by tile."""
    params, rng = {"w": jax.random.normal(jax.random.key(0), (2, 16, 24))}, np.random.default_rng(0)
    adapt = sparse.sparse_adapt(
        sparse.SM3(), schedule=sparse.Spiel(3, share=0.5, updates=12, first=False),
        layout=lambda name, leaf: sparse.tiling(leaf.shape, 0.2, stack=1, grid=grid),
        learning_rate=0.05,
    )  # fmt: skip
    t, state = adapt.layout("w", params["w"]), adapt.init(params)
    grads = rng.normal(size=(9, 2, 16, 24)).astype(np.float32)

    def on(index):
        at = jnp.zeros(params["w"].shape, bool)
        return np.asarray(sparse.scatter(at, index, jnp.ones(index.shape, bool), t))

    first, w, choose = on(state.active["w"].index), np.asarray(params["w"]), jax.jit(adapt.reselect)

    @jax.jit
    def step(params, state, g):
        taps = sparse.dense_to_sparse({"w": g}, state, adapt.layout)
        updates, state = adapt.update(taps, state, params)
        return adapt.apply(params, updates), state

    exchanged = [0] * 9
    for i, g in enumerate(grads):
        if adapt.schedule.due(i):
            exchanged[i] = int(np.floor(0.5 * (1 - i / 12) * t.count + 1e-4))
            params, state = choose(params, state)
        params, state = step(params, state, g)
    assert np.count_nonzero(exchanged) == 2
    last, accumulators, (r, c) = on(state.active["w"].index), state.active["w"].inner, t.tile
    for layer, i, j in np.ndindex(2, *grid):
        part = np.s_[layer, i * r : (i + 1) * r, j * c : (j + 1) * c]
        ours = (params["w"][part], last[part], *(x[layer, i, j] for x in accumulators))
        theirs = sm3_twin(w[part], first[part], grads[(slice(None), *part)], exchanged)
        assert (theirs[1] != first[part]).any()
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-6)


def test_sm3_keeps_rows_and_columns_alone():
    adapt = sparse.sparse_adapt(sparse.SM3(), density=0.01)
    state = adapt.init({"w": jnp.zeros((256, 128), jnp.bfloat16)})
    used = sum(x.nbytes for x in jax.tree.leaves(state.active))
    assert used == round(0.01 * 256 * 128) * (4 + 2 + 2) + (256 + 128) * 4


@pytest.mark.parametrize("selector", ["magnitude", "smallest", "lift"])
def test_selectors_of_weights_choose_what_they_say(selector, monkeypatch):
    monkeypatch.setattr(selectors, "LIFT_RANK", 3)
    x = jax.random.normal(jax.random.key(0), (2, 16, 24))
    t = sparse.tiling(x.shape, 0.05, stack=1)
    index = jax.jit(lambda x: selectors.select("x", selector, x, t, 0))(x)
    for layer in range(2):
        w = np.asarray(x[layer])
        if selector == "lift":
            u, s, v = np.linalg.svd(w)
            w = (u[:, :3] * s[:3]) @ v[:3]
        size = np.abs(w).reshape(-1)
        best = np.argsort(size if selector == "smallest" else -size)[: t.count]
        same = len(set(best) & set(np.asarray(index[layer, 0, 0]))) / t.count
        assert same >= (0.7 if selector == "lift" else 1.0)


def test_a_mask_is_what_is_trained():
    params, target = make(), make(seed=1)
    mask = np.zeros(SHAPES["a"], bool)
    mask[:, 3, ::2] = True
    adapt = sparse.sparse_adapt(optax.adam(0.05), selector={"a": mask})
    after, _ = train(adapt, params, 2, target)
    np.testing.assert_array_equal(np.asarray(after["a"] != params["a"]), mask)
    np.testing.assert_array_equal(after["b"], params["b"])


def test_state_is_as_small_as_what_is_active():
    params = {"w": jnp.zeros((256, 256), jnp.bfloat16)}
    adapt = sparse.sparse_adapt(optax.adam(1.0), density=0.01)
    state = adapt.init(params)
    k = state.active["w"].index.size
    used = sum(x.nbytes for x in jax.tree.leaves(state.active))
    assert k == round(0.01 * 256 * 256) and used == k * (4 + 12 + 2 + 2)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(selector="best"), "unknown selector 'best'"),
        (dict(on_drop="forget"), "unknown on_drop 'forget'"),
        (dict(density=0.0), "density is 0.0"),
        (dict(block=(5, 5)), r"blocks of \(5, 5\) do not divide"),
        (dict(inner=optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0))), "elementwise"),
        (dict(selector={"b": np.eye(8, 12, dtype=bool)[:, :3]}), "mask of 'b'"),
        (dict(selector={}, schedule=sparse.Periodic(3)), "never chosen anew"),
        (dict(inner=sparse.SM3(), block=(4, 4)), r"single entries, but units are blocks of \(4, 4"),
        (dict(inner=sparse.SM3(), schedule=sparse.Spiel()), "needs one of .* and first=False"),
    ],
)
def test_what_cannot_work_is_said(change, message):
    with pytest.raises(ValueError, match=message):
        sparse.sparse_adapt(**{"inner": optax.adam(1.0), **change}).init(make())


def test_units_need_a_grid_that_fits():
    with pytest.raises(ValueError, match=r"\(3, 1\) tiles do not divide"):
        sparse.tiling((16, 8), 0.1, grid=(3, 1))
    for wrong in (dict(share=0.0), dict(every=0), dict(decay="step")):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            sparse.Spiel(**wrong)

"""Collage's AdamW: against float64, in bytes, under wrappers of optax, on a mesh, and saved."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxrl_eff import optim, tree
from jaxrl_eff.optim import codecs, mcf
from jaxrl_eff.optim.collage import VARIANTS

BF16 = jnp.bfloat16
RNG = np.random.default_rng(0)
PARAMS = {
    "a": {"kernel": jnp.asarray(RNG.normal(size=(64, 128)) * 0.02, BF16)},
    "b": {"scale": jnp.ones(128, BF16)},
}


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def gradients(steps, params=PARAMS, seed=1, drift=0.3):
    """Noisy, with a direction: [steps, ...] a leaf, bfloat16."""
    rng = np.random.default_rng(seed)

    def one(p):
        mean = drift * rng.normal(size=p.shape)
        return jnp.asarray(mean + rng.normal(size=(steps, *p.shape)), BF16)

    return jax.tree.map(one, params)


def train(tx, grads, params=PARAMS, state=None, init=None):
    """All steps as one program."""
    state = (init or tx.init)(params) if state is None else state

    @jax.jit
    def run(params, state, grads):
        def body(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, state), grads)[0]

    return run(params, state, grads)


def adamw64(grads, lr, b1=0.9, b2=0.999, eps=1e-8, wd=0.0, params=PARAMS):
    """The textbook in float64."""
    out = {}
    for (path, p), g in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(grads), strict=True
    ):
        w, m, v = np.float64(p.astype(jnp.float32)), 0.0, 0.0
        for t, row in enumerate(np.float64(np.asarray(g.astype(jnp.float32))), 1):
            m, v = b1 * m + (1 - b1) * row, b2 * v + (1 - b2) * row * row
            w = w - lr * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + wd * w)
        out[tree.path_name(path)] = w
    return out


def displacement(params, state, want):
    """(norm ratio, cosine) of what the weights moved, against float64."""
    full = optim.full_precision_params(params, state)
    start = [np.float64(p.astype(jnp.float32)).ravel() for p in jax.tree.leaves(PARAMS)]
    start = np.concatenate(start)
    got = np.concatenate([np.float64(x).ravel() for x in jax.tree.leaves(full)]) - start
    want = np.concatenate([x.ravel() for x in want.values()]) - start
    norms = np.linalg.norm(got), np.linalg.norm(want)
    return norms[0] / norms[1], got @ want / (norms[0] * norms[1])


@pytest.mark.parametrize(
    ("options", "norm", "cosine"),
    [
        (dict(variant="exact"), 1e-4, 1 - 1e-6),
        (dict(variant="plus"), 0.005, 0.9998),
        (dict(variant="light_sr"), 0.02, 0.999),
        (dict(variant="plus", faithful=True), 0.03, 0.9995),
        (dict(variant="int16_8bit"), 0.1, 0.98),
        (dict(variant="flash8"), 0.1, 0.98),
    ],
    ids=str,
)
def test_small_steps_go_where_float64_goes(options, norm, cosine):
    """300 steps at a learning rate at which bfloat16 alone hardly moves."""
    grads = gradients(300)
    want = adamw64(grads, 1e-5)
    params, state = train(optim.collage_adamw(1e-5, **options), grads)
    ratio, angle = displacement(params, state, want)
    assert abs(ratio - 1) < norm and angle > cosine, (ratio, angle)


def test_bfloat16_alone_does_not():
    grads = gradients(300)
    tx = optax.adamw(1e-5, weight_decay=0.0)  # its state takes the parameters' dtype
    params, _ = train(tx, grads)
    moved = [
        (np.asarray(a) != np.asarray(b)).mean()
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(PARAMS), strict=True)
    ]
    assert moved[1] == 0  # scales of 1.0


@pytest.mark.parametrize("b2", [0.95, 0.98, 0.99, 0.999])
@pytest.mark.parametrize("nu", ["bf16", "bf16_sr", "bf16x2", "int8"])
def test_the_second_moment_against_float64(b2, nu):
    """bfloat16 to the nearest fails from 0.99 on; every other codec follows."""
    steps = int(5 / (1 - b2))
    rng = np.random.default_rng(0)
    scale = np.concatenate([np.full(steps // 5, 8.0), np.ones(steps - steps // 5)])
    g = rng.normal(size=(steps, 8, 64)) * scale[:, None, None]  # it must come down again
    grads = {"w": jnp.asarray(g, jnp.float32)}
    tx = optim.scale_by_adam(b2=b2, nu=nu)
    params = {"w": jnp.zeros((8, 64), BF16)}
    state = tx.init(params)

    @jax.jit
    def run(state):
        return jax.lax.scan(lambda s, g: (tx.update(g, s)[1], None), state, grads)[0]

    state = run(state)
    got = np.float64(
        codecs.moment(nu, "nu", (8, 64)).decode({k: v["w"] for k, v in state.nu.items()})
    )
    want = np.zeros((8, 64))
    for row in np.asarray(grads["w"], np.float64):
        want = b2 * want + (1 - b2) * row * row
    error = np.abs(got / want - 1).mean()
    if nu == "bf16" and b2 >= 0.99:
        assert error > 0.09
    else:  # stochastic rounding is a random walk around the truth: 0.06 at 0.999
        assert error < {"bf16": 0.05, "bf16_sr": 0.08, "bf16x2": 1e-3, "int8": 0.1}[nu]


BYTES = {"light": 10, "plus": 12, "light_sr": 10, "exact": 14, "flash8": 7.125, "int16_8bit": 8.125}


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("faithful", [False, True])
def test_bytes_a_parameter(variant, faithful):
    """Live arrays: weights, gradient and state of a large matrix."""
    if faithful and variant not in ("light", "plus"):
        return
    params = {"w": jnp.zeros((512, 1024), BF16)}
    state = optim.collage_adamw(1e-3, variant=variant, faithful=faithful).init(params)
    size = params["w"].size
    total = (2 * tree.nbytes(params) + tree.nbytes(state)) / size
    assert total == pytest.approx(BYTES[variant], abs=0.01)


def test_bytes_of_what_it_is_compared_with():
    params = {"w": jnp.zeros((512, 1024), BF16)}
    plain = optax.adam(1e-3).init(params)
    assert (2 * tree.nbytes(params) + tree.nbytes(plain)) / 2**19 == pytest.approx(8, abs=0.01)
    master = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    wide = (master, optax.adam(1e-3).init(master))
    assert (2 * tree.nbytes(params) + tree.nbytes(wide)) / 2**19 == pytest.approx(16, abs=0.01)


OPTIMIZERS = {
    "plus": lambda lr: optim.collage_adamw(lr),
    "faithful": lambda lr: optim.collage_adamw(lr, faithful=True),
    "flash8": lambda lr: optim.collage_adamw(lr, variant="flash8"),
    "exact": lambda lr: optim.collage_adamw(lr, variant="exact"),
    "lion int16": lambda lr: optim.lowp_chain(optax.lion(lr), store="int16"),
    "sgd sr": lambda lr: optim.lowp_chain(optax.sgd(lr), store="sr"),
}
each = pytest.mark.parametrize("make", list(OPTIMIZERS.values()), ids=list(OPTIMIZERS))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def alike(a, b):
    """Equal but for one entry in a hundred, whose first moment was near a tie.

    Another program may contract a product and a sum, and the moment then rounds the other way: 2^-8
    of it, and so of a step of 1e-2.
    """

    def one(a, b):
        a, b = (np.asarray(x.astype(jnp.float32)) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=2.0**-7, atol=1e-2 * 2.0**-7)
        assert (a != b).mean() < 0.01

    jax.tree.map(one, a, b)


@each
def test_battery_under_wrappers_of_optax(make):
    """chain, masked, partition, apply_if_finite, MultiSteps: each does what it does to adam."""
    grads = gradients(4)
    alone, _ = train(make(1e-2), grads)
    assert all((np.asarray(a) != np.asarray(p)).any() for a, p in zip(
        jax.tree.leaves(alone), jax.tree.leaves(PARAMS), strict=True))  # fmt: skip
    alike(train(optax.chain(optax.identity(), make(1e-2)), grads)[0], alone)
    alike(train(optim.apply_if_finite(make(1e-2), 3), grads)[0], alone)

    only_a = {"a": {"kernel": True}, "b": {"scale": False}}
    rest = jax.tree.map(lambda x: not x, only_a)
    masked = optax.chain(optax.masked(make(1e-2), only_a), optax.masked(optax.set_to_zero(), rest))
    params, state = train(masked, grads)
    same(params["b"], PARAMS["b"])
    alike(params["a"], alone["a"])
    assert not any(x.shape == (128,) for x in jax.tree.leaves(state))

    labels = {"a": {"kernel": "low"}, "b": {"scale": "no"}}
    parted = optax.partition({"low": make(1e-2), "no": optax.set_to_zero()}, labels)
    params, state = train(parted, grads)
    alike(params, {"a": alone["a"], "b": PARAMS["b"]})

    doubled = jax.tree.map(lambda g: jnp.repeat(g, 2, axis=0), grads)
    every = optax.MultiSteps(make(1e-2), 2)
    alike(train(every, doubled)[0], alone)


@each
def test_battery_not_a_number_leaves_everything_alone(make):
    tx = optim.apply_if_finite(make(1e-2), 3)
    state = tx.init(PARAMS)
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), PARAMS)
    updates, after = tx.update(bad, state, PARAMS)
    same(optax.apply_updates(PARAMS, updates), PARAMS)
    same(after.inner_state, state.inner_state)


@each
def test_battery_schedules(make):
    """A schedule of a constant is the constant; one of zeros moves nothing."""
    grads = gradients(3)
    same(train(make(lambda _: 1e-2), grads)[0], train(make(1e-2), grads)[0])
    frozen, _ = train(make(lambda _: 0.0), grads)
    same(frozen, PARAMS)


def test_injected_numbers_stay_float32():
    """optax's own casts b2 = 0.999 to bfloat16's 1.0, and divides by 1 - 1."""
    grads = gradients(3)
    broken, _ = train(optax.inject_hyperparams(optax.adamw)(1e-2), grads)
    assert np.isnan(np.asarray(broken["b"]["scale"].astype(jnp.float32))).any()
    tx = optim.inject_hyperparams(optim.collage_adamw)(1e-2)
    params, state = train(tx, grads)
    assert state.hyperparams["b2"].dtype == jnp.float32
    want, _ = train(optim.collage_adamw(1e-2), grads)
    alike(params, want)


def meshed(params):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    specs = {"a": {"kernel": PartitionSpec("fsdp", "tensor")}, "b": {"scale": PartitionSpec()}}
    return jax.tree.map(lambda p, s: jax.device_put(p, NamedSharding(mesh, s)), params, specs)


@each
def test_battery_on_a_mesh(make):
    """The same bits as on one device; state beside its parameters; no collective."""
    grads = gradients(3)
    want, want_state = train(make(1e-2), grads)
    params, tx = meshed(PARAMS), make(1e-2)
    state = optim.init_sharded(tx, params)
    kernel = params["a"]["kernel"].sharding
    for x in jax.tree.leaves(state):
        if x.ndim == 2:
            assert x.sharding.is_equivalent_to(kernel, 2), x.shape
    got, got_state = train(tx, grads, params, state)
    same(got, want)
    same(got_state, want_state)

    step = jax.jit(lambda p, s, g: tx.update(g, s, p), donate_argnums=(0, 1))
    g = jax.tree.map(lambda p: jax.device_put(jnp.ones_like(p), p.sharding), params)
    text = step.lower(params, state, g).compile().as_text()
    for op in ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert f" {op}(" not in text and f" {op}-start(" not in text, op


@each
def test_battery_saved_and_restored(make, tmp_path):
    grads = gradients(6)
    first, second = (jax.tree.map(lambda g, a=a: g[a : a + 3], grads) for a in (0, 3))
    tx = make(1e-2)
    want, want_state = train(tx, grads)
    params, state = train(tx, first)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "at3", (params, jax.tree.leaves(state)))
        saver.wait_until_finished()
        params, leaves = saver.restore(tmp_path / "at3", (params, jax.tree.leaves(state)))
    state = jax.tree.unflatten(jax.tree.structure(state), leaves)
    got, got_state = train(tx, second, params, state)
    same(got, want)
    same(got_state, want_state)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_from_a_float32_master_and_back(variant):
    w = {"w": jnp.asarray(RNG.normal(size=(16, 64)) * 0.02, jnp.float32)}
    mu = {"w": jnp.asarray(RNG.normal(size=(16, 64)) * 0.1, jnp.float32)}
    nu = {"w": jnp.square(mu["w"]) * 3 + 1e-4}
    master = optim.Master(w, mu, nu, jnp.int32(41))
    tx = optim.collage_adamw(1e-3, variant=variant)
    params, state = optim.from_master(tx, master, variant=variant)
    assert params["w"].dtype == BF16 and int(state.inner[0].count) == 41
    back = optim.to_master(params, state, variant=variant)
    near = {"exact": (0, 0, 0), "plus": (2**-17, 2**-8, 2**-17), "flash8": (2**-15, 0.05, 0.05)}
    for got, want, tolerance in zip(
        back[:3], master[:3], near.get(variant, (2**-15, 0.05, 0.05)), strict=True
    ):
        size = np.abs(np.asarray(want["w"]))
        slack = tolerance * np.maximum(size, 0.2 * size.max())
        assert (np.abs(np.asarray(got["w"] - want["w"])) <= slack).all()
    assert int(back.count) == 41
    grads = {"w": jnp.ones((16, 64), BF16)}
    jax.eval_shape(tx.update, grads, state, params)  # it goes on from there


def test_eight_bits_never_make_a_second_moment_vanish():
    """mu of an entry a thousand times smaller than its group's largest must not meet nu = 0."""
    g = np.ones((1, 32), np.float32)
    g[0, 1:] = 1e-3
    tx = optim.scale_by_adam(mu="int8", nu="int8")
    params = jnp.zeros((1, 32), BF16)
    state = tx.init(params)
    for _ in range(10):
        u, state = jax.jit(tx.update)(jnp.asarray(g), state)
        assert np.isfinite(np.asarray(u)).all() and np.abs(np.asarray(u)).max() < 3.5


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match=r"unknown variant 'lite'.*'light'"):
        optim.collage_adamw(1e-3, variant="lite")
    with pytest.raises(ValueError, match="'light' and 'plus', not 'exact'"):
        optim.collage_adamw(1e-3, variant="exact", faithful=True)
    with pytest.raises(ValueError, match="metrics are not kept"):
        optim.collage_adamw(1e-3, faithful=True, metrics=True)
    with pytest.raises(ValueError, match=r"nu: unknown codec 'fp8'.*'bf16x2'"):
        optim.scale_by_adam(nu="fp8")


def test_rounding_comes_on_float32_alone():
    """reduce-precision on a bfloat16 operand is a no-op that a compiler may drop."""
    tx = optim.collage_adamw(1e-3)
    text = jax.jit(tx.update).lower(PARAMS, tx.init(PARAMS), PARAMS).as_text()
    lines = [line for line in text.splitlines() if "reduce_precision" in line]
    assert lines and all("xf32>" in line.split(":")[-1] for line in lines)
    assert mcf.round_to(jnp.float32(1 + 2.0**-9), BF16) == 1

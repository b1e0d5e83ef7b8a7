"""Error-free arithmetic on narrow floats, against float64, in every setting that could break it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_eff.optim import mcf

BF16 = jnp.bfloat16


def hard(seed=0, n=20_000, dtype=BF16):
    """Pairs of narrow values: random, near in size, cancelling, tied, huge ratios, 0, subnormal."""
    rng = np.random.default_rng(seed)
    top = 60 if dtype == BF16 else 4
    a = rng.normal(size=n) * 2.0 ** rng.integers(-top, top, n)
    b = a * 2.0 ** rng.integers(-12, 12, n) * rng.choice([-1, 1], n) * rng.uniform(0.5, 1, n)
    b[: n // 8] = -a[: n // 8] * (1 + 2.0**-7 * rng.integers(-3, 4, n // 8))
    a[n // 8 : n // 4] = 1.0 + 2.0**-7 * rng.integers(0, 128, n // 8)
    b[n // 8 : n // 4] = 2.0**-8 * rng.choice([-1, 1], n // 8)  # half a unit in the last place
    b[n // 4 : n // 4 + 50], a[n // 4 + 50 : n // 4 + 100] = 0.0, 0.0
    tiny = float(jnp.finfo(dtype).smallest_subnormal)
    a[-50:] = tiny * rng.integers(1, 100, 50)
    a, b = (
        np.asarray(jnp.asarray(x, jnp.float32).astype(dtype).astype(jnp.float32)) for x in (a, b)
    )
    return a, b


def both(fn, *args):
    """fn compiled: as it is, mapped, in a loop, and inside a program that widens results."""

    def widened(*args):
        return [x.astype(BF16).astype(jnp.float32) for x in fn(*args)]

    def looped(*args):
        return jax.lax.scan(lambda c, x: (c, fn(*x)), 0, args)[1]

    return [jax.jit(f)(*args) for f in (fn, widened, jax.vmap(fn), looped)]


def exact(got, want):
    """hi + lo is what it must be, but for what the device flushes to 0; and hi is the nearest."""
    hi, lo = (np.asarray(x, np.float64) for x in got)
    off = hi + lo != want
    assert (np.abs(hi + lo - want)[off] < 2.0**-126).all(), want[off]
    normal = np.abs(want) >= 2.0**-126
    np.testing.assert_array_equal(hi[normal], rounded(want)[normal])
    assert off.mean() < 0.01


def rounded(x):
    """float64 to bfloat16, ties to even, by arithmetic."""
    step = 2.0 ** (np.floor(np.log2(np.abs(x), where=x != 0, out=np.full_like(x, -200.0))) - 7)
    step = np.maximum(step, 2.0**-133)
    return np.rint(x / step) * step


def test_two_sum_is_exact_in_any_order():
    a, b = hard()
    with np.errstate(divide="ignore"):
        for got in both(mcf.two_sum, a, b):
            exact(got, a.astype(np.float64) + b)


def test_fast_two_sum_is_exact_where_the_first_is_larger():
    a, b = hard(1)
    a, b = np.where(abs(a) >= abs(b), a, b), np.where(abs(a) >= abs(b), b, a)
    for got in both(mcf.fast_two_sum, a, b):
        exact(got, a.astype(np.float64) + b)


def test_two_prod_is_exact():
    a, b = hard(2)
    product = np.abs(a.astype(np.float64) * b)
    kept = (product > 2.0**-100) & (product < 2.0**120)  # so that the error does not underflow
    kept &= np.minimum(np.abs(a), np.abs(b)) >= 2.0**-126
    for got in both(mcf.two_prod, a[kept], b[kept]):
        exact(got, a[kept].astype(np.float64) * b[kept])


def test_growing_adds_a_thousand_small_numbers():
    """Each is below half a unit in the last place of the sum: in bfloat16 alone nothing happens."""
    c = jnp.full(64, 2.0**-12)

    @jax.jit
    def total(x, y):
        return jax.lax.fori_loop(0, 1000, lambda _, xy: mcf.grow(*xy, c), (x, y))

    x, y = total(jnp.ones(64), jnp.zeros(64))
    np.testing.assert_allclose(np.float64(x) + np.float64(y), 1 + 1000 * 2.0**-12, rtol=2.0**-16)
    naive = jax.jit(lambda x: jax.lax.fori_loop(0, 1000, lambda _, x: x + c.astype(BF16), x))(
        jnp.ones(64, BF16)
    )
    assert (naive == 1).all()


@pytest.mark.parametrize("b2", [0.95, 0.98, 0.99, 0.999])
def test_an_average_over_a_constant_expansion_follows_float64(b2):
    rng = np.random.default_rng(0)
    steps = int(6 / (1 - b2))
    g = np.asarray(jnp.asarray(rng.normal(size=(steps, 32)), BF16).astype(jnp.float32))

    @jax.jit
    def average(g):
        def body(v, g):
            v = mcf.scale(*v, *mcf.constant(b2))
            return mcf.grow(*v, mcf.round_to((1 - b2) * g * g, BF16)), None

        return jax.lax.scan(body, (jnp.zeros(32), jnp.zeros(32)), g)[0]

    want = np.zeros(32)
    for row in g.astype(np.float64):
        want = b2 * want + (1 - b2) * row * row
    hi, lo = average(g)
    np.testing.assert_allclose(np.float64(hi) + np.float64(lo), want, rtol=2e-3)


@pytest.mark.parametrize("dtype", [BF16, jnp.float16])
def test_rounding_is_the_cast_of_jax_subnormals_and_ties_included(dtype):
    rng = np.random.default_rng(3)
    x = (rng.normal(size=50_000) * 2.0 ** rng.integers(-30, 16, 50_000)).astype(np.float32)
    x = np.concatenate([x, [0.0, -0.0, np.inf, -np.inf, 65504, 65520, 2.0**-24, 2.0**-25]])
    x = x.astype(np.float32)
    got = jax.jit(lambda x: mcf.round_to(x, dtype))(x)
    with np.errstate(over="ignore"):
        want = x.astype(jnp.dtype(dtype)).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(got), want)


def test_an_expansion_keeps_sixteen_bits():
    x = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    hi, lo = jax.jit(mcf.split)(x)
    assert hi.dtype == lo.dtype == BF16
    np.testing.assert_array_equal(hi, x.astype(jnp.dtype(BF16)))
    np.testing.assert_allclose(np.asarray(jax.jit(mcf.join)(hi, lo)), x, rtol=2.0**-17)


def test_stochastic_rounding_is_right_on_average_and_the_same_on_any_mesh():
    x = jnp.full((256, 512), 1 + 2.0**-10)  # an eighth of the way to the next number
    words = (7, jnp.int32(3))
    fn = jax.jit(lambda x: mcf.stochastic(x, mcf.noise(x.shape, *words)))
    got = np.asarray(fn(x))
    assert set(np.unique(got)) == {np.float32(1), np.float32(1 + 2.0**-7)}
    share = (got > 1).mean()
    assert abs(share - 1 / 8) < 4 * np.sqrt(1 / 8 * 7 / 8 / got.size)
    up = got > 1
    assert abs(np.corrcoef(up[:, 1:].ravel(), up[:, :-1].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(up[1:].ravel(), up[:-1].ravel())[0, 1]) < 0.02
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))
    np.testing.assert_array_equal(np.asarray(fn(jax.device_put(x, where))), got)
    later = jax.jit(lambda x: mcf.stochastic(x, mcf.noise(x.shape, 7, jnp.int32(4))))(x)
    assert (np.asarray(later) != got).any()


def test_bias_corrections_do_not_cancel():
    t = jnp.arange(1, 2000, 37)
    for b in (0.9, 0.999, 0.0):
        want = 1 - np.float64(b) ** np.asarray(t)
        np.testing.assert_allclose(mcf.one_minus_power(b, t), want, rtol=3e-7)
    np.testing.assert_allclose(
        mcf.one_minus_power(jnp.float32(0.9), t), 1 - 0.9 ** np.asarray(t), rtol=1e-5
    )

"""Codes in blocks: bounds, odd sizes, what is not finite."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_eff.parallel.codec import Blocks, decode, encode, rotate

INT4 = Blocks(4, 64)
ALL = {
    "int8": Blocks(8, 64),
    "int4": INT4,
    "hadamard": Blocks(4, 64, hadamard=True),
    "clipped": Blocks(4, 64, shrink=(1.0, 0.9, 0.8)),
}


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@jax.jit(static_argnums=(1,))
def _sent(x, blocks):
    return decode(encode(x, blocks), x.shape[-1], blocks, jnp.float32)


def sent(x, blocks):
    return np.asarray(_sent(x, blocks))


def pieces(x, blocks):
    """[blocks, width] with zeros at the end, as a slow twin of the layout."""
    count, width = blocks.layout(x.size)
    out = np.zeros(count * width, np.float32)
    out[: x.size] = x
    return out.reshape(count, width)


def scales(x, blocks):
    """The scale of each block: its largest number over the largest code."""
    return np.abs(pieces(x, blocks)).max(-1) / (2 ** (blocks.bits - 1) - 1)


@pytest.mark.parametrize("n", [1, 31, 257])
@pytest.mark.parametrize("bits", [8, 4])
def test_no_number_is_off_by_more_than_half_a_code(bits, n):
    blocks = Blocks(bits, 64)
    x = numbers(n)
    off = pieces(np.abs(sent(x, blocks) - x), blocks)
    # Scales are rounded up to 8 bits of mantissa.
    assert (off <= scales(x, blocks)[:, None] * 0.5 * (1 + 2**-7) + 1e-7).all()
    assert n == 1 or off.max() > 0


@pytest.mark.parametrize("name", ALL)
def test_bytes_are_as_many_as_promised_and_of_one_type(name):
    blocks = ALL[name]
    for n in (1, 63, 64, 65, 300):
        payload = jax.eval_shape(lambda n=n: encode(jnp.zeros((3, n)), blocks))
        assert payload.shape == (3, blocks.nbytes(n)) and payload.dtype == jnp.uint8
        count, width = blocks.layout(n)
        assert n <= count * width and width <= blocks.size
    assert blocks.nbytes(128) == 128 * blocks.bits // 8 + 2 * 2


@pytest.mark.parametrize(("bits", "dtype"), [(16, jnp.bfloat16), (32, jnp.float32)])
def test_exact_numbers_travel_as_their_bytes(bits, dtype):
    x = numbers(2, 33)
    np.testing.assert_array_equal(sent(x, Blocks(bits)), x.astype(dtype).astype(np.float32))
    assert Blocks(bits).nbytes(33) == 33 * bits // 8


def test_hadamard_is_orthogonal_and_its_own_inverse():
    for n in (2, 8, 64, 256):
        x = jnp.asarray(numbers(3, n))
        once = rotate(x)
        np.testing.assert_allclose(np.linalg.norm(once), np.linalg.norm(x), rtol=1e-5)
        np.testing.assert_allclose(rotate(once), x, atol=1e-5)
        first = np.asarray(rotate(jnp.eye(n)))
        np.testing.assert_allclose(np.abs(first), n**-0.5, rtol=1e-5)
    with pytest.raises(ValueError, match="power of 2"):
        rotate(jnp.zeros(12))


def test_hadamard_helps_where_there_are_outliers():
    x = np.random.default_rng(0).standard_t(3, 6400).astype(np.float32)
    off = {k: np.linalg.norm(sent(x, b) - x) for k, b in ALL.items()}
    assert off["hadamard"] < 0.75 * off["int4"]
    assert off["int8"] < 0.1 * off["int4"]


def test_clipping_never_has_the_larger_error():
    x = numbers(20, 64)
    plain, clipped = (((sent(x, ALL[k]) - x) ** 2).sum(-1) for k in ("int4", "clipped"))
    assert (clipped <= plain).all() and (clipped < plain).mean() > 0.5


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible_and_in_its_block(name, bad):
    x = numbers(128)
    x[70] = bad
    y = sent(x, ALL[name])
    assert np.isnan(y[64:]).all() and np.isfinite(y[:64]).all()


@pytest.mark.parametrize("name", ALL)
def test_zeros_and_extremes(name):
    blocks = ALL[name]
    np.testing.assert_array_equal(sent(np.zeros(70, np.float32), blocks), 0)
    for size in (1e-30, 1e30):
        x = numbers(64) * np.float32(size)
        assert np.linalg.norm(sent(x, blocks) / size - x / size) < 0.3 * np.linalg.norm(x / size)


@pytest.mark.parametrize(
    ("change", "word"),
    [(dict(bits=5), "4, 8, 16 or 32"), (dict(size=7), "even"), (dict(shrink=()), "factors"),
     (dict(size=48, hadamard=True), "power of two")],
)  # fmt: skip
def test_what_is_refused(change, word):
    with pytest.raises(ValueError, match=word):
        dataclasses.replace(INT4, **change)


def test_bytes_of_another_length_are_refused():
    with pytest.raises(ValueError, match="64 elements"):
        decode(jnp.zeros(33, jnp.uint8), 64, INT4, jnp.float32)
    with pytest.raises(ValueError, match="at least 1"):
        INT4.layout(0)

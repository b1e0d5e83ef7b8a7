"""Kernels, run step by step on a CPU, against chunks in XLA and against one formula."""

import functools
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import orders
import pytest
from jax.sharding import PartitionSpec

from jaxrl_eff.models import attention
from jaxrl_eff.parallel.attention import blockwise, flash, flash_gpu, kernels, ring
from jaxrl_eff.parallel.attention.blockwise import Queries, Where
from jaxrl_eff.parallel.attention.context import Mask
from jaxrl_eff.parallel.attention.on_mesh import on_mesh
from tests.parallel.attention.test_ring import line, packed, value_and_gradients


def interpreted(kernel):
    """The kernel in Pallas's interpret mode, on any device; slow."""
    forward, backward = (
        functools.partial(f, interpret=True) for f in (kernel.forward, kernel.backward)
    )
    return kernel._replace(forward=forward, backward=backward)


DIM = {"triton": 16, "mosaic": 64}
KERNELS = {
    # Short chunks make many of them; a TPU would not take them.
    kernel.name: interpreted(kernel)._replace(chunk=lambda _: 16)
    for kernel in (kernels.TRITON, kernels.MOSAIC)
}
WAYS = {"ring": ring.ring, "gathered": ring.gathered, "ulysses": ring.ulysses}


def operands(rng, name, dtype, rows=2, queries=48, keys=64, groups=2):
    """Folded q, dout, kv and where of packed rows, with more keys than queries."""
    shapes = [(rows, n, h, DIM[name]) for n, h in ((queries, 2 * groups),) * 2 + ((keys, 2),) * 2]
    q, dout, k, v = (
        blockwise.fold(jnp.asarray(rng.normal(size=shape), dtype), 2, 16) for shape in shapes
    )  # fmt: skip
    where = [
        blockwise.fold_where(*map(jnp.asarray, packed(rng, rows, length)), 16)
        for length in (queries, keys)
    ]  # fmt: skip
    return q, dout, jnp.stack([k, v], axis=1), Where(*where)


@pytest.mark.parametrize("window, softcap", [(None, None), (7, 2.0)])
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_goes_on_from_what_was_met_as_chunks_in_xla_do(name, window, softcap):
    kernel, slow = KERNELS[name], kernels.xla()
    q, dout, kv, where = operands(np.random.default_rng(0), name, jnp.float32)
    where = where._replace(window=None if window is None else jnp.int32(window))

    def forward(way, *met):
        return jax.jit(lambda *met: way.forward(met, q, kv, where, softcap))(*met)

    def before_it():
        others = where._replace(k=where.k[::-1] * 0 + 1)
        return slow.forward(blockwise.nothing(q), q, kv[::-1], others, softcap)

    met = jax.jit(before_it)()
    want, got = (forward(way, *met) for way in (slow, kernel))
    for x, y in zip(want, got, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5)
    out, lse = want
    queries, before = Queries(q, dout, lse, (out * dout).sum(axis=-1)), jnp.ones_like(q)
    want, got = (
        jax.jit(lambda way=way: way.backward(before, queries, kv, where, softcap))()
        for way in (slow, kernel)
    )  # fmt: skip
    for x, y in zip(want, got, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", KERNELS)
def test_a_query_without_keys_has_met_nothing(name):
    q, _, kv, where = operands(np.random.default_rng(1), name, jnp.float32)
    for empty in (where._replace(q=where.q * 0), where._replace(k=where.k * 0)):
        out, lse = KERNELS[name].forward(blockwise.nothing(q), q, kv, empty, None)
        assert (out == 0).all() and (lse == np.float32(blockwise.NEG)).all()


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_does_not_touch_chunks_outside_its_bounds(name):
    """Whatever is in them, which would otherwise spread by a weight of 0."""
    q, dout, kv, _ = operands(np.random.default_rng(2), name, jnp.float32, 1, 64, 64)
    segment = jnp.repeat(jnp.array([1, 2]), 32)[None]
    position = jnp.tile(jnp.arange(32), 2)[None]
    where = Where(*[blockwise.fold_where(position, segment, 16)] * 2)
    spans = flash.bounds(where)
    np.testing.assert_array_equal(spans.of_queries[:2, :, 0], [[0, 0, 2, 2], [1, 2, 3, 4]])
    np.testing.assert_array_equal(spans.of_keys[:2, :, 0], [[0, 1, 2, 3], [2, 2, 4, 4]])
    out, lse = KERNELS[name].forward(
        blockwise.nothing(q), q, kv.at[2].set(np.nan), where, None
    )  # fmt: skip
    assert np.isfinite(out[:2]).all() and np.isnan(out[2:]).any()
    queries = Queries(q.at[0].set(np.nan), dout, jnp.zeros_like(lse), lse * 0)
    dq, dkv = KERNELS[name].backward(jnp.zeros_like(q), queries, kv, where, None)
    assert np.isfinite(dkv[1:]).all() and np.isnan(dkv[0]).any()
    assert np.isfinite(dq[1:]).all()


def test_bounds_hold_all_that_is_seen_and_narrow_with_a_window():
    rng = np.random.default_rng(3)
    for window in (None, jnp.int32(1), jnp.int32(9)):
        q_where, k_where = (
            blockwise.fold_where(*map(jnp.asarray, packed(rng, 3, n)), 4) for n in (40, 52)
        )
        spans = flash.bounds(Where(q_where, k_where, window))
        seen = jax.vmap(
            lambda q, k=k_where, w=window: jax.vmap(lambda k: Mask(*q, *k, w).seen())(k)
        )
        seen = np.asarray(jax.jit(seen)(q_where))
        some, every = seen.any((3, 4)), seen.all((3, 4))
        for (low, high, first, end), any_, all_ in (
            (spans.of_queries, some, every),
            (spans.of_keys, some.swapaxes(0, 1), every.swapaxes(0, 1)),
        ):
            low, high, first, end = map(np.asarray, (low, high, first, end))
            at = np.arange(any_.shape[1])[None, :, None]
            inside = (at >= low[:, None]) & (at < high[:, None])
            assert not (any_ & ~inside).any()
            assert (low <= first).all() and (first <= end).all() and (end <= high).all()
            unmasked = (at >= first[:, None]) & (at < end[:, None])
            assert not (unmasked & ~all_).any()
            assert (unmasked.any(1) == all_.any(1)).all()
            hull = [any_.argmax(1), any_.shape[1] - any_[:, ::-1].argmax(1)]
            for bound, exact in zip((low, high), hull, strict=True):
                assert (bound == np.where(any_.any(1), exact, 0)).all()  # of tokens in order
    document = jnp.arange(64)[None]
    where = blockwise.fold_where(document, document * 0 + 1, 8)
    low, high = flash.bounds(Where(where, where, jnp.int32(9))).of_queries[:2, :, 0]
    assert (high - low <= 2).all()
    low, high, first, end = flash.bounds(Where(where, where)).of_queries[..., 0]
    np.testing.assert_array_equal(end - first, np.arange(8))  # all but the diagonal


@pytest.mark.parametrize(
    "own, met", [(8, 4), *(pytest.param(*n, marks=pytest.mark.slow) for n in ((4, 16), (16, 8)))]
)
def test_how_a_gpu_divides_its_work_changes_nothing(own, met, monkeypatch):
    """Tiles of a chunk, documents longer than several of them, and a window."""
    rng = np.random.default_rng(7)
    q, dout, kv, _ = operands(rng, "triton", jnp.float32, 1, 96, 128)
    q = q * DIM["triton"] ** -0.5
    segment = jnp.repeat(jnp.array([1, 2, 0]), jnp.array([70, 50, 8]))[None]
    position = jnp.concatenate([jnp.arange(70), jnp.arange(50), jnp.arange(8)])[None]
    where = Where(
        *(blockwise.fold_where(position[:, :n], segment[:, :n], 16) for n in (96, 128))
    )  # fmt: skip
    tile = flash_gpu.Tile(own, met, 4, 2)
    monkeypatch.setattr(flash_gpu, "tiles", lambda *_: flash_gpu.Tiles(tile, tile, tile))
    for window in (None, jnp.int32(40)):
        found = []
        for way in (kernels.xla(), KERNELS["triton"]):
            found.append(both_ways(way, q, dout, kv, where._replace(window=window)))
        for x, y in zip(*found, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=2e-5)


@functools.partial(jax.jit, static_argnums=0)
def both_ways(way, q, dout, kv, where):
    out, lse = way.forward(blockwise.nothing(q), q, kv, where, None)
    queries = Queries(q, dout, lse, (out * dout).sum(axis=-1))
    return out, *way.backward(dout, queries, kv, where, None)


def unchecked(attend, parts):
    """As `on_mesh`; interpreted kernels cannot say what differs between devices."""
    pieces = PartitionSpec(None, "seq")

    def attention(q, k, v, mask, **how):
        return jax.shard_map(
            lambda *args: attend(*args, **how), mesh=line(parts),
            in_specs=(*[pieces] * 3, Mask(*[pieces] * 4, PartitionSpec())), out_specs=pieces,
            check_vma=False,
        )(q, k, v, mask)  # fmt: skip

    return attention


@pytest.mark.parametrize(
    "name, way, parts, layout",
    [
        ("triton", "ring", 4, orders.striped),
        ("mosaic", "ring", 2, orders.zigzag),
        pytest.param("triton", "ulysses", 2, orders.zigzag, marks=pytest.mark.slow),
        ("mosaic", "gathered", 4, orders.striped),
        pytest.param("mosaic", "ring", 1, orders.contiguous, marks=pytest.mark.slow),
    ],
)
def test_attention_by_a_kernel_on_many_devices_is_that_on_one(name, way, parts, layout):
    rng, length = np.random.default_rng(4), 72
    fast = unchecked(WAYS[way]("seq", kernel=KERNELS[name]), parts)
    position, segment = packed(rng, 2, length)
    position[0], segment[0] = np.arange(length), 1
    shapes = [(2, length, n, DIM[name]) for n in (4, 2, 2, 4)]
    arrays = *(rng.normal(size=s).astype(np.float32) for s in shapes), position, segment
    for window in (None, np.int32(20)):
        want = value_and_gradients(attention.plain, 0.7)(*arrays, window)
        to = layout(length, parts)
        got = value_and_gradients(fast, 0.7)(*[to.place(x) for x in arrays], window)
        for x, y in zip(want, got, strict=True):
            np.testing.assert_allclose(x, to.restore(np.asarray(y)), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", KERNELS)
def test_half_precision_errs_no_more_than_chunks_in_xla(name):
    rng = np.random.default_rng(5)
    q, dout, kv, where = operands(rng, name, jnp.bfloat16)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def all_of(way, cast):
        a, b, c = (cast(x) for x in (q, kv, dout))
        out, lse = way.forward(blockwise.nothing(a), a, b, where, None)
        queries = Queries(a, c, lse, (out * c.astype(jnp.float32)).sum(axis=-1))
        return out, *way.backward(jnp.zeros_like(out), queries, b, where, None)

    exact = all_of(kernels.xla(), lambda x: x.astype(jnp.float32))
    errors = [
        [float(abs(x - y).max()) for x, y in zip(all_of(way, lambda x: x), exact, strict=True)]
        for way in (kernels.xla(), KERNELS[name])
    ]
    assert (np.array(errors[1]) <= 2 * np.array(errors[0]) + 1e-6).all(), errors


def test_what_does_not_fit_a_kernel_is_computed_by_xla():
    """Heads of 80 numbers, which is no power of two, and float64."""
    for dim, dtype, fits in (
        (80, "float32", False),
        (64, "float64", False),
        (64, "bfloat16", True),
        (256, "bfloat16", True),
        (256, "float32", False),
    ):
        assert kernels.TRITON.fits(dim, dtype) == fits
    refuses = kernels.TRITON._replace(forward=None, backward=None)  # would fail if called
    x = np.random.default_rng(6).normal(size=(1, 8, 2, 80)).astype(np.float32)
    at, one = np.arange(8, dtype=np.int32)[None], np.ones((1, 8), np.int32)
    attend = on_mesh(ring.ring(kernel=refuses), line(2))
    got = value_and_gradients(attend, None)(x, x, x, x, at, one, None)
    want = value_and_gradients(attention.plain, None)(x, x, x, x, at, one, None)
    for a, b in zip(want, got, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


def test_gpus_with_little_shared_memory_have_smaller_tiles(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability="8.9")])
    for dim, dtype, fits in ((128, "bfloat16", True), (256, "bfloat16", False)):
        assert flash_gpu.fits(dim, dtype) == fits
    for kernel in flash_gpu.tiles(128, "bfloat16"):
        # Keys and values of all stages, and the queries.
        held = (2 * kernel.stages * kernel.met + kernel.own) * 128 * 2
        assert held <= 99 * 1024


@pytest.mark.parametrize("kernel", [kernels.TRITON, kernels.MOSAIC], ids=lambda k: k.name)
def test_a_kernel_is_checked_on_the_device_before_it_is_used(kernel, monkeypatch, caplog):
    good = interpreted(kernel)
    assert kernels.error_of(good) < 2e-2
    monkeypatch.setitem(kernels._OF_PLATFORM, "cpu", good)

    def chosen(kernel):
        kernels.best.cache_clear()
        monkeypatch.setitem(kernels._OF_PLATFORM, "cpu", kernel)
        found = []
        jax.jit(lambda x: (found.append(kernels.best()), x)[1])(1.0)  # asked while tracing
        return found[0].name

    try:
        assert chosen(good) == kernel.name
        with caplog.at_level(logging.WARNING):
            broken = good._replace(forward=lambda met, *_: met)
            assert chosen(broken) == "xla" and "wrong by" in caplog.text
            assert chosen(kernel) == "xla" and "does not run here" in caplog.text
    finally:
        kernels.best.cache_clear()


@pytest.mark.parametrize("kernel", [kernels.TRITON, kernels.MOSAIC], ids=lambda k: k.name)
def test_kernels_lower_for_the_device_that_they_are_for(kernel):
    """As far as JAX alone goes: what a driver makes of it only that device shows."""
    platform = {"triton": "cuda", "mosaic": "tpu"}[kernel.name]
    shapes = [(1, 1024, n, 128) for n in (4, 2, 2)]
    q, k, v = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes)
    where = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
    device = jax.sharding.AbstractDevice(
        {"cuda": "NVIDIA H100 80GB HBM3", "tpu": "TPU v5p"}[platform], 1, platform
    )
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((2,), ("seq",), auto, abstract_device=device)

    def loss(q, k, v, position, segment):
        attend = on_mesh(ring.ring(kernel=kernel), mesh)
        mask = Mask(position, segment, position, segment, 300)
        out = attend(q, k, v, mask, scale=0.1, softcap=20.0)
        return (out.astype(jnp.float32) ** 2).sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, v, where, where)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    for name in ("ring_forward", "ring_backward_q", "ring_backward_kv"):
        assert name in text

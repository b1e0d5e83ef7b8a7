import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_eff import models
from jaxrl_eff.models import LMConfig, Rope, layers
from jaxrl_eff.rollout import cache

# Every option at once: each layer differs, and nothing divides what it should not.
FULL = LMConfig(
    vocab=24, layers=3, width=16, heads=4, kv_heads=2, head_dim=6, ffn=20, norm_offset=True,
    post_norms=True, qk_norm=True, qkv_bias=True, o_bias=True, mlp_bias=True, act="gelu_tanh",
    rope=Rope(kind="llama3", theta=1000.0, factor=4.0, original_length=16),
    rope_local=Rope(theta=100.0), tie=True, embed_scale=True, query_scale=0.3, attn_softcap=5.0,
    final_softcap=4.0, window=3, windowed=(True, False, True), init_std=0.3,
)  # fmt: skip
PLAIN = LMConfig(
    vocab=24, layers=2, width=16, heads=4, kv_heads=2, head_dim=8, ffn=20, init_std=0.3
)


def rows(cfg, batch=2, length=10, seed=1):
    tokens = jax.random.randint(jax.random.key(seed), (batch, length), 0, cfg.vocab)
    position = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    return tokens, position, jnp.ones_like(tokens)


init = jax.jit(models.init, static_argnums=0)
apply = functools.partial(jax.jit, static_argnums=0)(
    lambda cfg, params, data, memory=None: models.apply(cfg, params, *data, cache=memory)
)
logprobs = jax.jit(lambda params, data: models.token_logprobs(FULL, params, *data))


def loss(cfg, params, data):
    logp, spread = models.token_logprobs(cfg, params, *data)
    return logp.sum() + 0.1 * spread.sum()


@pytest.fixture(scope="module")
def full():
    return init(FULL, jax.random.key(0))


def test_packed_sequences_do_not_see_each_other(full):
    a, b = rows(FULL, 1, 6), rows(FULL, 1, 4, seed=2)
    packed = [jnp.concatenate([x, y], axis=1) for x, y in zip(a, b, strict=True)]
    packed[2] = packed[2].at[0, 6:].set(2)
    together = logprobs(full, packed)[0]
    apart = [logprobs(full, x)[0] for x in (a, b)]
    np.testing.assert_allclose(together, jnp.concatenate(apart, axis=1), atol=1e-5)
    assert together[0, 0] == together[0, 6] == 0


def test_padding_changes_nothing(full):
    tokens, position, segment = rows(FULL, 1, 6)
    short = logprobs(full, (tokens, position, segment))
    padded = [jnp.pad(x, ((0, 0), (0, 3))) for x in (tokens, position, segment)]
    padded[0] = padded[0].at[0, 6:].set(7)
    long = logprobs(full, padded)
    for x, y in zip(short, long, strict=True):
        np.testing.assert_allclose(x, y[:, :6], atol=1e-5)
        assert (y[:, 6:] == 0).all()


def test_unrolled_and_unstacked_layers_are_the_scanned_ones(full):
    data = rows(FULL)
    scanned, _ = apply(FULL.replace(unroll=1), full, data)
    unrolled, _ = apply(FULL.replace(unroll=3), full, data)
    unstacked, _ = apply(FULL, models.unstack_layers(FULL, full), data)
    np.testing.assert_allclose(scanned, unrolled, atol=1e-5)
    np.testing.assert_allclose(scanned, unstacked, atol=1e-5)


def test_parameters_narrowed_beforehand_give_the_same_bits(full):
    cfg = FULL.replace(dtype="bfloat16")
    narrow = models.cast_for_decode(cfg, full)
    kinds = {x.dtype.name for x in jax.tree.leaves(narrow)}
    assert kinds == {"bfloat16", "float32"}  # norms are used in float32
    wide, _ = apply(cfg, full, rows(cfg))
    got, _ = apply(cfg, narrow, rows(cfg))
    np.testing.assert_array_equal(wide, got)


def test_logits_in_half_precision_have_the_gradient_of_float32(full):
    """The backward products have narrow operands; float32 is the slow twin."""
    data = rows(PLAIN, 4, 16)
    params = init(PLAIN, jax.random.key(3))
    grads = {
        dtype: jax.jit(jax.grad(lambda p, d=dtype: loss(PLAIN.replace(dtype=d), p, data)))(params)
        for dtype in ("float32", "bfloat16")
    }
    exact, half = (g["unembed"]["kernel"] for g in grads.values())
    assert half.dtype == jnp.float32
    assert jnp.linalg.norm(half - exact) < 0.02 * jnp.linalg.norm(exact)


@pytest.mark.parametrize("remat", ["full", "dots", "attention", "outputs", "host"])
def test_recomputing_changes_no_gradient(full, remat):
    data, grad = rows(FULL), jax.jit(jax.grad(loss, 1), static_argnums=0)
    expected = grad(FULL.replace(unroll=1), full, data)
    got = grad(FULL.replace(unroll=1, remat=remat), full, data)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), expected, got)


@pytest.mark.parametrize("chunk", [3, 4])
def test_an_mlp_in_pieces_is_the_mlp(full, chunk):
    data, grad = rows(FULL), jax.jit(jax.grad(loss, 1), static_argnums=0)
    expected = grad(FULL.replace(unroll=1), full, data)
    got = grad(FULL.replace(unroll=1, mlp_chunk=chunk), full, data)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), expected, got)


def test_memory_falls_from_rung_to_rung():
    """None, all but attention's outputs, all; and an MLP in pieces needs less at once."""
    cfg = LMConfig(vocab=24, layers=4, width=32, heads=4, kv_heads=2, head_dim=8, ffn=512, unroll=1)
    shapes = models.abstract(cfg)
    x = jax.ShapeDtypeStruct((2, 512), jnp.int32)

    def needs(**changes):
        of = cfg.replace(**changes)
        run = jax.jit(jax.grad(lambda p, *row: models.apply(of, p, *row)[0].sum()))
        return run.lower(shapes, x, x, x).compile().memory_analysis().temp_size_in_bytes

    none, outputs, full = (needs(remat=r) for r in ("none", "outputs", "full"))
    assert none > 1.5 * outputs > 1.5 * full
    assert needs(remat="full", mlp_chunk=64) < 0.9 * full


def test_gated_units_have_the_gradient_of_their_formula(key):
    gate, up = jax.random.normal(key, (2, 3, 5))
    for name, act in [("silu", nn.silu), ("gelu_tanh", functools.partial(nn.gelu))]:
        fast = lambda g, u, name=name: layers._gated(name, g, u)  # noqa: E731
        got = jax.jit(jax.grad(lambda *x: (fast(*x) ** 2).sum(), (0, 1)))(gate, up)  # noqa: B023
        want = jax.grad(lambda g, u: ((act(g) * u) ** 2).sum(), (0, 1))  # noqa: B023
        want = jax.jit(want)(gate, up)
        for x, y in zip(got, want, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("stacked", [True, False])
def test_reading_in_two_pieces_through_the_cache_is_reading_at_once(full, stacked):
    data = rows(FULL)
    params = full if stacked else models.unstack_layers(FULL, full)
    at_once, _ = apply(FULL, full, data)
    memory = cache.empty(FULL, 2, 12, stacked=stacked)
    pieces = []
    for part in (slice(0, 6), slice(6, 7), slice(7, 10)):
        piece, memory = apply(FULL, params, [x[:, part] for x in data], memory)
        pieces.append(piece)
    np.testing.assert_allclose(at_once, jnp.concatenate(pieces, axis=1), atol=1e-5)
    assert memory.slot == 10


def test_half_precision_keeps_logits_in_float32():
    cfg = PLAIN.replace(dtype="bfloat16", param_dtype="bfloat16")
    params = init(cfg, jax.random.key(0))
    hidden, _ = apply(cfg, params, rows(cfg))
    assert hidden.dtype == jnp.bfloat16
    assert models.unembed(cfg, params, hidden).dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("axes", [dict(data=4, tensor=2), dict(data=2, seq=2, tensor=2)])
def test_sharding_changes_nothing(axes):
    params, data = init(PLAIN, jax.random.key(0)), rows(PLAIN, 4, 8)
    value = jax.value_and_grad(functools.partial(loss, PLAIN))
    expected = jax.jit(value)(params, data)
    mesh = jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(jax.sharding.AxisType.Auto,) * len(axes)
    )
    rules = [
        ("batch", "data"), ("length", "seq" if "seq" in axes else None), ("heads", "tensor"),
        ("kv_heads", "tensor"), ("ffn", "tensor"), ("vocab", "tensor"), ("act_heads", "tensor"),
        ("act_kv_heads", "tensor"), ("act_ffn", "tensor"), ("embed", None), ("act_embed", None),
        ("layers", None), ("head_dim", None),
    ]  # fmt: skip
    places = jax.tree.map(
        lambda names: NamedSharding(mesh, nn.logical_to_mesh_axes(names, rules)),
        models.logical_axes(PLAIN), is_leaf=lambda x: isinstance(x, tuple),
    )  # fmt: skip
    row = NamedSharding(mesh, P("data", "seq" if "seq" in axes else None))
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        got = jax.jit(value)(jax.device_put(params, places), jax.device_put(data, row))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), expected, got)

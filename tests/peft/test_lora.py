"""Taps give the gradient's entries; LoRA, DoRA and overlays are what they are merged into."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_eff import models, tree
from jaxrl_eff.models import LMConfig
from jaxrl_eff.optim import sparse
from jaxrl_eff.optim.sparse import selectors
from jaxrl_eff.peft import lora, weights

CFG = LMConfig(
    vocab=24, layers=2, width=16, heads=4, kv_heads=2, head_dim=8, ffn=24, init_std=0.3, unroll=1
)
KERNELS = ("layers/attn/q/kernel", "layers/attn/o/kernel", "layers/mlp/down/kernel")


def but(usual, every):
    """All of them, of which the usual ones run by default."""
    return [k if k in usual else pytest.param(k, marks=pytest.mark.slow) for k in every]


BLOCKS = {"element": (1, 1), "block": (4, 8), "row": (1, 0), "column": (0, 1)}


@pytest.fixture(scope="module")
def base():
    return models.init(CFG, jax.random.key(0))


@pytest.fixture(scope="module")
def rows():
    tokens = jax.random.randint(jax.random.key(1), (4, 10), 0, CFG.vocab)
    position = jnp.broadcast_to(jnp.arange(10), tokens.shape)
    return tokens, position, jnp.ones_like(tokens)


view = functools.partial(weights.assembled, CFG)


def loss(params, rows, cfg=CFG):
    return models.token_logprobs(cfg, view(params), *rows)[0].sum()


@pytest.fixture(scope="module")
def dense(base, rows):
    return tree.flat(jax.jit(jax.grad(loss))(base, rows))


def tilings(base, block, grid=(2, 2)):
    axes, flat = lora.targets(CFG), tree.flat(base)
    return {
        name: sparse.tiling(
            flat[name].shape, 0.2, stack=1, inputs=lora.inputs_of(axes[name][1:]), grid=grid,
            block=block,
        )
        for name in KERNELS
    }  # fmt: skip


def beside(name, leaf):
    return name.removesuffix("kernel") + leaf


def tapped(base, tiled, leaf="tap"):
    """Zero taps by name, and the parameters with their indices."""
    flat, taps, index = tree.flat(base), {}, {}
    for name, t in tiled.items():
        x = flat[name]
        index[beside(name, f"{leaf}_index")] = selectors.select(name, "random", x, t, seed=3)
        taps[beside(name, leaf)] = jnp.zeros(t.value_shape(x.shape))
    return taps, tree.with_leaves(base, index)


@pytest.mark.parametrize("kind", but(("element", "block"), BLOCKS))
def test_a_tap_has_the_entries_of_the_dense_gradient(base, rows, dense, kind):
    tiled = tilings(base, BLOCKS[kind])
    taps, params = tapped(base, tiled)
    cfg = CFG.replace(remat="full" if kind == "block" else "none")
    run = jax.value_and_grad(lambda taps: loss(tree.with_leaves(params, taps), rows, cfg))
    value, got = jax.jit(run)(taps)
    np.testing.assert_allclose(value, loss(base, rows), rtol=1e-6)
    for name, t in tiled.items():
        index = tree.flat(params)[beside(name, "tap_index")]
        want = sparse.gather(dense[name], index, t)
        np.testing.assert_allclose(got[beside(name, "tap")], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", but(("gradient",), selectors.GRADIENTS))
def test_a_probe_finds_the_best_units(base, rows, dense, kind):
    block = (4, 8) if kind == "gradient" else (1, 1)
    tiled = tilings(base, block)
    taps, params = tapped(base, tiled)
    flat = tree.flat(base)
    zeros = {
        beside(n, f"probe_{kind}"): jnp.zeros(
            (*t.index_shape(flat[n].shape)[:-1], 3, t.count), jnp.float32
        )
        for n, t in tiled.items()
    }
    params = tree.with_leaves(params, taps)
    found = jax.jit(jax.grad(lambda z: loss(tree.with_leaves(params, z), rows)))(zeros)
    if kind == "fisher":
        each = jax.jit(jax.grad(loss))
        parts = [tree.flat(each(base, [x[i : i + 1] for x in rows])) for i in range(4)]
    for name, t in tiled.items():
        g, w = dense[name], flat[name]
        if kind == "fisher":
            scores = sum(jnp.square(p[name]) for p in parts)
        elif kind == "gallop":
            scores = jnp.abs(g) / (jnp.abs(w) + 1e-8)
        else:
            scores = jnp.abs(g * w) if kind == "snip" else jnp.abs(g)
        scores = scores.reshape(2, *t.matrix_shape(w.shape))
        best, units = selectors.top(selectors.by_unit(scores, t), t.count)
        got = found[beside(name, f"probe_{kind}")]
        np.testing.assert_allclose(got[..., 2, :], best, rtol=1e-3)
        np.testing.assert_array_equal(jnp.sort(selectors.units_of(got, t)), jnp.sort(units))


def adapted(base, kind):
    """Parameters with an adapter that is not zero."""
    if kind == "delta":
        taps, params = tapped(base, tilings(base, (1, 1)), "delta")
        return tree.with_leaves(params, {k: 0.1 + v for k, v in taps.items()})
    shapes, _ = lora.lora_shapes(CFG, 4, dora=kind == "dora")
    leaves = lora.lora_init(base, shapes, jax.random.key(2), lora.lora_scale(kind, 8.0, 4))
    moved = {
        k: v + 0.1 * jax.random.normal(jax.random.key(i), v.shape)
        for i, (k, v) in enumerate(leaves.items())
        if not k.endswith("scale")
    }
    return tree.with_leaves(base, leaves | moved)


hidden = functools.partial(jax.jit, static_argnums=0)(
    lambda cfg, params, rows: models.unembed(
        cfg, params, models.apply(cfg, view(params) if "layers" in params else params, *rows)[0]
    )
)


@pytest.mark.parametrize("kind", but(("dora", "delta"), (*lora.METHODS, "delta")))
def test_merging_an_adapter_gives_the_same_logits(base, rows, kind):
    params = adapted(base, kind)
    beside_ = hidden(CFG, params, rows)
    merged = jax.jit(lambda p: weights.merged(CFG, p))(params)
    assert tree.names(merged) == tree.names(base)
    np.testing.assert_allclose(beside_, hidden(CFG, merged, rows), rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(beside_ - hidden(CFG, base, rows)).max()) > 1e-2
    jax.tree.map(np.testing.assert_array_equal, weights.base(view(params)), base)
    apart = hidden(CFG, models.unstack_layers(CFG, view(params)), rows)
    np.testing.assert_allclose(beside_, apart, rtol=1e-5, atol=1e-5)


def products(jaxpr, shape):
    """How many products in a program, loops' bodies counted once, have a result of this shape."""
    inner = [j for e in jaxpr.eqns for j in jax.tree.leaves(list(e.params.values())) if
             hasattr(j, "eqns") or hasattr(j, "jaxpr")]  # fmt: skip
    here = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    return sum(e.outvars[0].aval.shape == shape for e in here) + sum(
        products(getattr(j, "jaxpr", j), shape) for j in inner
    )


def test_norms_made_ahead_are_those_made_at_every_use(base, rows):
    params = adapted(base, "dora")
    ready = jax.jit(lambda p: models.cast_for_decode(CFG, view(p)))(params)
    found = {k: v.shape for k, v in tree.flat(ready).items() if k.endswith("/norm")}
    assert found["layers/attn/q/kernel/norm"] == (2, 32) and len(found) == 7
    got, want = (hidden(CFG, p, rows) for p in (ready, params))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    run = jax.make_jaxpr(lambda p, *rows: models.apply(CFG, view(p), *rows))
    counts = [products(run(p, *rows).jaxpr, (CFG.width, CFG.ffn)) for p in (params, ready)]
    assert counts == [2, 0]  # A B of gate and up
    assert tree.names(models.cast_for_decode(CFG, base)) == tree.names(base)


@pytest.mark.parametrize("kind", but(("dora",), ("lora", "dora")))
def test_a_fresh_adapter_changes_nothing(base, rows, kind):
    shapes, axes = lora.lora_shapes(CFG, 4, dora=kind == "dora")
    leaves = lora.lora_init(base, shapes, jax.random.key(2), 2.0)
    assert {k: (v.shape, v.dtype) for k, v in leaves.items()} == {
        k: (v.shape, v.dtype) for k, v in shapes.items()
    }
    assert all(len(axes[k]) == leaves[k].ndim for k in leaves)
    got = hidden(CFG, tree.with_leaves(base, leaves), rows)
    np.testing.assert_allclose(got, hidden(CFG, base, rows), rtol=1e-4, atol=1e-5)


def test_an_overlay_has_the_gradient_of_its_merged_kernel(base, rows):
    params = adapted(base, "delta")
    merged = weights.merged(CFG, params)
    dense = tree.flat(jax.jit(jax.grad(loss))(merged, rows))
    taps = {k: v for k, v in tree.flat(params).items() if k.endswith("/delta")}
    got = jax.jit(jax.grad(lambda taps: loss(tree.with_leaves(params, taps), rows)))(taps)
    for name, t in tilings(base, (1, 1)).items():
        index = tree.flat(params)[beside(name, "delta_index")]
        want = sparse.gather(dense[name], index, t)
        np.testing.assert_allclose(got[beside(name, "delta")], want, rtol=1e-4, atol=1e-4)


def test_leaves_beside_a_kernel_are_not_ignored(base, rows):
    with pytest.raises(ValueError, match=r"layers/attn/q has \['lora_a', 'lora_b', 'lora_scale'\]"):
        jax.eval_shape(functools.partial(models.apply, CFG), adapted(base, "lora"), *rows)


def test_what_cannot_be_adapted_is_said():
    with pytest.raises(ValueError, match="unknown target 'layers/nope'"):
        lora.targets(CFG, ["layers/nope"])
    with pytest.raises(ValueError, match="rank is 17, but for 'layers/attn/k/kernel'"):
        lora.lora_shapes(CFG, 17)
    with pytest.raises(ValueError, match="'best'"):
        lora.lora_scale("best", 8.0, 4)

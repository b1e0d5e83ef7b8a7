"""Codes of 8 and 4 bits: how near they are, and a model on them is the model on what they mean."""

import functools
import math
import re
import statistics
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_eff import checkpoints, core, models, tree
from jaxrl_eff.algorithms import sft
from jaxrl_eff.models import LMConfig, params
from jaxrl_eff.parallel import Placement, rules
from jaxrl_eff.parallel.mesh import mesh
from jaxrl_eff.parallel.offload import OffloadedWeight
from jaxrl_eff.peft import lora, quantized, ways, weights
from jaxrl_eff.peft.quantized import NF4, Block
from jaxrl_eff.rollout import Sampling, sample
from jaxrl_eff.train import memory, settings

CFG = LMConfig(
    vocab=24, layers=2, width=16, heads=4, kv_heads=2, head_dim=8, ffn=48, init_std=0.3, unroll=1
)
WAYS = {
    "lora": dict(name="lora", rank=2, targets=("layers/attn/[qko]/kernel", "layers/mlp/.*/kernel")),
    "dora": dict(name="dora", rank=2, targets=("layers/attn/[qo]/kernel",)),
    "overlay": dict(
        name="static",
        mode="overlay",
        density=0.1,
        rank=2,
        selector="magnitude",
        targets=("layers/attn/[qo]/kernel", "layers/mlp/up/kernel"),
    ),
}


def spec(cfg=CFG, **changes):
    s = settings.AdaptSettings(**changes)
    optim = settings.OptimSettings(name="adam")
    return ways.spec(s, cfg, optim, optax.constant_schedule(1e-2), 1)


def kernel(shape=(3, 5, 4, 32), dtype=jnp.float32):
    """Normal numbers, with zeros, a block of zeros, and an outlier below 0."""
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    x[np.random.default_rng(1).random(shape) < 0.1] = 0
    x[0, 0, 0], x[1, 0, 0, 3] = 0, -9
    return jnp.asarray(x, dtype)


def test_the_codes_of_nf4_are_quantiles():
    """Those of equal shares of a normal distribution on either side of an exact 0."""
    ends = np.linspace(0.9677083, 0.5, 9)[:-1], np.linspace(0.9677083, 0.5, 8)[:-1]
    over, under = ([statistics.NormalDist().inv_cdf(p) for p in side] for side in ends)
    want = np.sort([*over, 0.0, *(-x for x in under)])
    np.testing.assert_allclose(NF4, want / want.max(), atol=1e-6)


def by_hand(x, block):
    """Every number's block's largest size."""
    y = np.moveaxis(np.asarray(x, np.float32), block.axis, -1)
    top = np.abs(y.reshape(*y.shape[:-1], -1, block.size)).max(-1)
    return np.moveaxis(np.repeat(top, block.size, -1), -1, block.axis)


BLOCKS = [Block(3, 8), Block(3, 32), Block(2, 20)]


@pytest.mark.parametrize("block", BLOCKS)
def test_int8_is_within_half_a_step(block):
    x = kernel((3, 5, 40, 32))
    kept = quantized.quantize(x, "int8", block)
    assert kept.codes.dtype == jnp.int8 and kept.codes.shape == kept.shape == x.shape
    got, step = np.asarray(kept.dequantize(jnp.float32)), by_hand(x, block) / 127
    assert np.all(np.abs(got - x) <= step * (0.5 + 1e-4))
    assert np.abs(got - x).max() > 0.4 * step.min()


@pytest.mark.parametrize("block", BLOCKS)
def test_nf4_takes_the_nearest_code(block):
    x = kernel((3, 5, 40, 32))
    kept = quantized.quantize(x, "nf4", block)
    half = tuple(n // 2 if i == block.axis else n for i, n in enumerate(x.shape))
    assert kept.codes.dtype == jnp.uint8 and kept.codes.shape == half and kept.shape == x.shape
    got, top = np.asarray(kept.dequantize(jnp.float32)), by_hand(x, block)
    every = np.abs(top[..., None] * NF4 - np.asarray(x)[..., None])
    np.testing.assert_allclose(np.abs(got - x), every.min(-1), atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", quantized.KINDS)
def test_zeros_and_extremes_are_exact_and_twice_is_once(kind, dtype):
    block = Block(3, 16)
    x = kernel(dtype=dtype)
    kept = quantized.quantize(x, kind, block)
    got = np.asarray(kept.dequantize(dtype))
    exact = (np.asarray(x) == 0) | (np.abs(np.asarray(x, np.float32)) == by_hand(x, block))
    np.testing.assert_array_equal(got[exact], np.asarray(x)[exact])
    again = quantized.quantize(jnp.asarray(got), kind, block)
    jax.tree.map(np.testing.assert_array_equal, again, kept)


@pytest.mark.parametrize(
    "kind, axes, shape, tiles, want",
    [
        ("nf4", ("layers", "embed", "heads", "head_dim"), (2, 100, 3, 128), 8, Block(3, 64)),
        ("nf4", ("layers", "heads", "head_dim", "embed"), (2, 3, 96, 100), 1, Block(2, 48)),
        ("nf4", ("layers", "embed", "ffn"), (2, 100, 4864), 1, Block(2, 64)),
        ("nf4", ("layers", "ffn", "embed"), (2, 4864, 100), 8, Block(1, 38)),
        ("int8", ("layers", "embed", "ffn"), (2, 16, 27), 2, Block(2, 27)),
    ],
)
def test_blocks_divide_what_no_plan_cuts(kind, axes, shape, tiles, want):
    assert quantized.block_of(kind, axes, shape, tiles) == want


@pytest.mark.parametrize(
    "changes, cfg, message",
    [
        (dict(name="lora", rank=2, base="int4"), CFG, r"unknown base 'int4'; expected one of"),
        (dict(name="static", base="nf4"), CFG, "mode='in_place' writes into the kernels"),
        (dict(name="lisa", layers=1, base="int8"), CFG, "'lisa' .* writes into the kernels"),
        (dict(name="lora", rank=2, base="nf4"), CFG.replace(ffn=27), "mlp/down/kernel: .*no even"),
        (dict(name="lora", rank=2, base="int8"), CFG.replace(ffn=71), "mlp/down/kernel: .*71 num"),
    ],
)
def test_what_cannot_be_quantized_is_said(changes, cfg, message):
    with pytest.raises(ValueError, match=message):
        spec(cfg, **changes)


@functools.cache
def base():
    return jax.tree.map(np.asarray, params.init(CFG, jax.random.key(0)))


def rows():
    tokens = np.random.default_rng(1).integers(0, CFG.vocab, (4, 10)).astype(np.int32)
    return tokens, np.broadcast_to(np.arange(10, dtype=np.int32), (4, 10)), np.ones_like(tokens)


def started(way, kind):
    """A spec and parameters whose adapters do something."""
    of = spec(**WAYS[way], base=kind, whole=("layers/attn/v/kernel",))
    full = jax.jit(of.tx.extended)(base())
    key = jax.random.key(2)
    moved = {
        k: x + 0.3 * jax.random.normal(key, x.shape)
        for k, x in tree.flat(full).items()
        if k.endswith(("lora_b", "dora", "/delta"))
    }
    return of, tree.with_leaves(full, moved)


def meant(p):
    """Parameters as a model reads them, with the kernels that codes mean."""
    return quantized.dequantized(weights.assembled(CFG, p), jnp.float32)


def codes(p):
    return [k for k in tree.flat(p) if k.endswith("/kernel_codes")]


def test_kernels_are_quantized_one_by_one_as_they_are_read(tmp_path):
    checkpoints.save_hf(tmp_path, CFG, jax.tree.map(jnp.asarray, base()))
    kept = ways.kept_in_bits(settings.AdaptSettings(name="lora", rank=1, base="nf4"), CFG)
    seen = []

    def keep(name, x):
        assert all(one() is None for one in seen)
        if name in kept.blocks:
            seen.append(weakref.ref(x))
        return kept.leaves(name, x)

    got = checkpoints.load_hf(tmp_path, CFG, keep=keep)
    assert len(seen) == len(codes(got)) == 7
    want = kept.params(jax.tree.map(jnp.asarray, base()))
    jax.tree.map(np.testing.assert_array_equal, got, want)


USUAL = [("nf4", "overlay")]  # which has LoRA besides
CASES = [
    pytest.param(*c, marks=() if c in USUAL else pytest.mark.slow)
    for c in [(kind, way) for kind in quantized.KINDS for way in WAYS]
]


@pytest.mark.parametrize("kind, way", CASES)
def test_a_model_on_codes_is_the_model_on_what_they_mean(kind, way):
    """Forward, gradients of adapters, and merged; what is trained whole is not quantized."""
    of, ours = started(way, kind)
    assert len(codes(ours)) == 6 and "layers/attn/v/kernel" in tree.flat(ours)
    theirs = jax.eval_shape(lambda p: weights.base(meant(p)), ours)
    assert jax.tree.structure(params.abstract(CFG)) == jax.tree.structure(theirs)
    np.testing.assert_array_equal(
        ours["layers"]["attn"]["v"]["kernel"], base()["layers"]["attn"]["v"]["kernel"]
    )
    like = jax.tree.map(lambda x: (x.shape, x.dtype), (ours, of.shapes))
    assert like[0] == like[1]

    def loss(read, given, p):
        p = read(tree.with_leaves(p, given))
        return models.token_logprobs(CFG, p, *map(jnp.asarray, rows()))[0].sum()

    leaves = {k: tree.flat(ours)[k] for k in of.tx.leaves(ours, of.tx.init(ours))}
    assert all(k in leaves for k in ("layers/attn/q/lora_a", "layers/attn/v/kernel"))
    got, want = (
        jax.jit(jax.value_and_grad(functools.partial(loss, read)))(leaves, ours)
        for read in (of.view, meant)
    )
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    for name in leaves:
        size = np.abs(want[1][name]).max()  # small numbers are sums of ones as large as this
        np.testing.assert_allclose(got[1][name], want[1][name], rtol=1e-5, atol=3e-6 * size)
    merged = [
        jax.jit(lambda p, read=read: weights.merged(CFG, read(p)))(ours)
        for read in (of.view, meant)
    ]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    jax.tree.map(close, *merged)


def test_adapters_go_around_codes_and_these_around_arrays_in_host_memory():
    of, p = started("overlay", "nf4")
    away = {**p, "layers": jax.tree.map(OffloadedWeight, p["layers"])}
    kernel, kinds = of.view(away)["layers"]["attn"]["q"]["kernel"], []
    while kernel is not None:
        kinds.append(type(kernel))
        kernel = getattr(kernel, "base", getattr(kernel, "codes", None))
    assert kinds == [weights.LowRank, weights.Tapped, quantized.Quantized, OffloadedWeight]
    run = jax.jit(lambda p: models.apply(CFG, of.view(p), *map(jnp.asarray, rows()))[0])
    np.testing.assert_array_equal(run(away), run(p))
    ready = jax.jit(lambda p: models.cast_for_decode(CFG, of.view(p)))(away)
    got = jax.jit(lambda p: models.apply(CFG, p, *map(jnp.asarray, rows()))[0])(ready)
    np.testing.assert_allclose(got, run(p), rtol=1e-6)


LARGE = LMConfig(
    vocab=32, layers=12, width=128, heads=4, kv_heads=4, head_dim=64, ffn=384, unroll=1,
    remat="full",
)  # fmt: skip
FLOATS = r"f32\[12,(?:128,384|384,128|128,256|256,128|128,4,64|4,64,128)\]"


@functools.cache
def compiled(base_):
    """A gradient of LoRA."""
    cfg = LARGE.replace(remat="none")
    of = spec(cfg, name="lora", rank=4, base=base_)
    opt = jax.eval_shape(of.tx.init, of.shapes)
    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)

    def run(p, opt, *rows):
        def loss(given):
            return models.token_logprobs(cfg, of.view(of.tx.attach(p, opt, given)), *rows)[0].sum()

        return jax.grad(loss)(of.tx.leaves(p, opt))

    return jax.jit(run).lower(of.shapes, opt, tokens, tokens, tokens).compile()


def test_no_float_copy_of_a_stack_of_kernels():
    """Neither made at once nor kept for the backward pass."""
    ours, theirs = compiled("nf4"), compiled("")
    assert re.search(FLOATS, theirs.as_text()) and not re.search(FLOATS, ours.as_text())
    one_layer = 4 * 128 * (4 * 256 + 3 * 384)
    spare = [p.memory_analysis().temp_size_in_bytes for p in (ours, theirs)]
    assert spare[0] <= spare[1] + one_layer < spare[1] + 12 * one_layer


PROMPT = np.ones((2, 4), np.int32)
PROMPTS = {"prompt": PROMPT, "prompt_length": PROMPT.sum(1)}


def test_sampling_dequantizes_layer_by_layer():
    """At every token; never all kernels, before the loop over tokens or within it."""
    cfg = LARGE.replace(layers=8, windowed=(), unroll=0)
    of = spec(cfg, name="lora", rank=4, base="nf4")
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.int32), PROMPTS)
    draw = sample(cfg, Sampling(max_tokens=4))
    run = jax.jit(lambda p, *args: draw(of.view(p), *args))
    program = run.lower(of.shapes, like, jax.random.key(1)).compile()
    floats = 8 * 4 * 128 * (4 * 256 + 3 * 384)
    assert program.memory_analysis().temp_size_in_bytes < floats / 4


@pytest.mark.slow
def test_samples_from_codes_are_those_from_what_they_mean():
    of, p = started("overlay", "nf4")
    draw, prompts = sample(CFG, Sampling(max_tokens=8)), jax.tree.map(jnp.asarray, PROMPTS)
    got, want = (
        jax.jit(lambda p, read=read: draw(read(p), prompts, jax.random.key(1)))(p)
        for read in (of.view, meant)
    )
    np.testing.assert_array_equal(got["tokens"], want["tokens"])
    np.testing.assert_allclose(got["logp"], want["logp"], rtol=1e-4, atol=1e-5)


def test_norms_of_kernels_on_codes_can_be_made_ahead():
    of, p = started("dora", "nf4")
    tokens, p = [jnp.asarray(x) for x in rows()], of.view(p)
    run = jax.jit(lambda p: models.apply(CFG, p, *tokens)[0])
    ready = jax.jit(lambda p: models.cast_for_decode(CFG, p))(p)
    assert "layers/attn/o/kernel/norm" in tree.flat(ready)
    np.testing.assert_allclose(run(ready), run(p), rtol=1e-5, atol=1e-5)


def test_codes_are_what_is_gathered():
    """Over the fsdp axis, in the forward and in the backward pass; of floats only activations."""
    place = Placement((0, 1, 2, 3), fsdp=2, tensor=2)
    r, of = rules(place, {}), spec(LARGE, name="lora", rank=4, base="nf4")
    opt = jax.eval_shape(of.tx.init, of.shapes)
    home = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), of.shapes, r.tree(of.axes)
    )
    tokens = jax.ShapeDtypeStruct((4, 16), jnp.int32, sharding=r.sharding(("batch", None)))

    def run(p, *rows):
        def loss(given):
            read = of.view(of.tx.attach(p, opt, given))
            return models.token_logprobs(LARGE, read, *rows)[0].sum()

        return jax.grad(loss)(of.tx.leaves(p, opt))

    with jax.set_mesh(mesh(place)), nn.logical_axis_rules(list(r.table)):
        text = jax.jit(run).lower(home, tokens, tokens, tokens).compile().as_text()
    found = re.findall(r"= \(?(\w+)\[([\d,]*)\][^=]* (?:all-gather|all-reduce)(?:-start)?\(", text)
    sizes = {}
    for dtype, shape in found:
        size = math.prod(int(n) for n in shape.split(",") if n)
        sizes[dtype] = max(sizes.get(dtype, 0), size)
    smallest = 128 * 256 // 2  # a kernel, cut by the tensor axis
    assert sizes["u8"] >= smallest // 2, sizes
    assert sizes["f32"] < smallest, sizes


@pytest.mark.parametrize("kind, a_parameter", [("int8", 1 + 4 / 64), ("nf4", 0.5 + 4 / 64)])
def test_bytes_of_a_base_in_few_bits(kind, a_parameter):
    of = spec(LARGE, name="lora", rank=4, base=kind)
    step = core.compile(
        sft.graph(sft.SFTConfig(), {"actor": LARGE}),
        {"actor_train": Placement((0,))},
        {"actor": of},
    )
    shapes = params.abstract(LARGE)
    count = sum(tree.flat(shapes)[k].size for k in lora.targets(LARGE))
    rest = tree.nbytes(shapes) - 4 * count
    adapters = tree.nbytes(of.shapes) - tree.nbytes(weights.base(of.view(of.shapes)))
    assert memory.planned(step, "actor").parameters == a_parameter * count + rest + adapters
    assert memory.whole(step, "actor").total == 16 * models.count(LARGE)

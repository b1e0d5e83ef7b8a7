"""What compiled programs of sparse training may contain: collectives, operations, memory."""

import contextlib
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_eff import core, models, tree
from jaxrl_eff.algorithms import sft
from jaxrl_eff.models import LMConfig, logical_axes, params
from jaxrl_eff.parallel import Placement, rules
from jaxrl_eff.parallel.mesh import mesh
from jaxrl_eff.peft import gradient_taps, ways, weights
from jaxrl_eff.peft.entries import entries_of
from jaxrl_eff.train import memory as footprint
from jaxrl_eff.train import settings

LM = LMConfig(vocab=24, layers=2, width=32, heads=4, kv_heads=4, head_dim=8, ffn=64)
FSDP, TENSOR = 4, 2
PLACE = Placement(tuple(range(8)), fsdp=FSDP, tensor=TENSOR)
TARGETS = ("layers/attn/o/kernel", "layers/mlp/up/kernel")  # one sharded in each way
ROWS_BYTES = 3 * 2 * 64 * 4  # of the batch in `programs`
COLLECTIVES = r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"


def collectives(compiled):
    """(kind, largest number of elements) of every collective of a compiled program."""
    found = []
    for line in compiled.as_text().splitlines():
        kind = re.search(rf" = (.*?) {COLLECTIVES}(-start)?\(", line)
        if kind:
            shapes = re.findall(r"\w+\[([\d,]*)\]", kind[1])
            sizes = [int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes]
            found.append((kind[2], max(sizes)))
    return found


@contextlib.contextmanager
def placed(table=None):
    table = table or rules(PLACE, {}).table
    with jax.set_mesh(mesh(PLACE)), nn.logical_axis_rules(list(table)):
        yield


def entries(**changes):
    s = settings.AdaptSettings(
        **{"name": "periodic", "density": 0.1, "tiles": (FSDP, TENSOR), "targets": TARGETS}
        | changes
    )
    return entries_of(s, LM, settings.OptimSettings(name="adam"))


def placed_like(like, of):
    """Shapes of state with the layout that `Step.home` gives it."""
    r = rules(PLACE, {})

    def one(name, x):
        kernel = name.removeprefix("active/").rpartition("/kernel")[0] + "/kernel"
        axes = of.layout.index_axes(kernel) if kernel in of.layout.tilings else ()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=r.fitting(axes, x.shape))

    return tree.map_with_name(one, like)


def by_rows_and_columns(of, home, state, where, tap):
    """SpIEL-MA's programs, lowered."""
    there = where, jax.tree.map(lambda x: x.sharding, state)

    def step(p, s, taps_):
        updates, s = of.update(taps_, s, p)
        return of.apply(p, updates), s

    return {
        "update by SM3": jax.jit(step, out_shardings=there).lower(home, state, tap),
        "grow by SM3": jax.jit(of.reselect, out_shardings=there).lower(home, state),
    }


@pytest.mark.parametrize("granularity", ["element", "block"])
def test_choosing_and_writing_need_no_collective(granularity):
    of = entries(selector="magnitude", granularity=granularity, block=(2, 2))
    grown = entries(selector="gradient", granularity=granularity, block=(2, 2))
    whole = entries(selector="magnitude", tiles=(1, 1))
    shapes = params.abstract(LM)
    where = rules(PLACE, {}).tree(logical_axes(LM))
    home = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where
    )
    state, ma = placed_like(jax.eval_shape(of.init, shapes), of), entries(name="spiel_ma")
    ma_state = placed_like(jax.eval_shape(ma.init, shapes), ma)
    there = jax.tree.map(lambda x: x.sharding, state)

    def step(p, s, taps_):
        updates, s = of.update(taps_, s, p)
        return of.apply(p, updates), s

    found, tap = {}, {}
    for name, a in state.active.items():
        spec = PartitionSpec(*a.index.sharding.spec)
        *lead, count = a.index.shape
        lay = NamedSharding(mesh(PLACE), PartitionSpec(*spec[:3]))
        found[name] = jax.ShapeDtypeStruct((*lead, 3, count), jnp.float32, sharding=lay)
        tap[name] = jax.ShapeDtypeStruct(a.original.shape, jnp.float32, sharding=lay)
    with placed():
        programs = {
            "choose by weights": jax.jit(of.init, out_shardings=there).lower(home),
            "update and write": jax.jit(step, out_shardings=(where, there)).lower(home, state, tap),
            "choose by gradient": jax.jit(grown.reselect, out_shardings=(where, there)).lower(
                home, state, found
            ),
        }
        if granularity == "element":
            programs |= by_rows_and_columns(ma, home, ma_state, where, tap)
        found = {k: collectives(p.compile()) for k, p in programs.items()}
        assert not any(found.values()), found
        # That the search finds them: one tile over all devices cannot do without.
        assert collectives(jax.jit(whole.init).lower(home).compile())


def test_data_parallel_gradients_are_summed_at_the_active_entries_alone():
    """And are those of one device, where the compiler's own way sums whole matrices."""
    place = Placement(tuple(range(8)), data=4, tensor=2)
    table = rules(place, {}).table
    x = jax.random.normal(jax.random.key(0), (8, 6, 32))
    g = jax.random.normal(jax.random.key(1), (8, 6, 64))
    matrix = jax.random.normal(jax.random.key(2), (32, 64))
    index = jnp.sort(jax.random.permutation(jax.random.key(3), 32 * 32)[:40])
    index = jnp.stack([index, jnp.sort(1023 - index)]).astype(jnp.int32)[None]

    def loss(tap, x, matrix, index, g):
        where = gradient_taps.place_of(8, 6, "embed", "ffn", (1, 2))
        return jnp.sum(gradient_taps.tapped(x, matrix, tap, index, place=where) * g)

    def dense(tap, x, matrix, index, g):
        whole = jax.grad(lambda m: jnp.sum((x @ m) * g))(matrix)
        t = gradient_taps.tiling_of(matrix.shape, tap, index)
        return gradient_taps.gather(whole, index, t)

    args = jnp.zeros((1, 2, 40)), x, matrix, index, g
    want = dense(*args)
    with jax.set_mesh(mesh(place)), nn.logical_axis_rules(list(table)):
        specs = ((None, "tensor"), ("data",), (None, "tensor"), (None, "tensor"))
        specs = [PartitionSpec(*s) for s in (*specs, ("data", None, "tensor"))]
        there = [
            jax.device_put(a, NamedSharding(mesh(place), s))
            for a, s in zip(args, specs, strict=True)
        ]
        ours = jax.jit(jax.grad(loss)).lower(*there).compile()
        theirs = jax.jit(dense).lower(*there).compile()
    np.testing.assert_allclose(ours(*there), want, rtol=1e-5, atol=1e-5)
    assert [k for k, _ in collectives(ours)] == ["all-reduce"]
    assert max(n for _, n in collectives(ours)) == 40  # of one device's tile
    assert max(n for _, n in collectives(theirs)) >= matrix.size // 2


@functools.cache
def programs():
    """Compiled gradients of one model: by the taps of entries or blocks, or of one tap alone."""
    cfg = LMConfig(
        vocab=32, layers=12, width=256, heads=4, kv_heads=4, head_dim=64, ffn=768, unroll=1,
        remat="full",
    )  # fmt: skip
    shapes = params.abstract(cfg)
    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    optim = settings.OptimSettings(name="adam")

    def loss(p, tokens, position, segment):
        p = weights.assembled(cfg, p)
        return models.apply(cfg, p, tokens, position, segment)[0].astype(jnp.float32).sum()

    def compiled(way, p):
        opt = jax.eval_shape(way.init, p)

        def run(p, opt, *rows):
            leaves = way.leaves(p, opt)
            return jax.grad(lambda x: loss(way.attach(p, opt, x), *rows))(leaves)

        return jax.jit(run).lower(p, opt, tokens, tokens, tokens).compile()

    def part(**changes):
        s = settings.AdaptSettings(name="static", density=0.015, **changes)
        return ways.spec(s, cfg, optim, optax.constant_schedule(1e-3), 1).tx

    frozen = part(targets=("layers/attn/v/kernel",), granularity="block", block=(64, 64))

    def whole_step(way, p):
        opt = jax.eval_shape(way.init, p)

        def run(p, opt, *rows):
            taps = way.leaves(p, opt)
            grads = jax.grad(lambda x: loss(way.attach(p, opt, x), *rows))(taps)
            return way.update(grads, opt, p, jnp.isfinite(grads[min(grads)]).all())

        rows = (tokens, tokens, tokens)
        return jax.jit(run, donate_argnums=(0, 1)).lower(p, opt, *rows).compile()

    return shapes, {
        "whole step": whole_step(part(), shapes),
        "frozen": compiled(frozen, shapes),
        "block": compiled(part(granularity="block", block=(32, 32)), shapes),
        "element": compiled(part(), shapes),
    }


def test_operations_of_a_backward_pass():
    """Blocks cost what a frozen base costs; entries the gradient of each matrix besides."""
    _, found = programs()
    flops = {k: p.cost_analysis()["flops"] for k, p in found.items()}
    assert flops["frozen"] < flops["block"] <= 1.05 * flops["frozen"]
    assert flops["block"] < flops["element"] <= 1.45 * flops["frozen"]


def test_memory_of_a_backward_pass():
    """One layer's gradient of one matrix at most, never a stack of them."""
    shapes, found = programs()
    spare = {k: p.memory_analysis().temp_size_in_bytes for k, p in found.items()}
    largest = max(x.size * 4 // 12 for x in jax.tree.leaves(shapes["layers"]))
    assert spare["element"] <= spare["frozen"] + 1.15 * 2 * largest
    assert spare["block"] <= spare["frozen"] + largest


def test_bytes_of_a_model_in_training():
    """bfloat16 parameters and one percent trained: 2 + 22 bytes x density, and one matrix's dW."""
    density, narrow = 0.01, LM.replace(param_dtype="bfloat16", width=256, ffn=1024, head_dim=64)
    part = settings.AdaptSettings(name="static", density=density)
    optim = settings.OptimSettings(name="adam")
    spec = ways.spec(part, narrow, optim, optax.constant_schedule(1e-3), 1)
    step = core.compile(
        sft.graph(sft.SFTConfig(), {"actor": narrow}),
        {"actor_train": Placement((0,))},
        {"actor": spec},
    )
    said, size = footprint.planned(step, "actor"), models.count(narrow)
    largest = 256 * 1024 * 4
    assert said.parameters == 2 * size
    assert said.total <= 1.15 * (2 + 22 * density) * size + largest
    # What is said is what there is.
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params.abstract(narrow))
    home = jax.tree.map(lambda x: x.sharding, step.home("actor").params)
    model = step.init("actor", jax.device_put(start, home))
    assert said.parameters == tree.nbytes(model.params) and said.state == tree.nbytes(model.opt)
    taps = spec.tx.leaves(model.params, model.opt)
    assert said.gradients == tree.nbytes(taps)
    assert footprint.whole(step, "actor").total == (2 + 8 + 2) * size


def test_an_update_writes_into_the_kernels_it_was_given():
    """Donated, and with no copy of a stack of kernels on the way."""
    shapes, found = programs()
    stack = max(tree.nbytes(x) for x in jax.tree.leaves(shapes["layers"]))
    memory = found["whole step"].memory_analysis()
    assert memory.alias_size_in_bytes == memory.argument_size_in_bytes - ROWS_BYTES
    spare = found["element"].memory_analysis().temp_size_in_bytes
    assert memory.temp_size_in_bytes < spare + stack / 2

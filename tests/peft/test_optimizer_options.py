"""An optimizer's `store`, `descent` and `frozen` with partial training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_eff import core, tree
from jaxrl_eff.algorithms import sft
from jaxrl_eff.core import Placement
from jaxrl_eff.models import LMConfig, params
from jaxrl_eff.optim import precision_metrics
from jaxrl_eff.peft import ways
from jaxrl_eff.train import settings

LM = LMConfig(
    vocab=24, layers=2, width=16, heads=4, kv_heads=2, head_dim=8, ffn=32, init_std=0.3,
    param_dtype="bfloat16",
)  # fmt: skip
RATE = 2.0**-12  # a power of 2, so that products with it are exact
WHOLE = ("layers/mlp/up/kernel", "final_norm/scale")
LORA = dict(name="lora", rank=2, targets=("layers/attn/[qo]/kernel",), whole=WHOLE)


def spec(part, lm=LM, **optim):
    of = settings.OptimSettings(**{"name": "sgd", "clip_norm": 0.0, **optim})
    return ways.spec(settings.AdaptSettings(**part), lm, of, lambda count: RATE, 100)


@functools.cache
def base(lm=LM):
    return params.init(lm, jax.random.key(0))


def updated(of, steps=8):
    """Parameters, optimizer state and the sum of the gradients, after updates by random ones."""
    model = jax.jit(of.tx.extended)(base())
    opt, total = of.tx.init(model), {}
    update = jax.jit(of.tx.update)
    for i in range(steps):
        leaves = of.tx.leaves(model, opt)
        grads = {
            k: jax.random.normal(jax.random.fold_in(jax.random.key(i), j), x.shape, x.dtype)
            for j, (k, x) in enumerate(leaves.items())
        }
        model, opt = update(grads, opt, model, jnp.bool_(True))
        total |= {k: [*total.get(k, []), np.asarray(g, np.float32)] for k, g in grads.items()}
    return tree.flat(model), opt, total


def test_what_an_adapter_trains_whole_keeps_what_rounding_loses():
    """Weights are those of a float32 copy, rounded; adapters are float32 anyway."""
    of = spec(LORA, store="int16")
    got, _, grads = updated(of)
    start = tree.flat(jax.jit(of.tx.extended)(base()))
    assert {*WHOLE, "layers/attn/q/lora_a", "layers/attn/o/lora_b"} < {*grads}
    for name, every in grads.items():
        exact = np.asarray(start[name], np.float32)
        for g in every:
            exact = exact - np.float32(RATE) * g
        np.testing.assert_array_equal(got[name], jnp.asarray(exact).astype(start[name].dtype))
    rounded, name = updated(spec(LORA))[0], WHOLE[0]
    stayed = [np.mean(np.asarray(x[name] == start[name])) for x in (got, rounded)]
    assert stayed[0] + 0.05 < stayed[1]


def test_what_a_store_keeps_is_sharded_like_its_parameter():
    place = Placement((0, 1, 2, 3), fsdp=2, tensor=2)
    graph = sft.graph(sft.SFTConfig(), {"actor": LM})
    of = spec(LORA, name="adam", store="int16")
    home = core.compile(graph, {"actor_train": place}, {"actor": of}).home("actor")
    kept = {k: x for k, x in tree.flat(home.opt).items() if "/low/" in k}
    assert {k.partition("/low/")[2] for k in kept} == set(WHOLE)
    for name, x in kept.items():
        like = tree.flat(home.params)[name.partition("/low/")[2]]
        assert x.shape == like.shape and x.sharding == like.sharding


def test_descent_says_what_reached_the_weights():
    lost = precision_metrics(updated(spec(LORA, descent=True), 1)[1])
    kept = precision_metrics(updated(spec(LORA, descent=True, store="int16"), 1)[1])
    alone = precision_metrics(updated(spec({**LORA, "whole": ()}, descent=True), 1)[1])
    assert lost["lost"] > 0.3 > 0.001 > kept["lost"] == alone["lost"] == 0
    assert abs(kept["stored"] - 1) < 1e-3 and abs(alone["visible"] - 1) < 1e-3


@pytest.mark.parametrize(
    ("part", "frozen", "stays"),
    [
        (LORA, ".*lora_a", ("layers/attn/q/lora_a", "layers/attn/o/lora_a")),
        (LORA, WHOLE[0], WHOLE[:1]),
        (dict(name="static", density=0.1, rank=2), ".*/attn/./kernel", ("layers/attn/q/kernel",)),
        (dict(name="static", mode="overlay"), ".*/mlp/.*/kernel", ("layers/mlp/up/kernel",)),
        (dict(name="lisa", layers=1), ".*/attn/./kernel", ("layers/attn/q/kernel",)),
    ],
    ids=["lora", "whole", "entries", "overlay", "lisa"],
)
def test_what_is_frozen_stays_without_state_and_the_rest_learns_as_before(part, frozen, stays):
    of, plain = spec(part, frozen=(frozen,), name="adam"), spec(part, name="adam")
    shapes, whole = (jax.eval_shape(s.tx.init, s.shapes) for s in (of, plain))
    assert tree.nbytes(shapes) < tree.nbytes(whole)
    assert not any(name in k for k in tree.flat(shapes) for name in stays)
    assert {*stays} <= ways.frozen(of) | {*stays} - {*tree.flat(of.shapes)}
    model = jax.jit(plain.tx.extended)(base())
    ours, theirs = of.tx.init(model), plain.tx.init(model)
    mine, every = of.tx.leaves(model, ours), plain.tx.leaves(model, theirs)
    assert 0 < len(mine) < len(every) and {*mine} < {*every}
    grads = {k: jnp.ones(x.shape, x.dtype) for k, x in every.items()}
    got, _ = of.tx.update({k: grads[k] for k in mine}, ours, model, jnp.bool_(True))
    want, _ = plain.tx.update(grads, theirs, model, jnp.bool_(True))
    got, want, start = map(tree.flat, (got, want, model))
    for name in start:
        same = np.array_equal(got[name], start[name])
        assert np.array_equal(got[name], want[name]) or (same and name not in mine)
    assert all(np.array_equal(got[k], start[k]) for k in stays if k in start)


def test_norms_are_clipped_without_what_is_frozen():
    of = spec(LORA, frozen=(".*lora_a",), clip_norm=1.0)
    model = jax.jit(of.tx.extended)(base())
    opt = of.tx.init(model)
    grads = {k: jnp.ones(x.shape, x.dtype) for k, x in of.tx.leaves(model, opt).items()}
    new, _ = of.tx.update(grads, opt, model, jnp.bool_(True))
    change = tree.flat(new)["layers/attn/q/lora_b"] - tree.flat(model)["layers/attn/q/lora_b"]
    np.testing.assert_allclose(change, -RATE / np.sqrt(tree.size(grads)), rtol=1e-3)


@pytest.mark.parametrize(
    ("part", "optim", "message"),
    [
        ({**LORA, "whole": ()}, dict(store="int16"), "store='int16'.*adapters are float32"),
        (dict(name="static"), dict(store="int16"), "keep what rounding loses by themselves"),
        (dict(name="static"), dict(name="collage_adamw"), "static updates numbers in float32"),
        ({**LORA, "whole": ()}, dict(name="collage_adamw"), "for parameters of 16 bits"),
        (dict(name="lisa", layers=1), dict(descent=True), "layers in turn lose nothing"),
        (LORA, dict(frozen=(".*nothing",)), "'.*nothing', which matches nothing that is trained"),
        (LORA, dict(frozen=(".*",)), "leaves nothing to train"),
        (dict(name="static"), dict(frozen=(".*",)), "leaves nothing to train"),
    ],
)
def test_what_has_no_meaning_is_refused(part, optim, message):
    with pytest.raises(ValueError, match=message):
        spec(part, **optim)


def test_collage_trains_an_adapter_and_what_is_whole_beside_it():
    of = spec(LORA, name="collage_adamw", options={"variant": "plus"}, descent=True)
    got, opt, _ = updated(of, 2)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in got.values())
    assert precision_metrics(opt)["lost"] < 0.01

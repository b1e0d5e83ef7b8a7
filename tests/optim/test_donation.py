"""Every optimizer's state can be given away with the parameters: no buffer is in it twice."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_eff import optim
from jaxrl_eff.optim import codecs, sparse
from jaxrl_eff.optim.collage import VARIANTS

BF16 = jnp.bfloat16
DTYPES = {"bfloat16": BF16, "float32": jnp.float32}


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def parameters(dtype=BF16):
    return {"w": jnp.full((4, 64), 0.5, dtype), "b": jnp.full(32, 0.5, dtype)}


def transforms():
    """Every public transform, variant and layout, by name."""
    found = {f"adam {kind}": optim.scale_by_adam(mu=kind, nu=kind) for kind in codecs.MOMENT_NAMES}
    for variant in VARIANTS:
        for metrics in (False, True):
            tx = optim.collage_adamw(lambda _: 1e-3, variant=variant, metrics=metrics)
            found[f"{variant} {metrics}"] = tx
    for variant in ("light", "plus"):
        tx = optim.collage_adamw(1e-3, variant=variant, faithful=True)
        found[f"{variant} faithful"] = tx
        found[f"{variant} faithful, watched"] = optim.watch_descent(tx)
    for store in codecs.WEIGHTS:
        found[f"store {store}"] = optim.store_weights(store, metrics=True)
        found[f"adamw {store}"] = optim.lowp_chain(optax.adamw(1e-3), store=store, metrics=True)
    found["keeps parameters"] = optim.lowp_chain(_keeping())
    found["keeps parameters, wide"] = optim.in_float32(_keeping())
    found["keeps parameters, watched"] = optim.watch_descent(_keeping())
    found["finite"] = optim.apply_if_finite(optim.collage_adamw(1e-3), 3)
    found["injected"] = optim.inject_hyperparams(optim.collage_adamw)(1e-3)
    found["frozen"] = optim.optimizer("collage_adamw", 1e-3, frozen=("b",), descent=True)
    found["sparse"] = sparse.from_dense(sparse.sparse_adapt(optax.adam(1e-3)))
    found["sparse blocks"] = sparse.from_dense(
        sparse.sparse_adapt(optax.adam(1e-3), block=(4, 4), density=0.1)
    )
    found["sm3"] = sparse.from_dense(sparse.sparse_adapt(sparse.SM3()))
    return found


def _keeping():
    """A transform that starts with the parameters, and with one array in two places."""

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return params, zeros, zeros

    return optax.GradientTransformation(init, lambda u, s, p=None: (u, (s[0], s[2], s[1])))


TRANSFORMS = transforms()


def twice(*trees):
    """Sizes of the arrays whose memory is that of another one."""
    arrays = [x for x in jax.tree.leaves(trees) if x.nbytes]
    places = [x.unsafe_buffer_pointer() for x in arrays]
    return [x.shape for x, at in zip(arrays, places, strict=True) if places.count(at) > 1]


@pytest.mark.parametrize("name", list(TRANSFORMS))
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_no_buffer_is_in_a_state_twice(name, dtype):
    params = parameters(DTYPES[dtype])
    assert not twice(TRANSFORMS[name].init(params), params)


@pytest.mark.filterwarnings("ignore:Specifying a key:UserWarning")
@pytest.mark.parametrize("descent", [False, True])
def test_nor_with_any_optimizer_by_name(descent):
    for name in optim.optimizer_names():
        for dtype in DTYPES.values():
            params = parameters(dtype)
            tx = optim.optimizer(name, 1e-3, clip_norm=1.0, descent=descent)
            assert not twice(tx.init(params), params), (name, dtype)


def test_nor_in_what_comes_from_a_master_or_trains_in_other_ways():
    params = parameters(jnp.float32)
    master = optim.Master(params, *(parameters(jnp.float32) for _ in range(2)), jnp.int32(3))
    for variant in VARIANTS:
        tx = optim.collage_adamw(lambda _: 1e-3, variant=variant)
        assert not twice(optim.from_master(tx, master, variant=variant), master), variant
    layout = sparse.sparse_adapt(optax.adam(1e-3)).layout
    overlay = sparse.sparse_overlay(optax.adam(1e-3), layout=layout)
    started = overlay.start(params)
    assert not twice(overlay.init(started), started, params)
    layers = sparse.sampled_layers(optax.adam(1e-3), total=4, active=2, every=3)
    for dtype in DTYPES.values():
        some = {"w": parameters(dtype)["w"]}
        assert not twice(layers.init(some), some)


def test_a_donated_step_runs():
    """One program with a state of each kind, all of it donated, twice."""
    chosen = ["adam float32", "exact True", "plus True", "flash8 True", "plus faithful, watched",
              "store bf16x2", "adamw int16", "keeps parameters", "frozen", "sparse"]  # fmt: skip
    params = {k: parameters() for k in chosen}
    states = {k: TRANSFORMS[k].init(params[k]) for k in chosen}

    def step(params, states, g):
        out, new = {}, {}
        for k in chosen:
            u, new[k] = TRANSFORMS[k].update(g, states[k], params[k])
            out[k] = optax.apply_updates(params[k], u)
        return out, new

    compiled = jax.jit(step, donate_argnums=(0, 1))
    for _ in range(2):
        params, states = compiled(params, states, parameters())
    for k in chosen:
        assert np.isfinite(np.asarray(params[k]["w"].astype(jnp.float32))).all(), k

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_eff import models, tree
from jaxrl_eff.models import LMConfig, attention

CFG = LMConfig(vocab=16, layers=2, width=8, heads=4, kv_heads=2, head_dim=6, ffn=12, qk_norm=True)


def test_shapes_and_axis_names_follow_the_glossary():
    shapes, axes = models.abstract(CFG), models.logical_axes(CFG)
    q, o = shapes["layers"]["attn"]["q"]["kernel"], shapes["layers"]["attn"]["o"]["kernel"]
    assert q.shape == (2, 8, 4, 6) and o.shape == (2, 4, 6, 8)
    assert shapes["layers"]["mlp"]["down"]["kernel"].shape == (2, 12, 8)
    assert axes["layers"]["attn"]["k"]["kernel"] == ("layers", "embed", "kv_heads", "head_dim")
    assert axes["unembed"]["kernel"] == ("embed", "vocab")
    flat = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
    assert [len(x) for x in flat] == [len(x.shape) for x in jax.tree.leaves(shapes)]


def test_init_makes_what_abstract_promises(key):
    params = models.init(CFG, key)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), models.abstract(CFG)
    )
    assert models.count(CFG) == tree.size(params)
    assert (params["final_norm"]["scale"] == 1).all()
    assert abs(float(params["embed"]["table"].std()) - CFG.init_std) < 0.005


def test_init_does_not_depend_on_sharding(key):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(leaf):
        spec = [None] * leaf.ndim
        for i, n in enumerate(leaf.shape):
            if n % 8 == 0:
                spec[i] = "x"
                break
        return NamedSharding(mesh, P(*spec))

    whole = models.init(CFG, key)
    out = jax.tree.map(place, models.abstract(CFG))
    spread = jax.jit(lambda k: models.init(CFG, k), out_shardings=out)(key)
    jax.tree.map(np.testing.assert_array_equal, whole, spread)


def test_a_value_model_differs_from_its_policy_only_in_the_head(key):
    value, policy = models.abstract(CFG.replace(head="value")), models.abstract(CFG)
    assert set(value) ^ set(policy) == {"value", "unembed"}
    assert value["value"]["kernel"].shape == (8, 1)
    assert "unembed" not in models.abstract(CFG.replace(tie=True))


def test_flops_are_those_of_the_compiled_program():
    # Wide enough for the products to outweigh what is not counted.
    cfg = LMConfig(vocab=256, layers=2, width=64, heads=4, kv_heads=2, head_dim=16, ffn=192)
    params = models.abstract(cfg)
    row = jax.ShapeDtypeStruct((1, 32), jnp.int32)

    def forward(params, *data):
        hidden, _ = models.apply(cfg, params, *data, attend=attention.plain)
        return models.unembed(cfg, params, hidden)

    program = jax.jit(forward).lower(params, row, row, row).compile()
    measured = program.cost_analysis()["flops"]
    assert 0.9 < measured / (32 * models.flops_per_token(cfg, 32)) < 1.2

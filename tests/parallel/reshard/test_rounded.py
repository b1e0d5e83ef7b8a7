"""Rounded weights: what arrives is what one device would round, and codes are what is sent."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counted import counted

from jaxrl_eff.parallel import Placement, Route, rules
from jaxrl_eff.parallel.reshard.rounded import LEAST, MOST, Pieces, RoundedRoute, sent_bytes

AXES = {
    "up": ("layers", "embed", "ffn"),
    "o": ("layers", "heads", "head_dim", "embed"),
    "norm": ("layers", "embed"),
}
SHAPES = {"up": (2, 512, 256), "o": (2, 4, 8, 512), "norm": (2, 512)}
SIZES = {"layers": {2}, "embed": {512}, "ffn": {256}, "heads": {4}, "head_dim": {8}}
ROUNDED = {"up": True, "o": True, "norm": False}
PLACES = {
    "one": (Placement((0,)), Placement((0,))),
    "disjoint": (Placement((0, 1, 2, 3), fsdp=2, tensor=2), Placement((4, 5, 6, 7), tensor=4)),
    "overlap": (Placement((0, 1, 2, 3), fsdp=4), Placement((2, 3, 4, 5), tensor=2)),
    "same": (Placement((0, 1), fsdp=2), Placement((0, 1), fsdp=2)),
    "many shards": (Placement(tuple(range(8)), fsdp=8), Placement((3,))),
    "into host memory": (Placement((0, 1), tensor=2), Placement((2,), offload="params")),
    "out of host memory": (Placement((2,), offload="params"), Placement((0, 1), fsdp=2)),
}


def values(dtype, seed=0):
    rng = np.random.default_rng(seed)
    return {k: rng.standard_normal(s).astype(dtype) for k, s in SHAPES.items()}


def routed(place, dtype, precision):
    source, target = (rules(p, SIZES).tree(AXES) for p in PLACES[place])
    tree = jax.device_put(values(dtype), source)
    return RoundedRoute(tree, target, rounded=ROUNDED, precision=precision), tree, target


def by_hand(x, bits):
    """Block by block: the scale is the largest magnitude over the largest code, in bfloat16.

    Quotients are products with reciprocals, as in the codec.
    """
    flat = np.asarray(x, np.float32).reshape(-1, Pieces.of(x.shape).length)
    top, one = np.float32(2 ** (bits - 1) - 1), np.float32(1)
    out = np.empty_like(flat)
    for i, block in enumerate(flat):
        largest = np.abs(block).max() * (one / top)
        near = np.float32(jnp.bfloat16(largest))
        up = near if near >= largest else np.float32(jnp.nextafter(jnp.bfloat16(near), jnp.inf))
        out[i] = np.clip(np.round(block * (one / up)), -top, top) * up
    return out.reshape(x.shape).astype(x.dtype)


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("place", PLACES)
def test_every_device_gets_what_is_rounded_by_hand(place, dtype, precision):
    route, tree, target = routed(place, dtype, precision)
    with jax.transfer_guard("disallow"):
        out = route.compile()(tree)
    for k, x in values(dtype).items():
        want = by_hand(x, int(precision[-1])) if ROUNDED[k] else x
        assert out[k].sharding == target[k] and out[k].dtype == dtype
        for shard in out[k].addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), want[shard.index], err_msg=k)


@pytest.mark.parametrize(
    ("precision", "dtype", "ratio"),
    [
        ("int8", np.float32, 66 / 256),
        ("int8", jnp.bfloat16, 66 / 128),
        ("int4", np.float32, 34 / 256),
        ("int4", jnp.bfloat16, 34 / 128),
    ],
)
@pytest.mark.parametrize("place", ["disjoint", "overlap", "many shards"])
def test_codes_are_sent_instead_of_weights(place, precision, dtype, ratio):
    route, tree, target = routed(place, dtype, precision)
    sent, whole = route.report().received, Route(tree, target).report().received
    norm = Route({"norm": tree["norm"]}, {"norm": target["norm"]}).report().received
    assert counted(route._route)[0] == sent  # of the compiled programs
    assert sent - norm == pytest.approx(ratio * (whole - norm))
    assert ratio == sent_bytes(precision) / np.dtype(dtype).itemsize


def test_nothing_is_sent_where_the_layouts_are_equal():
    route, tree, _ = routed("same", np.float32, "int8")
    assert route.report().received == 0 and not route.alias
    assert (np.asarray(route(tree)["up"]) != np.asarray(tree["up"])).any()


@pytest.mark.parametrize(
    "shape",
    [(4, 4096, 32, 128), (11008, 4096), (4096, 11008), (24, 896, 4864), (8960, 1536), (64, 8, 8)],
)
def test_blocks_of_real_sizes_divide_by_shards(shape):
    axis, count, length = Pieces.of(shape)
    assert count * length == math.prod(shape[axis:]) and LEAST <= length <= MOST
    assert shape[axis] % count == 0  # consecutive numbers
    if len(shape) < 4 and shape[-1] > 64:
        assert count % 8 == 0


@pytest.mark.parametrize("shape", [(3, 5), (7, 131), (2, 1, 3), (257,), (2, 3, 7, 11)])
def test_awkward_sizes_are_cut_by_the_codec(shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    where = rules(Placement((0, 1)), {}).sharding((None,) * len(shape))
    route = RoundedRoute([jax.device_put(x, where)], [where], rounded=[True], precision="int8")
    out = np.asarray(route([jax.device_put(x, where)])[0])
    assert 0 < np.abs(out - x).max() < 0.51 * np.abs(x).max() / 126


def test_what_is_not_finite_arrives_so():
    route, tree, _ = routed("disjoint", np.float32, "int8")
    out = np.asarray(route(tree | {"up": tree["up"].at[1, 5, 7].set(jnp.inf)})["up"])
    bad = np.isnan(out)
    assert bad[1, 5, 7] and bad.sum() == Pieces.of(SHAPES["up"]).length

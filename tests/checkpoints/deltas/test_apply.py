"""Apply and remove are inverse bit for bit; a delta only fits the base that it was made for."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_eff.checkpoints import deltas
from jaxrl_eff.checkpoints.deltas import Delta, Entries

DTYPES = {"float32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16}


def any_bits(dtype, shape, seed):
    """Every kind of number: both zeros, subnormals, infinities, NaNs with payloads."""
    unsigned = DTYPES[dtype]
    most = np.iinfo(unsigned).max
    return np.random.default_rng(seed).integers(0, most, shape, unsigned, True).view(dtype)


def raw(x):
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


def same_bits(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(raw(x), raw(y)), a, b)
    assert jax.tree.map(lambda x: x.dtype, a) == jax.tree.map(lambda x: x.dtype, b)


def tuned(base, seed, share=0.2):
    """Some entries with other bits."""

    def change(x):
        rng = np.random.default_rng(seed)
        flip = rng.integers(0, np.iinfo(raw(x).dtype).max, x.shape, raw(x).dtype)
        return np.where(rng.random(x.shape) < share, raw(x) ^ flip, raw(x)).view(x.dtype)

    return jax.tree.map(change, base)


@pytest.fixture(params=DTYPES)
def models(request):
    base = {
        "a": {"w": any_bits(request.param, (3, 5, 7), 0), "b": any_bits(request.param, (11,), 1)},
        "c": any_bits(request.param, (), 2),
        "same": any_bits(request.param, (4, 4), 3),
        "none": any_bits(request.param, (0, 4), 4),
    }
    new = tuned(base, 5)
    new["c"] = raw(base["c"]).__xor__(1).view(request.param).reshape(())
    new["same"] = base["same"]
    return base, new


@pytest.mark.parametrize("on", ["numpy", "jax"])
def test_apply_then_remove_is_the_base_bit_for_bit(models, on):
    base, new = models
    if on == "jax":
        base, new = jax.tree.map(jnp.asarray, base), jax.tree.map(jnp.asarray, new)
    delta = deltas.diff(base, new)
    assert set(delta.tensors) == {"a/w", "a/b", "c"} and 0 < delta.density < 0.6
    before = jax.tree.map(np.array, base)
    got = deltas.apply(base, delta)
    same_bits(got, new)
    same_bits(base, before)
    assert all(isinstance(x, jax.Array) == (on == "jax") for x in jax.tree.leaves(got))
    back = deltas.remove(got, delta)
    same_bits(back, base)
    assert deltas.content_hash(back) == deltas.content_hash(base) == delta.base


def test_zeros_of_either_sign_and_nans_are_different_numbers():
    base = {"w": np.array([0.0, -0.0, np.nan, 1.0], np.float32)}
    new = {"w": np.array([-0.0, -0.0, 0.0, 1.0], np.float32)}
    new["w"].view(np.uint32)[2] = 0x7FC00001
    delta = deltas.diff(base, new)
    np.testing.assert_array_equal(delta.tensors["w"].indices, [0, 2])
    got = deltas.apply(base, delta)
    assert np.signbit(got["w"][0]) and raw(got["w"])[2] == 0x7FC00001


def test_subtracting_would_not_restore_bfloat16():
    """Why `remove` overwrites: (w + d) - d is another number for some."""
    rng = np.random.default_rng(0)
    base = {"w": rng.normal(0, 0.02, 4096).astype(ml_dtypes.bfloat16)}
    change = rng.normal(0, 0.01, 4096).astype(np.float32)
    delta = deltas.from_entries(
        {"w": (4096,)}, {"w": np.arange(4096)}, {"w": change},
        dtypes={"w": "bfloat16"}, semantics="add",
    )  # fmt: skip
    exact = deltas.resolved(base, delta)
    merged = deltas.apply(base, delta)
    naive = (merged["w"].astype(np.float32) - change).astype(ml_dtypes.bfloat16)
    assert (raw(naive) != raw(base["w"])).mean() > 0.01
    same_bits(deltas.remove(merged, exact), base)


def test_adding_rounds_once_to_the_tensors_dtype():
    rng = np.random.default_rng(1)
    for dtype in DTYPES:
        base = {"w": rng.normal(0, 1, (6, 8)).astype(dtype)}
        at = np.sort(rng.choice(48, 10, replace=False))
        values = rng.normal(0, 1e-2, 10).astype(np.float32)
        delta = Delta({"w": Entries((6, 8), dtype, at, values)}, semantics="add")
        wanted = base["w"].astype(np.float32).reshape(-1)
        wanted[at] = wanted[at] + values
        same_bits(deltas.apply(base, delta), {"w": wanted.reshape(6, 8).astype(dtype)})


def test_shards_change_where_they_are():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    where = NamedSharding(mesh, PartitionSpec(None, "x", "y"))
    host = {"w": any_bits("bfloat16", (3, 8, 6), 6)}
    base = jax.device_put(host, where)
    new = tuned(host, 7)
    delta = deltas.diff(base, jax.device_put(new, where))
    assert delta.base == deltas.content_hash(host)
    got = deltas.apply(base, delta)
    assert got["w"].sharding == where
    same_bits(got, new)
    back = deltas.remove(got, delta)
    assert back["w"].sharding == where
    same_bits(back, host)


def test_the_hash_sees_contents_alone():
    base = {"a": any_bits("bfloat16", (4, 6), 0), "b": {"c": any_bits("float32", (5,), 1)}}
    told = deltas.content_hash(base)
    assert told.startswith("sha256:") and len(told) == 71
    flat = {"b/c": base["b"]["c"], "a": np.asfortranarray(base["a"])}
    assert deltas.content_hash(flat) == told
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("x"))
    assert deltas.content_hash({**flat, "a": jax.device_put(flat["a"], split)}) == told
    others = [
        {**flat, "a": flat["a"].reshape(6, 4)},
        {**flat, "a": flat["a"].view(np.float16)},
        {"b/d": flat["b/c"], "a": flat["a"]},
        {"a": flat["a"]},
        {**flat, "more": np.zeros(0, np.float32)},
    ]
    for bit in (0, 13):
        other = np.array(flat["a"], order="C")
        raw(other)[2, 3] ^= 1 << bit
        others.append({**flat, "a": other})
    assert len({told, *map(deltas.content_hash, others)}) == 1 + len(others)


def test_a_delta_fits_its_base_alone(models):
    base, new = models
    delta = deltas.diff(base, new)
    with pytest.raises(ValueError, match=f"made for the base {delta.base}, but this is sha256"):
        deltas.apply(new, delta)
    other = {**base, "same": new["a"]["w"][0, :4, :4]}
    with pytest.raises(ValueError, match="another model"):
        deltas.apply(other, delta)
    with pytest.raises(ValueError, match="is not what the delta was made for"):
        deltas.apply(new, delta, content=False)
    with pytest.raises(ValueError, match="not the base"):
        deltas.remove({**new, "same": other["same"]}, delta)
    with pytest.raises(ValueError, match="changes 'c', which is not there; there is a/b, a/w"):
        deltas.apply({k: v for k, v in base.items() if k != "c"}, delta)
    with pytest.raises(ValueError, match=r"'c' is \w+\[1\], but the delta is for \w+\[\]"):
        deltas.apply({**base, "c": base["c"].reshape(1)}, delta)
    bare = deltas.diff(base, new, originals=False)
    assert not bare.reversible
    same_bits(deltas.apply(base, bare), new)
    with pytest.raises(ValueError, match="no originals"):
        deltas.remove(new, bare)
    same_bits(deltas.remove(new, deltas.resolved(base, bare)), base)


def test_models_that_do_not_fit_have_no_difference():
    a, b = np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32)
    with pytest.raises(ValueError, match=r"float32\[2, 3\] in the base, but float32\[3, 2\]"):
        deltas.diff({"w": a}, {"w": b})
    with pytest.raises(ValueError, match="float16"):
        deltas.diff({"w": a}, {"w": a.astype(np.float16)})
    with pytest.raises(ValueError, match="'v' is only in the tuned model"):
        deltas.diff({"w": a}, {"w": a, "v": a})
    empty = deltas.diff({"w": a}, {"w": a})
    assert not empty.tensors and deltas.apply({"w": a}, empty)["w"] is a


def test_a_sparse_optimizers_arrays_become_the_delta_of_the_models():
    """Stacked tensors with indices into every layer, in any order, some of them unchanged."""
    rng = np.random.default_rng(8)
    base = {"layers/w": any_bits("bfloat16", (3, 4, 5), 9), "norm": any_bits("bfloat16", (6,), 10)}
    new = tuned(base, 11)
    at = np.stack([rng.permutation(20) for _ in range(3)]).astype(np.int32)
    rows = np.arange(3)[:, None]
    delta = deltas.from_entries(
        {"layers/w": (3, 4, 5), "norm": (6,)},
        {"layers/w": at, "norm": np.arange(6)[::-1]},
        {"layers/w": new["layers/w"].reshape(3, 20)[rows, at], "norm": new["norm"][::-1]},
        {"layers/w": base["layers/w"].reshape(3, 20)[rows, at], "norm": base["norm"][::-1]},
        base=deltas.content_hash(base),
    )
    wanted = deltas.diff(base, new)
    assert delta.tensors.keys() == wanted.tensors.keys()
    for name, entries in wanted.tensors.items():
        mine = delta.tensors[name]
        np.testing.assert_array_equal(mine.indices, entries.indices)
        np.testing.assert_array_equal(raw(mine.values), raw(entries.values))
        np.testing.assert_array_equal(raw(mine.originals), raw(entries.originals))
    same_bits(deltas.apply(base, delta), new)


def test_arrays_that_do_not_fit_are_named():
    shapes = {"w": (2, 3)}
    one = np.zeros(1, np.float32)

    def refuses(message, indices, values=one, originals=None, **more):
        with pytest.raises(ValueError, match=message):
            deltas.from_entries(
                shapes, {"w": indices}, {"w": values},
                None if originals is None else {"w": originals}, **more,
            )  # fmt: skip

    refuses("'w': indices from 6 to 6", np.array([6]))
    refuses("'w' has 2 indices, but 1 values", np.array([0, 1]))
    refuses("'w': the indices are not strictly", np.array([1, 1]), np.zeros(2, np.float32))
    refuses("not from 0 to 2", np.array([[0], [3]]), np.zeros(2, np.float32))
    refuses(r"\[3, 1\], but its shape is \[2, 3\]", np.zeros((3, 1), int), np.zeros(3, np.float32))
    refuses("are float32, not integers", one)
    refuses("values of 'w' are float32", np.array([0]), one, np.zeros(1, np.float16))
    refuses("unknown semantics 'put'", np.array([0]), semantics="put")
    with pytest.raises(ValueError, match="'v' is only in one of shapes and values"):
        deltas.from_entries(shapes, {"w": np.array([0])}, {"v": one})
    with pytest.raises(ValueError, match="originals are float16, but the tensor float32"):
        dataclasses.replace(
            Entries((4,), "float32", np.array([0]), one), originals=one.astype(np.float16)
        )

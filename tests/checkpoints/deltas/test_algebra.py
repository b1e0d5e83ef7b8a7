"""Sums of deltas against dense float64; overlaps and masks against sets."""

import itertools

import numpy as np
import pytest

from jaxrl_eff.checkpoints import deltas
from jaxrl_eff.checkpoints.deltas import Delta, Entries

SHAPES = {"a": (7, 9), "b": (30,), "c": (2, 3, 4)}


def base(dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return {k: rng.normal(0, 1, s).astype(dtype) for k, s in SHAPES.items()}


def tuned(model, seed, share=0.3, leave=()):
    rng = np.random.default_rng(seed)
    return {
        k: x if k in leave else np.where(
            rng.random(x.shape) < share, (x + rng.normal(0, 0.1, x.shape)).astype(x.dtype), x
        )
        for k, x in model.items()
    }  # fmt: skip


def three(dtype="float32"):
    model = base(dtype)
    return model, [deltas.diff(model, tuned(model, s, leave="abc"[s - 1])) for s in (1, 2, 3)]


def dense(delta):
    """The change of every entry in float64."""
    out = {k: np.zeros(s) for k, s in SHAPES.items()}
    for name, e in delta.tensors.items():
        change = e.values.astype(np.float64)
        if delta.semantics == "set":
            change = change - e.originals.astype(np.float64)
        np.put(out[name], e.indices, change)
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_composing_adds_dense_deltas_in_float64(dtype):
    model, parts = three(dtype)
    weights = [1.0, 0.5, -2.0]
    got = deltas.compose(parts, weights)
    assert got.semantics == "add" and got.base == deltas.content_hash(model)
    for name, shape in SHAPES.items():
        wanted = sum(w * dense(d)[name] for w, d in zip(weights, parts, strict=True))
        np.testing.assert_array_equal(dense(got)[name], wanted.astype(np.float32))
        touched = set().union(*(d.tensors[name].indices for d in parts if name in d.tensors))
        np.testing.assert_array_equal(got.tensors[name].indices, sorted(touched))
        assert got.tensors[name].shape == shape


def test_the_order_of_the_deltas_does_not_matter():
    _, parts = three()
    wanted = deltas.compose(parts, [1.0, 0.3, -0.7])
    for order in itertools.permutations(range(3)):
        got = deltas.compose([parts[i] for i in order], [[1.0, 0.3, -0.7][i] for i in order])
        for name, e in wanted.tensors.items():
            assert got.tensors[name].values.tobytes() == e.values.tobytes()
            assert got.tensors[name].originals.tobytes() == e.originals.tobytes()


def test_disjoint_deltas_compose_to_one_after_the_other():
    model = base("bfloat16")
    first = deltas.diff(model, tuned(model, 1))
    second = deltas.without(deltas.diff(model, tuned(model, 2)), first)
    assert deltas.disjoint(first, second) and second.count
    both = deltas.apply(deltas.apply(model, first), second, content=False)
    got = deltas.apply(model, deltas.compose([first, second]))
    for name in SHAPES:
        np.testing.assert_array_equal(got[name], both[name])


def test_a_sum_can_be_taken_back():
    model, parts = three("bfloat16")
    both = deltas.compose(parts[:2])
    assert both.reversible
    back = deltas.remove(deltas.apply(model, both), both)
    assert deltas.content_hash(back) == deltas.content_hash(model)


def test_scaling_by_one_is_the_delta_and_by_minus_one_cancels_it():
    model, (delta, *_) = three("bfloat16")  # whose differences float32 holds
    plain = deltas.as_add(delta)
    for name, e in deltas.scale(delta, 1).tensors.items():
        np.testing.assert_array_equal(e.values, plain.tensors[name].values)
    nothing = deltas.compose([delta, deltas.scale(delta, -1.0)])
    assert all(not e.values.any() for e in nothing.tensors.values())
    got = deltas.apply(model, nothing)
    assert all(np.array_equal(got[k], model[k]) for k in SHAPES)
    assert deltas.scale(delta, 0.5).method == delta.method


def test_a_delta_of_a_float32_copy_fits_the_bfloat16_base():
    half = base("bfloat16")
    wide = {k: x.astype(np.float32) for k, x in half.items()}
    rng = np.random.default_rng(5)
    new = {k: x + rng.normal(0, 1e-2, x.shape).astype(np.float32) for k, x in wide.items()}
    got = deltas.as_dtype(deltas.diff(wide, new), "bfloat16", base=deltas.content_hash(half))
    rounded = {k: x.astype(half[k].dtype) for k, x in new.items()}
    wanted = deltas.diff(half, rounded)
    assert got.base == wanted.base and 0 < got.count < sum(x.size for x in wide.values())
    for name, e in wanted.tensors.items():
        assert np.array_equal(got.tensors[name].indices, e.indices)
        assert got.tensors[name].values.tobytes() == e.values.tobytes()
        assert got.tensors[name].originals.tobytes() == e.originals.tobytes()
    with pytest.raises(ValueError, match="was never bfloat16"):
        deltas.as_dtype(deltas.diff(new, wide), "bfloat16")


def test_overlap_counts_what_sets_do():
    _, parts = three()
    for (i, j), both in deltas.overlaps(parts).items():
        a, b = dense(parts[i]), dense(parts[j])
        one, two = (
            {(k, n) for k, e in parts[p].tensors.items() for n in e.indices} for p in (i, j)
        )
        conflicts = sum(
            a[k].reshape(-1)[n] * b[k].reshape(-1)[n] < 0 for k, n in one & two
        )  # fmt: skip
        assert (both.shared, both.either, both.conflicts) == (
            len(one & two), len(one | two), conflicts,
        )  # fmt: skip
        assert both.jaccard == len(one & two) / len(one | two)
        assert both.conflict_rate == conflicts / len(one & two)
        assert not deltas.disjoint(parts[i], parts[j])
    itself = deltas.overlap(parts[0], parts[0])
    assert (itself.jaccard, itself.conflict_rate) == (1, 0)
    opposite = deltas.overlap(parts[0], deltas.scale(parts[0], -1))
    assert (opposite.jaccard, opposite.conflict_rate) == (1, 1)
    nothing = deltas.overlap(Delta({}), Delta({}))
    assert (nothing.jaccard, nothing.conflict_rate) == (0, 0)


def test_masks_say_where_another_task_may_train():
    model, parts = three()
    masks = deltas.mask_of(parts[0])
    assert masks.keys() == parts[0].tensors.keys()
    other = tuned(model, 9, share=0.9)
    kept = {k: np.where(masks[k], model[k], other[k]) if k in masks else other[k] for k in model}
    second = deltas.diff(model, kept)
    assert deltas.disjoint(parts[0], second)
    assert deltas.mask_of(second)["b"].sum() == len(second.tensors["b"])
    left = deltas.without(parts[1], parts[0])
    assert left.count == parts[1].count - deltas.overlap(*parts[:2]).shared


def test_what_cannot_be_summed_is_refused():
    model, parts = three()
    bare = deltas.diff(model, tuned(model, 4), originals=False)
    elsewhere = deltas.diff(base(seed=1), tuned(base(seed=1), 1))
    one = Delta({"a": Entries((63,), "float32", np.array([0]), np.ones(1, np.float32))}, "", "add")
    for message, those, weights in (
        ("0 deltas and 0 weights", [], None),
        ("3 deltas and 1 weights", parts, [1.0]),
        ("should be finite", parts[:1], [np.nan]),
        ("different bases", [parts[0], elsewhere], None),
        ("holds no originals", [parts[0], bare], None),
        (r"'a' is float32\[7, 9\] in one delta and float32\[63\]", [parts[1], one], None),
    ):
        with pytest.raises(ValueError, match=message):
            deltas.compose(those, weights)
    with pytest.raises(ValueError, match="different bases"):
        deltas.overlap(parts[0], elsewhere)

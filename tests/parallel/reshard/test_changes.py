"""Weight sync by changes: the copy is what a whole sync would give, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_eff.parallel import Placement, Route, SyncConfig, WeightSync, rules
from jaxrl_eff.parallel.reshard.changes import ChangedElements

AXES = {"w": ("embed", "heads"), "b": ("embed",), "n": ()}
SIZES = {"embed": {64}, "heads": {32}}
PLACES = {
    "disjoint": (Placement((0, 1, 2, 3), fsdp=2, tensor=2), Placement((4, 5, 6, 7), tensor=4)),
    "repeated": (Placement((0, 1), fsdp=2), Placement((2, 3, 4))),
    "overlap": (Placement((0, 1, 2, 3), fsdp=4), Placement((2, 3, 4, 5), tensor=2)),
    "same": (Placement((0, 1), fsdp=2), Placement((0, 1), fsdp=2)),
}


def values(seed, share=1.0, like=None):
    rng = np.random.default_rng(seed)
    shapes = {"w": (64, 32), "b": (64,), "n": ()}
    new = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    if like is None:
        return new
    return {k: np.where(rng.random(v.shape) < share, new[k], v) for k, v in like.items()}


def equal(copy, tree):
    for k, v in tree.items():
        assert copy[k].dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(copy[k]), v.astype(jnp.bfloat16), err_msg=k)


@pytest.mark.parametrize("place", PLACES)
def test_a_copy_follows_its_source(place):
    source, target = (rules(p, SIZES).tree(AXES) for p in PLACES[place])
    now = values(0)
    tree = jax.device_put(now, source)
    sync = ChangedElements(tree, target, SyncConfig(0.1, every=4, dense_below=16))
    copy, sent = sync.start(tree)
    equal(copy, now)
    moves = Route(tree, target).report().minimum > 0
    for step, share in enumerate([0.03, 0.0, 0.5, 0.02, 0.02], start=1):
        now = values(step, share, now)
        with jax.transfer_guard("disallow"):
            copy, sent, done = sync(jax.device_put(now, source), copy, sent, step)
        equal(copy, now)
        equal(sent, now)
        assert copy["w"].sharding == target["w"] and sent["w"].sharding == source["w"]
        full, drifted = int(done.dense), int(done.drifted)
        assert (full > 0) == (share == 0.5 and moves)
        assert drifted == (0 if step == 4 else -1)
        if moves and step != 4:
            assert float(done.changed) == pytest.approx(share, abs=0.02)
            assert (float(done.received) < done.whole / 2) == (not full)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("place", PLACES)
def test_rounded_differences_leave_all_receivers_alike(place, bits):
    """Every device has the bits that its source thinks it has, and errors do not add up."""
    source, target = (rules(p, SIZES).tree(AXES) for p in PLACES[place])
    now = values(0)
    sync = ChangedElements(
        now_on(now, source), target, SyncConfig(bits=bits, block=64, dense_below=16), dtype=None
    )
    copy, sent = sync.start(now_on(now, source))
    wrong = []
    for step in range(1, 9):
        drift = values(step)
        now = {k: v + np.float32(0.01) * drift[k] for k, v in now.items()}
        with jax.transfer_guard("disallow"):
            copy, sent, done = sync(now_on(now, source), copy, sent, step)
        for k in now:
            same = np.asarray(sent[k])
            for shard in copy[k].addressable_shards:
                np.testing.assert_array_equal(shard.data, same[shard.index], err_msg=k)
        apart = np.asarray(copy["w"]) - now["w"]
        wrong.append(np.abs(apart).max())
        assert (np.asarray(copy["n"]) == now["n"]).all()  # a number always goes as it is
    received = float(done.received)
    if Route(sent, target).report().minimum == 0:
        assert received == 0
        return
    steps = 0.01 * np.abs(values(1)["w"]).max() / (2 ** (bits - 1) - 1)  # of codes, about
    assert wrong[0] > 0 and max(wrong) < 1.5 * steps
    assert received < done.whole * (bits / 32 + 0.06)  # scales, and what is too small
    for step in range(9, 13):  # nothing changes: what was left over arrives
        copy, sent, done = sync(now_on(now, source), copy, sent, step)
    assert np.abs(np.asarray(copy["w"]) - now["w"]).max() < wrong[-1] / 100
    copy, sent, done = sync(now_on(now, source), copy, sent, 100)
    np.testing.assert_array_equal(copy["w"], now["w"])
    assert int(done.drifted) == 0


def now_on(values, where):
    return jax.device_put(values, where)


def test_what_is_not_finite_arrives_so():
    source, target = (rules(p, SIZES).tree(AXES) for p in PLACES["disjoint"])
    now = values(0)
    sync = ChangedElements(
        now_on(now, source), target, SyncConfig(bits=4, dense_below=16), dtype=None
    )
    copy, sent = sync.start(now_on(now, source))
    now["w"][5, 7] = np.nan
    copy, sent, _ = sync(now_on(now, source), copy, sent, 1)
    assert np.isnan(np.asarray(copy["w"])[5, 7])


def test_a_copy_that_drifted_is_noticed_and_mended():
    source, target = (rules(p, SIZES).tree(AXES) for p in PLACES["disjoint"])
    now = values(0)
    tree = jax.device_put(now, source)
    sync = ChangedElements(tree, target, SyncConfig(every=2, dense_below=16))
    copy, sent = sync.start(tree)
    spoilt = np.array(copy["w"])
    spoilt[3, 3] = 5
    copy["w"] = jax.device_put(spoilt, target["w"])
    copy, sent, done = sync(tree, copy, sent, 1)
    assert np.asarray(copy["w"])[3, 3] == 5 and int(done.drifted) == -1
    copy, sent, done = sync(tree, copy, sent, 2)
    equal(copy, now)
    assert int(done.drifted) == 1


def test_a_restarted_sync_sends_everything_like_the_first():
    source, target = (rules(p, SIZES).tree(AXES) for p in PLACES["disjoint"])
    tree = jax.device_put(values(0), source)
    config = SyncConfig(bits=8, block=64, dense_below=16)
    sync = WeightSync(tree, target, still={"w": False, "b": True, "n": False}, changes=config)
    before = sync(tree)
    assert sync.done is None
    now = jax.device_put(values(1, like=values(0)), source) | {"b": tree["b"]}
    rounded = sync(now)
    assert rounded["b"] is before["b"] and int(sync.done.drifted) == -1
    assert (np.asarray(rounded["w"]) != np.asarray(now["w"])).any()
    sync.restart()
    copy = sync(now)
    assert copy["b"] is not before["b"] and sync.done is None  # not that of a sync before it
    for k, x in now.items():
        np.testing.assert_array_equal(np.asarray(copy[k]), np.asarray(x))

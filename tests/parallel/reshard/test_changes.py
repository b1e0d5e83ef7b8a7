"""Weight sync by changes: the copy is what a whole sync would give, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_eff.parallel import Placement, Route, SyncConfig, rules
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

"""Counts of a scheduled loader are of the batches that were given, not of those planned ahead."""

import numpy as np

from jaxrl_eff.data import loader
from jaxrl_eff.data.balance.assignment import Shape
from jaxrl_eff.data.balance.balanced_loader import BalancedLoader
from jaxrl_eff.data.balance.cost import Cost


def masked(example):
    ids = np.arange(example["n"], dtype=np.int32)
    return ids, np.minimum(ids, 1).astype(np.float32)


def made(batches, **options):
    cost = Cost(
        linear=1.0, square=1.0, bytes_per_token=2.0, ring_rounds=3,
        flops_per_s=1e9, attention_per_s=1e9, bytes_per_s=1e9,
    )  # fmt: skip
    return BalancedLoader(
        batches, groups=1, parts=1, capacity=8, cost=cost, shapes=[Shape(0, 8)], measure=False,
        **options,
    )  # fmt: skip


def test_what_is_dropped_is_counted_up_to_the_batch_that_was_given():
    source = [{"n": 4 if i % 3 == 0 else 40} for i in range(60)]
    options = dict(
        encode=masked, batch=2, kind="sft", seed=0, length=8, shuffle=False, packed=False
    )
    plain = loader.batches(source, **options)
    batches = made(loader.batches(source, **options), ahead=4)
    names = ("examples", "dropped", "overlong", "batches", "epochs")
    for _ in range(5):
        next(plain), next(batches)
        there, here = plain.stats(), batches.stats()
        assert [here[k] for k in names] == [there[k] for k in names]
    assert there["dropped"] >= 18
    plain.close(), batches.close()


def test_states_saved_under_the_costs_earlier_names_are_restored():
    source = [{"n": 4}] * 8
    first, again = (
        made(loader.batches(source, encode=masked, batch=2, kind="sft", seed=0, length=8))
        for _ in range(2)
    )
    state = first.state()
    earlier = {"bytes_per_token": "wire", "ring_rounds": "laps"}
    state["cost"] = {earlier.get(k, k): v for k, v in state["cost"].items()}
    again.restore(state)
    assert again.state()["cost"] == first.state()["cost"]
    first.close(), again.close()

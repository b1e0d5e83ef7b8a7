"""Reallocation: every pair of layouts gives the same values, and none goes through the host."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_eff.parallel import Placement, Route, rules

PLACES = {
    "one": Placement((0,)),
    "fsdp4": Placement((0, 1, 2, 3), fsdp=4),
    "tp4": Placement((0, 1, 2, 3), tensor=4),
    "tp2_other_half": Placement((4, 5), tensor=2),
    "mixed8": Placement(tuple(range(8)), data=2, fsdp=2, tensor=2),
    "reordered": Placement((3, 1, 0, 2), fsdp=2, tensor=2),
    "overlap": Placement((2, 3, 4, 5), fsdp=2, tensor=2),
    "three": Placement((5, 6, 7), data=3),
}
AXES = {"w": ("layers", "embed", "heads", "head_dim"), "b": ("embed",)}


def _tree():
    return {
        "w": jnp.arange(2 * 8 * 4 * 3, dtype=jnp.float32).reshape(2, 8, 4, 3),
        "b": jnp.arange(8, dtype=jnp.float32),
    }


@pytest.mark.parametrize(("a", "b"), itertools.product(PLACES, PLACES))
def test_values_survive_every_pair_of_layouts(a, b, monkeypatch):
    sizes = {"embed": {8}, "heads": {4}, "head_dim": {3}, "layers": {2}}
    source, target = (rules(PLACES[p], sizes).tree(AXES) for p in (a, b))
    tree = jax.device_put(_tree(), source)
    route = Route(source, target)

    bounced = []
    array_type = type(tree["w"])
    fetch = array_type._value.fget
    monkeypatch.setattr(
        array_type, "_value", property(lambda self: bounced.append(self.shape) or fetch(self))
    )
    moved = route(tree)
    monkeypatch.undo()

    assert not bounced, f"{a} to {b} went through the host"
    assert jax.tree.map(lambda x: x.sharding, moved) == target
    jax.tree.map(np.testing.assert_array_equal, moved, _tree())
    assert route.alias == (a == b)

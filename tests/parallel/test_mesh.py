"""Placements, and the table from logical axes to mesh axes."""

import pytest
from jax.sharding import PartitionSpec as P

from jaxrl_eff.parallel import Placement, arrays, rules
from jaxrl_eff.parallel.mesh import mesh


def test_data_takes_what_the_other_axes_leave():
    place = Placement(tuple(range(8)), tensor=2, fsdp=2)
    assert place.axes == {"stage": 1, "dcn": 1, "data": 2, "fsdp": 2, "seq": 1, "tensor": 2}
    assert mesh(place).shape["data"] == 2
    assert str(place) == "devices 0-7: data=2 fsdp=2 tensor=2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"devices": (0, 1, 2), "tensor": 2}, "3 devices .* cannot be meshed"),
        ({"devices": (0, 0)}, "must be distinct"),
        ({"devices": ()}, "at least one"),
        ({"devices": (0, 1, 2), "stage": 2}, "cannot be meshed as stage=2"),
        ({"devices": (0, 1), "offload": "opt "}, "unknown offload 'opt '; expected one of"),
        ({"devices": (0,), "microbatches": 0}, "microbatches is 0"),
    ],
)
def test_a_bad_placement_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Placement(**arguments)


def test_an_axis_that_does_not_divide_stays_whole_with_a_note():
    r = rules(Placement(tuple(range(4)), tensor=4), {"kv_heads": {2}, "heads": {8}})
    assert r.spec(("embed", "kv_heads", "head_dim")) == P(("fsdp",), None, None)
    assert r.spec(("embed", "heads", "head_dim")) == P(("fsdp",), ("tensor",), None)
    assert r.notes == ("kv_heads of size 2 does not divide by 4 and stays whole",)


def test_two_axes_on_one_mesh_axis_are_refused():
    r = rules(Placement((0,)), {})
    with pytest.raises(ValueError, match="two axes on mesh axis 'tensor'"):
        r.spec(("heads", "ffn"))
    with pytest.raises(ValueError, match="unknown logical axis 'hedas'"):
        r.spec(("hedas",))


def test_rows_are_split_over_data_and_fsdp():
    place = Placement(tuple(range(8)), data=2, fsdp=2, seq=2)
    assert arrays(place).fitting(("batch", "length"), (8, 6)).spec == P(("data", "fsdp"), "seq")
    assert arrays(place).fitting(("batch", "length"), (6, 6)).spec == P(None, "seq")
    assert arrays(place).fitting(("batch", "length"), (8,)).spec == P(("data", "fsdp"))


def test_nodes_come_before_the_axes_within_them():
    place = Placement(tuple(range(8)), dcn=2, fsdp=2)
    assert place.axes["data"] == 2 and place.row_shards == 8 and place.weight_shards == 4
    assert arrays(place).fitting(("batch", "length"), (8,)).spec == P(("dcn", "data", "fsdp"))
    r = rules(place, {"embed": {8}})
    assert r.spec(("embed", "ffn")) == P(("dcn", "fsdp"), ("tensor",))
    assert rules(place, {"embed": {6}}).notes == (
        "embed of size 6 does not divide by 4 and stays whole",
    )

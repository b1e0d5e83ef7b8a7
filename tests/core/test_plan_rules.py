"""Plans from rules and tables, and what is refused."""

import pytest

from jaxrl_eff.core import Graph, generate, infer, local, plan_rules, train
from jaxrl_eff.parallel import Placement


def nothing(*_):
    return {}


GRAPH = Graph(
    "prompt",
    (
        generate("actor_gen", of="actor", fn=nothing, reads="prompt", writes="tokens"),
        infer("ref_inf", of="ref", fn=nothing, reads="tokens", writes="ref_logp"),
        local("advantage", fn=nothing, reads="tokens ref_logp", writes="adv"),
        train("actor_train", of="actor", loss=nothing, reads="tokens adv"),
    ),
)
ALL = Placement((0, 1, 2, 3))


def test_all_puts_every_model_call_on_all_devices():
    assert plan_rules.plan("all", GRAPH, 4) == {
        "actor_gen": ALL,
        "ref_inf": ALL,
        "actor_train": ALL,
    }


def test_halves_parts_the_actor_from_the_others():
    assert plan_rules.plan("halves", GRAPH, 5) == {
        "actor_gen": Placement((0, 1)),
        "ref_inf": Placement((2, 3)),
        "actor_train": Placement((0, 1)),
    }


def test_a_table_gives_rows_and_a_default():
    rule = {
        "default": {},
        "actor_gen": {"devices": 2, "tensor": 2},
        "actor_train": {"devices": [1, 0], "fsdp": 2, "microbatches": 3},
        "advantage": {"devices": [3]},
    }
    assert plan_rules.plan(rule, GRAPH, 4) == {
        "actor_gen": Placement((0, 1), tensor=2),
        "ref_inf": ALL,
        "actor_train": Placement((1, 0), fsdp=2, microbatches=3),
        "advantage": Placement((3,)),
    }


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("thirds", r"unknown plan 'thirds'; expected one of \['all'.*'halves'\]"),
        ({"actor_gen": {}}, r"no row for ref_inf, and no row 'default'"),
        ({"default": {}, "rew_inf": {}}, r"unknown call 'rew_inf'; expected one of \['actor_gen'"),
        ({"default": {"tnsor": 2}}, r"of actor_gen: unknown field 'tnsor'; .*'tensor'"),
        ({"default": {"devices": [0, 4]}}, r"of actor_gen names devices \[4\]; there are 4, 0 to"),
        ({"default": {"devices": 9}}, r"devices is 9, but must be 1 to 4"),
        ({"default": {"devices": []}}, r"of actor_gen: devices \[\] must be distinct and at least"),
        ({"default": {"devices": [1, 1]}}, r"devices \[1, 1\] must be distinct"),
        ({"default": {"devices": "0"}}, r"of actor_gen: devices is '0', but must be"),
        (
            {"default": {"tensor": 3}},
            r"meshed as stage=1 dcn=1 data=\(rest\) fsdp=1 seq=1 tensor=3",
        ),
        ({"default": {"tensor": 0}}, r"tensor is 0, but must be at least 1"),
        ({"default": {"tensor": "2"}}, r"of actor_gen: tensor is '2', of the wrong type"),
        ({"default": {"offload": "all"}}, r"of actor_gen: unknown offload 'all'; expected one of"),
        ({"default": {"microbatches": 0}}, r"microbatches is 0, but must be at least 1"),
    ],
)
def test_what_does_not_fit_is_named(rule, message):
    with pytest.raises(ValueError, match=message):
        plan_rules.plan(rule, GRAPH, 4)


def test_halves_of_one_device_are_refused():
    with pytest.raises(ValueError, match=r"'halves' needs at least 2 devices; there is 1"):
        plan_rules.plan("halves", GRAPH, 1)

"""Rows of the data source computed packed: no schedule and no plan changes a parameter."""

import dataclasses
import functools
import re

import jax
import launch
import numpy as np
import optax
import pytest
from sized import sized
from test_packed import at_random
from test_plan_law import check as check_law
from test_plan_law import models_after
from test_resume import failed

from jaxrl_eff import core
from jaxrl_eff.algorithms import dpo, reward_model, sft
from jaxrl_eff.core import Packing, Placement, Spec, packed_memory
from jaxrl_eff.data import packing
from jaxrl_eff.data.balance import skrull
from jaxrl_eff.data.balance.assignment import Shape
from jaxrl_eff.models import LMConfig, params
from jaxrl_eff.planner.packed_rows import cost_of
from jaxrl_eff.train import assembly, balanced

LM = LMConfig(
    vocab=24, layers=2, width=16, heads=4, kv_heads=2, head_dim=8, ffn=32, init_std=0.3, unroll=1
)
VALUE = LM.replace(head="value")
GRAPHS = {
    "sft": lambda: sft.graph(sft.SFTConfig(loss_agg="sequence_mean"), {"actor": LM}),
    "dpo": lambda: dpo.graph(dpo.DPOConfig(length_normalised=True), {"actor": LM}),
    "reward_model": lambda: reward_model.graph(
        reward_model.RewardModelConfig(center=0.1), {"reward": VALUE}
    ),
}
LENGTHS = (5, 7, 3, 30, 12, 1, 9, 4, 26, 2)
PLACE = Placement((3, 0, 2, 1), data=2, seq=2)
SHAPES = (Shape(16, 16), Shape(0, 32), Shape(32, 0))
ROOM = 32
COST = cost_of(sized(2, 16, 4, 2, 8, 32, 24), flops_per_s=1e9, bytes_per_s=1e9)


def units(algorithm):
    """Sequences, or pairs of which no side is empty."""
    rng = np.random.default_rng(0)

    def segment(n):
        mask = np.ones(n, np.float32)
        mask[0] = 0
        return rng.integers(0, LM.vocab, n).astype(np.int32), mask

    if algorithm == "sft":
        return [(segment(n),) for n in LENGTHS]
    return [(segment(n), segment(n // 2 + 2)) for n in LENGTHS if n > 1]


def start(step):
    models = {}
    for i, name in enumerate(step.graph.models):
        where = jax.tree.map(lambda x: x.sharding, step.home(name).params)
        head = VALUE if name == "reward" else LM
        full = jax.tree.map(np.asarray, params.init(head, jax.random.key(i)))
        models[name] = step.init(name, jax.device_put(full, where))
    return models


def specs(graph):
    out = {}
    for name in graph.models:
        lm = VALUE if name == "reward" else LM
        tx = optax.sgd(0.5) if any(c.kind == "train" for c in graph.of(name)) else None
        out[name] = Spec(params.abstract(lm), params.logical_axes(lm), tx)
    return out


def after(step, batch):
    models, _, seen = step(start(step), batch, np.array([0, 1], np.uint32))
    (trained,) = (c.of for c in step.graph.calls if c.kind == "train")
    return jax.tree.map(np.asarray, models[trained].params), {k: float(v) for k, v in seen.items()}


@functools.cache
def batch_of(algorithm):
    """One sequence or pair a row."""
    return packing.lay_out(units(algorithm), length=64)


def graph_of(algorithm, **how):
    """The algorithm's graph; `how` changes its train call."""
    graph = GRAPHS[algorithm]()
    calls = (dataclasses.replace(c, **how) if c.kind == "train" else c for c in graph.calls)
    return dataclasses.replace(graph, calls=tuple(calls))


def alone(algorithm, **how):
    graph = graph_of(algorithm, **how)
    plan = {c.name: Placement((0,)) for c in graph.calls}
    return after(core.compile(graph, plan, specs(graph)), batch_of(algorithm))


alone = functools.cache(alone)


@functools.cache
def step_of(algorithm, **how):
    graph = graph_of(algorithm, **how)
    plan = dict.fromkeys((c.name for c in graph.calls), PLACE)
    pack = 1 if algorithm == "sft" else 2
    step = core.compile(graph, plan, specs(graph), pack=pack).check(batch_of(algorithm))
    return step.scheduled(Packing(SHAPES, ROOM, COST)).build(batch_of(algorithm))


def check(got, want, moved_from):
    (ours, seen), (theirs, told) = got, want
    for a, b, c in zip(*map(jax.tree.leaves, (ours, theirs, moved_from)), strict=True):
        assert (
            np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b) + 1e-3 * np.linalg.norm(b - c) + 1e-9
        )
    assert {k for k in seen if not k.startswith("schedule/")} == {*told}
    for k in told:
        assert seen[k] == pytest.approx(told[k], rel=1e-4, abs=1e-5), k


def first_of(step):
    (trained,) = (c.of for c in step.graph.calls if c.kind == "train")
    return jax.tree.map(np.asarray, start(step)[trained].params)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "algorithm",
    ["dpo", *(pytest.param(a, marks=pytest.mark.slow) for a in ("sft", "reward_model"))],
)
def test_any_legal_schedule_gives_the_same_parameters(algorithm, seed, monkeypatch):
    step = step_of(algorithm)
    monkeypatch.setattr(skrull, "plan", functools.partial(at_random, seed=seed))
    check(after(step, batch_of(algorithm)), alone(algorithm), first_of(step))


@pytest.mark.parametrize(
    "algorithm",
    ["sft", *(pytest.param(a, marks=pytest.mark.slow) for a in ("dpo", "reward_model"))],
)
def test_epochs_and_minibatches_draw_the_same_rows(algorithm):
    how = {"epochs": 2, "minibatches": 2 if algorithm == "sft" else 3}
    step = step_of(algorithm, **how)
    check(after(step, batch_of(algorithm)), alone(algorithm, **how), first_of(step))


def test_the_scheduler_s_own_plan_does_too_and_nothing_is_compiled_for_it():
    step = step_of("dpo")
    before = dict(step.traces)
    check(after(step, batch_of("dpo")), alone("dpo"), first_of(step))
    assert step.traces == before == dict.fromkeys(("ref_inf", "actor_train"), len(SHAPES))
    assert not [name for name in step.analysis() if name.endswith(" lengths")]  # the host knows


def test_rows_of_their_own_need_no_permutes_and_no_hidden_states_travel():
    step = step_of("dpo")
    count = {}
    for shape in SHAPES:
        text = step.program(f"actor_train {shape.local}+{shape.distributed}").as_text()
        count[shape] = len(re.findall(r"collective-permute\(", text))
        for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]\S* all-gather\(", text):
            size = np.prod([int(n) for n in dims.split(",")])
            padded = 64 * len(units("dpo"))  # numbers of the padded rows
            assert kind == "s32" or size <= max(padded, 4 * shape.columns * 4), (shape, kind, dims)
    assert count[SHAPES[2]] == 0 < min(count[SHAPES[0]], count[SHAPES[1]])


def run(*changes):
    plan = "sft.plan={'default': {'devices': [0, 1, 2, 3], 'data': 2, 'seq': 2}}"
    schedule = "sft.schedule={'name': 'skrull', 'room': 24, 'shapes': 2}"
    return launch.config("algorithm=sft,steps=4,every=1", plan, schedule, *changes)


# Whole runs


SCHEDULE = "{'name': 'skrull', 'room': 24, 'shapes': 2}"
FOUR = "'devices': [3, 0, 2, 1], 'data': 2, 'seq': 2"
APART = (
    "'ref_inf': {'devices': [4, 5], 'seq': 2}, 'actor_train': {'devices': [0], 'offload': 'opt'}"
)
ENTRIES = "{'actor': {'name': 'spiel_ag', 'density': 0.1, 'selector': 'gradient', 'every': 1}}"


def trained(algorithm, *changes):
    more = (c.replace("STAGE", algorithm) for c in changes)
    config = launch.config(f"algorithm={algorithm},optim=sgd", f"{algorithm}.batch=8", *more)
    return models_after(assembly.assemble(config))


@functools.cache
def rows_alone(algorithm, *changes):
    """One device, one example a row, in order."""
    plan = "STAGE.plan={'default': {'devices': [0]}}"
    return trained(algorithm, plan, "STAGE.data.packed=False", *changes)


@pytest.mark.parametrize(
    ("algorithm", "changes", "same"),
    [
        ("dpo", (f"STAGE.plan={{{APART}}}",), ()),
        *(
            pytest.param(algorithm, changes, same, marks=pytest.mark.slow)
            for algorithm, changes, same in (
                ("sft", (f"STAGE.plan={{'default': {{{FOUR}, 'offload': 'opt'}}}}",), ()),
                ("sft", (f"STAGE.plan={{'default': {{{FOUR}, 'microbatches': 2}}}}",), ()),
                ("sft", (f"STAGE.plan={{'default': {{{FOUR}}}}}",), (f"STAGE.adapt={ENTRIES}",)),
                ("dpo", (f"STAGE.plan={{'default': {{{FOUR}}}}}",), (f"STAGE.adapt={ENTRIES}",)),
                ("sft", ("STAGE.plan=search", "STAGE.search.evaluations=100"), ()),
                ("dpo", ("STAGE.plan=search", "STAGE.search.evaluations=100"), ()),
                ("rm", (f"STAGE.plan={{'default': {{{FOUR}, 'offload': 'opt'}}}}",), ()),
            )
        ),
    ],
)
def test_every_plan_gives_the_parameters_of_one_device(algorithm, changes, same):
    got = trained(algorithm, f"STAGE.schedule={SCHEDULE}", *changes, *same)
    check_law(got, rows_alone(algorithm, *same))


def test_a_scheduled_run_stops_and_goes_on(tmp_path, monkeypatch):
    assert launch.train(run(), tmp_path / "whole")
    failed(monkeypatch, run(), tmp_path / "parts", at=3)
    assert launch.train(run(), tmp_path / "parts")
    a, b = (launch.tensors(tmp_path / d) for d in ("whole", "parts"))
    for name in b:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-5, err_msg=name)
    rows = launch.numbers(tmp_path / "parts")
    assert [r[0] for r in rows] == [1, 2, 3, 4]
    told = rows[-1][2]
    assert 0 <= told["schedule/padding"] < 1 and 0 < told["schedule/balance"] <= 1
    assert told["schedule/planned_seconds"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("sft.schedule.name=best",), "schedule: unknown schedule 'best'; expected one of"),
        (
            ("sft.data.length=100",),
            r"rows have 100 tokens, but 2 devices .* 24 tokens each hold 48",
        ),
        (("sft.data.length=2",), "no example has at most 2 tokens"),
    ],
)
def test_what_cannot_be_scheduled_is_said(changes, message):
    with pytest.raises(ValueError, match=message):
        assembly.assemble(run(*changes))


def test_rows_are_as_long_as_examples_need_where_no_length_is_said():
    (stage,) = assembly.assemble(run("sft.data.length=0")).stages
    assert stage.batch["tokens"].shape[1] == max(stage.lengths) <= 48
    described = balanced.describe(stage.step, stage.lengths)
    assert sum(share for _, share in described["lengths"]) == pytest.approx(1)


@pytest.mark.slow
def test_room_is_what_compiled_programs_need():
    graph, capacity = GRAPHS["sft"](), 20e6
    plan = dict.fromkeys((c.name for c in graph.calls), PLACE)
    batch = {k: jax.ShapeDtypeStruct((10, 64), v.dtype) for k, v in batch_of("sft").items()}
    step = core.compile(graph, plan, specs(graph), pack=1).check(batch)
    need = functools.partial(packed_memory.needs, step, PLACE)
    room = balanced.found_room(need, PLACE, capacity, most=8192)

    def needs(tokens):
        return need([Shape(tokens, 0), Shape(0, tokens)])

    assert 512 <= room < 8192 and needs(room) <= capacity < needs(int(1.6 * room))
    assert balanced.found_room(need, PLACE, capacity, most=256) == 256
    with pytest.raises(ValueError, match="has no room for 128 tokens"):
        balanced.found_room(need, PLACE, 1e4, most=256)

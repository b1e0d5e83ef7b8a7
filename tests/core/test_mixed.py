"""Short and long sequences at once: no schedule of theirs changes a parameter."""

import functools
import re

import jax
import launch
import numpy as np
import optax
import pytest
from sized import sized

from jaxrl_eff import core
from jaxrl_eff.algorithms import dpo, reward_model, sft
from jaxrl_eff.core import Placement, Spec, mixed
from jaxrl_eff.data import packing
from jaxrl_eff.data.balance import skrull
from jaxrl_eff.data.balance.assignment import Assignment, Shape
from jaxrl_eff.data.balance.balanced_loader import arrange
from jaxrl_eff.models import LMConfig, params
from jaxrl_eff.planner.packed_rows import cost_of
from jaxrl_eff.train import assembly, balanced, writer

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
def alone(algorithm):
    """One device, one sequence or pair a row."""
    graph, these = GRAPHS[algorithm](), units(algorithm)
    batch = packing.lay_out(these, length=64)
    plan = {c.name: Placement((0,)) for c in graph.calls}
    return after(core.compile(graph, plan, specs(graph)).build(batch), batch)


@functools.cache
def step_of(algorithm):
    graph = GRAPHS[algorithm]()
    plan = dict.fromkeys((c.name for c in graph.calls), PLACE)
    step = mixed.compile(graph, plan, specs(graph))
    return step.build([like(shape, graph.inputs.split()) for shape in SHAPES])


def like(shape, names):
    sizes = {"local": (4, shape.local), "shared": (2, 2 * shape.distributed)}
    kinds = {k: np.float32 if k == "mask" else np.int32 for k in names}
    return {
        side: {k: jax.ShapeDtypeStruct(size, kinds[k]) for k in names}
        for side, size in sizes.items()
    }


def at_random(these, seed):
    """Any legal schedule: every unit where there is room, in one of the shapes."""
    rng = np.random.default_rng(seed)
    shapes, steps, groups, ranks, free = [], [], [], [], []
    for unit in these:
        n = sum(len(ids) for ids, _ in unit)
        options = [
            (s, g, r)
            for s, room in enumerate(free)
            for g in range(2)
            for r in (-1, 0, 1)
            if room[g, r] >= n
        ]
        if not options or rng.random() < 0.2:
            fit = [s for s in SHAPES if n <= max(s.local, 2 * s.distributed)]
            shape = fit[rng.integers(len(fit))]
            shapes.append(shape)
            room = {(g, r): 2 * shape.distributed if r < 0 else shape.local
                    for g in range(2) for r in (-1, 0, 1)}  # fmt: skip
            free.append(room)
            s = len(shapes) - 1
            options = [(s, g, r) for g, r in room if room[g, r] >= n]
        s, g, r = options[rng.integers(len(options))]
        free[s][g, r] -= n
        steps.append(s), groups.append(g), ranks.append(r)
    lengths = np.array([sum(len(ids) for ids, _ in u) for u in these])
    places = (np.array(x, np.int32) for x in (steps, groups, ranks))
    return Assignment(lengths, 2, 2, 40, COST, tuple(shapes), *places, 1.0, "any", {})


def check(got, want, moved_from):
    (ours, seen), (theirs, told) = got, want
    for a, b, c in zip(*map(jax.tree.leaves, (ours, theirs, moved_from)), strict=True):
        assert (
            np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b) + 1e-3 * np.linalg.norm(b - c) + 1e-9
        )
    assert seen.keys() == told.keys()
    for k in told:
        assert seen[k] == pytest.approx(told[k], rel=1e-4, abs=1e-5), k


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "algorithm",
    ["sft", *(pytest.param(a, marks=pytest.mark.slow) for a in ("dpo", "reward_model"))],
)
def test_any_legal_schedule_gives_the_same_parameters(algorithm, seed):
    step, these = step_of(algorithm), units(algorithm)
    (trained,) = (c.of for c in step.graph.calls if c.kind == "train")
    first = jax.tree.map(np.asarray, start(step)[trained].params)
    schedule = at_random(these, seed)
    check(after(step, arrange(schedule, these)), alone(algorithm), first)


def test_the_scheduler_s_own_plan_does_too_and_nothing_is_compiled_for_it():
    step, these = step_of("sft"), units("sft")
    found = skrull.plan(
        [len(u[0][0]) for u in these], groups=2, parts=2, capacity=32, cost=COST, shapes=SHAPES
    )
    before = dict(step.traces)
    first = jax.tree.map(np.asarray, start(step)["actor"].params)
    check(after(step, arrange(found, these)), alone("sft"), first)
    assert step.traces == before == {"actor_train": len(SHAPES)}


def test_a_micro_batch_of_another_shape_is_refused():
    other = arrange(at_random(units("sft")[:2], 0), units("sft")[:2])[0]
    other["local"] = {k: v[:, :3] for k, v in other["local"].items()}
    with pytest.raises(ValueError, match=r"\(3, \d+\) tokens a row.*compiled: \[\(0, 32\)"):
        step_of("sft")(start(step_of("sft")), [other], np.zeros(2, np.uint32))


def test_rows_of_their_own_need_no_permutes_and_no_hidden_states_travel():
    step = step_of("sft")
    count = {}
    for shape in SHAPES:
        text = step.program(f"actor_train {shape.local}+{shape.distributed}").as_text()
        count[shape] = len(re.findall(r"collective-permute\(", text))
        for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]\S* all-gather\(", text):
            size = np.prod([int(n) for n in dims.split(",")])
            assert kind == "s32" or size <= 4 * shape.columns * 4, (shape, kind, dims)
    assert count[SHAPES[2]] == 0 < min(count[SHAPES[0]], count[SHAPES[1]])


def test_rows_hold_every_token_once():
    these = units("dpo")
    schedule = at_random(these, 5)
    found = [
        side
        for micro in arrange(schedule, these, pad=9)
        for side in micro.values()
        for side in packing.unpack_pairs(side)
    ]
    key = lambda pair: [tuple(ids) for ids, _ in pair]  # noqa: E731
    assert sorted(map(key, found)) == sorted(map(key, these))


def run(*changes):
    plan = "sft.plan={'default': {'devices': [0, 1, 2, 3], 'data': 2, 'seq': 2}}"
    schedule = "sft.schedule={'name': 'skrull', 'room': 24, 'shapes': 2}"
    return launch.config("algorithm=sft,steps=4,every=1", plan, schedule, *changes)


def test_a_scheduled_run_stops_and_goes_on(tmp_path, monkeypatch):
    assert launch.train(run(), tmp_path / "whole")
    step = writer.Writer.step

    def fail(self, number, *args, **kwargs):
        if number == 3:
            raise RuntimeError("stopped")
        return step(self, number, *args, **kwargs)

    monkeypatch.setattr(writer.Writer, "step", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        launch.train(run(), tmp_path / "parts")
    monkeypatch.undo()
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
        (("sft.schedule.name=best",), "schedule: name is 'best', not 'rows' or 'skrull'"),
        (("sft.plan=search",), "schedule is 'skrull', whose plan is not searched"),
        (("sft.data.length=100",), r"data.length is 100, but 2 devices .* 24 tokens each hold 48"),
        (("sft.plan={'default': {'microbatches': 2}}",), "actor_train has epochs or parts"),
        (("sft.data.length=2",), "no example has at most 2 tokens"),
        (("sft.plan={'default': {'offload': 'opt'}}",), "actor_train offloads 'opt'"),
    ],
)
def test_what_cannot_be_scheduled_is_said(changes, message):
    with pytest.raises(ValueError, match=message):
        assembly.assemble(run(*changes))


@pytest.mark.slow
def test_room_is_what_compiled_programs_need():
    graph = GRAPHS["sft"]()
    plan = dict.fromkeys((c.name for c in graph.calls), PLACE)
    make = functools.partial(mixed.compile, graph, plan, specs(graph))
    capacity = 20e6
    need = functools.partial(balanced.needed, make, graph.inputs.split(), PLACE)
    room = balanced.found_room(need, PLACE, capacity, most=8192)

    def needs(tokens):
        return need([Shape(tokens, 0), Shape(0, tokens)])

    assert 512 <= room < 8192 and needs(room) <= capacity < needs(int(1.6 * room))
    assert balanced.found_room(need, PLACE, capacity, most=256) == 256
    with pytest.raises(ValueError, match="has no room for 128 tokens"):
        balanced.found_room(need, PLACE, 1e4, most=256)

"""Sampled sequences computed packed: no schedule changes a parameter, a metric or an output."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import launch
import numpy as np
import optax
import pytest
from sized import sized
from test_plan_law import check, models_after
from test_resume import failed

from jaxrl_eff.algorithms import grpo, ppo
from jaxrl_eff.cli import report
from jaxrl_eff.core import (
    Graph,
    Packing,
    Placement,
    Spec,
    compile,
    infer,
    packed_memory,
    rows,
    shardings,
    train,
)
from jaxrl_eff.data.balance import skrull
from jaxrl_eff.data.balance.assignment import Assignment, Shape
from jaxrl_eff.parallel.attention.context import current_layout
from jaxrl_eff.planner.packed_rows import cost_of
from jaxrl_eff.train import assembly, balanced, state, summary

COST = cost_of(sized(2, 16, 4, 2, 8, 32, 24), flops_per_s=1e9, bytes_per_s=1e9)
FOUR = Placement((3, 0, 2, 1), data=2, seq=2)
ONE = Placement((0,))
SHARDED = Placement((4, 5, 0, 1), data=2, fsdp=2)
SHAPES = {
    FOUR: (Shape(12, 4), Shape(0, 16)),
    ONE: (Shape(24, 0), Shape(0, 32)),
    SHARDED: (Shape(0, 12), Shape(0, 20)),
}
ROOM = {FOUR: 16, ONE: 32, SHARDED: 20}
# Of every table's calls: one mesh for all, or three that share devices or not.
PLANS = {
    "four devices": {"default": FOUR},
    "one device": {"default": ONE},
    "three meshes": {
        "default": FOUR,
        "grpo_train": SHARDED,
        "score_inf": dataclasses.replace(SHARDED, offload="params"),
        "value_train": dataclasses.replace(ONE, microbatches=3, offload="opt"),
    },
}  # fmt: skip
OWN = skrull.plan


def at_random(lengths, *, groups, parts, capacity, cost, shapes, seed, kind=""):
    """Any legal schedule: every sequence where there is room, in one of the shapes.

    Of the kind "local" or "shared" all are that.
    """
    rng = np.random.default_rng(seed)
    ranks = {"": range(-1, parts), "local": range(parts), "shared": [-1]}[kind]
    taken, places, free = [], [], []

    def holds(shape, r):
        return parts * shape.distributed if r < 0 else shape.local

    for n in lengths:
        options = [
            (s, g, r) for s, there in enumerate(free) for (g, r), left in there.items() if left >= n
        ]
        if not options or rng.random() < 0.3:
            fit = [s for s in shapes if any(holds(s, r) >= n for r in ranks)]
            taken.append(fit[rng.integers(len(fit))])
            free.append({(g, r): holds(taken[-1], r) for g in range(groups) for r in ranks})
            s = len(free) - 1
            options = [(s, *place) for place, left in free[s].items() if left >= n]
        s, g, r = options[rng.integers(len(options))]
        free[s][g, r] -= n
        places.append((s, g, r))
    step, group, rank = np.array(places, np.int32).T
    return Assignment(
        np.asarray(lengths),
        groups,
        parts,
        capacity,
        cost,
        tuple(taken),
        step,
        group,
        rank,
        1.0,
        "",
        {},
    )


# In double precision, with a table for a model


V, B, T = 7, 8, 12
INPUTS = "tokens segment position mask logp ref_logp adv value ret kl_coef"


def table_lm(params, tokens, position, segment):
    """log-probabilities and entropies of a bigram table, 0 where a segment begins."""
    before = current_layout(tokens.shape[1]).previous(tokens)
    logits = jax.nn.log_softmax(params["w"][before], axis=-1)
    there = (position > 0) & (segment > 0)
    logp = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return jnp.where(there, logp, 0.0), jnp.where(there, -(jnp.exp(logits) * logits).sum(-1), 0.0)


def table_values(params, tokens, position, segment):
    before = current_layout(tokens.shape[1]).previous(tokens)
    return jnp.where((position > 0) & (segment > 0), params["w"][before, 0], 0.0)


def table_score(params, batch, key):
    return {"after": jnp.where(batch["segment"] > 0, params["w"][batch["tokens"], 1], 0.0)}


def table_last(batch, key):
    end = batch["segment"].sum(1, keepdims=True, dtype=jnp.int32) - 1
    return {"last": jnp.take_along_axis(batch["after"], end, axis=1)[:, 0]}


def tables():
    """Losses of every kind, a token, a sequence or a row, each on a model of its own."""
    row = "tokens segment position mask "
    kl = ppo.PPOConfig(kl_in="loss", dual_clip=1.5, entropy=0.1)
    gspo = grpo.GRPOConfig(ratio="sequence", clip_low=0.1, clip_high=0.1, beta=0.0)
    plain = grpo.GRPOConfig(mask_truncated=True)
    tail = ((V - 1,), 5)
    twice = {"epochs": 2, "minibatches": 2}

    def one(name, forward, loss, reads, **how):
        return train(f"{name}_train", of=name, forward=forward, loss=loss, reads=row + reads, **how)

    calls = (
        one("ppo", table_lm, functools.partial(ppo.policy_loss, kl), "logp adv ref_logp kl_coef"),
        one("value", table_values, functools.partial(ppo.value_loss, ppo.PPOConfig()), "value ret",
            **twice),
        one("grpo", table_lm, functools.partial(grpo.policy_loss, plain, *tail),
            "logp adv ref_logp", **twice),
        one("gspo", table_lm, functools.partial(grpo.policy_loss, gspo, *tail), "logp adv"),
        infer("score_inf", of="reward", fn=table_score, finish=table_last, reads=row.strip(),
              writes="last"),
        infer("logp_inf", of="reward", reads="tokens segment position", writes="fresh",
              fn=lambda p, b, key: {"fresh": table_lm(
                  p, b["tokens"], b["position"], b["segment"])[0]}),
    )  # fmt: skip
    return Graph(inputs=INPUTS, calls=calls)


def sampled():
    """Padded rows of prompt and response, and what calls before would have written."""
    rng = np.random.default_rng(3)
    length = np.array([12, 3, 5, 2, 9, 4, 7, 3])
    at = np.arange(T)[None]
    inside = at < length[:, None]
    mask = (inside & (at > 0)).astype(np.float32)
    normal = lambda s=0.4: (rng.normal(size=(B, T)) * s * mask).astype(np.float32)  # noqa: E731
    logp = normal() - 2 * mask
    tokens = np.where(inside, rng.integers(0, V - 1, (B, T)), 0)
    tokens[::2][at == length[::2, None] - 1] = V - 1
    return {
        "tokens": tokens.astype(np.int32), "segment": inside.astype(np.int32), "mask": mask,
        "position": np.where(inside, at, 0).astype(np.int32), "logp": logp,
        "ref_logp": logp + normal(), "adv": normal(2.0), "value": normal(), "ret": normal(),
        "kl_coef": rng.uniform(0.01, 0.1, B).astype(np.float32),
    }  # fmt: skip


def table_specs(graph):
    like = {"w": jax.ShapeDtypeStruct((V, V), jnp.float64)}
    trained = {c.of for c in graph.calls if c.kind == "train"}
    return {
        m: Spec(like, {"w": (None, None)}, optax.sgd(0.5, 0.9) if m in trained else None)
        for m in graph.models
    }


def start(step):
    models = {}
    for i, name in enumerate(step.graph.models):
        there = jax.tree.map(lambda x: x.sharding, step.home(name).params)
        full = {"w": np.random.default_rng(i).normal(size=(V, V))}
        models[name] = step.init(name, jax.device_put(full, there))
    return models


def outcome(step, batch):
    """Models, kept arrays and metrics after one step, as numpy."""
    models, data, seen = step(start(step), batch, np.array([0, 1], np.uint32))
    own = {k: float(v) for k, v in seen.items() if not k.startswith("schedule/")}
    return jax.tree.map(np.asarray, ({m: x.params for m, x in models.items()}, data)), own


@functools.cache
def padded_tables():
    graph = tables()
    plan = dict.fromkeys((c.name for c in graph.calls), ONE)
    step = compile(graph, plan, table_specs(graph), keep="last fresh")
    return outcome(step.build(sampled()), sampled())


@functools.cache
def packed_tables(name):
    graph, batch = tables(), sampled()
    plan = {c.name: PLANS[name].get(c.name, PLANS[name]["default"]) for c in graph.calls}
    step = compile(graph, plan, table_specs(graph), keep="last fresh", pack=1).check(batch)
    packings = {p: Packing(SHAPES[p], ROOM[p], COST) for p in step.packs.places}
    return step.scheduled(packings).build(batch)


@pytest.fixture
def wide():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize(
    ("plan", "kinds"),
    [
        ("four devices", ("own", "local", "shared", 1, 2, 3)),
        ("one device", ("own", "local", "shared", 1, 2)),
        ("three meshes", ("own", 1)),
    ],
)
def test_no_schedule_changes_a_parameter_in_double_precision(plan, kinds, wide, monkeypatch):
    (want, told), step = padded_tables(), packed_tables(plan)
    for kind in kinds:
        how = {"kind": kind, "seed": 0} if isinstance(kind, str) else {"seed": kind}
        plan = OWN if kind == "own" else functools.partial(at_random, **how)
        monkeypatch.setattr(skrull, "plan", plan)
        got, seen = outcome(step, sampled())
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10, err_msg=str(kind))
        assert seen.keys() == told.keys()
        for k in told:
            np.testing.assert_allclose(seen[k], told[k], rtol=2e-6, atol=1e-7, err_msg=k)


def test_nothing_is_compiled_for_other_lengths(wide, monkeypatch):
    step, rng, compiled, shapes = packed_tables("one device"), np.random.default_rng(0), [], set()
    words = np.array([0, 1], np.uint32)
    models, _, _ = step(start(step), sampled(), words)

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    def plan(lengths, **how):
        found = OWN(lengths, **how)
        shapes.add(found.shapes)
        return found

    monkeypatch.setattr(skrull, "plan", plan)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for _ in range(8):
            batch = sampled()
            n = np.minimum(rng.integers(1, T + 1, B), rng.integers(1, T + 1))
            inside = np.arange(T)[None] < n[:, None]
            batch["segment"], batch["mask"] = inside.astype(np.int32), inside.astype(np.float32)
            batch["position"] = np.where(inside, np.arange(T)[None], 0).astype(np.int32)
            models, _, _ = step(models, batch, words)
        assert not compiled and len(shapes) > 2
        jax.jit(lambda x: x + 1)(np.zeros(17))
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("seed", range(3))
def test_maps_take_every_token_once_and_keep_sequences_apart(seed):
    rng = np.random.default_rng(seed)
    picked, lengths = rng.permutation(20)[:9], rng.integers(1, 13, 9)
    how = {"groups": 2, "parts": 2, "capacity": 16, "cost": COST, "shapes": SHAPES[FOUR]}
    schedule = at_random(lengths, seed=seed, **how)
    taken = []
    for shape, micro in zip(schedule.shapes, rows.maps(schedule, picked, width=13), strict=True):
        assert micro["local"]["source"].shape == (4, shape.local)
        assert micro["shared"]["source"].shape == (2, 2 * shape.distributed)
        for side in micro.values():
            for source, unit in zip(side["source"], side["unit"], strict=True):
                assert ((unit == 0) == (source == rows.NOWHERE)).all()
                for u in range(1, unit.max(initial=0) + 1):
                    here = source[unit == u]
                    assert here[0] % 13 == 0 and (np.diff(here) == 1).all()
                    taken.append((here[0] // 13, len(here)))
    assert sorted(taken) == sorted(zip(picked.tolist(), lengths.tolist(), strict=True))


def test_guessed_lengths_go_from_short_responses_to_cut_off_ones():
    pools = balanced.guessed([5, 9], 64, count=400)
    means = [pool.mean() for pool in pools]
    assert means == sorted(means) and means[0] < 12 and means[-1] == 71
    for pool in pools:
        responses = pool - np.resize([5, 9], 400)
        assert responses.min() >= 1 and responses.max() <= 64
    assert (pools[-1] - np.resize([5, 9], 400) == 64).all()


# Whole algorithms


def run(algorithm, *changes, **place):
    plan = f"{algorithm}.plan={{'default': {place!r}}}"
    return launch.config(f"algorithm={algorithm},optim=sgd", plan, *changes)


def skrull_of(algorithm):
    return f"{algorithm}.schedule={{'name': 'skrull', 'room': 16, 'shapes': 2}}"


@functools.cache
def padded(algorithm):
    return models_after(assembly.assemble(run(algorithm, devices=[0])))


@pytest.mark.parametrize(
    ("algorithm", "place"),
    [
        ("raft", {"devices": [3, 0, 2, 1], "data": 2, "seq": 2}),
        *(
            pytest.param(a, {"devices": [3, 0, 2, 1], "data": 2, "seq": 2}, marks=pytest.mark.slow)
            for a in ("ppo", "grpo", "remax", "rloo")
        ),
        pytest.param("ppo", {"devices": [0]}, marks=pytest.mark.slow),
        pytest.param("grpo", {"devices": [0, 1], "fsdp": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_scheduled_algorithm_gives_the_same_parameters(algorithm, place):
    room = skrull_of(algorithm) if "seq" in place else skrull_of(algorithm).replace("16", "24")
    check(models_after(assembly.assemble(run(algorithm, room, **place))), padded(algorithm))


def test_meshes_have_schedules_of_their_own(wide):
    step = packed_tables("three meshes")
    assert step.packs.places == (FOUR, ONE, SHARDED)
    told = {tuple(p["calls"]): p for p in balanced.describe(step, ())["places"]}
    assert told["value_train",] == {
        "calls": ["value_train"], "groups": 1, "parts": 1, "room": 32, "shapes": [[24, 0], [0, 32]],
    }  # fmt: skip
    _, _, seen = step(start(step), sampled(), np.array([0, 1], np.uint32))
    assert 0 < seen["schedule/padding"] < 1 and 0 < seen["schedule/balance"] <= 1
    assert 0 <= seen["schedule/distributed"] < 1 and seen["schedule/micro_steps"] >= 12


def test_what_lies_beside_a_packed_call_counts_where_it_lies(wide):
    step, table = packed_tables("three meshes"), V * V * 8
    calls = {c.name: c for c in step.packs.calls}
    found = {
        k: shardings.held(packed_memory.beside(step, calls[k])) for k in ("value_train", "logp_inf")
    }
    at = jax.devices()
    # With momentum a trained model is two tables; what waits in host memory counts nothing.
    assert found["value_train"][at[0]] == 3 * 2 * table
    assert found["value_train"][at[4]] == 2 * table
    assert found["logp_inf"][at[0]] == (3 * 2 + 1) * table
    assert found["logp_inf"][at[2]] == 2 * 2 * table


@pytest.mark.slow
def test_what_is_trained_is_chosen_anew_as_by_padded_rows():
    entries = (
        "grpo.adapt={'actor': {'name': 'spiel_ag', 'density': 0.1, 'selector': 'gradient', "
        "'every': 1}}"
    )

    def after(*changes, **place):
        (stage,) = (one := assembly.assemble(run("grpo", entries, *changes, **place))).stages
        step = stage.step.build(stage.batch)
        models = state.initial(one, stage, {})
        for t in range(3):
            words, due = assembly.words(0, stage.name, t), step.due(t)
            models, _, _ = step(models, next(stage.loader), words, reselect=due)
        stage.loader.close()
        return step, jax.tree.map(np.asarray, models["actor"])

    _, want = after(devices=[0])
    step, got = after(skrull_of("grpo"), devices=[3, 0, 2, 1], data=2, seq=2)
    assert step.due(1) == ("actor",)
    for a, b in zip(*map(jax.tree.leaves, (got.params, want.params)), strict=True):
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b) + 1e-9
    same = [np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (got.opt, want.opt)),
                                                 strict=True) if a.dtype == np.int32]  # fmt: skip
    assert same and all(same)  # the very same entries
    choosing = step.analysis()["actor_train reselect"]["bytes"]
    assert packed_memory.needs(step, step.packs.places[0], [Shape(0, 16)]) >= choosing


APART = (
    "{'default': {'devices': [0, 1, 2, 3], 'seq': 2}, "
    "'actor_train': {'devices': [4, 5, 6, 7], 'data': 4}, "
    "'critic_train': {'devices': [2, 3], 'fsdp': 2}}"
)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_calls_may_lie_on_several_meshes(algorithm, tmp_path):
    plan = APART if algorithm == "ppo" else APART.partition(", 'critic_train'")[0] + "}"
    changes = f"{algorithm}.plan={plan}", skrull_of(algorithm)
    config = launch.config(f"algorithm={algorithm},optim=sgd", *changes)
    check(models_after(assembly.assemble(config)), padded(algorithm))
    assert launch.train(launch.config(f"algorithm={algorithm}", *changes), tmp_path)
    places = launch.document(tmp_path, "schedule")[algorithm]["places"]
    assert [place["parts"] for place in places] == [2, 1, 1][: len(places)]
    text = report.write(tmp_path).read_text()
    assert f"{algorithm}: actor_train: 4 groups of 1 devices with 16 tokens each" in text


def searched():
    how = launch.config("algorithm=grpo,optim=sgd,plan=search", skrull_of("grpo"),
                        "grpo.search.evaluations=100")  # fmt: skip
    return assembly.assemble(how)


def test_a_plan_is_searched_with_packed_calls_priced_by_expected_lengths():
    (stage,) = searched().stages
    works = {w.name: w for w in stage.searched.problem.works}
    expected = works["ref_inf"].packed
    assert expected == works["actor_train"].packed and works["actor_gen"].packed is None
    assert works["actor_gen"].responses == expected.responses
    assert expected.capacity == 16 and expected.responses.tokens == (1, 2, 3, 4)
    places = {stage.searched.plan[c.name].bare for c in stage.step.packs.calls}
    assert places == {*stage.step.packs.places} == {*stage.step.packs.packings}
    # Lengths of sampled rows are fetched once.
    assert [c.name for c in stage.step.packs.calls if stage.step.packs.asks(c)] == ["ref_inf"]


@pytest.mark.slow
def test_a_searched_plan_may_be_given_up_for_another_one():
    run = searched()
    other = {"ref_inf": Placement((3, 1), data=1, seq=2), "actor_train": Placement((0,))}
    switch = run.stages[0].searched.plan | other
    check(models_after(run, switch=switch), padded("grpo"))


def test_what_is_packed_where_is_said():
    one = {"calls": ["ref_inf"], "room": 16, "parts": 2, "shapes": [[12, 4], [0, 16]]}
    assert (
        summary.scheduled_rows({"places": [one]})
        == "16 tokens a device; micro-batches of 12+4, 0+16 (own + shared)"
    )
    places = [
        one,
        {"calls": ["a", "b"], "room": 8, "parts": 1, "shapes": [[0, 8]]},
    ]
    assert summary.scheduled_rows({"places": places}) == (
        "ref_inf: 16 tokens a device; micro-batches of 12+4, 0+16 (own + shared); "
        "a, b: 8 tokens a device; micro-batches of 8 tokens"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        "grpo.staleness=1",
        "grpo.sync.name=changes",
        "grpo.adapt={'actor': {'name': 'lora', 'rank': 2}}",
        "grpo.weights={'actor_gen': 'int8', 'ref_inf': 'int8'}",
    ],
)
def test_sampling_may_be_elsewhere_with_other_weights_changes_or_an_adapter(change):
    same, steps = () if "sync" in change else (change,), 1 if "int8" in change else 3
    want = models_after(assembly.assemble(run("grpo", *same, devices=[0])), steps=steps)
    there = "'devices': [0, 1], 'seq': 2"
    plan = f"{{'default': {{{there}}}, 'actor_gen': {{'devices': [2, 3]}}, "
    plan = f"grpo.plan={plan} 'actor_train': {{{there}, 'offload': 'opt', 'microbatches': 4}}}}"
    config = launch.config("algorithm=grpo,optim=sgd", plan, skrull_of("grpo"), change)
    check(models_after(assembly.assemble(config), steps=steps), want)


@pytest.mark.slow  # by default test_resume's scheduled run
def test_a_run_that_stopped_ends_with_the_same_bits(tmp_path, monkeypatch):
    arg = "algorithm=grpo,steps=2,every=1"
    plan = "grpo.plan={'default': {'devices': [0]}}"
    few = "grpo.schedule={'name': 'skrull', 'room': 32, 'shapes': 1}"
    whole = launch.config(arg, plan, few, "grpo.loss.minibatches=2")
    assert launch.train(whole, tmp_path / "whole")
    failed(monkeypatch, whole, tmp_path / "parts", at=2)
    assert launch.train(whole, tmp_path / "parts")
    assert launch.export(tmp_path / "whole") == launch.export(tmp_path / "parts")
    told = [values for _, _, values in launch.numbers(tmp_path / "parts")]
    assert len(told) == 2
    for values in told:
        assert 0 <= values["schedule/padding"] < 1 and 0 < values["schedule/balance"] <= 1
        assert values["schedule/micro_steps"] >= 4  # one of the reference, one a minibatch, ..
        assert values["schedule/planned_seconds"] > 0 and values["schedule/measured_seconds"] > 0
    (place,) = launch.document(tmp_path / "parts", "schedule")["grpo"]["places"]
    assert place["shapes"] == [[0, 32]] and place["parts"] == 1
    assert place["calls"] == ["ref_inf", "actor_train"]
    assert "micro-batches of" in report.write(tmp_path / "parts").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("grpo.schedule.room=7",), "rows have 8 tokens, but 1 devices .* each hold 7"),
        (("grpo.loss.minibatches=3",), r"32 rows, which do not divide by 3 \(minibatches\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_packed_is_said(changes, message):
    plan = "grpo.plan={'default': {'devices': [0]}}"
    with pytest.raises(ValueError, match=message):
        assembly.assemble(launch.config("algorithm=grpo", plan, skrull_of("grpo"), *changes))


def test_a_call_that_numbers_rows_or_takes_no_tokens_is_refused():
    row = "tokens segment position"
    spec = {"m": Spec({"w": jax.ShapeDtypeStruct((V, V), jnp.float32)}, {"w": (None, None)})}

    def compiled(reads, fn, finish=None):
        call = infer("inf", of="m", fn=fn, finish=finish, reads=reads, writes="last")
        return compile(Graph(row, (call,)), {"inf": ONE}, spec, pack=1)

    batch = {k: sampled()[k] for k in row.split()}
    whole = compiled(row, lambda p, b, key: {"last": b["tokens"].sum(1)})
    with pytest.raises(ValueError, match=r"inf makes 'last' of shape \(1,\) .* needs `finish`"):
        whole.check(batch)
    with pytest.raises(ValueError, match="nothing to be packed"):
        compiled("tokens", lambda p, b, key: {"last": b["tokens"]})
    every = compiled(row, table_score, table_last).check(batch)
    with pytest.raises(ValueError, match="say what schedules are made for"):
        every.build(batch)
    with pytest.raises(ValueError, match=r"one must be \(0, 12\)"):
        every.scheduled(Packing((Shape(12, 0),), 12, COST))


@pytest.mark.slow
def test_room_for_sampled_rows_is_what_compiled_programs_need():
    place = {"devices": [0], "data": 1}
    (stage,) = assembly.assemble(run("ppo", skrull_of("ppo").replace("16", "24"), **place)).stages
    step, (place,) = stage.step, stage.step.packs.places

    def need(*shapes):
        return packed_memory.needs(step, place, shapes)

    def both(tokens):
        return need(Shape(tokens, 0), Shape(0, tokens))

    capacity = 1.2 * both(1024)
    room = balanced.found_room(lambda shapes: need(*shapes), place, capacity, most=8192)
    assert room >= 512 and both(room) <= capacity < both(int(1.8 * room))

"""Train calls on nodes: a rung changes how many bytes are sent, and results by rounding alone."""

import dataclasses
import functools

import hlo_bytes
import jax
import jax.numpy as jnp
import launch
import numpy as np
import optax
import pytest
from jax import lax
from launch import cache  # noqa: F401 (fixture)
from test_plan_law import check, models_after
from test_processes import together
from test_resume import stopped

from jaxrl_eff import core, tree
from jaxrl_eff.algorithms import sft
from jaxrl_eff.core import lowering
from jaxrl_eff.core.shardings import Shardings
from jaxrl_eff.core.specs import Spec
from jaxrl_eff.models import LMConfig, params
from jaxrl_eff.models.layers import SAVED
from jaxrl_eff.parallel import Placement
from jaxrl_eff.parallel.attention import sequence
from jaxrl_eff.parallel.codec import Blocks, decode, encode
from jaxrl_eff.parallel.zero import collectives, levels
from jaxrl_eff.peft import ways
from jaxrl_eff.train import assembly, settings, state

LM = LMConfig(vocab=24, layers=3, width=32, heads=2, kv_heads=2, head_dim=16, ffn=48, qkv_bias=True)
ROWS, LENGTH = 16, 8
EVERY = tuple(range(8))
NODES = Placement(EVERY, dcn=2, fsdp=4)


def sends(name, **changes):
    """A rung; "exact" in float32."""
    rung = levels.zero_level(name)
    if name == "exact":
        rung = dataclasses.replace(rung, weight_bits=32, grad_bits=32)
    return levels.ZeroConfig(dataclasses.replace(rung, **changes), block=64)


WIDE = dict(weight_bits=32, grad_bits=32, delta_bits=32, hadamard=False, feedback=False)


def batch(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "tokens": rng.integers(0, LM.vocab, (ROWS, LENGTH)).astype(np.int32),
        "segment": np.ones((ROWS, LENGTH), np.int32),
        "position": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        "mask": (rng.random((ROWS, LENGTH)) < 0.7).astype(np.float32),
    }


def spec(plan, lm=LM, tx=None):
    return Spec(params.abstract(lm), params.logical_axes(lm), tx or optax.sgd(0.3), plan)


@functools.cache
def compiled(place, plan, lm=LM):
    graph = sft.graph(sft.SFTConfig(), {"actor": lm})
    return core.compile(graph, {"actor_train": place}, {"actor": spec(plan, lm)}).build(batch())


def started(step, lm=LM):
    where = jax.tree.map(lambda x: x.sharding, step.home("actor").params)
    made = jax.jit(functools.partial(params.init, lm), out_shardings=where)(jax.random.key(0))
    return {"actor": step.init("actor", made)}


def after(step, models, steps=3, first=0):
    """Models and metrics after some steps, each of rows of its own."""
    seen = {}
    for t in range(first, first + steps):
        models, _, seen = step(models, batch(t), np.array([0, t], np.uint32))
    return models, seen


@functools.cache
def trained(place, plan, steps=3, lm=LM):
    """Parameters by name."""
    step = compiled(place, plan, lm)
    models, _ = after(step, started(step, lm), steps)
    return jax.tree.map(np.asarray, tree.flat(models["actor"].params))


def off(got, want):
    """The largest distance of a parameter, relative to its norm."""
    return max(np.linalg.norm(got[k] - want[k]) / np.linalg.norm(want[k]) for k in want)


ALONE = Placement((0,))


@pytest.mark.parametrize(
    "place",
    [
        NODES,
        pytest.param(Placement(EVERY, dcn=4, fsdp=2), marks=pytest.mark.slow),
        Placement(EVERY, dcn=2, data=2, fsdp=2, microbatches=2),
        pytest.param(Placement(EVERY, dcn=2, fsdp=2, tensor=2), marks=pytest.mark.slow),
        pytest.param(
            Placement(EVERY, dcn=2, fsdp=2, tensor=2, microbatches=2), marks=pytest.mark.slow
        ),
        pytest.param(Placement(EVERY, dcn=8, fsdp=1), marks=pytest.mark.slow),
        Placement(EVERY, dcn=2, fsdp=2, seq=2),
        pytest.param(Placement(EVERY, dcn=2, seq=2, tensor=2), marks=pytest.mark.slow),
        pytest.param(Placement(EVERY, dcn=2, seq=4, microbatches=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_without_rounding_training_is_that_of_one_device(place):
    got = trained(place, sends("exact"))
    assert off(got, trained(ALONE, None)) < 1e-6
    traffic = compiled(place, sends("exact")).traffic["actor_train"]
    assert traffic.counted == traffic.promised


def test_rows_may_be_attended_to_as_on_a_tpu(monkeypatch):
    """By a kernel on the device's own rows, inside the `shard_map` that is there already."""
    monkeypatch.setattr(sequence, "for_whole_rows", lambda: True)
    step = compiled.__wrapped__(NODES, sends("exact"))
    models, _ = after(step, started(step))
    got = jax.tree.map(np.asarray, tree.flat(models["actor"].params))
    assert off(got, trained(ALONE, None)) < 1e-6


@pytest.mark.parametrize(
    "place",
    [
        NODES,
        pytest.param(
            Placement(EVERY, dcn=2, data=2, fsdp=2, microbatches=2), marks=pytest.mark.slow
        ),
        pytest.param(Placement(EVERY, dcn=2, fsdp=2, tensor=2), marks=pytest.mark.slow),
        pytest.param(Placement(EVERY, dcn=4, fsdp=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_differences_without_rounding_train_as_one_device(place):
    plan = sends("int4_delta", **WIDE)
    assert off(trained(place, plan), trained(ALONE, None)) < 1e-6
    traffic = compiled(place, plan).traffic["actor_train"]
    assert traffic.counted == traffic.promised


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("int8", 0.01),
        pytest.param("int4", 0.1, marks=pytest.mark.slow),  # its codes are those of the next
        ("int4_delta", 0.1),
        pytest.param("qgz", 0.2, marks=pytest.mark.slow),
    ],
)
def test_rounding_changes_little_and_something(name, near):
    want, start = trained(ALONE, None, 1), trained(ALONE, None, 0)
    got = trained(NODES, sends(name), 1)
    learned = np.sqrt(sum(np.sum((want[k] - start[k]) ** 2) for k in want))
    apart = np.sqrt(sum(np.sum((want[k] - got[k]) ** 2) for k in want))
    assert 1e-4 < apart / learned < near


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int4", "int4_delta"])
def test_the_number_of_microbatches_changes_nothing_that_is_rounded(name):
    split = dataclasses.replace(NODES, microbatches=2)
    got, want = (trained(place, sends(name), 1) for place in (split, NODES))
    for k in want:  # a number between two codes may fall either way
        assert np.mean(np.abs(got[k] - want[k]) > 1e-5) < 0.01, k
    once, twice = (compiled(p, sends(name)).traffic["actor_train"] for p in (NODES, split))
    assert twice.counted["dcn"] == once.counted["dcn"] and twice.plain == 2 * once.plain


@pytest.mark.parametrize(
    "name", ["int8", *(pytest.param(n, marks=pytest.mark.slow) for n in ("int4_delta", "qgz"))]
)
def test_a_sequence_axis_changes_nothing_that_is_rounded_and_sends_no_more(name):
    places = Placement(EVERY, dcn=2, fsdp=2, seq=2), Placement(EVERY[:4], dcn=2, fsdp=2)
    got, want = (trained(place, sends(name), 1) for place in places)
    for k in want:  # a number between two codes may fall either way
        assert np.mean(np.abs(got[k] - want[k]) > 1e-5) < 0.01, k
    split, whole = (compiled(place, sends(name)).traffic["actor_train"] for place in places)
    assert split.counted == whole.counted == split.promised


# Bytes


def adapted(plan, lm=LM, **changes):
    s, optim = settings.AdaptSettings(**changes), settings.OptimSettings(lr=1e-2, name="adam")
    return ways.in_every_node(ways.spec(s, lm, optim, lambda count: 1e-2, 10)._replace(sends=plan))


def laid_out(place, of, lm=LM):
    return Shardings(
        sft.graph(sft.SFTConfig(), {"actor": lm}), {"actor_train": place}, {"actor": of}
    )


def traffic(place, plan, lm=LM, fn=None, more=1, of=None):
    """Of a train call that is traced and not compiled."""
    graph = sft.graph(sft.SFTConfig(), {"actor": lm})
    (c,) = graph.calls
    c = dataclasses.replace(c, fn=fn or c.fn, epochs=more)
    graph = dataclasses.replace(graph, calls=(c,))
    there = Shardings(graph, {c.name: place}, {"actor": of or spec(plan, lm)})
    (c,) = there.calls
    shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch().items()}
    jaxpr = lowering.trace(there, c, there.rows(c, shapes)).jaxpr
    return there.sharded[c.name].traffic(jaxpr)


@pytest.mark.parametrize("remat", ["none", "attention", "dots", "outputs", "full", "host"])
@pytest.mark.parametrize("name", ["exact", "int8", "int4_delta"])
def test_recomputation_gathers_no_weight_more_often_than_said(name, remat):
    found = traffic(NODES, sends(name), LM.replace(remat=remat))
    assert found.counted == found.promised


of_whole_mlps = functools.cache(traffic)


@pytest.mark.parametrize("remat", ["none", "outputs"])
@pytest.mark.parametrize(
    ("name", "k"),
    [("exact", 1), ("int4", 1), pytest.param("int4_delta", 2, marks=pytest.mark.slow)],
)
def test_mlps_in_pieces_gather_no_weight_more_often(name, k, remat):
    place, lm = dataclasses.replace(NODES, microbatches=k), LM.replace(remat=remat, mlp_chunk=3)
    found = traffic(place, sends(name), lm)
    assert found.counted == found.promised == of_whole_mlps(place, sends(name)).counted
    of = adapted(sends(name), lm, name="dora", rank=2, base="int8")
    found = traffic(place, of.sends, lm, of=of)
    assert found.counted == found.promised


def test_mlps_in_pieces_train_as_one_device():
    got = trained(NODES, sends("exact"), lm=LM.replace(mlp_chunk=3))
    assert off(got, trained(ALONE, None)) < 1e-6


@pytest.mark.slow
def test_inputs_of_layers_in_host_memory_change_no_bit():
    """The program that is traced puts them there; CPUs, which have one memory, leave that out."""
    lm, plan = LM.replace(remat="host"), sends("int8")
    there = laid_out(NODES, spec(plan, lm), lm)
    shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch().items()}
    (c,) = there.calls
    kept = f"f32<host>[{LM.layers},{ROWS // 8},{LENGTH},{LM.width}]"
    assert kept in str(lowering.trace(there, c, there.rows(c, shapes)).jaxpr)
    got, want = trained(NODES, plan, 1, lm), trained(NODES, plan, 1)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


def test_every_update_sends_as_much():
    once, thrice = (traffic(NODES, sends("int8"), more=n) for n in (1, 3))
    assert thrice.counted == {k: 3 * v for k, v in once.counted.items()}
    assert thrice.plain == 3 * once.plain


@pytest.mark.parametrize(
    ("name", "passes"),
    [("exact", 3.0), ("int8", 1.0), ("int4", 0.75), ("qgz", 0.75), ("int4_delta", 0.5)],
)
def test_a_model_crosses_the_slow_axis_as_often_as_the_ladder_says(name, passes):
    """But for embeddings, which are gathered once."""
    lm = LM.replace(width=256, ffn=1024, head_dim=128, qkv_bias=False, dtype="bfloat16")
    plan = dataclasses.replace(
        sends(name), rung=levels.zero_level(name), block=256, dtype="bfloat16"
    )
    for k in (1, 2):
        found = traffic(dataclasses.replace(NODES, microbatches=k), plan, lm)
        least = passes - (name == "exact" and k > 1)  # micro-batches share what was gathered
        assert 0.98 * least / k < 3 * found.counted["dcn"] / found.plain < 1.03 * least / k


@pytest.mark.parametrize("base", ["", "int8"])
@pytest.mark.parametrize(("name", "k"), [("exact", 1), ("int8", 2), ("int4_delta", 1)])
def test_beside_a_frozen_model_only_its_adapter_crosses_the_slow_axis(name, k, base):
    place, plan = dataclasses.replace(NODES, microbatches=k), sends(name)
    of = adapted(plan, name="lora", rank=2, base=base)
    found = traffic(place, plan, of=of)
    assert found.counted == found.promised
    adapter = sum(x.size for n, x in tree.flat(of.shapes).items() if "lora" in n)
    assert 0 < found.counted["dcn"] < 4 * adapter + 64  # an all-reduce in float32, and numbers
    assert str(found).endswith(
        "; gradients travel exactly, in float32; every node has what is frozen"
    )
    for n, x in tree.flat(laid_out(place, of).home("actor").params).items():
        parts = x.size / np.prod(x.sharding.shard_shape(x.shape))
        assert parts == (4 if "lora" not in n and ("kernel" in n or "embed" in n) else parts)


def test_what_an_adaptation_trains_whole_is_sent_as_in_training_whole():
    whole, below = ("layers/mlp/up/kernel",), (".*attn/./kernel",)
    of = adapted(sends("int4_delta"), name="lora", rank=2, targets=below, whole=whole)
    home = laid_out(NODES, of).home("actor")
    assert [*home.error_feedback] == [*home.node_copy] == ["layers/mlp/up/kernel"]
    assert home.params["layers"]["mlp"]["up"]["kernel"].sharding.spec[1] == ("dcn", "fsdp")
    found = traffic(NODES, of.sends, of=of)
    assert found.counted == found.promised and found.notes == ("every node has what is frozen",)


@pytest.mark.parametrize("name", ["static", "lisa"])
def test_kernels_that_are_trained_in_part_are_renewed_and_nothing_is_left_over(name):
    of = adapted(sends("int4_delta"), name=name)
    home, found = laid_out(NODES, of).home("actor"), traffic(NODES, of.sends, of=of)
    assert {n for n in tree.names(home.params) if n.endswith("kernel")} - set(home.node_copy) == {
        "unembed/kernel"
    }
    assert home.error_feedback == () and found.counted == found.promised
    assert found.notes[0] == "gradients travel exactly, in float32"


def test_what_is_sent_besides_breaks_the_contract():
    def leaking(params_, rows, key):
        value, weight, seen = (
            sft.graph(sft.SFTConfig(), {"actor": LM}).calls[0].fn(params_, rows, key)
        )
        table = lax.stop_gradient(params_["embed"]["table"])
        return value + 0 * lax.psum(table, "dcn").sum(), weight, seen

    with pytest.raises(ValueError, match=r"actor_train: axis 'dcn' carries .* times is allowed"):
        traffic(NODES, sends("int8"), fn=leaking)


def test_compiled_programs_send_the_same_and_nothing_large_besides():
    """Rows, norms and scalars are what the compiler may move."""
    step = compiled(NODES, sends("int4_delta"))
    program, found = step.program("actor_train"), step.traffic["actor_train"]
    total, counted = hlo_bytes.received(program) / 8, sum(found.counted.values())
    assert counted <= total < 1.02 * counted
    assert str(found).startswith("int4_delta sends 0.00")


def test_policies_know_the_name_of_the_first_stage():
    assert collectives.STAGE in SAVED


# What rounding leaves over, and what nodes hold of the weights


@pytest.fixture(scope="module")
def fed():
    """A step with error feedback and differences of weights, its models after two steps, and what
    was left over by name.
    """
    step = compiled(NODES, sends("int4_delta"))
    models, _ = after(step, started(step), 2)
    return step, models, jax.tree.map(np.asarray, models["actor"].error_feedback)


def check_copies(name, x, copies=2):
    """That the devices which hold the same part, `copies` each, hold the same bits."""
    parts = {}
    for shard in x.addressable_shards:
        parts.setdefault(str(shard.index), []).append(np.asarray(shard.data).tobytes())
    assert {len(p) for p in parts.values()} == {copies} and len(parts) == 8 // copies, name
    assert all(len(set(p)) == 1 for p in parts.values()), name


def test_all_nodes_hold_the_same_to_the_last_bit_and_near_the_weights(fed):
    step, models, left = fed
    first = started(step)["actor"]
    assert set(models["actor"].node_copy) == set(first.node_copy) == set(left)
    for name, x in models["actor"].node_copy.items():
        check_copies(name, x)
        weight, start = (np.asarray(tree.flat(m.params)[name]) for m in (models["actor"], first))
        apart = np.linalg.norm(np.asarray(x, np.float32).reshape(weight.shape) - weight)
        # The last step's change is missing, the one before was rounded, and the sum to bfloat16.
        limit = 0.7 * np.linalg.norm(weight - start) + 2**-9 * np.linalg.norm(weight)
        assert apart < limit, name


@pytest.mark.parametrize(
    ("name", "at"), [("layers/mlp/down/kernel", 2), ("layers/mlp/gate/kernel", 1)]
)
def test_what_nodes_hold_is_renewed_by_coded_differences(fed, name, at):
    """One shard after the other, by `encode` and `decode` alone."""
    step, models, _ = fed
    weight = np.asarray(tree.flat(models["actor"].params)[name])
    old = np.asarray(models["actor"].node_copy[name], np.float32).reshape(weight.shape)
    (got, _), blocks = after(step, jax.tree.map(jnp.copy, models), 1, first=2), Blocks(4, 64)
    new = np.asarray(got["actor"].node_copy[name], np.float32).reshape(weight.shape)
    for w, r, now in zip(*(np.split(x, 8, axis=at) for x in (weight, old, new)), strict=True):
        w, r, now = (np.moveaxis(x, at, 1).reshape(len(x), -1) for x in (w, r, now))
        sent = decode(encode(jnp.asarray(w - r), blocks), w.shape[-1], blocks, jnp.float32)
        np.testing.assert_array_equal(np.asarray((r + sent).astype(jnp.bfloat16), np.float32), now)


def test_weights_that_something_else_replaced_are_sent_in_full(fed):
    step, models, _ = fed
    other = jax.tree.map(lambda x: x + 3, models["actor"].params)
    got = step.refreshed("actor", models["actor"]._replace(params=other))
    flat = tree.flat(other)
    for name, x in got.node_copy.items():
        assert x.sharding == models["actor"].node_copy[name].sharding and x.dtype == jnp.bfloat16
        want = np.asarray(flat[name].astype(jnp.bfloat16))
        np.testing.assert_array_equal(np.asarray(x).reshape(want.shape), want)


def test_what_is_left_over_is_kept_for_every_rounded_weight(fed):
    step, _, left = fed
    shapes = {k: v.shape for k, v in tree.flat(step.home("actor").params).items()}
    assert {k for k in shapes if k.endswith(("kernel", "table"))} == set(left)
    assert left["layers/mlp/gate/kernel"].shape == (2, 3, 2, 16, 48)
    assert left["layers/mlp/down/kernel"].shape == (2, 3, 48, 2, 16)
    for name, x in left.items():
        whole = shapes[name]
        split = next(i for i, n in enumerate(x.shape[1:]) if i == len(whole) or n != whole[i])
        sent = np.moveaxis(x, 1 + split, 1)
        for node in range(2):  # a node keeps its own part exact, and sends the other's
            assert not sent[node, node].any() and sent[node, 1 - node].any(), name


def test_another_number_of_devices_keeps_it(fed):
    step, models, left = fed
    fewer = Placement(tuple(range(4)), dcn=2, fsdp=2)
    other = core.compile(step.graph, {"actor_train": fewer}, step.specs)
    moved = state.moved(jax.tree.map(jnp.copy, models), step, other)
    for name, x in moved["actor"].error_feedback.items():
        assert len(x.sharding.device_set) == 4
        np.testing.assert_array_equal(x, left[name])
    for name, x in moved["actor"].node_copy.items():
        assert len(x.sharding.device_set) == 4
        np.testing.assert_array_equal(x, models["actor"].node_copy[name])


def test_a_withheld_update_keeps_it(fed):
    step, models, left = fed
    bad = batch(7)
    bad["mask"][3, 4] = np.inf
    got, _, seen = step(jax.tree.map(jnp.copy, models), bad, np.array([0, 7], np.uint32))
    assert seen["actor_train/finite"] == 0
    for name, x in got["actor"].error_feedback.items():
        np.testing.assert_array_equal(x, left[name])
    for name, x in got["actor"].node_copy.items():
        np.testing.assert_array_equal(x, models["actor"].node_copy[name])


ZERO = (
    "sft.zero.name=int4_delta", "sft.zero.block=64", "sft.plan={'default': {'dcn': 2, 'fsdp': 4}}",
)  # fmt: skip
FED = "algorithm=sft,steps=4,every=1,first=8"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that is never stopped."""
    workdir = tmp_path_factory.mktemp("fed")
    assert launch.train(launch.config(FED, *ZERO), workdir)
    return workdir


@pytest.mark.slow
def test_a_resumed_run_ends_where_the_other_does(whole, tmp_path, monkeypatch):
    run = launch.config(FED, *ZERO)
    stopped(monkeypatch, run, tmp_path, after=2)
    assert launch.train(run, tmp_path)
    assert launch.export(tmp_path) == launch.export(whole)


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices_in_a_node(tmp_path, monkeypatch):
    """Other numbers share a scale then, so that the result is not quite the same."""
    run, parted, whole = (FED, "sft.zero.name=int4", *ZERO[1:]), tmp_path / "a", tmp_path / "b"
    assert launch.train(launch.config(*run), whole)
    stopped(monkeypatch, launch.config(*run), parted, after=2)
    fewer = "sft.plan={'default': {'devices': 4, 'dcn': 2, 'fsdp': 2}}"
    assert launch.train(launch.config(*run, fewer), parted)
    losses = [[v["actor_train/loss"] for _, _, v in launch.numbers(d)] for d in (parted, whole)]
    np.testing.assert_allclose(*losses, rtol=5e-3)
    assert losses[0][:2] == losses[1][:2] and losses[0][2:] != losses[1][2:]


# Algorithms, by config


def law(algorithm, nodes, *changes, plan="all"):
    """Parameters of a run on nodes and of one on one device."""
    more = (f"{algorithm}.batch=16", *changes)
    one = launch.config(f"algorithm={algorithm},optim=sgd,first=1", *more)
    zero = (f"{algorithm}.zero.name=exact", f"{algorithm}.zero.nodes={nodes}")
    many = launch.config(
        f"algorithm={algorithm},optim=sgd", *more, *zero, f"{algorithm}.plan={plan}"
    )
    steps = 1 if algorithm == "ppo" else 2  # of four updates each
    return [models_after(assembly.assemble(run), steps=steps) for run in (many, one)]


@pytest.mark.parametrize(
    ("algorithm", "nodes"),
    [
        pytest.param(name, nodes, marks=pytest.mark.slow)
        for name in ("sft", "dpo", "grpo", "ppo")
        for nodes in (2, 4)
    ],
)
def test_algorithms_learn_what_one_device_does(algorithm, nodes):
    check(*law(algorithm, nodes))


SPLIT = {"dcn": 2, "fsdp": 2, "seq": 2}


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["sft", "dpo", "grpo", "ppo"])
def test_algorithms_on_nodes_and_a_sequence_axis_learn_what_one_device_does(algorithm):
    names = {"ppo": ["actor_train", "critic_train"]}.get(algorithm, ["actor_train"])
    plan = {"default": {"fsdp": 8}} | dict.fromkeys(names, SPLIT)
    check(*law(algorithm, 2, plan=repr(plan)))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["sft", "grpo"])
def test_a_searched_plan_puts_training_on_nodes_and_changes_no_result(algorithm):
    few = f"{algorithm}.search.evaluations=50"
    run = launch.config(
        f"algorithm={algorithm},optim=sgd", f"{algorithm}.zero.name=int8",
        f"{algorithm}.plan=search", f"{algorithm}.batch=16", few,
    )  # fmt: skip
    plan = assembly.assemble(run).stages[0].step.plan
    assert {
        name: place.dcn for name, place in plan.items() if "train" in name or "gen" in name
    } == {name: 2 if "train" in name else 1 for name in plan if "train" in name or "gen" in name}
    check(*law(algorithm, 2, few, plan="search"))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_nodes_hold_the_same_whatever_the_algorithm(algorithm):
    zero = (f"{algorithm}.zero.name=int4_delta", f"{algorithm}.batch=16")
    run = launch.config(f"algorithm={algorithm},optim=sgd,plan=all", *zero)
    assembled = assembly.assemble(run)
    (stage,) = assembled.stages
    step, models = stage.step.build(stage.batch), state.initial(assembled, stage, {})
    for t in range(2):
        before = {role: jax.tree.map(np.asarray, tree.flat(models[role].params)) for role in models}
        models, _, _ = step(models, next(stage.loader), assembly.words(0, stage.name, t))
    stage.loader.close()
    for role in ("actor", "critic") if algorithm == "ppo" else ("actor",):
        assert models[role].node_copy
        for name, x in models[role].node_copy.items():
            check_copies(name, x)
            # As far as the last update or, of PPO, some of the last four.
            old, new = before[role][name], np.asarray(tree.flat(models[role].params)[name])
            apart = np.linalg.norm(np.asarray(x, np.float32).reshape(new.shape) - new)
            assert apart < 1.2 * np.linalg.norm(new - old) + 2**-8 * np.linalg.norm(new), name


PARTS = {
    "lora on int8": dict(name="lora", rank=4, base="int8"),
    "entries": dict(name="static", density=0.05),
    "blocks chosen anew": dict(
        name="periodic", density=0.2, every=1, granularity="block", block=(4, 4),
        selector="gradient",
    ),
    "spiel": dict(name="spiel_ag", density=0.05, every=1, selector="gradient"),
    "overlay on int8": dict(name="static", density=0.05, mode="overlay", base="int8"),
    "dora on nf4": dict(name="dora", rank=4, base="nf4", whole=(".*norm/scale",)),
    "layers": dict(name="lisa", layers=1, every=1),
    "lora and a kernel": dict(
        name="lora", rank=4, targets=(".*attn/./kernel",), whole=(".*mlp/up/kernel",)
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["all", {"default": SPLIT}], ids=["all", "seq"])
@pytest.mark.parametrize("name", PARTS)
def test_parts_of_a_model_learn_what_they_do_on_one_device(name, plan):
    got, want = law("sft", 2, f"sft.adapt={{'actor': {PARTS[name]}}}", plan=str(plan))
    for a, b in zip(*map(jax.tree.leaves, (got[1], want[1])), strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b) + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["all", "halves"])
def test_an_adapter_of_a_policy_learns_what_it_does_on_one_device(plan):
    """Calls that sample borrow a base that every node has whole, on the same devices or others."""
    more = ("grpo.batch=16", f"grpo.adapt={{'actor': {PARTS['lora on int8']}}}")
    arg, zero = "algorithm=grpo,optim=sgd", "grpo.zero.name=exact"
    runs = (
        launch.config(f"{arg},plan={plan}", *more, zero), launch.config(f"{arg},first=1", *more)
    )  # fmt: skip
    got, want = (models_after(assembly.assemble(run))[1] for run in runs)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b) + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "zero"),
    [
        *((name, "int8") for name in PARTS),
        *(
            (name, "int4_delta")
            for name in ("lora on int8", "spiel", "layers", "lora and a kernel")
        ),
    ],
)
def test_parts_of_a_model_go_with_rounding(name, zero, tmp_path):
    part = f"sft.adapt={{'actor': {PARTS[name]}}}"
    run = launch.config("algorithm=sft,plan=all,steps=3", part, f"sft.zero.name={zero}")
    assert launch.train(run, tmp_path)
    losses = [v["actor_train/loss"] for _, _, v in launch.numbers(tmp_path)]
    assert np.isfinite(losses).all()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "near"), [("exact", 0.01), ("int8", 0.05), ("int4", 0.15)])
def test_collage_goes_with_it(name, near):
    """Its steps are as long for small gradients as for large ones, so that rounding shows."""
    collage = (
        "sft.optim.actor.name=collage_adamw", "model.param_dtype=bfloat16", "sft.batch=16",
        "sft.optim.actor.lr=0.003",
    )  # fmt: skip
    more = (*collage, f"sft.zero.name={name}")
    runs = [
        launch.config("algorithm=sft,first=1", *collage),
        launch.config("algorithm=sft,plan=all", *more),
    ]
    want, got = (models_after(assembly.assemble(run))[1] for run in runs)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        a, b = (x.astype(np.float32) for x in (a, b))
        assert np.linalg.norm(a - b) <= near * np.linalg.norm(b)


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["sft.zero.name=int3"], r"config.sft.zero: unknown level 'int3'; expected one of"),
        (["sft.zero.nodes=1"], r"config.sft.zero.nodes is 1, but must be at least 2"),
        (["sft.zero.block=7"], r"config.sft.zero: size is 7; it must be even"),
        (["sft.zero.nodes=3"], r"actor_train has 8 devices, which do not divide into 3 nodes"),
        (
            ["sft.plan={'default': {'fsdp': 8}}"],
            r"sends 'int8' between 2 nodes, but its placement has dcn=1",
        ),
        (
            ["model.shape.width=36"],
            r"width \[36\] does not divide by 8 = 2 \(dcn\) x 4 \(fsdp\)",
        ),
        (["model.dtype=float16"], r"unknown dtype 'float16'"),
        (
            [
                "sft.plan={'default': {'dcn': 2, 'fsdp': 2, 'tensor': 2}}",
                "sft.adapt={'actor': {'name': 'static'}}",
            ],
            r"trains entries or layers of its kernels, which goes with tensor=1 only",
        ),
    ],
)
def test_what_does_not_go_with_it_is_named(changes, message):
    first = [] if any("zero.name" in c for c in changes) else ["sft.zero.name=int8"]
    plan = "first=8" if any(".plan={" in c for c in changes) else "plan=all"
    with pytest.raises(ValueError, match=message):
        assembly.assemble(launch.config(f"algorithm=sft,{plan}", *first, *changes))


@pytest.mark.slow
def test_two_processes_send_what_one_does(cache, tmp_path):  # noqa: F811
    spec_ = f"--config={launch.TINY}:algorithm=sft,plan=all,steps=3"
    zero = "--config.sft.zero.name=int4_delta"
    code, out, err = launch.command(
        f"{spec_},devices=8", zero, f"--workdir={tmp_path / 'one'}", cache=cache
    )
    assert code == 0, out + err
    assert "of ZeRO-3's in 16 bits" in " ".join(out.split())
    done = together(cache, f"{spec_},devices=4", zero, f"--workdir={tmp_path / 'two'}")
    for out, err, code in done:
        assert code == 0, out + err
    got, want = (launch.tensors(tmp_path / name) for name in ("two", "one"))
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-5, err_msg=name)

"""Training in part, through the framework: what a plan must not change, and what may change."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import launch
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrl_eff import core, tree
from jaxrl_eff.algorithms import sft
from jaxrl_eff.checkpoints import deltas, save_hf
from jaxrl_eff.core import Placement, Spec
from jaxrl_eff.models import LMConfig, params
from jaxrl_eff.optim import optimizer
from jaxrl_eff.peft import entries, ways, weights
from jaxrl_eff.planner import from_graph
from jaxrl_eff.train import assembly, settings, state, writer

LM = LMConfig(
    vocab=24, layers=2, width=16, heads=4, kv_heads=2, head_dim=8, ffn=32, init_std=0.3, unroll=1
)
ONE = Placement((0,))
OPTIM = settings.OptimSettings(lr=1e-2, name="adam")
TARGETS = ("layers/attn/o/kernel", "layers/mlp/up/kernel")  # one sharded in each way


def batch(rows=8, length=12):
    rng = np.random.default_rng(0)
    ones = np.ones((rows, length), np.int32)
    return {
        "tokens": rng.integers(0, LM.vocab, (rows, length)).astype(np.int32),
        "segment": ones,
        "position": np.cumsum(ones, 1, dtype=np.int32) - 1,
        "mask": ones.astype(np.float32),
    }


def spec(**changes):
    s = settings.AdaptSettings(**{"tiles": (2, 2), "density": 0.1, "targets": TARGETS, **changes})
    sm3 = dataclasses.replace(OPTIM, name="sm3")
    return ways.spec(s, LM, sm3 if s.name == "spiel_ma" else OPTIM, lambda count: 1e-2, 100)


@functools.cache
def base():
    return jax.tree.map(np.asarray, params.init(LM, jax.random.key(0)))


def train(of, place, steps=3):
    """The parameters and optimizer state after a few steps of SFT, on the host."""
    step = core.compile(
        sft.graph(sft.SFTConfig(), {"actor": LM}), {"actor_train": place}, {"actor": of}
    ).build(batch())
    home = jax.tree.map(lambda x: x.sharding, step.home("actor").params)
    start = jax.jit(of.tx.extended)(base()) if isinstance(of.tx, core.Adaptation) else base()
    models = {"actor": step.init("actor", jax.device_put(start, home))}
    for i in range(steps):
        models, _, m = step(models, batch(), np.array([0, i], np.uint32), reselect=step.due(i))
    assert all(np.isfinite(float(v)) for v in m.values())
    return jax.tree.map(np.asarray, models["actor"]), step


WAYS = {
    "entries": dict(name="spiel_ag", selector="gradient", every=2),
    "blocks and lora": dict(
        name="periodic", selector="fisher", every=2, granularity="block", block=(4, 4), rank=2
    ),
    "accumulators": dict(name="spiel_ma", every=2, share=0.5),
    "overlay": dict(name="spiel_ag", selector="snip", every=2, mode="overlay"),
    "lisa": dict(name="lisa", layers=1, every=1),
    "lora on nf4": dict(name="lora", rank=2, base="nf4"),
    "overlay on int8": dict(name="spiel_ag", selector="snip", every=2, mode="overlay", base="int8"),
}
PLACES = {
    "entries": Placement((7, 6, 5, 4, 3, 2, 1, 0), fsdp=2, tensor=2, microbatches=2),
    "blocks and lora": Placement((1, 3, 0, 2), tensor=2, seq=2, microbatches=4),
    "accumulators": Placement((0, 1, 2, 3), fsdp=2, tensor=2, microbatches=2),
    "overlay": Placement((0, 1, 2, 3), fsdp=2, tensor=2, microbatches=2),
    "lisa": Placement((3, 2, 1, 0), fsdp=2, tensor=2, microbatches=2),
    "lora on nf4": Placement((0, 1, 2, 3), fsdp=2, tensor=2),
    "overlay on int8": Placement((0, 1, 2, 3), fsdp=2, tensor=2, microbatches=2),
}
USUAL = ("entries", "lora on nf4")
EXACT = ("index", "entries/layers", "kernel_codes", "kernel_scales")


@pytest.mark.parametrize(
    "way",
    [w if w in USUAL else pytest.param(w, marks=pytest.mark.slow) for w in WAYS],
)
def test_no_plan_changes_what_is_chosen_nor_learned(way):
    want, _ = train(spec(**WAYS[way]), ONE)
    got, _ = train(spec(**WAYS[way]), PLACES[way])
    chosen = {k: v for k, v in tree.flat(want).items() if k.endswith(EXACT)}
    assert chosen
    for name, index in chosen.items():
        np.testing.assert_array_equal(index, tree.flat(got)[name])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, got.params, want.params)


@pytest.mark.slow
def test_everything_at_full_density_is_dense_adam():
    """Of these kernels; the rest is frozen."""
    ours, _ = train(spec(name="static", density=1.0, tiles=(1, 1)), ONE)
    frozen = tuple(k for k in tree.flat(base()) if k not in TARGETS)
    tx = optimizer("adam", 1e-2, clip_norm=1.0, frozen=frozen)
    theirs, _ = train(Spec(params.abstract(LM), params.logical_axes(LM), tx), ONE)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, ours.params, theirs.params)


def test_only_what_is_active_changes_and_the_base_comes_back():
    of = spec(name="spiel_ag", selector="snip", every=2, tiles=(1, 1))
    got, _ = train(of, ONE, steps=4)
    changed = tree.flat(jax.tree.map(lambda a, b: (a != b).mean(), got.params, base()))
    for name, share in changed.items():
        assert 0 < share <= 0.11 if name in got.opt["entries"].active else share == 0, name
    part = settings.AdaptSettings(name="static", density=0.1, targets=TARGETS)
    model = jax.tree.map(jnp.asarray, got)
    back = jax.jit(entries.entries_of(part, LM, OPTIM).revert)(model.params, model.opt["entries"])
    jax.tree.map(np.testing.assert_array_equal, back, base())


@pytest.mark.slow
def test_an_overlay_learns_what_training_in_place_learns():
    """And its base is there unchanged."""
    way = dict(name="periodic", selector="gradient", every=2, tiles=(1, 1))
    inside, _ = train(spec(**way), ONE)
    beside, _ = train(spec(**way, mode="overlay"), ONE)
    params_ = jax.tree.map(jnp.asarray, beside.params)
    jax.tree.map(
        np.testing.assert_array_equal, weights.base(weights.assembled(LM, params_)), base()
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, jax.jit(lambda p: weights.merged(LM, p))(params_), inside.params)


@pytest.mark.slow
def test_lisa_of_all_layers_is_dense_adam_and_of_one_leaves_the_others():
    ours, _ = train(spec(name="lisa", layers=2, every=9), ONE)
    frozen = tuple(k for k in tree.flat(base()) if k not in TARGETS)
    tx = optimizer("adam", 1e-2, clip_norm=1.0, frozen=frozen)
    theirs, _ = train(Spec(params.abstract(LM), params.logical_axes(LM), tx), ONE)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, ours.params, theirs.params)
    one, _ = train(spec(name="lisa", layers=1, every=9), ONE)
    (layer,) = one.opt["entries"].layers
    for name in TARGETS:
        changed = tree.flat(one.params)[name] != tree.flat(base())[name]
        assert changed[layer].mean() > 0.9 and not changed[1 - layer].any()
    state = [x for x in jax.tree.leaves(one.opt["entries"].inner) if x.ndim > 2]
    assert state and all(len(x) == 1 for x in state)


def run(algorithm, steps, **changes):
    """Settings of tests/tiny.py with an actor that is trained in part."""
    of = launch.config(f"algorithm={algorithm},steps={steps},every=1,first=1")
    part = {"actor": settings.AdaptSettings(**changes)}
    stage = dataclasses.replace(of.stage[algorithm], adapt=part)
    return dataclasses.replace(of, stage={algorithm: stage})


@pytest.mark.slow
@pytest.mark.parametrize(
    "part",
    [
        dict(name="spiel_ag", selector="gradient", every=2, density=0.1, rank=2),
        dict(name="lora", rank=2, base="nf4"),
    ],
    ids=["spiel", "nf4"],
)
def test_a_killed_run_ends_bitwise_the_same_across_a_choice(tmp_path, monkeypatch, part):
    of = run("sft", 4, **part, targets=TARGETS)
    assert launch.train(of, tmp_path / "whole")
    write, left = writer.Writer.step, [3]

    def killing(self, *args, **kwargs):
        write(self, *args, **kwargs)
        left[0] -= 1
        if not left[0]:
            self.close()
            raise launch.Killed

    with monkeypatch.context() as m:
        m.setattr(writer.Writer, "step", killing)
        with pytest.raises(launch.Killed):
            launch.train(of, tmp_path / "killed")
    assert launch.train(of, tmp_path / "killed")
    assert launch.export(tmp_path / "killed") == launch.export(tmp_path / "whole")
    assert launch.numbers(tmp_path / "killed") == launch.numbers(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    "way",
    [
        dict(name="lora", rank=2),
        dict(name="static", mode="overlay"),
        dict(name="lora", rank=2, base="nf4"),
    ],
)
def test_the_reference_is_the_actor_without_its_adapter(tmp_path, way):
    """No second model; and the KL to it starts at 0 and then does not stay there."""
    of = run("grpo", 2, **way, targets=TARGETS)
    assert launch.train(of, tmp_path)
    rows = [v for _, _, v in launch.numbers(tmp_path, "grpo")]
    kl = [v["advantage/ref_kl"] for v in rows if "advantage/ref_kl" in v]
    assert abs(kl[0]) < 1e-5 < abs(kl[1])
    plan = launch.document(tmp_path, "plan")["grpo"]
    assert plan["ref_inf"]["of"] == "actor"


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(name="best"), "unknown adaptation 'best'"),
        (dict(name="lora"), "rank is 0"),
        (dict(name="static", granularity="bit"), "unknown granularity 'bit'"),
        (dict(name="static", selector="best"), "unknown selector 'best'"),
        (dict(name="spiel_ag"), "grows by a gradient"),
        (dict(name="spiel_ma", selector="gradient"), "selector of its start is 'gradient'"),
        (dict(name="spiel_ma", granularity="row"), "granularity is 'row'"),
        (dict(name="spiel_ma", mode="overlay"), "mode is 'overlay'"),
        (dict(name="periodic"), "choose the same again"),
        (dict(name="static", granularity="block"), r"attn/o/kernel: blocks of \(128, 128\)"),
        (dict(name="static", tiles=(0, 1)), r"tiles is \(0, 1\)"),
        (dict(name="static", targets=("nothing",)), "unknown target 'nothing'"),
        (dict(name="static", whole=TARGETS[1:]), "also trained by entries"),
        (
            dict(name="lora", rank=2, whole=TARGETS[1:]),
            "whole has .*mlp/up/kernel.*have an adapter",
        ),
        (dict(name="static", probe=0), "probe is 0"),
        (dict(name="lisa", layers=3), "3 layers are trained at a time, but there are 2"),
        (dict(name="lisa", rank=2), "no rank and no overlay"),
        (dict(name="static", mode="under"), "mode is 'under'"),
        (dict(name="static", mode="overlay", on_drop="keep"), "an overlay always reverts"),
        (dict(name="static", base="nf4"), "writes into the kernels"),
    ],
)
def test_what_cannot_work_is_said(changes, message):
    with pytest.raises(ValueError, match=message):
        spec(**changes)


def test_spiel_ma_brings_its_own_optimizer():
    with pytest.raises(ValueError, match="updates by SM3, but optim is 'adam'"):
        ways.spec(settings.AdaptSettings(name="spiel_ma"), LM, OPTIM, lambda count: 1e-2, 100)
    sm3 = dataclasses.replace(OPTIM, name="sm3")
    with pytest.raises(ValueError, match="only spiel_ma"):
        ways.spec(settings.AdaptSettings(name="static"), LM, sm3, lambda count: 1e-2, 100)


FROZEN = {  # of the leaves of layers/mlp/up and layers/mlp/down
    "entries": {"down/kernel"},
    "overlay": {"down/kernel", "up/kernel"},
    "lisa": {"down/kernel"},
    "lora on nf4": {
        "down/kernel_codes", "down/kernel_scales", "up/kernel_codes", "up/kernel_scales",
        "up/lora_scale",
    },
}  # fmt: skip


@pytest.mark.parametrize("way", FROZEN)
def test_what_nothing_changes_is_found(way):
    found = {name.removeprefix("layers/mlp/") for name in ways.frozen(spec(**WAYS[way]))}
    assert {n for n in found if n.startswith(("up/", "down/"))} == FROZEN[way]
    assert "embed/table" in found


@pytest.mark.parametrize(
    ("way", "passes"),
    [
        (dict(name="lora", rank=2), 2),
        (dict(name="static"), 3),
        (dict(name="static", granularity="row"), 2),
        (dict(name="lisa", layers=1), 2.5),
    ],
)
def test_products_that_are_left_out_are_not_counted(way, passes):
    of = spec(**way)
    assert of.tx.passes == passes and from_graph.role(LM, of, trained=True).passes == passes


@pytest.mark.parametrize("base_", ["", pytest.param("nf4", marks=pytest.mark.slow)])
def test_training_goes_on_from_an_adapter_on_disk(tmp_path, base_):
    """The base and the adapter of one run, read by another, are the model that it ended with."""

    def of(**way):
        role = settings.AdaptSettings(name="lora", targets=TARGETS, base=base_, **way)
        run = launch.config("algorithm=reward_model,steps=1")
        stage = dataclasses.replace(run.stage["reward_model"], adapt={"reward": role})
        return dataclasses.replace(run, stage={"reward_model": stage})

    assert launch.train(of(rank=2), tmp_path / "first")
    start = str(tmp_path / "first" / "adapter")
    model = settings.ModelSettings(path=str(tmp_path / "first" / "base"))
    again = assembly.assemble(dataclasses.replace(of(rank=2, start=start), model=model))
    (stage,) = again.stages
    params_, lm = state.initial(again, stage, {})["reward"].params, stage.lms["reward"]
    assert np.any(np.asarray(params_["value"]["kernel"]))
    save_hf(tmp_path / "back", lm, state.merged(lm, params_))
    back, export = (load_file(tmp_path / d / "model.safetensors") for d in ("back", "first/export"))
    assert back.keys() == export.keys()
    for name, x in export.items():
        np.testing.assert_allclose(back[name], x, rtol=1e-6, atol=1e-7, err_msg=name)
    for way, error, message in (
        (dict(rank=3, start=start), ValueError, r"adapt.reward: start.*with rank 3"),
        (dict(rank=2, start=str(tmp_path)), FileNotFoundError, r"no adapter_config\.json"),
        (dict(rank=2, start=start, whole=("final_norm/scale",)), ValueError, "lacks 'final_norm"),
    ):
        with pytest.raises(error, match=message):
            assembly.assemble(of(**way))


def test_a_run_leaves_a_file_that_takes_its_change_back(tmp_path):
    """Sparse training of a directory: the export without the delta is that directory, by hash."""
    first = run("sft", 1, name="static", targets=TARGETS)
    assert launch.train(dataclasses.replace(first), tmp_path / "first")
    assert not (tmp_path / "first" / "delta.safetensors").exists()  # there was no directory
    base = tmp_path / "first" / "export"
    model = settings.ModelSettings(path=str(base))
    again = dataclasses.replace(run("sft", 2, name="static", targets=TARGETS), model=model)
    assert launch.train(again, tmp_path / "second")
    delta = deltas.load(tmp_path / "second" / "delta.safetensors")
    assert set(delta.tensors) and delta.count and delta.method == "static"
    deltas.rollback(tmp_path / "second" / "export", delta, tmp_path / "back")
    hashes = [deltas.content_hash(deltas.read_directory(d)) for d in (base, tmp_path / "back")]
    assert hashes[0] == hashes[1] == delta.base

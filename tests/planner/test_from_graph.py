"""Problems from real graphs: what `dataflow` finds by tracing, without tracing."""

import jax
import jax.numpy as jnp
import pytest

from jaxrl_eff import core
from jaxrl_eff.algorithms import Rollout, grpo, ppo, remax, sft
from jaxrl_eff.models import LMConfig, params
from jaxrl_eff.optim import optimizer
from jaxrl_eff.parallel import Placement
from jaxrl_eff.planner import shares
from jaxrl_eff.planner.from_graph import works
from jaxrl_eff.planner.problem import Lengths
from jaxrl_eff.rollout import Sampling

LM = LMConfig(
    vocab=12, layers=2, width=16, heads=2, kv_heads=1, head_dim=8, ffn=24, eos=(1,),
    window=4, windowed=(True, False), tie=True,
)  # fmt: skip
VALUE = LMConfig(vocab=12, layers=1, width=8, heads=1, kv_heads=1, head_dim=8, ffn=8, head="value")
PROMPTS = {
    "prompt": jax.ShapeDtypeStruct((4, 5), jnp.int32),
    "prompt_length": jax.ShapeDtypeStruct((4,), jnp.int32),
    "prompt_example": jax.ShapeDtypeStruct((4,), jnp.int32),
}


def step(graph, lms):
    trained = {c.of for c in graph.calls if c.kind == "train"}
    specs = {}
    for m in graph.models:
        if m == "kl":
            specs[m] = ppo.kl_spec()
            continue
        tx = optimizer("adamw", 1e-3) if m in trained else None
        specs[m] = core.Spec(params.abstract(lms[m]), params.logical_axes(lms[m]), tx)
    plan = {c.name: Placement((0,)) for c in graph.calls}
    return core.compile(graph, plan, specs)


MODELS = {"actor": LM, "critic": VALUE, "reward": VALUE}
CASES = {
    "ppo": (
        ppo.graph(
            ppo.PPOConfig(minibatches=2, kl_target=1.0), MODELS,
            Rollout(Sampling(max_tokens=6, samples=2)),
        ),
        {"actor": LM, "ref": LM, "critic": VALUE, "reward": VALUE},
        Sampling(max_tokens=6, samples=2),
    ),
    "grpo": (
        grpo.graph(grpo.GRPOConfig(), MODELS, Rollout(Sampling(max_tokens=3, samples=4))),
        {"actor": LM, "ref": LM, "reward": VALUE},
        Sampling(max_tokens=3, samples=4),
    ),
    "remax": (
        remax.graph(remax.ReMaxConfig(), MODELS, Rollout(Sampling(max_tokens=3))),
        {"actor": LM, "ref": LM, "reward": VALUE},
        Sampling(max_tokens=3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_sizes_are_those_that_tracing_finds(name):
    graph, lms, sampling = CASES[name]
    s = step(graph, lms).check(PROMPTS)
    problem = works(graph, lms, PROMPTS, sampling=sampling, specs=s.specs)
    assert [w.name for w in problem.works] == [c.name for c in s.calls]
    for w in problem.works:
        shapes = {k: v.shape for k, v in s.args[w.name].items()}
        for k, shape in shapes.items():
            assert problem.edge_bytes[k] == 4 * jnp.zeros(shape).size, (w.name, k)
        if w.kind in ("infer", "train"):
            long = max(shape[1] for shape in [*shapes.values(), (1, 1)] if len(shape) > 1)
            assert (w.rows, w.length) == (next(iter(shapes.values()))[0], long)
        if w.kind == "generate":
            assert (w.prompts, w.prompt, w.max_new) == (4, 5, sampling.max_tokens)
            assert w.rows == 4 * (1 if w.name == "greedy_gen" else sampling.samples)


def test_models_are_sized_as_they_are():
    graph, lms, sampling = CASES["ppo"]
    s = step(graph, lms)
    problem = works(graph, lms, PROMPTS, sampling=sampling, specs=s.specs)
    for name, lm in lms.items():
        norms = (2 * lm.layers + 1) * lm.width
        assert shares.params(problem.roles[name].lm) == params.count(lm) - norms
    assert problem.roles["actor"].opt_bytes == pytest.approx(8, rel=0.01)
    assert problem.roles["actor"].grad_bytes == 4
    assert problem.roles["ref"].opt_bytes == 0
    assert shares.params(problem.roles["kl"].lm) <= 16
    assert problem.roles["actor"].lm == LM and sum(LM.windowed) == 1
    assert problem.work("actor_train").minibatches == 2


def test_flops_agree_with_the_models_own_count():
    graph, lms, sampling = CASES["grpo"]
    problem = works(graph, lms, PROMPTS, sampling=sampling)
    lm, context = problem.roles["ref"].lm, 8
    mine = 2 * lm.layers * shares.layer_params(lm) + 2 * shares.head_params(lm)
    mine += 4 * lm.heads * lm.head_dim * shares.seen(lm, float(context))
    norms = 2 * 2 * LM.layers * LM.width
    assert mine + norms == params.flops_per_token(LM, context)


def test_options_reach_the_calls_they_name():
    graph, lms, sampling = CASES["grpo"]
    lengths = Lengths((1, 3), (0.5, 0.5))
    problem = works(
        graph, lms, PROMPTS, sampling=sampling, responses=lengths,
        staleness={"actor_gen": 1}, seconds={"advantage": 0.25},
    )  # fmt: skip
    assert problem.work("actor_gen").staleness == 1
    assert problem.work("actor_gen").responses == lengths
    assert problem.work("advantage").seconds == 0.25
    with pytest.raises(ValueError, match="'ref_inf' is no generate call"):
        works(graph, lms, PROMPTS, sampling=sampling, staleness={"ref_inf": 1})
    with pytest.raises(ValueError, match="actor_gen generates, but sampling is None"):
        works(graph, lms, PROMPTS)


def test_a_graph_without_generation():
    rows = {
        k: jax.ShapeDtypeStruct((6, 10), jnp.int32) for k in ("tokens", "segment", "position")
    } | {"mask": jax.ShapeDtypeStruct((6, 10), jnp.float32)}
    problem = works(sft.graph(sft.SFTConfig(), {"actor": LM}), {"actor": LM}, rows)
    (train,) = problem.works
    assert (train.rows, train.length, train.kind) == (6, 10, "train")
    assert problem.roles["actor"].lm == LM

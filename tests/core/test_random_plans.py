"""Plans drawn at random, over all algorithms and options: each gives what one device gives.

Every number is a plan, drawn anew until one is accepted: what is refused must be a ValueError,
before anything is compiled.
"""

import collections
import functools
import random

import jax
import launch
import numpy as np
import pytest
from test_plan_law import check

from jaxrl_eff.peft import weights
from jaxrl_eff.train import assembly, state

pytestmark = pytest.mark.slow

ALGORITHMS = ("sft", "reward_model", "dpo", "ppo", "grpo", "rloo", "remax", "raft")
STALE = ("ppo", "grpo", "rloo", "remax")
SAMPLING = (*STALE, "raft")
PLANS = 64
MOST_REFUSED = 40  # of one number
ADAPTERS = (
    dict(name="lora", rank=4),
    dict(name="lora", rank=4, base="int8"),
    dict(name="dora", rank=4, base="nf4", whole=(".*norm/scale",)),
    # Its scale is alpha over the root of the rank: more would multiply rounding by as much.
    dict(
        name="rslora", rank=2, alpha=4.0, whole=(".*mlp/up/kernel",), targets=(".*attn/./kernel",)
    ),
    dict(name="static", density=0.05),
    dict(name="static", density=0.05, mode="overlay", base="int8"),
    dict(name="static", density=0.2, granularity="block", block=(4, 4)),
    dict(name="lisa", layers=1),
)


def role_of(algorithm):
    return "reward" if algorithm == "reward_model" else "actor"


def changes(algorithm, *, adapter=None, staleness=0, zero=0, skrull=0):
    """What of a config is changed by options, as its command line would."""
    role, out = role_of(algorithm), []
    if adapter is not None:
        out.append(f"{algorithm}.adapt={ {role: ADAPTERS[adapter]}!r}")
    if staleness:
        out.append(f"{algorithm}.staleness={staleness}")
    if zero:
        out += [f"{algorithm}.zero.name=exact", f"{algorithm}.zero.nodes={zero}"]
    if skrull:
        out.append(f"{algorithm}.schedule={ {'name': 'skrull', 'room': skrull, 'shapes': 2}!r}")
    return [*out, f"{algorithm}.batch=16"]


def assembled(algorithm, plan, **options):
    more = changes(algorithm, **options)
    config = launch.config(f"algorithm={algorithm},optim=sgd", f"{algorithm}.plan={plan!r}", *more)
    return assembly.assemble(config)


def steps_of(algorithm, chosen):
    """As in the laws of single plans: rounding adds up over the four updates of a step of PPO."""
    return 1 if algorithm == "ppo" and "zero" in chosen else 2


def learned(run, step, steps):
    """First and last parameters of every role."""
    (stage,) = run.stages
    models = state.initial(run, stage, {})
    start = jax.tree.map(np.asarray, {r: m.params for r, m in models.items()})
    for t in range(steps):
        models, _, _ = step(models, next(stage.loader), assembly.words(0, stage.name, t))
    stage.loader.close()
    return start, jax.tree.map(np.asarray, {r: m.params for r, m in models.items()})


@functools.cache
def alone(algorithm, adapter, staleness, skrull, steps):
    """On one device, rows in order, nothing rounded."""
    one = {"default": {"devices": [0]}}
    run = assembled(algorithm, one, adapter=adapter, staleness=staleness, skrull=skrull)
    (stage,) = run.stages
    return learned(run, stage.step.build(stage.batch), steps)


def reference(algorithm, chosen):
    """What one device gives.

    Of algorithms that sample, schedules arrange the same rows. Elsewhere they take other sequences
    from the data than packed rows do, so that the reference is scheduled, too.
    """
    skrull = 0 if algorithm in SAMPLING else chosen.get("skrull", 0)
    options = (chosen.get("adapter"), chosen.get("staleness", 0), skrull)
    return alone(algorithm, *options, steps_of(algorithm, chosen))


def merged(run, algorithm, params):
    """What the adapted model computes with: adapters merged into kernels."""
    (stage,), role = run.stages, role_of(algorithm)
    return jax.jit(lambda p: weights.merged(stage.lms[role], p))(params[role])


@functools.cache
def calls(algorithm):
    """(name, kind) of the calls with a model."""
    (stage,) = assembled(algorithm, {"default": {"devices": [0]}}).stages
    return [(c.name, c.kind) for c in stage.step.graph.calls if c.of is not None]


def options(rng, algorithm):
    """Zero to two of what a stage may have besides its plan."""
    found = {}
    kinds = ["adapter", "zero", "skrull", "nothing"] + ["staleness"] * (algorithm in STALE)
    for kind in rng.sample(kinds, rng.choice([1, 1, 2])):
        if kind == "adapter":
            found[kind] = rng.randrange(len(ADAPTERS))
        elif kind != "nothing":
            found[kind] = {"zero": 2, "staleness": 1, "skrull": rng.choice([16, 24, 32])}[kind]
    return found


def place(rng, kind, zero):
    """A row of a plan: some devices in any order, as a mesh of any axes."""
    size = rng.choice([2, 4, 8] if zero else [1, 2, 4, 8])
    row = {"devices": rng.sample(range(8), size)}
    axes = ["data", "fsdp", "tensor"] + ["seq"] * (kind != "generate")
    if zero and kind == "train":
        row["dcn"], size = zero, size // zero
    sizes = collections.Counter()
    while size > 1:
        sizes[rng.choice(axes)] += 1
        size //= 2
    row |= {axis: 2**power for axis, power in sizes.items()}
    if rng.random() < 0.3:
        row["microbatches"] = 2
    if rng.random() < 0.15:
        row["offload"] = "opt" if kind == "train" else "params"
    return row


def drawn(rng, algorithm, zero):
    """One row for all calls, or one for each."""
    if rng.random() < 0.4:
        return {"default": place(rng, "train", zero)}
    return {name: place(rng, kind, zero) for name, kind in calls(algorithm)}


def accepted(number):
    """The first plan of this number that is not refused, its options, and the refusals before."""
    rng, refusals = random.Random(number), []
    algorithm = ALGORITHMS[number % len(ALGORITHMS)]
    while len(refusals) < MOST_REFUSED:
        chosen = options(rng, algorithm)
        plan = drawn(rng, algorithm, chosen.get("zero", 0))
        try:
            run = assembled(algorithm, plan, **chosen)
            (stage,) = run.stages
            step = stage.step.build(stage.batch)
        except ValueError as error:
            refusals.append(str(error))
            continue
        return (algorithm, chosen, plan), (run, step), refusals
    pytest.fail(f"all of {MOST_REFUSED} plans are refused, e.g. {refusals[-1]}")


@pytest.mark.parametrize("number", range(PLANS))
def test_a_plan_drawn_at_random_gives_what_one_device_gives(number, record_property):
    (algorithm, chosen, plan), (run, step), refusals = accepted(number)
    print(f"{number}: {algorithm} {chosen} {plan}; refused before: {len(refusals)}")
    for said in refusals:
        print(f"  refused: {said}")
        assert "\n" not in said
    record_property("refused", len(refusals))
    got = learned(run, step, steps_of(algorithm, chosen))
    want = reference(algorithm, chosen)
    if "adapter" not in chosen:
        check(got, want)
        return
    # Parts of an adapter that start at 0 consist of what was learned alone. So the law of whole
    # models holds for what the model computes with, and its second half for every part.
    kernels = [jax.tree.leaves(merged(run, algorithm, last)) for _, last in (got, want)]
    for a, b in zip(*kernels, strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b) + 1e-9
    parts = [jax.tree.leaves(tree) for tree in (want[0], got[1], want[1])]
    moved = []
    for start, a, b in zip(*parts, strict=True):
        start, a, b = (np.asarray(x, np.float64) for x in (start, a, b))
        moved.append(np.linalg.norm(b - start))
        assert np.linalg.norm(a - b) <= 1e-3 * moved[-1] + 1e-6 * np.linalg.norm(b) + 1e-9
    assert any(moved)

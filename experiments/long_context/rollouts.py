r"""Measured GRPO steps after a rollout with a long tail: padded rows against packed micro-batches.

  NPROC=32 taskset -c 0 python experiments/long_context/rollouts.py

The same batches through both steps, interleaved, on one device and on four (2 groups of 2). A
rollout is replaced by rows whose responses have log-normal lengths, so that a step is what comes
after sampling: the reference's log-probabilities, advantages, training. What the cost predicts is
printed beside: the schedules' estimated seconds over those of padded rows, with the constants of
this machine as they are found before anything ran.
"""

import dataclasses
import os
import statistics
import sys
import time

os.environ.setdefault("NPROC", "32")

from jaxrl_eff.parallel import host

DEVICES = 4
host.simulate(DEVICES)

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_eff import core
from jaxrl_eff.algorithms import Rollout, grpo
from jaxrl_eff.core import Placement, Spec
from jaxrl_eff.models import LMConfig, logical_axes, params
from jaxrl_eff.planner import clusters
from jaxrl_eff.rollout import Sampling
from jaxrl_eff.train import balanced
from jaxrl_eff.train.settings import ScheduleSettings

LM = LMConfig(
    vocab=512, layers=2, width=128, heads=4, kv_heads=2, head_dim=32, ffn=384, max_length=1024
)
PROMPT, ANSWER, PROMPTS, SAMPLES = 64, 448, 8, 4
MEDIAN, SPREAD = 40, 1.2  # of the log-normal lengths of responses, tokens and nats
STEPS = 12
PLACES = {
    "one device": Placement((0,)),
    "2 groups of 2": Placement(tuple(range(DEVICES)), data=2, seq=2),
}


def rollout(_, batch, key):
    """What sampling writes, with lengths that are drawn instead of found."""
    length, words = jax.random.split(key)
    count, width = PROMPTS * SAMPLES, PROMPT + ANSWER
    draw = jnp.exp(np.log(MEDIAN) + SPREAD * jax.random.normal(length, (count,)))
    answer = jnp.clip(jnp.ceil(draw), 1, ANSWER).astype(jnp.int32)
    begin = jnp.repeat(batch["prompt_length"], SAMPLES)
    at = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (count, width))
    inside = at < (begin + answer)[:, None]
    mask = (inside & (at >= begin[:, None])).astype(jnp.float32)
    tokens = jax.random.randint(words, (count, width), 0, LM.vocab, jnp.int32)
    return {
        "tokens": jnp.where(inside, tokens, 0),
        "segment": inside.astype(jnp.int32),
        "position": jnp.where(inside, at, 0),
        "mask": mask,
        "logp": -6.2 * mask,
        "group": jnp.repeat(jnp.arange(PROMPTS, dtype=jnp.int32), SAMPLES),
        "example": jnp.repeat(batch["prompt_example"], SAMPLES),
    }


def reward(batch, key):
    del key
    return {"score": (batch["tokens"] % 7 == 0).mean(1, dtype=np.float32)}


def graph():
    sampling = Sampling(max_tokens=ANSWER, samples=SAMPLES)
    whole = grpo.graph(grpo.GRPOConfig(), {"actor": LM}, Rollout(sampling, reward))
    calls = (dataclasses.replace(c, fn=rollout) if c.kind == "generate" else c for c in whole.calls)
    return dataclasses.replace(whole, calls=tuple(calls))


def batch(number):
    rng = np.random.default_rng(number)
    return {
        "prompt": np.zeros((PROMPTS, PROMPT), np.int32),
        "prompt_length": rng.integers(16, PROMPT + 1, PROMPTS).astype(np.int32),
        "prompt_example": np.arange(PROMPTS, dtype=np.int32),
    }


def padded_seconds(cost, place):
    """What `Cost` says of rows that are all as long as the longest may be."""
    rows, width = PROMPTS * SAMPLES // place.row_shards, PROMPT + ANSWER
    each = float(cost.attention(np.array([width]), place.seq)[0])
    stripes = rows * width // place.seq
    if place.seq == 1:
        return cost.seconds(stripes, 0, 1, attention=rows * each)
    return cost.seconds(0, stripes, place.seq, shared=rows * each)


def compare(name, place, cluster):
    rows, spec = graph(), Spec(params.abstract(LM), logical_axes(LM))
    trained = spec._replace(tx=optax.sgd(1e-3))
    plan = dict.fromkeys((c.name for c in rows.calls if c.of), place)
    specs = {"actor": trained, "ref": spec}
    padded = core.compile(rows, plan, specs).build(batch(0))
    ours = core.compile(rows, plan, specs, pack=1).check(batch(0))
    settings = ScheduleSettings(name="skrull", room=4096, shapes=6)
    pools = balanced.guessed(range(16, PROMPT + 1), ANSWER)
    began = time.perf_counter()
    lms = dict.fromkeys(specs, LM)
    balanced.scheduled(settings, ours, lms, pools, cluster=cluster).build(batch(0))
    built = time.perf_counter() - began
    seen = {"padded": [], "packed": []}
    told, predicted = [], []
    models = {}
    for way, step in (("padded", padded), ("packed", ours)):
        models[way] = {}
        for i, role in enumerate(("actor", "ref")):
            where = jax.tree.map(lambda x: x.sharding, step.home(role).params)
            full = jax.tree.map(np.asarray, params.init(LM, jax.random.key(i)))
            models[way][role] = step.init(role, jax.device_put(full, where))
    for number in range(STEPS + 1):
        for way, step in (("padded", padded), ("packed", ours))[:: 1 if number % 2 else -1]:
            given = models.pop(way)
            wall, cpu = time.perf_counter(), time.process_time()
            models[way], _, m = step(given, batch(number), np.array([7, number], np.uint32))
            jax.block_until_ready((models[way], m))
            if number:  # the first step is a warm-up
                seen[way].append((time.perf_counter() - wall, time.process_time() - cpu))
                if way == "packed":
                    told.append({k: float(v) for k, v in m.items() if k.startswith("schedule/")})
                    cost = step.packs.packings[place].cost
                    estimate = told[-1]["schedule/planned_seconds"]
                    predicted.append(estimate / padded_seconds(cost, place))
    ratios = [[b[i] / a[i] for a, b in zip(seen["padded"], seen["packed"], strict=True)]
              for i in (0, 1)]  # fmt: skip

    def spread(x):
        return f"{statistics.median(x):.3f} ({min(x):.3f} to {max(x):.3f})"

    mean = {k.partition("/")[2]: statistics.mean(t[k] for t in told) for k in told[0]}
    shapes = " ".join(f"{a}+{b}" for a, b in ours.packs.packings[place].shapes)
    print(f"{name}: {STEPS} steps, {PROMPTS * SAMPLES} rows of {PROMPT + ANSWER}; shapes {shapes}, "
          f"made and compiled in {built:.0f} s")  # fmt: skip
    for way in seen:
        print(f"  {way} seconds: wall {spread([s for s, _ in seen[way]])}, "
              f"CPU {spread([s for _, s in seen[way]])}")  # fmt: skip
    print(f"  packed / padded: wall {spread(ratios[0])}, CPU {spread(ratios[1])}, "
          f"predicted {spread(predicted)}")  # fmt: skip
    print("  " + ", ".join(f"{k} {v:.3f}" for k, v in mean.items()), flush=True)


def main():
    cluster = clusters.local()
    for name in sys.argv[1:] or PLACES:
        compare(name, PLACES[name], cluster)


if __name__ == "__main__":
    main()

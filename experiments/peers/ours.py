"""One workload of the comparison, run by this package: generate, sft, dpo, grpo or grpo_disagg.

Prints a line `RESULT {json}` as the peers' scripts do. A step is timed from its dispatch until its
loss is a Python float, data loading and reward included. `MODEL` is the directory of the common
model; `STEPS`, `BATCH`, `PROMPT`, `NEW`, `SEQ` are as for the peers. grpo_disagg
trains on the first four of eight simulated devices and samples on the others, each fsdp=2 x
tensor=2.
"""

import time

START = time.perf_counter()

import json
import os
import random
import string
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
CACHE = os.environ.get("CACHE")  # a directory: persistent compilation cache; unset: none

from jaxrl_eff.checkpoints import read_config
from jaxrl_eff.parallel import host

if os.environ.get("HUGE_PAGES", "1") == "1":  # as `jaxrl_eff.main` does
    host.use_huge_pages()
if sys.argv[1:] == ["grpo_disagg"]:
    host.simulate(8)

import jax

from jaxrl_eff.train import assembly, loop, parts, settings, startup, state

STEPS, BATCH, SEQ = (
    int(os.environ.get(k, d)) for k, d in (("STEPS", 8), ("BATCH", 16), ("SEQ", 128))
)
PROMPT, NEW, SAMPLES = (
    int(os.environ.get(k, d)) for k, d in (("PROMPT", 32), ("NEW", 96), ("G", 8))
)
WARM = int(os.environ.get("WARM", 2))
MODEL = os.environ["MODEL"]
LETTERS = string.ascii_lowercase + " 0123456789"


def texts(n: int, length: int, seed: int = 0) -> list[str]:
    """n strings of `length` characters, each one token."""
    rng = random.Random(seed)
    return ["".join(rng.choice(LETTERS) for _ in range(length)) for _ in range(n)]


def config(work: str) -> dict:
    adamw = dict(name="adamw", lr=1e-3, clip_norm=1.0, weight_decay=0.0)
    inline = dict(source="inline", bos=True, eos=False)
    if work == "sft":
        data = dict(inline, format="text", length=SEQ)
        data["options"] = dict(examples=[{"text": t} for t in texts(BATCH * STEPS, SEQ - 1)])
        stage = dict(algorithm="sft", batch=BATCH, data=data)
        stage["optim"] = dict(actor=dict(adamw, schedule="linear"))
    elif work == "dpo":
        pairs = BATCH // 2
        sides = [texts(pairs * STEPS, n, s) for n, s in ((PROMPT - 1, 0), (NEW, 1), (NEW, 2))]
        rows = [dict(prompt=p, chosen=c, rejected=r) for p, c, r in zip(*sides, strict=True)]
        data = dict(inline, format="preference", length=2 * SEQ, options=dict(examples=rows))
        stage = dict(algorithm="dpo", batch=pairs, data=data, models=dict(actor="base"))
        stage["optim"] = dict(actor=dict(adamw, lr=1e-4, schedule="linear"))
        stage["loss"] = dict(beta=0.1)
    else:
        prompts, samples = BATCH // SAMPLES, SAMPLES
        rows = [{"prompt": t} for t in texts(prompts * STEPS, PROMPT - 1)]
        data = dict(inline, format="prompt", prompt_length=PROMPT, options=dict(examples=rows))
        stage = dict(algorithm="grpo", batch=prompts, data=data)
        stage["optim"] = dict(actor=adamw)
        stage["loss"] = dict(beta=float(os.environ.get("BETA", 0.04)))
        stage["sampling"] = dict(max_tokens=NEW, samples=samples)
        stage["reward"] = dict(name="letter_e")
        if work == "grpo_disagg":
            half = dict(fsdp=2, tensor=2)
            home, away = dict(half, devices=[0, 1, 2, 3]), dict(half, devices=[4, 5, 6, 7])
            stage["plan"] = dict(default=home, actor_gen=away)
    stage |= dict(steps=STEPS, samples_every=0)
    return dict(model=dict(path=MODEL), stages=("bench",), bench=stage)


def letter_e():
    """Share of the letter e: the toy reward of the comparison."""
    return lambda example, response: response.count("e") / max(1, len(response))


def run(work: str) -> dict:
    parts.REWARDS["letter_e"] = letter_e
    if CACHE:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE
        startup.cache()
    assembled = assembly.assemble(settings.run(config(work)))
    imported = time.perf_counter() - START
    stage = assembled.stages[0]
    with loop.getting_ready(stage):
        models = state.initial(assembled, stage, {})
    built = time.perf_counter() - START
    seconds, values, split = [], [], {}
    for t in range(STEPS):
        began = time.perf_counter()
        models, _, metrics = stage.step(models, next(stage.loader), assembly.words(0, "bench", t))
        values.append({k: float(v) for k, v in jax.device_get(metrics).items()})
        seconds.append(time.perf_counter() - began)
        if t == 0:
            first = time.perf_counter() - START
        split = stage.step.timeline.seconds()
    key = "actor_train/loss"
    return summary(work, seconds, imported, built, first) | {
        "losses": [round(v[key], 4) for v in values],
        "rewards": [round(v["advantage/score"], 4) for v in values if "advantage/score" in v],
        "gap_max": max((v.get("actor_train/logp_gap_max", 0.0) for v in values), default=0.0),
        "split": {k: round(v, 4) for k, v in split.items()},
    }


def generate() -> dict:
    """The rollout alone."""
    import dataclasses

    from jaxrl_eff.checkpoints import load_hf
    from jaxrl_eff.core import Graph, Model, Placement, Spec, compile
    from jaxrl_eff.core import generate as call
    from jaxrl_eff.models import abstract, logical_axes
    from jaxrl_eff.rollout import Sampling, sample

    lm = dataclasses.replace(read_config(MODEL), eos=())
    reads = "prompt prompt_length prompt_example"
    fn = sample(lm, Sampling(max_tokens=NEW, growths=int(os.environ.get("GROWTHS", 3))))
    writes = "tokens segment position mask logp group example"
    graph = Graph(reads, (call("actor_gen", of="actor", fn=fn, reads=reads, writes=writes),))
    place = {"actor_gen": Placement((0,))}
    step = compile(graph, place, {"actor": Spec(abstract(lm), logical_axes(lm))}, keep="tokens")
    imported = time.perf_counter() - START
    import numpy as np

    rng = np.random.default_rng(0)
    batch = {
        "prompt": rng.integers(4, 260, (BATCH, PROMPT)).astype(np.int32),
        "prompt_length": np.full(BATCH, PROMPT, np.int32),
        "prompt_example": np.arange(BATCH, dtype=np.int32),
    }
    models = {"actor": Model(load_hf(MODEL, lm))}
    step.build(batch)
    built = time.perf_counter() - START
    seconds = []
    for t in range(STEPS):
        began = time.perf_counter()
        models, data, _ = step(models, batch, assembly.words(0, "bench", t))
        jax.device_get(data["tokens"])
        seconds.append(time.perf_counter() - began)
        if t == 0:
            first = time.perf_counter() - START
    return summary("generate", seconds, imported, built, first)


def summary(work: str, seconds: list[float], imported: float, built: float, first: float) -> dict:
    body = sorted(seconds[WARM:]) or sorted(seconds)
    tokens = BATCH * (NEW if work == "generate" else SEQ)
    median = body[len(body) // 2]
    return {
        "name": f"ours_{work}",
        "first_step_s": round(seconds[0], 4),
        "median_step_s": round(median, 4),
        "min_step_s": round(body[0], 4),
        "steps": len(seconds),
        "tokens_per_step": tokens,
        "tokens_per_s": round(tokens / median, 1),
        "import_and_check_s": round(imported, 2),
        "compiled_s": round(built, 2),
        "until_first_step_s": round(first, 2),
    }


if __name__ == "__main__":
    result = generate() if sys.argv[1] == "generate" else run(sys.argv[1])
    print("RESULT", json.dumps(result))

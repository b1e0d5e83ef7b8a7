"""Does the planner choose the fastest plan? Five workloads on two simulated devices, interleaved.

  NPROC=32 python experiments/planner/run.py [--steps=16] [--out=experiments/planner/results.json]

For each workload the plans by rule run for a few steps, taking turns, and are given to the
`Calibration` that a run has, one after the other. It then has its say: a plan that has not run is
compiled and measured, until it stays with one that was. Then all plans take turns again, step by
step, and only these steps count. Printed: the median step of every plan, as predicted (from calls
and edges alone) and as measured; whether the chosen one is within 5 % of the fastest; and how far
predicted calls are from measured ones.
"""

import argparse
import dataclasses
import json
import os
import random
import statistics
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxrl_eff.parallel import host

host.simulate(2)

import jax
import numpy as np

from jaxrl_eff import core
from jaxrl_eff.core import plan_rules
from jaxrl_eff.planner import from_graph, measured
from jaxrl_eff.planner.simulate import simulate
from jaxrl_eff.train import assembly, replan, settings, state

TRIAL, ROUNDS = 16, 3
HOW = settings.SearchSettings(evaluations=3000)
LETTERS = "abcdefghijklmnopqrstuvwxyz 0123456789"
SMALL = dict(layers=2, width=128, heads=4, kv_heads=4, head_dim=32, ffn=344, max_length=512)
WIDE = dict(layers=4, width=256, heads=4, kv_heads=4, head_dim=64, ffn=688, max_length=512)
# name -> algorithm, model, prompts, samples, prompt length, new tokens
WORKLOADS = {
    "GRPO, long answers": ("grpo", WIDE, 2, 8, 16, 96),
    "GRPO, long prompts": ("grpo", WIDE, 2, 8, 112, 16),
    "PPO, actor and critic": ("ppo", SMALL, 16, 1, 32, 64),
    "ReMax, two generations": ("remax", SMALL, 16, 1, 32, 64),
    "DPO": ("dpo", WIDE, 8, 1, 32, 96),
}


def run(algorithm, shape, prompts, samples, prompt, new):
    """Settings of a run of one stage."""
    rng = random.Random(0)
    text = lambda n: "".join(rng.choice(LETTERS) for _ in range(n))  # noqa: E731
    optim = dict(actor=dict(lr=1e-4))
    if algorithm == "dpo":
        rows = [dict(prompt=text(prompt - 1), chosen=text(new), rejected=text(new))
                for _ in range(64)]  # fmt: skip
        data = dict(format="preference", length=2 * (prompt + new))
        stage = dict(models=dict(actor="base"))
    else:
        rows = [dict(prompt=text(prompt - 1)) for _ in range(64)]
        data = dict(format="prompt", prompt_length=prompt)
        stage = dict(sampling=dict(max_tokens=new, samples=samples), models={})
        stage["reward"] = dict(name="contains", options=dict(words=("e",)))
    if algorithm == "ppo":
        stage["models"], optim["critic"] = dict(critic="base"), dict(lr=1e-4)
    data |= dict(source="inline", bos=True, eos=False, options=dict(examples=rows))
    stage |= dict(algorithm=algorithm, steps=1000, batch=prompts, data=data, optim=optim)
    return settings.run(
        dict(model=dict(shape=shape), tokenizer=f"chars:{LETTERS}", stages=("s",), s=stage)
    )


class Running:
    """One plan of a workload, compiled and ready."""

    def __init__(self, assembled, plan):
        stage = assembled.stages[0]
        self.step = core.compile(stage.step.graph, plan, stage.step.specs)
        self.step.build(stage.batch)
        self.plan = plan
        self.models = state.initial(assembled, dataclasses.replace(stage, step=self.step), {})
        self.t = 0
        self.forget()

    def once(self, batch):
        began = time.perf_counter()
        key = np.array([0, self.t], np.uint32)
        self.models, _, metrics = self.step(self.models, batch, key)
        jax.block_until_ready((metrics, self.models))
        self.seconds.append(time.perf_counter() - began)
        self.spans.append(self.step.timeline.last())
        for span in self.spans[-1]:
            self.calls.setdefault(span.call, []).append(span.end - span.start)
        self.t += 1

    def show(self, calibration):
        """Gives the last three quarters of the trial to the calibration."""
        for t in range(TRIAL // 4, TRIAL):
            calibration.see(self.spans[t], None, self.seconds[t])

    def forget(self):
        self.seconds, self.calls, self.spans = [], {}, []


def measure(name, steps):
    assembled = assembly.assemble(run(*WORKLOADS[name]))
    stage = assembled.stages[0]
    graph, batch = stage.step.graph, next(stage.loader)
    rules = {rule: plan_rules.plan(rule, graph, 2) for rule in ("all", "fsdp")}
    rules["one device"] = plan_rules.plan({"default": {"devices": [0]}}, graph, 2)
    if len(graph.models) > 1:
        rules["halves"] = plan_rules.plan("halves", graph, 2)
    running = {rule: Running(assembled, plan) for rule, plan in rules.items()}
    for _ in range(TRIAL):
        for r in running.values():
            r.once(batch)
    searched = replan.search(from_graph.of_stage(stage), HOW, seed=0)
    calibration = replan.Calibration(searched, first=0)
    for r in running.values():
        calibration.take(dataclasses.replace(searched, plan=r.plan))
        r.show(calibration)
        searched = calibration.corrected()
    for _ in range(ROUNDS):  # as a run does: take up the plan, measure, search again
        chosen = next((k for k, r in running.items() if r.plan == searched.plan), None)
        if chosen:
            break
        chosen = f"try {len(running) - len(rules) + 1}"
        r = running[chosen] = Running(assembled, searched.plan)
        for _ in range(TRIAL):
            r.once(batch)
        calibration.take(searched)
        r.show(calibration)
        searched = calibration.corrected()
    else:  # it would try on; of those that ran it would hold the fastest
        chosen = min(running, key=lambda k: statistics.median(running[k].seconds[TRIAL // 4 :]))
    for r in running.values():
        r.once(batch)
        r.forget()
    for _ in range(steps):
        for r in running.values():
            r.once(batch)
    problem, cluster, corrections = searched.problem, searched.cluster, searched.corrections
    out = {"chosen": chosen, "plans": {}}
    for k, r in running.items():
        seen = measured.timed(problem, r.plan, cluster, r.calls)
        rows = measured.compare(problem, r.plan, cluster, seen, corrections)
        out["plans"][k] = {
            "measured": statistics.median(r.seconds),
            "predicted": simulate(problem, r.plan, cluster, corrections=corrections).seconds,
            "call_error": measured.error([x for x in rows if x.measured > 1e-3]),
            "plan": {c: str(p) for c, p in r.plan.items()},
        }
    best = min(v["measured"] for v in out["plans"].values())
    out["over_fastest"] = out["plans"][chosen]["measured"] / best - 1
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.json")
    parser.add_argument("--only", nargs="*", default=list(WORKLOADS), choices=list(WORKLOADS))
    args = parser.parse_args()
    results = {}
    for name in args.only:
        r = results[name] = measure(name, args.steps)
        print(f"{name}: '{r['chosen']}' is chosen, {r['over_fastest']:+.1%} of the fastest")
        for k, v in sorted(r["plans"].items(), key=lambda kv: kv[1]["measured"]):
            print(f"  {k:12} measured {v['measured']:.3f} s, predicted {v['predicted']:.3f} s, "
                  f"calls off by {v['call_error']:.0%}", flush=True)  # fmt: skip
        args.out.write_text(json.dumps(results, indent=1))
    good = sum(r["over_fastest"] <= 0.05 for r in results.values())
    print(f"{good} of {len(results)} within 5 % of the fastest")


if __name__ == "__main__":
    main()

r"""Measured steps over mixed lengths on 8 simulated devices: scheduled, all shared, one by one.

  NPROC=32 python experiments/long_context/measure.py

Lengths of the printed Wikipedia histogram divided by 16, a small model, 2 groups of 4 devices. The
same batches under three rules, interleaved. The cost is fitted to the first half of the steps and
predicts the second. A step gathers its rows from padded ones on the devices; its seconds include
the maps that say from where, but not the search for the schedule.
"""

import dataclasses
import os
import statistics
import time
from unittest import mock

os.environ.setdefault("NPROC", "32")

from jaxrl_eff.parallel import host

host.simulate(8)

import jax
import lengths as published
import numpy as np
import optax

from jaxrl_eff.algorithms import sft
from jaxrl_eff.core import Packing, Placement, Spec, compile
from jaxrl_eff.data import packing
from jaxrl_eff.data.balance import baselines, skrull
from jaxrl_eff.data.balance.assignment import Shape
from jaxrl_eff.data.balance.batch import Batch
from jaxrl_eff.data.balance.cost import refit
from jaxrl_eff.data.balance.shapes import lattice
from jaxrl_eff.models import LMConfig, logical_axes, params
from jaxrl_eff.planner import clusters
from jaxrl_eff.planner.packed_rows import cost_on

LM = LMConfig(
    vocab=512, layers=2, width=64, heads=4, kv_heads=2, head_dim=16, ffn=256, unroll=1,
    remat="outputs", max_length=8192,
)  # fmt: skip
PLACE = Placement(tuple(range(8)), data=2, seq=4)
BATCH, ROOM, BATCHES = 128, 1024, 10


def batches() -> list[np.ndarray]:
    drawn = published.sample_lengths("wikipedia", BATCH * BATCHES, 0)
    short = np.clip(np.ceil(np.asarray(drawn) / 16), 2, ROOM * PLACE.seq).astype(int)
    return list(short.reshape(BATCHES, BATCH))


def rows(lengths: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns one sequence of random tokens per padded row."""
    units = [((rng.integers(0, LM.vocab, n).astype(np.int32), np.ones(n, np.float32)),)
             for n in lengths]  # fmt: skip
    return packing.lay_out(units, length=ROOM * PLACE.seq)


def main() -> None:
    every = batches()
    cost = cost_on(clusters.local(), LM, seq=PLACE.seq, tensor=PLACE.tensor)
    size = {"groups": 2, "parts": 4, "capacity": ROOM}
    shapes = lattice(np.concatenate(every), batch=BATCH, cost=cost, shapes=5, batches=16, **size)
    one_by_one = sorted({Shape(0, 64), Shape(0, 256), Shape(0, ROOM)} | set(shapes))
    graph = sft.graph(sft.SFTConfig(), {"actor": LM})
    spec = Spec(params.abstract(LM), logical_axes(LM), optax.sgd(0.1))
    step = compile(graph, {"actor_train": PLACE}, {"actor": spec}, pack=1)
    rng = np.random.default_rng(0)
    padded = [rows(lengths, rng) for lengths in every]
    step.check(padded[0]).scheduled(Packing(tuple(one_by_one), ROOM, cost)).build(padded[0])
    where = jax.tree.map(lambda x: x.sharding, step.home("actor").params)
    start = jax.jit(lambda k: params.init(LM, k), out_shardings=where)(jax.random.key(0))
    models = {"actor": step.init("actor", start)}

    def rounded(schedule):
        """Of rules with exact shapes: the smallest compiled one that holds each."""
        up = [next(s for s in one_by_one if s[0] == 0 and s[1] >= shape.distributed)
              for shape in schedule.shapes]  # fmt: skip
        return dataclasses.replace(schedule, shapes=tuple(up))

    seen: dict[str, list] = {"scheduled": [], "all shared": [], "one by one": []}
    for number, (lengths, batch) in enumerate(zip(every, padded, strict=True)):
        plans = {
            "scheduled": skrull.plan(lengths, cost=cost, shapes=shapes, **size),
            "all shared": baselines.packed(Batch(lengths, cost=cost, shapes=shapes, **size)),
            "one by one": rounded(baselines.unpacked(Batch(lengths, cost=cost, **size))),
        }
        for name, schedule in plans.items():
            began, worked = time.perf_counter(), time.process_time()
            with mock.patch.object(skrull, "plan", lambda *_, found=schedule, **how: found):
                models, _, m = step(models, batch, np.array([0, number], np.uint32))
            jax.block_until_ready((models, m))
            seconds = time.perf_counter() - began
            seen[name].append((schedule, seconds, time.process_time() - worked))
    half = BATCHES // 2
    early = [(s.terms(), t) for found in seen.values() for s, t, _ in found[1:half]]
    fitted = refit(cost, early)
    print("tokens/s; over the scheduled: seconds, predicted, CPU seconds (medians of late steps)")
    late = {name: found[half:] for name, found in seen.items()}
    ours, work = (statistics.median(row[i] for row in late["scheduled"]) for i in (1, 2))

    def predicted(schedule):
        return float(dataclasses.replace(schedule, cost=fitted).rank_seconds().max((1, 2)).sum())

    own = statistics.median(predicted(s) for s, *_ in late["scheduled"])
    for name, found in late.items():
        seconds, busy = (statistics.median(row[i] for row in found) for i in (1, 2))
        tokens = statistics.median(s.lengths.sum() / t for s, t, _ in found)
        guess = statistics.median(predicted(s) for s, *_ in found)
        steps = statistics.median(len(s.shapes) for s, *_ in found)
        ratios = f"{seconds / ours:6.2f} {guess / own:6.2f} {busy / work:6.2f}"
        print(f"{name:11} {tokens:9,.0f} {ratios}   {steps:.0f} micro-steps")


if __name__ == "__main__":
    main()

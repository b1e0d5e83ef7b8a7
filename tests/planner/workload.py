"""A PPO step of two small models, and a cluster of round numbers, for the planner's tests."""

import dataclasses

from sized import sized

from jaxrl_eff.parallel.mesh import Placement
from jaxrl_eff.planner.clusters import Cluster
from jaxrl_eff.planner.problem import Problem, Role, Work
from jaxrl_eff.planner.simulate import WARMUP

LM = sized(2, 4, 2, 1, 2, 8, 16)
LAYER = 4 * 2 * 2 * (2 + 1) + 3 * 4 * 8  # entries of a layer's matrices

# One FLOP a picosecond, one byte a nanosecond on links, and nothing that is not asked for.
ROUND = Cluster(
    name="round", devices=8, per_host=4, flops_per_s=1e12, flops32_per_s=1e12,
    memory_bytes=1e6, memory_bytes_per_s=1e15, link_bytes_per_s=1e9, nic_bytes_per_s=1e8,
    host_bytes_per_s=1e9, link_latency=0.0, nic_latency=0.0, launch=0.0, move_seconds=0.0,
    layer_seconds=0.0, stage_seconds=0.0, train_efficiency=1.0, forward_efficiency=1.0,
    decode_efficiency=1.0, memory_efficiency=1.0, link_efficiency=1.0, nic_efficiency=1.0,
    host_efficiency=1.0, overlap=0.0, fused=True,
)  # fmt: skip


def ppo(rows=16, staleness=0, lm=LM, **train) -> Problem:
    """The six calls of PPO: 4 tokens of prompt and 4 of response."""
    value = lm.replace(head="value")
    inputs = ("tokens", "logp", "score", "ref_logp", "value")

    def infer(name, model, write):
        return Work(name, "infer", model, rows, ("tokens",), (write,), length=8)

    return Problem(
        (
            Work(
                "actor_gen", "generate", "actor", rows, (), ("tokens", "logp"),
                prompts=rows, prompt=4, max_new=4, staleness=staleness,
            ),
            infer("rew_inf", "reward", "score"),
            infer("ref_inf", "ref", "ref_logp"),
            infer("critic_inf", "critic", "value"),
            Work("actor_train", "train", "actor", rows, inputs, length=8, **train),
            Work("critic_train", "train", "critic", rows, inputs, length=8, **train),
        ),
        {
            "actor": Role(lm, opt_bytes=8, grad_bytes=4),
            "critic": Role(value, opt_bytes=8, grad_bytes=4),
            "ref": Role(lm),
            "reward": Role(value),
        },
        dict.fromkeys(inputs, 4.0 * rows * 8),
    )  # fmt: skip


def on(start, count, **axes) -> Placement:
    """A run of devices."""
    return Placement(tuple(range(start, start + count)), **axes)


def everywhere(problem, where):
    """Every call on one placement."""
    return {w.name: where for w in problem.works}


def steady(schedule):
    """Spans of one iteration in the steady state, from its first start, by name."""
    middle = [s for s in schedule.spans if s.iteration == WARMUP]
    begin = min(s.start for s in middle)
    return {
        s.name: dataclasses.replace(s, start=s.start - begin, end=s.end - begin) for s in middle
    }

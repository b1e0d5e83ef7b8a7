"""Advice on quantized ZeRO traffic: the tokens above which traffic hides behind compute.

A model sharded over N nodes (ZeRO-3) sends, for every update and node, V times its bytes in 16 bits
over the slow network: V = 3 with weights gathered forward and backward and gradients reduced, less
at a level of `parallel.zero.levels`. With T tokens per device, P parameters, A devices per node, F
FLOP/s per device and B bytes/s between nodes per device,

    compute  p 2 P T / F        p passes: 3, or 4 where the forward pass is recomputed
    network  2 P V (N - 1) / N / (A B)

so the network is hidden from T* = V F (N - 1) / (p N A B) tokens on, for every model size (ZeRO++,
arXiv:2306.10209, whose figures this explains: 16 V100 with one link need 4,000).
"""

import dataclasses

from jaxrl_eff.parallel.zero.levels import LADDER, ZeroLevel
from jaxrl_eff.planner import packed_rows
from jaxrl_eff.planner.clusters import Cluster
from jaxrl_eff.planner.problem import Problem, Work


@dataclasses.dataclass(frozen=True)
class Advice:
    """Gain of one train call from sending less, if its model is sharded over all nodes.

    Attributes:
        call: its name.
        tokens: per device and update.
        needed: level -> tokens from which its traffic hides behind compute.
        gain: level -> how much faster an update could be than with "exact", at most.
    """

    call: str
    tokens: float
    needed: dict[str, float]
    gain: dict[str, float]

    def text(self) -> str:
        """The advice in one sentence."""
        exact, least = self.needed["exact"], min(self.gain, key=lambda k: (-self.gain[k], k))
        has = f"{self.call} has {self.tokens:,.0f} tokens a device and update"
        if self.tokens >= exact:
            return f"{has}, enough from {exact:,.0f} on: sharded over all nodes, send exactly"
        enough = [k for k, t in self.needed.items() if k != "exact" and self.tokens >= t]
        level = enough[0] if enough else least
        return (
            f"{has}, and {exact:,.0f} hide what ZeRO-3 sends between nodes: sharded over all, "
            f"zero.name={level!r} needs {self.needed[level]:,.0f} and is up to "
            f"{self.gain[level]:.1f}x faster"
        )


def volume(level: ZeroLevel) -> float:
    """V: bytes that a node receives for an update, over those of the model in 16 bits.

    Scales of blocks are left out: 0.8 % of int8 codes and 1.6 % of int4 codes in blocks of 256.
    """
    weights = level.delta_bits or level.weight_bits
    return (1 if level.secondary else 2) * weights / 16 + level.grad_bits / 16


def break_even(cluster: Cluster, level: ZeroLevel, *, passes: float | int = 3) -> float:
    """T*, tokens per device and update; 0 without a second node."""
    nodes = cluster.devices / cluster.domain
    if nodes <= 1:
        return 0.0
    flops = cluster.flops_per_s * cluster.train_efficiency
    sent = cluster.nic_bytes_per_s * cluster.nic_efficiency * cluster.domain
    return volume(level) * flops * (nodes - 1) / nodes / (passes * sent)


def advice(problem: Problem, cluster: Cluster) -> list[Advice]:
    """Advice for every train call; empty on a cluster without a slow network."""
    if cluster.devices <= cluster.domain:
        return []
    return [_of(w, problem, cluster) for w in problem.works if w.kind == "train" and w.model]


def _of(w: Work, problem: Problem, cluster: Cluster) -> Advice:
    role = problem.roles[w.model]
    passes = role.passes + role.remat
    tokens = packed_rows.tokens(w) / w.minibatches / cluster.devices
    needed = {r.name: break_even(cluster, r, passes=passes) for r in LADDER}
    slow = max(tokens, needed["exact"])
    gain = {k: slow / max(tokens, t) for k, t in needed.items() if k != "exact"}
    return Advice(w.name, tokens, needed, gain)

"""ReaL's published table, and the accuracy with which `cost` and `simulate` reproduce it.

36 PPO workloads on LLaMA-2 (33 distinct), each in seconds of one iteration: of a symmetric
Megatron-style plan ("heuristic") and of the plan that ReaL found, among others (arXiv:2406.14088
v1; source in `real_v1.json`). Both are priced here by the same functions as any other plan, on a
cluster of A100s whose kernels are launched one by one from Python, as in that version.

Only the constants in `Fitted` are fitted, and only to these times. Everything else is from a
datasheet or a round number, see `a100`.
"""

import dataclasses
import functools
import heapq
import itertools
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxrl_eff.models import LMConfig
from jaxrl_eff.parallel.mesh import Placement
from jaxrl_eff.planner import clusters as hardware
from jaxrl_eff.planner.clusters import Cluster
from jaxrl_eff.planner.problem import Plan, Problem, Role, Work
from jaxrl_eff.planner.simulate import Simulator

PROMPT, TOKENS, MINIBATCHES = 128, 2**17, 4
TRIED = 8  # plans of the reduced space to simulate, the fastest by the sum of their calls

# LLaMA-2, and CodeLlama's 34B.
SIZES = {
    7: (32, 4096, 11008, 32, 32),
    13: (40, 5120, 13824, 40, 40),
    34: (48, 8192, 22016, 64, 8),
    70: (80, 8192, 28672, 64, 8),
}


class Cell(NamedTuple):
    """One workload: sizes in billions of parameters, lengths in tokens, seconds by system."""

    case: str
    actor: int
    critic: int
    gpus: int
    response: int
    sequences: int
    seconds: dict[str, float | None]

    @property
    def gain(self) -> float:
        """Published speedup of ReaL's plan over the heuristic."""
        return self.seconds["heuristic"] / self.seconds["ReaL"]

    def __str__(self) -> str:
        return f"{self.actor}B+{self.critic}B on {self.gpus}, {self.response}"


@functools.cache
def cells() -> tuple[Cell, ...]:
    """The table's distinct workloads; three appear in it twice."""
    data = json.loads((Path(__file__).parent / "real_v1.json").read_text())
    systems = data["columns"][6:]
    out = {}
    for row in data["rows"]:
        cell = Cell(*row[:6], dict(zip(systems, row[6:], strict=True)))
        out.setdefault(cell[1:6], cell)
    return tuple(out.values())


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Constants that are fitted to the published times.

    Attributes:
        efficiency: share of the peak that matrix products reach, in training and forward passes.
        layer_seconds, tensor_seconds: to start a layer's kernels, and its tensor-parallel
            all-reduces, per doubling of the degree.
        move_seconds: of one change of layout, beyond its bytes: ReaL's plans have some, the
            symmetric plan none.
    """

    efficiency: float | int = 0.525
    layer_seconds: float | int = 2.5e-4
    tensor_seconds: float | int = 2.5e-4
    move_seconds: float | int = 1.0


def a100(gpus: int, fitted: Fitted) -> Cluster:
    """The paper's cluster: A100s in hosts of 8, with decoding kernels launched from Python.

    Not fitted: memory at 0.6 of 2.04 TB/s and products at 0.35 of the peak in decoding, NVLink at
    0.7 of 300 GB/s, 2 ms per pipeline stage, no overlap of collectives with computation.
    """
    return hardware.gpus("a100", gpus // 8, 8).with_(
        train_efficiency=fitted.efficiency,
        forward_efficiency=fitted.efficiency,
        decode_efficiency=0.35,
        memory_efficiency=0.6,
        link_efficiency=0.7,
        overlap=0.0,
        layer_seconds=fitted.layer_seconds,
        tensor_seconds=fitted.tensor_seconds,
        stage_seconds=2e-3,
        memory_bytes=80 * hardware.GIB,
        move_seconds=fitted.move_seconds,
    )


def llama(billions: int, *, value: bool = False) -> LMConfig:
    """A LLaMA-2 model in bfloat16 that recomputes layers in the backward pass."""
    layers, width, ffn, heads, kv_heads = SIZES[billions]
    return LMConfig(
        layers=layers,
        width=width,
        ffn=ffn,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width // heads,
        vocab=32000,
        head="value" if value else "lm",
        param_dtype="bfloat16",
        dtype="bfloat16",
        remat="full",
    )


def problem(cell: Cell) -> Problem:
    """The cell's PPO step. Optimizer states take 20 bytes per parameter, sharded by ZeRO-1."""
    n, length = cell.sequences, PROMPT + cell.response
    trained = {"opt_bytes": 20.0, "grad_bytes": 2.0, "zero": True}
    actor, critic = llama(cell.actor), llama(cell.critic, value=True)
    inputs = ("tokens", "logp", "score", "ref_logp", "value")

    def infer(name: str, model: str, write: str) -> Work:
        return Work(name, "infer", model, n, ("tokens",), (write,), length=length)

    def train(name: str, model: str) -> Work:
        return Work(name, "train", model, n, inputs, length=length, minibatches=MINIBATCHES)

    generate = Work(
        "actor_gen", "generate", "actor", n, (), ("tokens", "logp"),
        prompts=n, prompt=PROMPT, max_new=cell.response,
    )  # fmt: skip
    works = (
        generate,
        infer("rew_inf", "reward", "score"),
        infer("ref_inf", "ref", "ref_logp"),
        infer("critic_inf", "critic", "value"),
        train("actor_train", "actor"),
        train("critic_train", "critic"),
    )
    roles = {
        "actor": Role(actor, **trained),
        "critic": Role(critic, **trained),
        "ref": Role(actor),
        "reward": Role(critic),
    }
    return Problem(works, roles, dict.fromkeys(inputs, 4.0 * n * length))


def heuristic(cell: Cell) -> Plan:
    """The symmetric plan: tensor 8 in each host, a pipeline over the hosts."""
    stages = cell.gpus // 8
    devices = tuple(range(cell.gpus))
    parts = {"actor_train": 2 * stages, "critic_train": 2 * stages}
    return {
        w.name: _placement(devices, stages, 1, 8, parts.get(w.name, stages), w.model)
        for w in problem(cell).works
    }


@functools.lru_cache(maxsize=1 << 16)
def _placement(
    devices: tuple[int, ...], stage: int, data: int, tensor: int, parts: int, model: str
) -> Placement:
    offload = "params" if model in ("ref", "reward") else ""
    return Placement(
        devices, stage=stage, data=data, tensor=tensor,
        microbatches=parts if stage > 1 else 1, offload=offload,
    )  # fmt: skip


def _degrees(n: int) -> Iterator[tuple[int, int, int]]:
    """Yields ReaL's (stage, data, tensor) for n GPUs."""
    for tensor in (1, 2, 4, 8):
        rest = n // tensor
        for stage in (d for d in range(1, rest + 1) if rest % d == 0):
            members = n // stage
            if stage <= max(8, n // 8) and (members % 8 == 0 or members in (1, 2, 4)):
                yield stage, rest // stage, tensor


def _real_bytes(cell: Cell, work: Work, p: Placement) -> tuple[float, float]:
    """Static and transient bytes of a device by ReaL's own estimate, which its plans had to meet.

    It counts every model as if it had as many key/value heads as query heads, and counts a copy
    for generation or inference twice, since both exist during reallocation.
    """
    layers, width, ffn, *_ = SIZES[cell.actor if work.model in ("actor", "ref") else cell.critic]
    n = 3 * 32000 * width + (3 * width * ffn + 4 * width**2) * layers
    ways, length = p.stage * p.tensor, PROMPT + cell.response
    if work.kind == "train":
        rows = cell.sequences / (2 * p.stage * p.data)
        return 4.0 * n / ways + 20.0 * n / (ways * p.data), 2.0 * rows * length * width / p.tensor
    if work.kind == "infer":
        return (0.0 if p.offload else 4.0 * n / ways), 0.0
    return 4.0 * n / ways, 4.0 * cell.sequences * length * width * layers / (ways * p.data)


def _trainable(cell: Cell, rule: str, stage: int, data: int, tensor: int) -> bool:
    """Returns True if a trainer can have these degrees: ReaL's limits, or at least one row each."""
    if rule == "real":
        return tensor * data <= 8 and 2 * data * stage <= cell.sequences
    return data * stage * (2 if stage > 1 else 1) * MINIBATCHES <= cell.sequences


class _Option(NamedTuple):
    seconds: float
    static: float
    active: float
    placement: Placement


def _pareto(options: Iterable[_Option]) -> list[_Option]:
    out: list[_Option] = []
    for o in sorted(options, key=lambda o: o[:3]):
        if not any(k.static <= o.static and k.active <= o.active for k in out):
            out.append(o)
    return out


def searched(cell: Cell, cluster: Cluster, *, rule: str = "real") -> tuple[float, Plan]:
    """Returns (seconds, plan) of the best plan of a reduced ReaL space, by this package's prices.

    Generation takes all GPUs in any (stage, data, tensor). The trainers take all of them one after
    the other, or two runs of whole hosts (of 4 GPUs if there is one host) at once. Inference takes
    all, with frozen models offloaded to the hosts' memory. The best plan with one layout is a
    candidate too.

    Args:
        rule: "real": ReaL's own estimate must fit into a GPU, and trainers keep to its limits
            tensor * data <= 8 and 2 * data * stage <= sequences. "own": this package's estimate,
            and every degree that leaves at least one row per microbatch.
    """
    p, n = problem(cell), cell.sequences
    sim = Simulator(p, cluster)
    everything = tuple(range(cell.gpus))

    def options(call: str, devices: tuple[int, ...]) -> list[_Option]:
        work, out = p.work(call), []
        for stage, data, tensor in _degrees(len(devices)):
            parts = {"train": 2 * stage}.get(work.kind, stage)
            if work.kind == "train" and not _trainable(cell, rule, stage, data, tensor):
                continue
            if work.kind == "infer" and stage > 1:
                continue
            if data * stage > n:
                continue
            where = _placement(devices, stage, data, tensor, parts, work.model)
            price = sim.cost(call, where)
            held = price.static_bytes, price.active_bytes
            if rule == "real":
                held = _real_bytes(cell, work, where)
            if sum(held) <= cluster.memory_bytes:
                out.append(_Option(price.seconds, *held, where))
        return out

    def fullest(parts: Sequence[Sequence[_Option]]) -> float:
        return max(sum(o.static for o in x) + max(o.active for o in x) for x in parts)

    frozen = {
        call: min(options(call, everything), key=lambda o: o[:3]) for call in ("rew_inf", "ref_inf")
    }
    values = _pareto(options("critic_inf", everything))
    generate = _pareto(options("actor_gen", everything))
    actor, critic = (_pareto(options(c, everything)) for c in ("actor_train", "critic_train"))
    pairs = [(a.seconds + c.seconds, a, c, False) for a, c in itertools.product(actor, critic)]
    for k in [4] if cell.gpus == 8 else range(8, cell.gpus, 8):
        first = _pareto(options("actor_train", everything[:k]))
        second = _pareto(options("critic_train", everything[k:]))
        pairs += [
            (max(a.seconds, c.seconds), a, c, True) for a, c in itertools.product(first, second)
        ]
    rough = []
    for (t, a, c, split), g, v in itertools.product(pairs, generate, values):
        everywhere = (g, v, *frozen.values())
        parts = [(a, *everywhere), (c, *everywhere)] if split else [(a, c, *everywhere)]
        if fullest(parts) <= cluster.memory_bytes:
            rough.append((t + g.seconds + v.seconds, a, c, g, v))
    symmetric = heuristic(cell)
    found = [(sim.score(symmetric).seconds, symmetric)]
    found.append(uniform(cell, cluster, rule=rule))
    for _, a, c, g, v in heapq.nsmallest(TRIED, rough, key=lambda x: x[0]):
        plan = {call: o.placement for call, o in frozen.items()} | {
            "actor_gen": g.placement,
            "critic_inf": v.placement,
            "actor_train": a.placement,
            "critic_train": c.placement,
        }
        score = sim.score(plan)
        if rule == "real" or not score.over_bytes:
            found.append((score.seconds, plan))
    return min(found, key=lambda x: x[0])


def uniform(cell: Cell, cluster: Cluster, *, rule: str = "real") -> tuple[float, Plan]:
    """Returns (seconds, plan) of the best plan with one layout of all GPUs for every call.

    Args:
        rule: as for `searched`. "real" counts a copy for generation here too, although nothing is
            reallocated.
    """
    p = problem(cell)
    sim, devices = Simulator(p, cluster), tuple(range(cell.gpus))
    symmetric = heuristic(cell)
    found = [(sim.score(symmetric).seconds, symmetric)]
    for stage, data, tensor in _degrees(cell.gpus):
        if not _trainable(cell, rule, stage, data, tensor):
            continue
        plan = {
            w.name: _placement(
                devices, stage, data, tensor,
                2 * stage if w.kind == "train" else stage, w.model,
            )
            for w in p.works
        }  # fmt: skip
        score = sim.score(plan)
        over = score.over_bytes
        if rule == "real":
            held = [_real_bytes(cell, w, plan[w.name]) for w in p.works]
            peak = sum(h[0] for h in held) + max(h[1] for h in held)
            over = max(0.0, peak - cluster.memory_bytes)
        if not over:
            found.append((score.seconds, plan))
    return min(found, key=lambda x: x[0])


class Errors(NamedTuple):
    """Errors of the predictions against the published times.

    Attributes:
        heuristic, real: mean relative |error| of the seconds; `worst`: the largest of either.
        bias: mean relative error of ReaL's seconds.
        gain: mean |predicted - published| of the gain.
        rank: Spearman's rank correlation of the gains.
        mean_gain, published_gain: means.
    """

    heuristic: float
    real: float
    worst: float
    bias: float
    gain: float
    rank: float
    mean_gain: float
    published_gain: float


class Predicted(NamedTuple):
    """Predicted seconds of the two plans of a cell, and the plan searched for it."""

    heuristic: float
    real: float
    plan: Plan

    @property
    def gain(self) -> float:
        return self.heuristic / self.real


def predict(cell: Cell, cluster: Cluster) -> Predicted:
    """Prices both plans of a cell."""
    seconds, plan = searched(cell, cluster)
    return Predicted(
        Simulator(problem(cell), cluster).score(heuristic(cell)).seconds, seconds, plan
    )


def spearman(a: Sequence[float | int], b: Sequence[float | int]) -> float:
    """Spearman's rank correlation; ties share their mean rank."""

    def ranks(x: Sequence[float | int]) -> np.ndarray:
        x = np.asarray(x, np.float64)
        return (x[:, None] > x[None]).sum(1) + (x[:, None] == x[None]).sum(1) / 2

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def errors(table: Sequence[Cell], predicted: Sequence[Predicted]) -> Errors:
    """Compares predictions with the table."""
    h = [p.heuristic / c.seconds["heuristic"] - 1 for c, p in zip(table, predicted, strict=True)]
    r = [p.real / c.seconds["ReaL"] - 1 for c, p in zip(table, predicted, strict=True)]
    gains, published = [p.gain for p in predicted], [c.gain for c in table]
    mean = statistics.fmean
    return Errors(
        heuristic=mean(map(abs, h)),
        real=mean(map(abs, r)),
        worst=max(map(abs, h + r)),
        bias=mean(r),
        gain=mean(abs(a - b) for a, b in zip(gains, published, strict=True)),
        rank=spearman(gains, published),
        mean_gain=mean(gains),
        published_gain=mean(published),
    )


# Fitting. The grid is coarse so that the fitted values are round, and so that fits to other cells
# reuse prices.
LEVELS: dict[str, tuple[float, ...]] = {
    "efficiency": (0.425, 0.45, 0.475, 0.5, 0.525, 0.55, 0.575),
    "layer_seconds": (1.0e-4, 1.5e-4, 2.0e-4, 2.5e-4, 3.0e-4, 4.0e-4),
    "tensor_seconds": (1.5e-4, 2.0e-4, 2.5e-4, 3.0e-4, 3.5e-4, 4.0e-4),
    "move_seconds": (0.25, 0.5, 0.75, 1.0, 1.25),
}


class Fits:
    """Fits to parts of the table; every prediction is computed once."""

    def __init__(self, table: Sequence[Cell] | None = None):
        self.table = tuple(table or cells())
        self._known: dict[Fitted, tuple[Predicted, ...]] = {}

    def predict(self, fitted: Fitted) -> tuple[Predicted, ...]:
        """Predicts both plans of every cell."""
        if fitted not in self._known:
            clusters = {c.gpus: a100(c.gpus, fitted) for c in self.table}
            self._known[fitted] = tuple(predict(c, clusters[c.gpus]) for c in self.table)
        return self._known[fitted]

    def errors(self, fitted: Fitted, which: Sequence[int] | None = None) -> Errors:
        """Errors over the cells with these indices, or over all."""
        which = range(len(self.table)) if which is None else which
        predicted = self.predict(fitted)
        return errors([self.table[i] for i in which], [predicted[i] for i in which])

    def fit(self, which: Sequence[int] | None = None, start: Fitted = Fitted()) -> Fitted:
        """Finds the constants that fit these cells best, one at a time until none changes.

        The loss is the mean |error| of the heuristic's seconds plus that of ReaL's.
        """

        def loss(f: Fitted) -> float:
            e = self.errors(f, which)
            return e.heuristic + e.real

        now, before = start, None
        while now != before:
            before = now
            for name, levels in LEVELS.items():
                now = min((dataclasses.replace(now, **{name: v}) for v in levels), key=loss)
        return now

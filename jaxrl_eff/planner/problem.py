"""The planner's input: the calls of a step as amounts of work.

Plain data, made from a graph and its models (`from_graph.works`) or by hand, so that a plan can be
priced and searched without the model or the machine.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax.numpy as jnp

from jaxrl_eff.models import LMConfig
from jaxrl_eff.parallel.mesh import Placement
from jaxrl_eff.parallel.zero.levels import ZeroLevel


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Distribution of response lengths: `tokens[i]` with probability `share[i]`, ascending.

    A decoding loop ends with its longest row, and rows that have ended do no useful work.

    Example:
        >>> from jaxrl_eff.planner import Lengths
        >>> Lengths(tokens=(64, 512), share=(0.75, 0.25)).share
        (0.75, 0.25)
    """

    tokens: tuple[int, ...]
    share: tuple[float, ...]

    def __post_init__(self):
        if len(self.tokens) != len(self.share) or not self.tokens:
            raise ValueError(f"{len(self.tokens)} lengths and {len(self.share)} shares.")
        if list(self.tokens) != sorted(set(self.tokens)) or min(self.share) < 0:
            raise ValueError("lengths must ascend, and shares must not be negative.")
        if abs(sum(self.share) - 1) > 1e-6:
            raise ValueError(f"shares sum to {sum(self.share)}, but must sum to 1.")

    @classmethod
    def all(cls, tokens: int) -> "Lengths":
        """A distribution in which every response has `tokens` tokens."""
        return cls((tokens,), (1.0,))


@dataclasses.dataclass(frozen=True)
class ExpectedRows:
    """Rows that a schedule packs by their lengths (`jaxrl_eff.core.packed`).

    Attributes:
        prompt: tokens before each response, on average.
        responses: expected distribution of response lengths.
        capacity: tokens that a device holds at once; 0: as many as fit into memory.
    """

    prompt: int
    responses: Lengths
    capacity: int = 0

    @property
    def mean(self) -> float:
        """Expected tokens of a row."""
        pairs = zip(self.responses.tokens, self.responses.share, strict=True)
        return self.prompt + sum(n * share for n, share in pairs)


@dataclasses.dataclass(frozen=True)
class Work:
    """One call of the graph as an amount of work.

    Attributes:
        name, kind, model: as in `graph.Call` (its `of` is `model`; None for local calls).
        rows: sequences that the call reads or, for a generate call, writes.
        prompts: distinct prompts of a generate call, each prefilled once.
        prompt: tokens of a prompt, padding included.
        length: tokens of a row, padding included (infer, train).
        max_new: most tokens of a response (generate); `responses` is their actual distribution.
        growths, compactions: of the sampler, see `rollout.Sampling`. With growths 0 only the
            written part of the cache is read.
        epochs, minibatches: of a train call.
        reads, writes: names of arrays.
        host: runs in Python on the host.
        staleness: of a generate call: how many updates old its weights are allowed to be.
        weights: precision of those that it reads, as in `graph.Call`.
        seconds: of a local call, measured or guessed; calls with a model are priced.
        packed: expected rows of an infer or train call that computes its rows packed; None: rows
            have `length` tokens each.
    """

    name: str
    kind: Literal["generate", "infer", "train", "local"]
    model: str | None
    rows: int
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    prompts: int = 0
    prompt: int = 0
    length: int = 0
    max_new: int = 0
    responses: Lengths | None = None
    growths: int = 0
    compactions: int = 0
    epochs: int = 1
    minibatches: int = 1
    host: bool = False
    staleness: int = 0
    weights: str = ""
    seconds: float | int = 0.0
    packed: ExpectedRows | None = None


@dataclasses.dataclass(frozen=True)
class Nodes:
    """How train calls send a model's weights and gradients between nodes (`core.zero`).

    Attributes:
        count: number of nodes.
        level: precision of what is sent.
        frozen: weights are frozen beside an adapter, so that every node has them.
        partly: only parts of weights are trained, whose gradients are sent in float32.
        tensor: the weights can be sharded over `tensor`.
    """

    count: int
    level: ZeroLevel
    frozen: bool = False
    partly: bool = False
    tensor: bool = True


@dataclasses.dataclass(frozen=True)
class Role:
    """One model of the graph.

    Attributes:
        lm: its sizes.
        opt_bytes: bytes of optimizer state per parameter (AdamW in float32: 8); 0 if not trained.
        grad_bytes: of one gradient entry; 0 if not trained.
        zero: the optimizer state is sharded over `data` too (ZeRO-1, arXiv:1910.02054).
        passes: cost of a training pass in forward passes: 3 for the forward pass, the gradients of
            the activations and those of the weights; less if not all weights have gradients.
        param_bytes: of one stored parameter; 0: those of `lm.param_dtype`.
        nodes: how its train calls send it between nodes; None: as the compiler does.
    """

    lm: LMConfig
    opt_bytes: float | int = 0.0
    grad_bytes: float | int = 0.0
    zero: bool = False
    passes: float | int = 3
    param_bytes: float | int = 0
    nodes: Nodes | None = None

    def __post_init__(self):
        if not self.param_bytes:
            object.__setattr__(self, "param_bytes", jnp.dtype(self.lm.param_dtype).itemsize)

    @property
    def remat(self) -> bool:
        """The backward pass recomputes the forward pass."""
        return self.lm.remat == "full"


@dataclasses.dataclass(frozen=True)
class Problem:
    """A step to plan.

    Attributes:
        works: the calls, in a valid order of execution.
        roles: model -> its sizes and state.
        edge_bytes: array -> bytes of all its rows, for arrays that cross edges.
    """

    works: tuple[Work, ...]
    roles: Mapping[str, Role]
    edge_bytes: Mapping[str, float | int] = dataclasses.field(default_factory=dict)

    def work(self, name: str) -> Work:
        """Returns the call of this name."""
        return next(w for w in self.works if w.name == name)

    def home(self, model: str) -> Work:
        """Call whose placement stores a model: the one that trains it, else its first."""
        mine = [w for w in self.works if w.model == model]
        return next((w for w in mine if w.kind == "train"), mine[0])


Plan = Mapping[str, Placement]

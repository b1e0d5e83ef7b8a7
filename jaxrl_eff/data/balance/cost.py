"""Cost of a micro-step of sequences of many lengths, from plain numbers.

A rank's seconds are (Skrull, arXiv:2505.19609, equations 1 to 5)

    Time_j = max(T_comm(V), T_comp(Local_j)) + T_comp(Dist)

since computing local sequences hides the exchange of the distributed ones (`Cost.overlap` is how
much of their own attention hides it too). Unlike the paper's, the FLOPs here are those of a causal
decoder with a gated MLP, grouped queries and its head, and static shapes are charged in full: every
rank multiplies all columns of its row, padding included, and the ring carries every column of the
distributed part. Only attention skips padding.

The constants are of one mesh and drift with it: `refit` corrects them by measured steps.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np


def seen(n: np.ndarray, window: int, share: float | int) -> np.ndarray:
    """About twice the pairs that attention computes for sequences of n tokens, in tokens squared.

    Args:
        window: positions that a windowed layer's query sees, itself included.
        share: of the layers that are windowed.
    """
    near = np.minimum(n, window)
    return (1 - share) * n * n + share * near * (2 * n - near)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """A cost model: seconds from tokens, lengths and bytes.

    A kernel on n tokens reaches n / (n + half) of its rate, so it takes as long as n + half tokens
    at full rate (for attention on a GPU, within 3 % from 2,048 to 131,072 tokens). Products over a
    row are one kernel; attention is one kernel per sequence and rank.

    Attributes:
        linear, square: FLOP per token, and per token squared.
        window, windowed: positions that windowed layers see, and their share of the layers.
        bytes_per_token: that a token of the distributed part sends in one hop, over the whole
            micro-step.
        ring_rounds: times around the ring in a micro-step; each has parts - 1 hops.
        flops_per_s, attention_per_s: of one rank, for products and for attention.
        bytes_per_s: of one rank to its neighbor.
        hop_seconds: of a hop, in addition to its bytes.
        half, attention_half: tokens at which products over a row, and attention to a sequence,
            reach half their rate.
        micro_seconds, step_seconds: fixed seconds of a micro-step and of a step.
        overlap: share of the distributed sequences' own attention that hides the exchange, too:
            0 as in the paper, 1 in a ring that sends while it computes.
    """

    linear: float | int
    square: float | int
    bytes_per_token: float | int
    ring_rounds: int
    flops_per_s: float | int
    attention_per_s: float | int
    bytes_per_s: float | int
    hop_seconds: float | int = 2e-5
    half: float | int = 300
    attention_half: float | int = 300
    micro_seconds: float | int = 5e-3
    step_seconds: float | int = 0.0
    overlap: float | int = 0.0
    window: int = 0
    windowed: float | int = 0.0

    def __post_init__(self):
        for name in ("linear", "flops_per_s", "attention_per_s", "bytes_per_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Cost.{name} is {getattr(self, name)}, but must be above 0.")
        for name in (
            "square", "bytes_per_token", "ring_rounds", "hop_seconds", "half", "attention_half",
            "micro_seconds",
        ):  # fmt: skip
            if not getattr(self, name) >= 0:
                raise ValueError(f"Cost.{name} is {getattr(self, name)}, but must be at least 0.")
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"Cost.overlap is {self.overlap}, but must be in [0, 1].")
        if not 0 <= self.windowed <= 1 or self.window < bool(self.windowed):
            raise ValueError(
                f"Cost.windowed is {self.windowed} and window {self.window}, but must be in [0, 1] "
                "and, if there are such layers, at least 1."
            )

    def products(self, columns: float | int) -> float:
        """Seconds of all matrix products on a row with `columns` columns; 0 for none."""
        return self.linear * (columns + self.half) / self.flops_per_s if columns else 0.0

    def attention(self, lengths: np.ndarray, parts: int = 1) -> np.ndarray:
        """Seconds of every sequence's attention, float64 [K], on each rank that it is sharded over.

        Each rank has `tokens / parts` queries in its kernels, and all keys pass by.
        """
        n = np.asarray(lengths, np.float64)
        pairs = seen(n, self.window, self.windowed)
        return self.square * (pairs / parts + n * self.attention_half) / self.attention_per_s

    def exchange(self, columns: float | int, parts: int) -> float:
        """Seconds to send keys, values and their gradients of `columns` columns around the ring."""
        if not columns or parts == 1:
            return 0.0
        sent = columns * self.bytes_per_token / self.bytes_per_s
        return (parts - 1) * (self.ring_rounds * self.hop_seconds + sent)

    def seconds(
        self,
        local: float | int,
        distributed: float | int,
        parts: int,
        attention: float | int = 0.0,
        shared: float | int = 0.0,
    ) -> float:
        """Seconds of a micro-step on one rank.

        Args:
            local, distributed: columns of the two parts of its row.
            parts: ranks that the distributed part is sharded over.
            attention: seconds of attention of its local sequences.
            shared: seconds of attention of its share of the distributed ones.
        """
        whole = self.products(local + distributed)
        mine = self.products(local)  # `half` counts once per row: the rest is for distributed ones
        hides = mine + attention + self.overlap * shared
        first = max(self.exchange(distributed, parts), hides)
        return self.micro_seconds + first + (whole - mine) + (1 - self.overlap) * shared

    def perfect(self, lengths: np.ndarray, ranks: int) -> float:
        """Lower bound on a schedule's seconds: all FLOP at full rate, spread evenly over the ranks.

        Fixed costs, the inefficiency of small kernels, padding and the exchange are left out.
        """
        n = np.asarray(lengths, np.float64)
        pairs = seen(n, self.window, self.windowed)
        each = self.linear * n / self.flops_per_s + self.square * pairs / self.attention_per_s
        return float(each.sum()) / ranks

    def bound(self, lengths: np.ndarray, groups: int, parts: int, *, steps: int = 1) -> float:
        """Lower bound on the seconds of `steps` micro-steps, with all groups running one program.

        Beyond perfect balance it includes fixed costs, and kernel startup once per micro-step and
        once per sequence's attention. It also uses that the attention of a sequence takes a rank at
        least as long as it takes each rank of a group that shares it.
        """
        n, ranks = np.asarray(lengths, np.float64), groups * parts
        fixed = self.micro_seconds + self.linear * self.half / self.flops_per_s
        products = self.linear * n.sum() / ranks / self.flops_per_s
        even = self.attention(n).sum() / ranks
        longest = self.attention(n, parts).max(initial=0.0)
        return self.step_seconds + steps * fixed + products + float(max(even, longest))

    def terms(
        self,
        local: float | int,
        distributed: float | int,
        parts: int,
        attention: float | int = 0.0,
        shared: float | int = 0.0,
    ) -> np.ndarray:
        """Decomposes `seconds`: multiplier of each constant of `CONSTANTS`, float64 [6].

        Of work that overlaps only the longer counts, judged by the present constants.
        """
        work = self.linear * (local + distributed + self.half * bool(local + distributed))
        mine = self.linear * (local + self.half) if local else 0.0
        sent = (parts - 1) * distributed * self.bytes_per_token
        hops = (parts - 1) * self.ring_rounds * bool(distributed)
        kept = attention + shared
        hides = self.products(local) + attention + self.overlap * shared
        if self.exchange(distributed, parts) > hides:
            work, kept = work - mine, (1 - self.overlap) * shared
        else:
            sent = hops = 0.0
        scores = kept * self.attention_per_s
        return np.array([0.0, 1.0, work, scores, sent, hops])


# In the order of `Cost.terms`; a rate is fitted by its inverse.
CONSTANTS = (
    "step_seconds",
    "micro_seconds",
    "flops_per_s",
    "attention_per_s",
    "bytes_per_s",
    "hop_seconds",
)
_LEAST = 1e-3  # least factor on a constant in a fit: it cannot be 0, since a rate is its inverse


def refit(
    cost: Cost, rows: Sequence[tuple[np.ndarray, float | int]], *, trust: float | int = 0.03
) -> Cost:
    """Fits the cost's constants to measured steps.

    Minimizes the relative errors sum_i (a_i.x / t_i - 1)^2 + trust^2 sum_j (x_j / x0_j - 1)^2 over
    x >= 0. The second sum keeps constants near their previous values where the rows do not
    distinguish them, e.g. the two fixed costs when all steps have as many micro-steps.

    Args:
        rows: for every step its terms, [6], see `Assignment.terms`, and the seconds it took.
        trust: weight of the previous constants relative to one row.

    Raises:
        ValueError: there are no rows, or a step took no time.
    """
    from scipy.optimize import nnls  # slow to import

    if not rows:
        raise ValueError("refit needs at least one measured step.")
    times = np.array([t for _, t in rows], np.float64)
    if not (times > 0).all():
        raise ValueError(f"a step took {times.min()} s, but must have taken some time.")
    now = np.array([_slope(cost, name) for name in CONSTANTS])
    scale = np.where(now > 0, now, 1e-3)  # a fixed cost that is 0 so far is scaled to milliseconds
    a = np.stack([terms for terms, _ in rows]) * scale / times[:, None]
    a = np.concatenate([a, trust * np.eye(len(scale))])
    b = np.concatenate([np.ones(len(times)), trust * (now / scale)])
    x = nnls(a, b)[0] * scale
    changed = {}
    for name, value, before in zip(CONSTANTS, x, now, strict=True):
        value = max(float(value), _LEAST * float(before))
        changed[name] = 1 / value if name.endswith("per_s") else value
    return dataclasses.replace(cost, **changed)


def _slope(cost: Cost, name: str) -> float:
    value = float(getattr(cost, name))
    return 1 / value if name.endswith("per_s") else value

"""Settings of how a stage runs: plan search, schedule, and communication between devices."""

import dataclasses
from typing import Annotated

from jaxrl_eff.schema import Count, Natural, NonNegative, Share, Switch, Within

SYNCS = ("whole", "changes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """Settings of the plan search, and of its correction by measured times.

    Attributes:
        evaluations: plans to simulate in one search.
        calibrate: steps after which predicted and measured times are compared, the cost model is
            corrected and the search repeated; the interval then doubles each time. 0: never.
        threshold: fraction of the step's time that a new plan must save to be adopted.
        cluster: "local" for the available devices, or a name for `planner.clusters.parse`.
    """

    evaluations: Count = 3000
    calibrate: Natural = 4
    threshold: NonNegative = 0.05
    cluster: str = "local"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """Settings of the schedule that forms steps from sequences of many lengths.

    Attributes:
        name: "rows": `batch` packed rows of `data.length`; "skrull": `batch` sequences (or pairs)
            per step, short ones whole on a device and long ones over the plan's `seq` axis, in
            micro-batches chosen by estimated time. `data.length` is then the longest sequence; 0 is
            all that the devices of a `seq` axis hold. For algorithms that sample: "rows":
            log-probabilities, values, rewards and training use padded rows; "skrull": they use
            micro-batches, chosen likewise once the responses' lengths are known.
        room: maximum tokens on a device; 0: found by compiling the model for two sizes.
        shapes: maximum number of micro-batch shapes; each is a program to compile, for every call.
        sample: number of examples whose lengths determine the shapes.
        measure: True to measure the rates of CPUs at the start for the estimates. Two runs can then
            sum the same gradients in different orders; False: only constants, so that runs are
            bitwise reproducible.
    """

    name: Annotated[str, Switch()] = "rows"
    room: Natural = 0
    shapes: Count = 12
    sample: Count = 1024
    measure: bool = True

    def __post_init__(self):
        if self.name not in ("rows", "skrull"):
            raise ValueError(f"unknown schedule {self.name!r}; expected one of ['rows', 'skrull'].")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyncSettings:
    """Settings of weight sync: trained weights to calls on other devices or in another layout.

    The received weights are exact. Calls that read rounded weights (`config.STAGE.weights`) get all
    of their codes in every step.

    Attributes:
        name: "whole": all weights in every step; "changes": frozen tensors once, and of the others
            the elements that changed. Those devices then keep their copy, and the trainer a copy
            of what was sent.
        capacity: fraction of a tensor's elements that can change before it is sent in full; 0 is
            0.05, or twice the density of a sparse change. For "changes".
        every: steps between two that send everything in full and check the copy.
    """

    name: str = "whole"
    capacity: Share = 0.0
    every: Count = 100

    def __post_init__(self):
        if self.name not in SYNCS:
            raise ValueError(f"unknown sync {self.name!r}; expected one of {[*SYNCS]}.")
        if self.capacity and self.name != "changes":
            raise ValueError(
                f"capacity={self.capacity} is of 'changes', and name is {self.name!r}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroSettings:
    """Settings of communication of train calls between nodes with slow links (ZeRO++).

    Unlike a plan they affect the results: all but "exact" round.

    Attributes:
        name: "": left to the compiler. Otherwise weights are gathered and gradients reduced in two
            stages, between nodes and within them, and the program's bytes are checked against the
            expected bytes: "exact" in the compute precision; "int8" weights and gradients; "int4"
            gradients, rotated and with error feedback, weights in 8 bits; "qgz" the same gradients
            without these, rounded within a node too; "int4_delta" the gradients of "int4", and
            weights as 4-bit differences from a 16-bit copy that every node keeps. Weights that
            `adapt` freezes are on every node, and are not sent; parameters that it trains in part
            have exact gradients.
        nodes: number of nodes of a train call's devices; its plan must have dcn=nodes.
        block: numbers that share a scale.
    """

    name: Annotated[str, Switch()] = ""
    nodes: Annotated[int, Within(2)] = 2
    block: Count = 256

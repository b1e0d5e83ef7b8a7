"""Settings of how a stage runs: search of a plan, schedule, and what devices send each other."""

import dataclasses
from typing import Annotated

from jaxrl_eff.schema import Count, Natural, NonNegative, Share, Switch, Within


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """Settings of the search for a plan, and of its correction by measured times.

    Attributes:
        evaluations: plans to simulate in one search.
        calibrate: steps after which predicted and measured times are compared, the cost model is
            corrected and the search repeated; twice as many before the next time, and so on. 0:
            never.
        threshold: share of the step's time that a new plan must save to be taken up.
        cluster: "local" for the devices at hand, or what `planner.hardware.parse` knows.
    """

    evaluations: Count = 3000
    calibrate: Natural = 4
    threshold: NonNegative = 0.05
    cluster: str = "local"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """Settings of the schedule that makes a step of sequences of many lengths.

    Attributes:
        name: "rows": into packed rows of `data.length`, `batch` of them; "skrull": `batch`
            sequences (or pairs) a step, short ones whole on a device and long ones over the plan's
            `seq` axis, in micro-batches chosen by estimated time. `data.length` is the longest
            sequence then; 0 is all that the devices of a `seq` axis hold. Of algorithms that
            sample: "rows": log-probabilities, values, rewards and training of padded rows;
            "skrull": of micro-batches chosen likewise once the responses' lengths are known.
        room: tokens that a device holds at once; 0: found by compiling the model for two sizes.
        shapes: of micro-batches, at most; each is a program to compile, for every call.
        sample: examples whose lengths the shapes are chosen by.
        measure: let what is measured improve the estimates: the rates of CPUs at the start, and
            steps of algorithms that do not sample. Then two runs add up the same gradients in
            different orders; False: by constants alone, so that a run repeats bit for bit.
    """

    name: Annotated[str, Switch()] = "rows"
    room: Natural = 0
    shapes: Count = 12
    sample: Count = 1024
    measure: bool = True

    def __post_init__(self):
        if self.name not in ("rows", "skrull"):
            raise ValueError(f"name is {self.name!r}, not 'rows' or 'skrull'.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyncSettings:
    """Settings of weight sync: trained weights to calls on other devices or in another layout.

    Attributes:
        name: "whole": all of them in every step; "changes": frozen tensors once, of the others the
            elements that have changed. The copy stays on those devices then, and beside the
            trained weights a copy of what was sent. What arrives is the same. "int8" and "int4": of
            the others the differences to what arrived last, in 8 or 4 bits, so that those calls
            compute with weights that lag behind by what was rounded; which weights lag is part of
            what is computed, and depends on the plan.
        capacity: share of a tensor's elements that may have changed before it goes as a whole; 0
            is 0.05, or twice the density of a sparse change. Of "changes".
        every: steps between two in which everything goes as a whole, and the copy is checked.
    """

    name: str = "whole"
    capacity: Share = 0.0
    every: Count = 100

    @property
    def exact(self) -> bool:
        """True if weights arrive bit for bit as they were sent."""
        return self.name in ("whole", "changes")

    def __post_init__(self):
        if self.name not in ("whole", "changes", "int8", "int4"):
            raise ValueError(f"name is {self.name!r}, not 'whole', 'changes', 'int8' or 'int4'.")
        if self.capacity and self.name != "changes":
            raise ValueError(
                f"capacity={self.capacity} is of 'changes', and name is {self.name!r}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroSettings:
    """Settings of the traffic of train calls between nodes with slow links (ZeRO++).

    Part of what is computed, unlike a plan: all but "exact" round.

    Attributes:
        name: "": whatever the compiler makes of the plan. Otherwise weights are gathered and
            gradients reduced in two stages, between nodes and within them, and the program's bytes
            are checked against what they should be: "exact" in the precision of compute; "int8"
            weights and gradients; "int4" gradients, rotated and with error feedback, weights in 8
            bits; "qgz" the same gradients without these, rounded within a node too; "int4_delta"
            the gradients of "int4", and of weights their differences from a copy in 16 bits that
            every node keeps, in 4 bits. What `adapt` leaves frozen every node has whole, and it is
            not sent; what it trains but does not train whole has exact gradients.
        nodes: into how many the devices of a train call fall; its plan must have dcn=nodes.
        block: numbers that share a scale.
    """

    name: Annotated[str, Switch()] = ""
    nodes: Annotated[int, Within(2)] = 2
    block: Count = 256

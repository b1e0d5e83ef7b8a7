"""The section of a config that says what of a model is trained, if not all of it."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Protocol, runtime_checkable

from jaxrl_eff.schema import Count, Natural, Pattern, Positive, Seed, Share, Within


@runtime_checkable
class Optimizer(Protocol):
    """The section of a role's optimizer, as far as a way to train a part of it looks at it."""

    name: str
    clip_norm: float
    weight_decay: float
    store: str
    descent: bool
    frozen: tuple[str, ...]
    options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptSettings:
    """What of a model is trained, if not all of it.

    Attributes:
        name: "lora", "rslora" or "dora"; or, for sparse changes of the kernels in place, when the
            trained entries are chosen: "static" (once), "periodic" (anew every `every` steps),
            "spiel_ag" (drop the smallest changes, grow the largest gradients) or "spiel_ma" (grow
            where the sums of SM3, which must be the optimizer, are largest: the least state); or
            "lisa": the projections of a few layers, others every `every` steps.
        targets: patterns of kernels; () is every projection of the layers.
        whole: patterns of parameters that are trained whole besides, such as norms. A value head
            always is.
        rank, alpha: of LoRA; a sparse name with a rank above 0 trains both.
        start: a directory in PEFT's format that LoRA starts from; its scale counts, not `alpha`.
        ignore: fields of `start`'s adapter_config.json, and tensors, that are read as if they were
            not there.
        density: share of the entries that is trained.
        granularity: of what is chosen: "element", "block", "row", "column", or "head" (heads of
            attention, channels of the MLP). All but "element" spare the gradient of the rest.
        block: rows and columns of a block.
        selector: how: "random", "magnitude", "smallest", "lift" by the weights, or "gradient",
            "fisher", "snip", "gallop" by the gradient on the batch. For RL random is the safe one.
            For "spiel_ma", of the start alone and by the weights.
        layers: how many at a time, for "lisa".
        every: steps between two choices.
        share, decay: of "spiel_ag" and "spiel_ma", see `optim.sparse.Spiel`.
        mode: sparse changes are written into the kernels ("in_place"), or kept beside them in
            float32 and added at every use ("overlay"), so that a reference policy that starts
            where the actor starts needs no arrays of its own. LoRA is beside them always.
        base: bits of the layers' projection kernels where training leaves them as they are (LoRA
            and overlays): "int8", "nf4" as in QLoRA, or "" as they come. What `whole` names,
            embeddings, norms, heads and other models (a reference of its own) stay as they come.
        on_drop: "revert" what is no longer trained to its first value, or "keep" it.
        probe: the choice sees the gradient of one in so many rows.
        tiles: tiles along `embed` (the fsdp axis) and along heads and channels (the tensor axis).
            In each of them as many entries are trained; devices that hold whole tiles choose
            without talking to each other; blocks of a quantized base keep within them. Part of
            what is computed, whatever the plan is.
        seed: of random choices and first values.
    """

    name: str
    targets: tuple[Pattern, ...] = ()
    whole: tuple[Pattern, ...] = ()
    rank: Natural = 0
    alpha: Positive = 16.0
    start: str = ""
    ignore: tuple[str, ...] = ()
    density: Annotated[float, Within(0, 1, above=True)] = 0.01
    granularity: str = "element"
    block: tuple[Count, ...] = (128, 128)
    selector: str = "random"
    layers: Count = 2
    every: Count = 20
    share: Share = 0.2
    decay: str = "linear"
    mode: str = "in_place"
    base: str = ""
    on_drop: str = "revert"
    probe: Count = 1
    tiles: tuple[Count, ...] = (1, 1)
    seed: Seed = 0

    def __post_init__(self):
        for field in ("every", "probe", "layers"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}, but must be at least 1.")
        for field in ("rank", "seed"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} is {getattr(self, field)}, but must be at least 0.")

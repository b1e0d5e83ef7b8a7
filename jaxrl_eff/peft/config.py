"""Settings for training a part of a model."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Protocol, runtime_checkable

from jaxrl_eff.schema import Count, Natural, Pattern, Positive, Seed, Share, Within


@runtime_checkable
class Optimizer(Protocol):
    """The optimizer settings that partial training reads."""

    name: str
    clip_norm: float
    weight_decay: float
    store: str
    descent: bool
    frozen: tuple[str, ...]
    options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptSettings:
    """Settings of the part of a model that is trained.

    Attributes:
        name: "lora", "rslora" or "dora"; or, for sparse changes of the kernels in place, the
            schedule that selects the trained entries: "static" (once), "periodic" (again every
            `every` steps), "spiel_ag" (drop the smallest changes, grow the largest gradients) or
            "spiel_ma" (grow where the sums of SM3, which must be the optimizer, are largest: the
            least state); or "lisa": the projections of a few layers, others every `every` steps.
        targets: patterns of kernels; () is every projection of the layers.
        whole: patterns of further parameters that are trained in full, such as norms. A value head
            always is.
        rank, alpha: of LoRA; a sparse name with a rank above 0 trains both.
        start: a directory in PEFT's format with LoRA's initial values; its scale replaces `alpha`.
        ignore: fields of `start`'s adapter_config.json, and tensors, to ignore when reading.
        density: fraction of the entries that is trained.
        granularity: units of selection: "element", "block", "row", "column", or "head" (heads of
            attention, channels of the MLP). All but "element" save computing the other gradients.
        block: rows and columns of a block.
        selector: "random", "magnitude", "smallest", "lift" by the weights, or "gradient",
            "fisher", "snip", "gallop" by the gradient on the batch. For RL "random" is the safe
            one. For "spiel_ma" it applies only at the start, and must be one by the weights.
        layers: number of layers trained at a time, for "lisa".
        every: steps between two selections.
        share, decay: of "spiel_ag" and "spiel_ma", see `optim.sparse.Spiel`.
        mode: sparse changes are written into the kernels ("in_place"), or kept beside them in
            float32 and added at every use ("overlay"), so that a reference policy equal to the
            initial actor needs no arrays of its own. LoRA is always beside the kernels.
        base: quantization of the layers' projection kernels if training does not change them (LoRA
            and overlays): "int8", "nf4" as in QLoRA, or "" for none. Parameters named by `whole`,
            embeddings, norms, heads and other models (a separate reference) are not quantized.
        on_drop: "revert" entries that are no longer trained to their initial values, or "keep".
        probe: the selection uses the gradient of one in this many rows.
        tiles: tiles along `embed` (the fsdp axis) and along heads and channels (the tensor axis).
            Each tile has the same number of trained entries; devices that hold whole tiles select
            without communication; blocks of a quantized base stay within tiles. Tiles affect the
            results, independently of the plan.
        seed: of random selections and initial values.
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

"""The schema of a config: frozen dataclasses, and the one function that fills them.

A config file returns an `ml_collections.ConfigDict`; `build` turns it into a `Run`, naming every
unknown key and every value of the wrong type with its full path, before anything is loaded. What
needs files, devices or the model to be checked is checked in `stages`.
"""

import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The base model of a run.

    Attributes:
        path: a Hugging Face directory (config.json and safetensors); "" starts from scratch.
        shape: fields of `models.LMConfig`, for a model from scratch.
        dtype, param_dtype: of compute and of parameters; "" keeps the shape's or float32.
        remat: recomputation policy of `models.LMConfig`; "" keeps the shape's.
        rope: fields of `models.config.Rope` to change, e.g. dict(kind="yarn", factor=4.0), to
            stretch the context of a model; its `original_length` is the model's if not given. Kinds
            are "linear", "yarn", "llama3", and "ntk", which changes the base alone.
        max_length: tokens; 0 keeps the shape's, times the factor if `rope` has one.
    """

    path: str = ""
    shape: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = ""
    param_dtype: str = ""
    remat: str = ""
    rope: dict[str, Any] = dataclasses.field(default_factory=dict)
    max_length: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where examples come from and how they become tokens.

    Attributes:
        source: "jsonl", "parquet", "inline", or a toy: "reverse", "sort", "needles".
        path: the file, for jsonl and parquet.
        format: "text", "completion", "messages", "preference", "prompt" or "chat_prompt".
        fields: the encoder's argument -> the example's field, e.g. {"prompt": "question"}.
        template: for "prompt" and "completion": text around the prompt, with {prompt} in it.
        bos, eos: whether sequences begin and end with the tokenizer's special tokens.
        length: tokens of a packed row; prompt_length: the longest prompt kept.
        packed: False puts one example into a row.
        overlong: "drop", "truncate" or "error".
        held_out: examples set apart for evaluation (files only; toys have their own split).
        options: arguments of a toy: digits, train, held_out, wrong, keep_length (of needles:
            shortest, longest, long_share, train, held_out); or of "inline": examples, a tuple of
            dicts.
    """

    source: str = "jsonl"
    path: str = ""
    format: str = "completion"
    fields: dict[str, str] = dataclasses.field(default_factory=dict)
    template: str = "{prompt}"
    bos: bool = True
    eos: bool = True
    length: int = 0
    prompt_length: int = 0
    packed: bool = True
    overlong: str = "drop"
    held_out: int = 0
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """An optimizer. See `optim.optimizer` and `optim.warmup_then`.

    Attributes:
        store: "bf16x2", "int16", "int8" or "sr": how weights of 16 bits keep changes that are
            smaller than their rounding; "": not at all. `collage_adamw` does it by itself.
        descent: whether the metrics say how much of the wanted change reaches the weights that are
            seen, and those that are stored, and what share of the changes is lost.
    """

    name: str = "adamw"
    lr: float = 1e-4
    schedule: str = "constant"
    warmup: int = 0
    final: float = 0.0
    clip_norm: float = 1.0
    weight_decay: float = 0.0
    store: str = ""
    descent: bool = False
    frozen: tuple[str, ...] = ()
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name in ("lr", "final", "clip_norm", "weight_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}, but must be finite and >= 0.")


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
            without talking to each other; blocks of a quantised base keep within them. Part of
            what is computed, whatever the plan is.
        seed: of random choices and first values.
    """

    name: str
    targets: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    rank: int = 0
    alpha: float = 16.0
    start: str = ""
    density: float = 0.01
    granularity: str = "element"
    block: tuple[int, ...] = (128, 128)
    selector: str = "random"
    layers: int = 2
    every: int = 20
    share: float = 0.2
    decay: str = "linear"
    mode: str = "in_place"
    base: str = ""
    on_drop: str = "revert"
    probe: int = 1
    tiles: tuple[int, ...] = (1, 1)
    seed: int = 0

    def __post_init__(self):
        for field in ("every", "probe", "layers"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}, but must be at least 1.")
        for field in ("rank", "seed"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} is {getattr(self, field)}, but must be at least 0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """What a response is worth.

    Attributes:
        name: "model" (a reward model of this run or a directory), or a function of the text:
            "gold", "digit_share", "exact", "numeric", "matches", "tagged", "contains",
            "word_share", "length_penalty".
        options: the function's arguments.
    """

    name: str = "model"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Held-out generation, greedy unless said otherwise, scored by a function of the text.

    Attributes:
        problems: how many held-out examples; 0 switches evaluation off.
        every: steps between evaluations; 0 evaluates only after the stage's last step.
        before: also evaluate before the first step.
        reward: a function of the text, as in `RewardSettings`.
        max_tokens: of a response; 0 takes the stage's sampling.
        temperature: 0 is greedy.
        data: a file of its own with held-out examples; "" uses the stage's held-out part.
    """

    problems: int = 0
    every: int = 0
    before: bool = False
    reward: RewardSettings = RewardSettings(name="gold")
    max_tokens: int = 0
    temperature: float = 0.0
    data: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How a plan is searched, and corrected by what its steps really take.

    Attributes:
        evaluations: plans to simulate in one search.
        calibrate: steps after which predicted and measured times are compared, the cost model is
            corrected and the search repeated; twice as many before the next time, and so on. 0:
            never.
        threshold: share of the step's time that a new plan must save to be taken up.
        cluster: "local" for the devices at hand, or what `planner.hardware.parse` knows.
    """

    evaluations: int = 3000
    calibrate: int = 4
    threshold: float = 0.05
    cluster: str = "local"

    def __post_init__(self):
        if self.evaluations < 1 or self.calibrate < 0 or self.threshold < 0:
            raise ValueError(
                f"evaluations={self.evaluations}, calibrate={self.calibrate}, threshold="
                f"{self.threshold}; at least 1, 0 and 0 are needed."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """How sequences of many lengths become a step.

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

    name: str = "rows"
    room: int = 0
    shapes: int = 12
    sample: int = 1024
    measure: bool = True

    def __post_init__(self):
        if self.name not in ("rows", "skrull"):
            raise ValueError(f"name is {self.name!r}, not 'rows' or 'skrull'.")
        if self.room < 0 or self.shapes < 1 or self.sample < 1:
            raise ValueError(
                f"room={self.room}, shapes={self.shapes}, sample={self.sample}; at least 0, 1 and "
                "1 are needed."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyncSettings:
    """How trained weights get to calls on other devices, or to another layout on the same ones.

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
    capacity: float = 0.0
    every: int = 100

    def __post_init__(self):
        if self.name not in ("whole", "changes", "int8", "int4"):
            raise ValueError(f"name is {self.name!r}, not 'whole', 'changes', 'int8' or 'int4'.")
        if not 0 <= self.capacity <= 1 or self.every < 1:
            raise ValueError(
                f"capacity={self.capacity}, every={self.every}; 0 to 1 and at least 1 are needed."
            )
        if self.capacity and self.name != "changes":
            raise ValueError(
                f"capacity={self.capacity} is of 'changes', and name is {self.name!r}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroSettings:
    """What train calls send between nodes, over links that are slow (ZeRO++).

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

    name: str = ""
    nodes: int = 2
    block: int = 256

    def __post_init__(self):
        if self.nodes < 2:
            raise ValueError(f"nodes is {self.nodes}; there must be 2 or more to send between.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageSettings:
    """One stage of training: an algorithm, its data, its models, its plan.

    Attributes:
        algorithm: "sft", "reward_model", "dpo", "ppo", "grpo", "rloo", "remax" or "raft".
        steps: of the graph.
        batch: rows (sft, reward_model, dpo) or prompts a step, over all devices.
        data: the examples.
        models: role -> where its parameters come from: "base"; the name of an earlier stage, for
            what that stage trained; "stage/role"; or a Hugging Face directory.
        optim: role -> optimizer, for every role that is trained.
        adapt: role -> which part of it is trained; all of a role that is not named.
        loss: fields of the algorithm's config, e.g. `PPOConfig`.
        sampling: fields of `rollout.Sampling`.
        reward: for algorithms that sample.
        plan: "all" (every call on all devices), "fsdp" (the same, parameters sharded), "halves"
            (the actor's calls on the first half, the others on the second), "search" (the best
            that the planner finds), or a table call -> dict(devices=[...], tensor=..., ...); see
            `plans.plan`. With `zero` the first three put train calls on that many nodes.
        search: how, if the plan is "search".
        sync: how trained weights get to calls on other devices.
        schedule: how sequences of many lengths become a step.
        zero: what train calls send between nodes.
        staleness: how many steps old the weights are that sample. 0 is synchronous; 1 lets
            sampling and training overlap on devices of their own.
        evaluate: held-out measurement.
        samples_every: steps between samples written to samples.jsonl; 0 for none.
    """

    algorithm: str
    steps: int
    batch: int
    data: DataSettings
    models: dict[str, str] = dataclasses.field(default_factory=dict)
    optim: dict[str, OptimSettings] = dataclasses.field(default_factory=dict)
    adapt: dict[str, AdaptSettings] = dataclasses.field(default_factory=dict)
    loss: dict[str, Any] = dataclasses.field(default_factory=dict)
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)
    reward: RewardSettings = RewardSettings()
    plan: str | dict[str, dict[str, Any]] = "all"
    search: SearchSettings = SearchSettings()
    sync: SyncSettings = SyncSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    zero: ZeroSettings = ZeroSettings()
    staleness: int = 0
    evaluate: EvalSettings = EvalSettings()
    samples_every: int = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Attributes:
    every: steps between checkpoints; 0 saves only at the end of a stage.
    keep: newest checkpoints kept.
    """

    every: int = 0
    keep: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectSettings:
    """What the last line of a run is checked against; an empty metric expects nothing.

    Attributes:
        metric: "stage/eval" result to look at.
        at_least: its smallest value.
        rises_over: another result that it must exceed, by `rise`; "" for none.
        rise: absolute.
    """

    metric: str = ""
    at_least: float = float("-inf")
    rises_over: str = ""
    rise: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A whole run.

    Attributes:
        seed: of parameters, data order and sampling.
        simulate_devices: CPU devices to simulate; 0 uses the real ones.
        model: the base model.
        tokenizer: "model" (beside the checkpoint), or "chars:" and an alphabet.
        stages: names, in order.
        stage: name -> settings.
        nonfinite: "stop" at a loss or gradient that is not finite, or "skip" that update.
        checkpoint, expect: see there.
        wandb: arguments of `wandb.init`; empty for no W&B.
        export: write the last trained model as a Hugging Face directory.
    """

    seed: int = 0
    simulate_devices: int = 0
    model: ModelSettings
    tokenizer: str = "model"
    stages: tuple[str, ...]
    stage: dict[str, StageSettings] = dataclasses.field(default_factory=dict)
    nonfinite: str = "stop"
    checkpoint: CheckpointSettings = CheckpointSettings()
    expect: ExpectSettings = ExpectSettings()
    wandb: dict[str, Any] = dataclasses.field(default_factory=dict)
    export: bool = True

    def __post_init__(self):
        if not self.stages:
            raise ValueError("config.stages is empty; it must name at least one stage.")
        if missing := [s for s in self.stages if s not in self.stage]:
            raise ValueError(f"config.stages names {missing}, but there is {sorted(self.stage)}.")
        if self.nonfinite not in ("stop", "skip"):
            raise ValueError(f"config.nonfinite is {self.nonfinite!r}, not 'stop' or 'skip'.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"config.seed is {self.seed}; it must be at least 0, below 2**32.")


def run(config: Mapping[str, Any]) -> Run:
    """The settings of a config: sections with an algorithm are stages, `stages` says which run.

    Raises:
        ValueError: an unknown key or a value of the wrong type, with its path.
    """
    config = dict(config)
    names = config.get("stages", ())
    if not isinstance(names, tuple | list) or not all(isinstance(n, str) for n in names):
        raise ValueError(f"config.stages is {names!r}, but it must be a tuple of names.")
    sections = [k for k, v in config.items() if isinstance(v, Mapping) and "algorithm" in v]
    stages = {k: build(StageSettings, config.pop(k), f"config.{k}") for k in sections}
    fields = [f.name for f in dataclasses.fields(Run) if f.name != "stage"]
    if unknown := next((k for k in config if k not in fields), None):
        raise ValueError(f"config has no field {_among(unknown, [*fields, *sections])}")
    return build(Run, {**config, "stage": stages}, "config")


def build(cls: type, section: Mapping[str, Any], path: str) -> Any:
    """Fills a dataclass from a config section.

    Raises:
        ValueError: a key that the class does not have, a missing one, or a value of another type.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in section:
        if key not in fields:
            raise ValueError(f"{path} has no field {_among(key, fields)}")
    for name, f in fields.items():
        no_default = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if no_default and name not in section:
            raise ValueError(f"{path}.{name} is missing.")
    hints = typing.get_type_hints(cls)
    values = {k: _convert(hints[k], v, f"{path}.{k}") for k, v in section.items()}
    try:
        return cls(**values)
    except ValueError as error:
        message = str(error)
        raise ValueError(
            message if message.startswith("config") else f"{path}: {message}"
        ) from None


def _among(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"{key!r}; it has {sorted(known)}." + (f" Did you mean {close[0]!r}?" if close else "")


def _convert(hint: Any, value: Any, path: str) -> Any:
    """`value` as `hint` wants it; integers pass as floats, lists as tuples."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return _plain(value)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            if isinstance(value, Mapping) and typing.get_origin(option) is not dict:
                continue
            with contextlib.suppress(_WrongType):
                return _convert(option, value, path)
        raise _wrong(hint, value, path)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise _wrong(hint, value, path)
        return build(hint, value, path)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong(hint, value, path)
        return {str(k): _convert(args[1], v, f"{path}.{k}") for k, v in value.items()}
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise _wrong(hint, value, path)
        return tuple(_convert(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and type(value) is hint:
        return value
    if hint is type(None) and value is None:
        return None
    raise _wrong(hint, value, path)


def _plain(value: Any) -> Any:
    """Containers of the standard library in place of ml_collections'."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_plain(v) for v in value)
    return value


class _WrongType(ValueError):
    """A value that is of no allowed type."""


def _wrong(hint: Any, value: Any, path: str) -> _WrongType:
    name = hint.__name__ if isinstance(hint, type) else str(hint)
    return _WrongType(f"{path} is {value!r} ({type(value).__name__}), but it must be {name}.")

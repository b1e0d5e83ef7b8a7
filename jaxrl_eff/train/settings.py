"""The schema of a config: frozen dataclasses, and the function that fills them.

A config file returns an `ml_collections.ConfigDict`; `run` turns it into a `Run`, reporting every
unknown key and every value of the wrong type or out of range with its full path, before anything is
loaded. Checks that need files, devices or the model are in `assembly`, and `unused` finds values
that nothing would read.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any

from jaxrl_eff.peft.config import AdaptSettings
from jaxrl_eff.schema import (
    Count,
    Natural,
    NonNegative,
    Pattern,
    Seed,
    Switch,
    Within,
    build,
    unknown_field,
)
from jaxrl_eff.train.running import ScheduleSettings, SearchSettings, SyncSettings, ZeroSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The base model of a run.

    Attributes:
        path: a Hugging Face directory (config.json and safetensors); "" starts from scratch.
        shape: fields of `models.LMConfig`, for a model from scratch.
        dtype, param_dtype: of compute and of parameters; "" keeps the shape's or float32.
        remat: rematerialization policy of `models.LMConfig`; "" keeps the shape's.
        rope: fields of `models.config.Rope` to change, e.g. dict(kind="yarn", factor=4.0), to
            stretch the context of a model; its `original_length` defaults to the model's. Kinds are
            "linear", "yarn", "llama3", and "ntk", which changes only the base.
        max_length: tokens; 0 keeps the shape's, times the factor if `rope` has one.
        ignore: names of unknown fields in the files of `path` and of `models.ROLE` (config.json,
            those of the tokenizer), of tensors and of files, to ignore where the run would
            otherwise be rejected.
    """

    path: str = ""
    shape: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = ""
    param_dtype: str = ""
    remat: str = ""
    rope: dict[str, Any] = dataclasses.field(default_factory=dict)
    max_length: Natural = 0
    ignore: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Source of the examples, and their tokenization.

    Attributes:
        source: "jsonl", "parquet", "inline", or a toy: "reverse", "sort", "needles".
        path: the file, for jsonl and parquet.
        format: "text", "completion", "messages", "preference", "prompt" or "chat_prompt".
        fields: the encoder's argument -> the example's field, e.g. {"prompt": "question"}.
        template: for "prompt" and "completion": text around the prompt, with {prompt} in it.
        bos, eos: True if sequences begin and end with the tokenizer's special tokens.
        length: tokens of a packed row; prompt_length: the longest prompt kept.
        packed: False puts one example into a row.
        overlong: "drop", "truncate" (not prompts) or "error": handling of examples that are too
            long. "error" applies to held-out prompts too; otherwise these are left out of the mean,
            which is reported with their number.
        held_out: examples held out for evaluation (files only; toys have their own split).
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
    length: Natural = 0
    prompt_length: Natural = 0
    packed: bool = True
    overlong: str = "drop"
    held_out: Natural = 0
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """An optimizer. See `optim.optimizer` and `optim.warmup_then`.

    Attributes:
        store: "bf16x2", "int16", "int8" or "sr": how 16-bit weights keep changes smaller than their
            rounding; "": they do not. `collage_adamw` does so by itself.
        descent: True to report how much of the intended change reaches the visible weights and the
            stored ones, and the fraction of changes that is lost.
    """

    name: str = "adamw"
    lr: NonNegative = 1e-4
    schedule: str = "constant"
    warmup: Natural = 0
    final: NonNegative = 0.0
    clip_norm: NonNegative = 1.0
    weight_decay: NonNegative = 0.0
    store: str = ""
    descent: bool = False
    frozen: tuple[Pattern, ...] = ()
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """The reward of a response.

    Attributes:
        name: "model" (a reward model of this run or a directory), or a function of the text:
            "gold", "digit_share", "exact", "numeric", "math" (formulas, by math-verify), "matches",
            "tagged", "contains", "word_share", "length_penalty".
        options: the function's arguments.
    """

    name: str = "model"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Held-out generation, greedy by default, scored by a function of the text.

    Attributes:
        problems: number of held-out examples; 0 disables evaluation.
        every: steps between evaluations; 0 evaluates only after the stage's last step.
        before: True to also evaluate before the first step.
        reward: a function of the text, as in `RewardSettings`.
        max_tokens: of a response; 0 takes the stage's sampling.
        temperature: 0 is greedy.
        batch: maximum number of problems asked at once; 0: as many rows as a step of the stage has.
        data: a separate file with held-out examples, parquet or JSON lines by its suffix; "" uses
            the stage's held-out part.
    """

    problems: Annotated[int, Within(0), Switch()] = 0
    every: Natural = 0
    before: bool = False
    reward: RewardSettings = RewardSettings(name="gold")
    max_tokens: Natural = 0
    temperature: NonNegative = 0.0
    batch: Natural = 0
    data: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageSettings:
    """One stage of training: an algorithm, its data, its models, its plan.

    Attributes:
        algorithm: "sft", "reward_model", "dpo", "ppo", "grpo", "rloo", "remax" or "raft".
        steps: steps of the graph.
        batch: rows (sft, reward_model, dpo) or prompts per step, over all devices.
        data: the examples.
        models: role -> source of its parameters: "base"; the name of an earlier stage, for the
            role that it trained; "stage/role"; or a Hugging Face directory.
        optim: role -> optimizer, for every role that is trained.
        adapt: role -> the part of it that is trained; roles not named are trained in full.
        loss: fields of the algorithm's config, e.g. `PPOConfig`.
        sampling: fields of `rollout.Sampling`.
        reward: for algorithms that sample.
        plan: "all" (every call on all devices), "fsdp" (the same, parameters sharded), "halves"
            (the actor's calls on the first half, the others on the second), "search" (the best
            plan that the planner finds), or a table call -> dict(devices=[...], tensor=..., ...);
            see `plan_rules.plan`. With `zero` all four put train calls on that many nodes.
        search: settings of the plan search, if the plan is "search".
        sync: sending of trained weights to calls on other devices.
        schedule: formation of steps from sequences of many lengths.
        zero: precision of train calls' communication between nodes.
        staleness: age in steps of the weights used for sampling. 0 is synchronous; 1 lets sampling
            and training overlap on separate devices.
        weights: call that samples or evaluates -> "int8" or "int4": it reads its model's kernels
            and embeddings rounded to as many bits, on any devices; other calls read them as
            trained. If they come from other devices, only the codes are sent.
        evaluate: held-out evaluation.
        samples_every: steps between samples written to samples.jsonl; 0 for none.
    """

    algorithm: str
    steps: Count
    batch: Count
    data: DataSettings
    models: dict[str, str] = dataclasses.field(default_factory=dict)
    optim: dict[str, OptimSettings] = dataclasses.field(default_factory=dict)
    adapt: dict[str, AdaptSettings] = dataclasses.field(default_factory=dict)
    loss: dict[str, Any] = dataclasses.field(default_factory=dict)
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)
    reward: RewardSettings = RewardSettings()
    plan: str | dict[str, dict[str, Any]] = "all"
    search: SearchSettings = dataclasses.field(default_factory=SearchSettings)
    sync: SyncSettings = dataclasses.field(default_factory=SyncSettings)
    schedule: ScheduleSettings = dataclasses.field(default_factory=ScheduleSettings)
    zero: ZeroSettings = dataclasses.field(default_factory=ZeroSettings)
    staleness: Natural = 0
    weights: dict[str, str] = dataclasses.field(default_factory=dict)
    evaluate: EvalSettings = EvalSettings()
    samples_every: Natural = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Settings of checkpoints.

    Attributes:
        every: steps between checkpoints; 0: every so many `minutes`. The end of a stage, a state
            about to be evaluated, and a run that is asked to stop are always saved too.
        minutes: time between checkpoints if `every` is 0; 0: none but these.
        keep: number of newest checkpoints kept.
    """

    every: Natural = 0
    minutes: NonNegative = 10.0
    keep: Count = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectSettings:
    """Expected results, for the last line of a run; an empty metric expects nothing.

    Attributes:
        metric: "stage/eval" result to check.
        at_least: its minimum.
        rises_over: another result that it must exceed by `rise`; "" for none.
        rise: absolute difference.
    """

    metric: Annotated[str, Switch()] = ""
    at_least: Annotated[float, Within(infinite=True)] = -math.inf
    rises_over: str = ""
    rise: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Settings of a whole run.

    Attributes:
        seed: of parameters, data order and sampling.
        simulate_devices: number of CPU devices to simulate; 0 uses the real devices.
        model: the base model.
        tokenizer: "model" (stored with the checkpoint), or "chars:" and an alphabet.
        stages: names, in order.
        stage: name -> settings.
        nonfinite: "stop" at a non-finite loss or gradient, or "skip" that update.
        checkpoint, expect: see there.
        wandb: arguments of `wandb.init`; empty for no W&B.
        export: True to write the last trained model as a Hugging Face directory.

    Example:
        >>> from jaxrl_eff import train
        >>> data, optim = dict(source="reverse", length=16), dict(actor=dict(lr=1e-3))
        >>> sft = dict(algorithm="sft", steps=100, batch=8, data=data, optim=optim)
        >>> config = train.settings.run(dict(model=dict(path="DIR"), stages=("sft",), sft=sft))
        >>> config.stage["sft"].optim["actor"].name
        'adamw'
    """

    seed: Seed = 0
    simulate_devices: Annotated[int, Within(0, 1024)] = 0
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
        for name in self.stages:
            if not re.fullmatch(r"[^\W_][\w.+-]*", name):
                raise ValueError(
                    f"config.stages has {name!r:.200}; a stage's name begins with a letter or "
                    "digit and holds these, '_', '.', '+' and '-'."
                )
        if twice := sorted({s for s in self.stages if self.stages.count(s) > 1}):
            raise ValueError(f"config.stages has {twice} more than once.")
        if missing := [s for s in self.stages if s not in self.stage]:
            raise ValueError(
                f"config.stages: unknown stage {missing[0]!r}; expected one of "
                f"{sorted(self.stage)}."
            )
        if self.nonfinite not in ("stop", "skip"):
            raise ValueError(
                f"config: unknown nonfinite {self.nonfinite!r}; expected one of ['stop', 'skip']."
            )


def run(config: Mapping[str, Any]) -> Run:
    """Builds a config's settings: sections with an algorithm are stages, `stages` selects them.

    Raises:
        ValueError: an unknown key, or a value of the wrong type or out of range, with its path.
    """
    config = dict(config)
    names = config.get("stages", ())
    if not isinstance(names, tuple | list) or not all(isinstance(n, str) for n in names):
        raise ValueError(f"config.stages is {names!r:.200}, but it must be a tuple of names.")
    sections = [k for k, v in config.items() if isinstance(v, Mapping) and "algorithm" in v]
    stages = {k: _stage(config.pop(k), f"config.{k}") for k in sections}
    fields = [f.name for f in dataclasses.fields(Run) if f.name != "stage"]
    if unknown := [k for k in config if k not in fields]:
        raise ValueError(f"config: {unknown_field(unknown[0], [*fields, *stages])}")
    return build(Run, {**config, "stage": stages}, "config")


def _stage(section: Mapping[str, Any], path: str) -> StageSettings:
    sync = section.get("sync")
    name = sync.get("name") if isinstance(sync, Mapping) else None
    if name in ("int8", "int4"):  # names of an earlier version
        raise ValueError(
            f"{path}.sync.name: {name!r} is now a property of the call: set "
            f"{path}.weights={ {'actor_gen': name} }."
        )
    s = build(StageSettings, section, path)
    if "plan" not in section and s.search != SearchSettings():
        raise ValueError(
            f"{path}.search is given, but {path}.plan is not; only plan='search' reads it."
        )
    return s

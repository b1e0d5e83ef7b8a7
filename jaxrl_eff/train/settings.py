"""The schema of a config: frozen dataclasses, and the function that fills them.

A config file returns an `ml_collections.ConfigDict`; `run` turns it into a `Run`, naming every
unknown key and every value of the wrong type or out of its range with its full path, before
anything is loaded. What needs files, devices or the model to be checked is checked in `stages`,
and `unused` finds values that nothing would read.
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
    among,
    build,
)
from jaxrl_eff.train.running import ScheduleSettings, SearchSettings, SyncSettings, ZeroSettings


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
        ignore: names of fields of the files of `path` and of `models.ROLE` (config.json, those of
            the tokenizer), of tensors and of files, that are read as if they were not there, where
            a run would be refused because they are not known.
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
        overlong: "drop", "truncate" (not prompts) or "error": what is done with examples that are
            too long. With "error" no held-out prompt may be either; otherwise those are left out
            of the mean, which says of how many it is.
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
        store: "bf16x2", "int16", "int8" or "sr": how weights of 16 bits keep changes that are
            smaller than their rounding; "": not at all. `collage_adamw` does it by itself.
        descent: whether the metrics say how much of the wanted change reaches the weights that are
            seen, and those that are stored, and what share of the changes is lost.
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
    """What a response is worth.

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
    """Held-out generation, greedy unless said otherwise, scored by a function of the text.

    Attributes:
        problems: how many held-out examples; 0 switches evaluation off.
        every: steps between evaluations; 0 evaluates only after the stage's last step.
        before: also evaluate before the first step.
        reward: a function of the text, as in `RewardSettings`.
        max_tokens: of a response; 0 takes the stage's sampling.
        temperature: 0 is greedy.
        batch: problems asked at once, at most; 0: as many rows as a step of the stage has.
        data: a file of its own with held-out examples, parquet or JSON lines by its suffix; ""
            uses the stage's held-out part.
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
    evaluate: EvalSettings = EvalSettings()
    samples_every: Natural = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Attributes:
    every: steps between checkpoints; 0: every so many `minutes`. Besides, the end of a stage, what
        is about to be evaluated, and a run that is asked to stop are always saved.
    minutes: between checkpoints if `every` is 0; 0: none but these.
    keep: newest checkpoints kept.
    """

    every: Natural = 0
    minutes: NonNegative = 10.0
    keep: Count = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectSettings:
    """What the last line of a run is checked against; an empty metric expects nothing.

    Attributes:
        metric: "stage/eval" result to look at.
        at_least: its smallest value.
        rises_over: another result that it must exceed, by `rise`; "" for none.
        rise: absolute.
    """

    metric: Annotated[str, Switch()] = ""
    at_least: Annotated[float, Within(infinite=True)] = -math.inf
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
            raise ValueError(f"config.stages names {missing}, but there is {sorted(self.stage)}.")
        if self.nonfinite not in ("stop", "skip"):
            raise ValueError(f"config.nonfinite is {self.nonfinite!r}, not 'stop' or 'skip'.")


def run(config: Mapping[str, Any]) -> Run:
    """The settings of a config: sections with an algorithm are stages, `stages` says which run.

    Raises:
        ValueError: an unknown key or a value of the wrong type or out of its range, with its path.
    """
    config = dict(config)
    names = config.get("stages", ())
    if not isinstance(names, tuple | list) or not all(isinstance(n, str) for n in names):
        raise ValueError(f"config.stages is {names!r:.200}, but it must be a tuple of names.")
    sections = [k for k, v in config.items() if isinstance(v, Mapping) and "algorithm" in v]
    stages = {k: _stage(config.pop(k), f"config.{k}") for k in sections}
    fields = [f.name for f in dataclasses.fields(Run) if f.name != "stage"]
    if unknown := [k for k in config if k not in fields]:
        raise ValueError(f"config has no field {among(unknown[0], [*fields, *stages])}")
    return build(Run, {**config, "stage": stages}, "config")


def _stage(section: Mapping[str, Any], path: str) -> StageSettings:
    s = build(StageSettings, section, path)
    if "plan" not in section and s.search != SearchSettings():
        raise ValueError(
            f"{path}.search is given, but {path}.plan is not; only plan='search' reads it."
        )
    return s

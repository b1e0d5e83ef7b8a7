"""Assembly of a run's stages from settings: models, data, graph, plan, step, evaluation.

All errors of a config are found here, in milliseconds to seconds, before weights are read or a
program is compiled: files, formats, plans, sizes that do not divide.
"""

import contextlib
import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxrl_eff import core
from jaxrl_eff.core import Placement, Step, plan_rules
from jaxrl_eff.data import fates, loader
from jaxrl_eff.data.tokenizer import Tokenizer
from jaxrl_eff.models import LMConfig
from jaxrl_eff.planner import clusters
from jaxrl_eff.rollout import Sampling
from jaxrl_eff.rollout.rewards import verify
from jaxrl_eff.train import (
    balanced,
    base,
    examples,
    fits,
    held_out,
    parts,
    replan,
    unused,
    weights,
)
from jaxrl_eff.train.evaluate import Evaluation
from jaxrl_eff.train.outline import outline
from jaxrl_eff.train.settings import Run, StageSettings

_TRIED_SECONDS = 20.0  # time limit for trying a reward on examples before training, per stage


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage, assembled and checked, with nothing compiled or loaded yet.

    Attributes:
        name, settings: as in the config.
        lms: role -> config of its model.
        origins: role -> source of its initial parameters, as (kind, name): ("base", ""),
            ("stage", "sft/actor"), ("directory", path), or ("own", "") for the algorithm's own.
        step: the compiled graph's executor, checked for the stage's batches.
        loader: batches of this process's rows.
        batch: name -> global shape and dtype.
        evaluation: held-out evaluation, if any.
        schedules: trained role -> learning rate by optimizer update.
        source: the examples, for samples.
        searched: result of the plan search, if there was one.
        placed: plan -> `step` under it, checked.
        lengths: tokens of some examples, if rows are packed by length.
        notes: remarks on the stage's examples for the user, before training.
    """

    name: str
    settings: StageSettings
    lms: dict[str, LMConfig]
    origins: dict[str, tuple[str, str]]
    step: Step
    loader: loader.Loader
    batch: dict[str, jax.ShapeDtypeStruct]
    evaluation: Evaluation | None
    schedules: dict[str, Any]
    source: Any
    sampling: Sampling | None
    searched: replan.Searched | None
    placed: Callable[[Mapping[str, Placement]], Step]
    lengths: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def trained(self) -> str:
        """The role that later stages get by this stage's name: the first one trained."""
        return next(c.of for c in self.step.graph.calls if c.kind == "train")

    def updates(self, role: str) -> int:
        """Returns the optimizer updates of a role per step."""
        return sum(c.epochs * c.minibatches for c in self.step.graph.of(role) if c.kind == "train")


@dataclasses.dataclass(frozen=True)
class Assembled:
    """A run, assembled and checked."""

    run: Run
    tokenizer: Tokenizer
    base: LMConfig
    stages: tuple[Stage, ...]

    def needed_after(self, index: int) -> list[str]:
        """Returns "stage/role" of models of stages up to `index` that later stages start from."""
        earlier = {s.name for s in self.stages[: index + 1]}
        wanted = [
            name
            for later in self.stages[index + 1 :]
            for kind, name in later.origins.values()
            if kind == "stage" and name.split("/")[0] in earlier
        ]
        return list(dict.fromkeys(wanted))


def assemble(run: Run) -> Assembled:
    """Checks a run's settings against files and devices and builds its stages.

    Raises:
        ValueError, FileNotFoundError: the message has the path in the config.
    """
    with parts.at_path("config.tokenizer"):
        tokenizer = base.tokenizer(run)
    with parts.at_path("config.model"):
        lm = base.model(run, tokenizer)
    stages: list[Stage] = []
    for name in run.stages:
        with parts.at_path(f"config.{name}"):
            stages.append(_stage(run, name, tokenizer, lm, stages))
            fits.check_models(stages[-1].step)
    out = Assembled(run, tokenizer, lm, tuple(stages))
    _check_expectation(out)
    if run.export:
        last, role = stages[-1], stages[-1].trained
        weights.check_export(last.name, role, last.lms[role], last.settings.adapt.get(role))
    return out


def _stage(run: Run, name: str, tokenizer: Tokenizer, lm: LMConfig, earlier: list[Stage]) -> Stage:
    s, kind = run.stage[name], parts.algorithm_of(run.stage[name]).batch
    examples.check_format(s, kind)
    unused.check(s)
    seed = (run.seed + zlib.crc32(name.encode())) % 2**32
    source, apart = examples.source(s.data, seed)
    encoder = examples.encoder(s, kind, tokenizer)
    examples.check("data", encoder, source)
    score, reward, tried = None, None, ()
    if kind == "prompts" and s.reward.name != "model":
        with parts.at_path(f"config.{name}.reward"):
            score = parts.reward_fn(s.reward)
            reward = verify.host_reward(score, source, tokenizer)
    made = outline(run, name, tokenizer, lm, earlier, reward)
    graph, lms, specs, sampling = made.graph, made.lms, made.specs, made.sampling
    weights.check_read(made.origins, lms, run.model.path, run.model.ignore)
    fits.check_batch(s, sampling)
    if missing := [r for r in graph.models if r not in made.origins]:
        raise ValueError(f"models lacks the roles {missing}; say where each comes from.")
    if score is not None:  # takes up to seconds, so the settings were checked before
        with parts.at_path(f"config.{name}.reward"):
            what = f"the reward {s.reward.name!r}"
            tried = examples.try_all(what, lambda row: score(row, "0"), source, _TRIED_SECONDS)

    pack, length, pools = 0, s.data.length, []
    if s.schedule.name == "skrull":
        pack = 2 if kind == "preference" else 1
        with parts.at_path(f"config.{name}.schedule"):
            lengths = balanced.lengths_of(source, encoder, kind, s.schedule.sample)
            if sampling is not None:
                prompts = np.minimum(lengths, s.data.prompt_length)
                pools = balanced.guessed(prompts, sampling.max_tokens)
            else:
                length = balanced.longest(lengths, length)
                pools = [np.array([n for n in lengths if n <= length])]
    shapes, searched = made.batch(length), None
    with parts.at_path(f"config.{name}.plan"):
        if s.plan == "search":
            searched = replan.search(made.problem(shapes, pools), s.search, seed=run.seed)
            plan = searched.plan
        else:
            plan = plan_rules.plan(s.plan, graph, jax.device_count(), parts.nodes_of(s))
    keep = "tokens segment mask score example" if kind == "prompts" else ""

    def placed(plan: Mapping[str, Placement]) -> Step:
        step = core.compile(
            graph, plan, specs, keep=keep, sync=parts.changes_of(s), pack=pack
        ).check(shapes)
        if pack:
            cluster = clusters.local(measured=s.schedule.measure)
            balanced.scheduled(s.schedule, step, lms, pools, cluster=cluster)
        return step

    with parts.at_path(f"config.{name}.schedule") if pack else contextlib.nullcontext():
        step = placed(plan)
    batches = loader.batches(
        source,
        encode=encoder,
        batch=s.batch,
        kind=kind,
        seed=seed,
        length=length or None,
        prompt_length=s.data.prompt_length or None,
        overlong=s.data.overlong,
        packed=s.data.packed and not pack,
        pad=tokenizer.pad or 0,
        process=step.share,
    )
    with parts.at_path(f"config.{name}.data"):
        survey = batches.survey()
    evaluation = held_out.evaluation(run, name, tokenizer, lms, specs, plan, graph, apart, sampling)
    notes = (*_notes(s, kind, source, tokenizer, survey, evaluation), *tried)
    known = tuple(pools[0].tolist()) if pack and sampling is None else ()
    return Stage(
        name, s, lms, made.origins, step, batches, shapes, evaluation, made.schedules, source,
        sampling, searched, placed, known, notes,
    )  # fmt: skip


def _notes(
    s: StageSettings,
    kind: str,
    source: Any,
    tokenizer: Tokenizer,
    survey: fates.Survey,
    evaluation: Evaluation | None,
) -> tuple[str, ...]:
    """Returns notes on the training examples and the held-out ones."""
    own = examples.notes(s, kind, source, tokenizer, survey)
    return own if evaluation is None else (*own, *evaluation.notes)


def _check_expectation(out: Assembled) -> None:
    e = out.run.expect
    for field in ("metric", "rises_over"):
        wanted = getattr(e, field)
        stages = {s.name: s for s in out.stages}
        stage, _, rest = wanted.partition("/")
        if wanted and (stage not in stages or rest not in ("eval", "eval_before")):
            raise ValueError(
                f"config.expect.{field} is {wanted!r}; it must be STAGE/eval or "
                f"STAGE/eval_before with a stage of {list(stages)}."
            )
        if wanted and stages[stage].evaluation is None:
            raise ValueError(f"config.expect.{field} is {wanted!r}, but {stage!r} has no evaluate.")
        if rest == "eval_before" and not stages[stage].settings.evaluate.before:
            raise ValueError(
                f"config.expect.{field} is {wanted!r}, but config.{stage}.evaluate.before is False."
            )


def words(seed: int, stage: str, step: int) -> np.ndarray:
    """Returns the two words of a step's key."""
    return np.array([(seed + zlib.crc32(stage.encode())) % 2**32, step], np.uint32)

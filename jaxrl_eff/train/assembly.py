"""Assembly of a run's stages from settings: models, data, graph, plan, step, evaluation.

All errors of a config are found here, in milliseconds to seconds, before weights are read or a
program is compiled: files, formats, plans, sizes that do not divide.
"""

import contextlib
import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrl_eff import core
from jaxrl_eff.algorithms import Rollout
from jaxrl_eff.checkpoints import read_config
from jaxrl_eff.core import Graph, Placement, Spec, Step, plan_rules
from jaxrl_eff.data import fates, loader
from jaxrl_eff.data.tokenizer import CharTokenizer, Tokenizer, load_tokenizer
from jaxrl_eff.models import LMConfig
from jaxrl_eff.models.config import Rope
from jaxrl_eff.planner import clusters, from_graph
from jaxrl_eff.rollout import Sampling
from jaxrl_eff.rollout.rewards import verify
from jaxrl_eff.schema import build
from jaxrl_eff.train import balanced, examples, fits, held_out, parts, replan, unused, weights
from jaxrl_eff.train.evaluate import Evaluation
from jaxrl_eff.train.settings import Run, StageSettings

_TRIED_SECONDS = 20.0  # time limit for trying a reward on examples before training, per stage
_SIZES = ("vocab", "layers", "width", "heads", "kv_heads", "head_dim", "ffn", "max_length")


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
        tokenizer = tokenizer_of(run)
    with parts.at_path("config.model"):
        base = base_model(run, tokenizer)
    stages: list[Stage] = []
    for name in run.stages:
        with parts.at_path(f"config.{name}"):
            stages.append(_stage(run, name, tokenizer, base, stages))
            fits.check_models(stages[-1].step)
    out = Assembled(run, tokenizer, base, tuple(stages))
    _check_expectation(out)
    if run.export:
        last, role = stages[-1], stages[-1].trained
        weights.check_export(last.name, role, last.lms[role], last.settings.adapt.get(role))
    return out


def tokenizer_of(run: Run) -> Tokenizer:
    if run.tokenizer == "chars:":
        raise ValueError("config.tokenizer is 'chars:' without the characters of an alphabet.")
    if run.tokenizer.startswith("chars:"):
        return CharTokenizer(run.tokenizer.removeprefix("chars:"))
    directory = run.model.path if run.tokenizer == "model" else run.tokenizer
    if not directory:
        raise ValueError(
            "config.tokenizer is 'model', but config.model.path is empty: give a model's "
            "directory, or 'chars:' and an alphabet."
        )
    return load_tokenizer(directory, ignore=run.model.ignore)


def base_model(run: Run, tokenizer: Tokenizer) -> LMConfig:
    m = run.model
    if m.path and m.shape:
        raise ValueError("has both path and shape; a checkpoint brings its own shape.")
    if m.path:
        if not Path(m.path).is_dir():
            raise FileNotFoundError(f"path is {m.path!r}, which is no directory.")
        lm = read_config(m.path, ignore=m.ignore)
    else:
        special = {
            "vocab": tokenizer.vocab,
            "bos": tokenizer.bos,
            "eos": tuple(tokenizer.stop),
            "pad": tokenizer.pad,
        }
        for name, size in m.shape.items():
            if name in _SIZES and isinstance(size, int) and size < 1:
                raise ValueError(f"config.model.shape.{name} is {size}, but must be at least 1.")
        lm = build(LMConfig, {**special, **m.shape}, "config.model.shape")
    chosen = {k: getattr(m, k) for k in ("dtype", "param_dtype", "remat") if getattr(m, k)}
    if m.path and tokenizer.stop:
        chosen["eos"] = tuple(dict.fromkeys((*lm.eos, *tokenizer.stop)))
    if m.rope:
        chosen["rope"] = stretched(lm, m.rope)
        chosen["max_length"] = int(lm.max_length * max(1.0, m.rope.get("factor", 1.0)))
    if m.max_length:
        chosen["max_length"] = m.max_length
    if lm.vocab < tokenizer.vocab:
        raise ValueError(
            f"the model's vocabulary of {lm.vocab} is smaller than the tokenizer's, "
            f"{tokenizer.vocab}."
        )
    return dataclasses.replace(lm, **chosen)


def stretched(lm: LMConfig, changes: Mapping[str, Any]) -> Rope:
    """Returns a model's rotation with some fields changed.

    "ntk" increases the base of the frequencies, so that the slowest frequency is divided by
    `factor` and the fastest is unchanged: theta factor^(H / (H - 2)).

    Raises:
        ValueError: a field is unknown or has a wrong type, or "ntk" of a scaled rotation.
    """
    there, factor = dataclasses.asdict(lm.rope), changes.get("factor", 1.0)
    if type(factor) not in (int, float) or not 0 < factor < math.inf:
        raise ValueError(f"config.model.rope.factor is {factor!r:.200}, but must be above 0.")
    if changes.get("kind") == "ntk":
        if lm.rope.kind != "default" or set(changes) != {"kind", "factor"}:
            raise ValueError(
                f"config.model.rope is {dict(changes)}, of a rotation that is {lm.rope.kind!r}; "
                "ntk takes a factor alone, and a rotation without a scaling."
            )
        power = lm.head_dim / (lm.head_dim - 2)
        return dataclasses.replace(lm.rope, theta=lm.rope.theta * changes["factor"] ** power)
    if changes.get("kind", lm.rope.kind) in ("yarn", "llama3") and not there["original_length"]:
        there["original_length"] = lm.max_length
    given = {k: v for k, v in {**there, **changes}.items() if v is not None}
    return build(Rope, given, "config.model.rope")


def _stage(
    run: Run, name: str, tokenizer: Tokenizer, base: LMConfig, earlier: list[Stage]
) -> Stage:
    s = run.stage[name]
    algorithm = parts.algorithm_of(s)
    kind = algorithm.batch
    examples.check_format(s, kind)
    unused.check(s)
    cfg = parts.loss_of(s, name)
    seed = (run.seed + zlib.crc32(name.encode())) % 2**32
    source, apart = examples.source(s.data, seed)
    encoder = examples.encoder(s, kind, tokenizer)
    examples.check("data", encoder, source)

    sampling, rollout, tried = parts.sampling_of(s, name, tokenizer), None, ()
    origins, lms = parts.roles_of(s, base, earlier, run.model.ignore)
    weights.check_read(origins, lms, run.model.path, run.model.ignore)
    if sampling is not None:
        rollout = Rollout(sampling)
        if s.reward.name != "model":
            with parts.at_path(f"config.{name}.reward"):
                score = parts.reward_fn(s.reward)
                what = f"the reward {s.reward.name!r}"
                tried = examples.try_all(what, lambda row: score(row, "0"), source, _TRIED_SECONDS)
                rollout = Rollout(sampling, verify.host_reward(score, source, tokenizer))
    parts.check_length(s, lms, sampling)
    fits.check_batch(s, sampling)
    graph = parts.graph_of(s, name, cfg, lms, rollout)
    lms = {r: lm for r, lm in lms.items() if r in graph.models}
    origins = {r: o for r, o in origins.items() if r in graph.models}
    origins |= {r: ("own", "") for r in graph.models if r in algorithm.own}
    if missing := [r for r in graph.models if r not in origins]:
        raise ValueError(f"models lacks the roles {missing}; say where each comes from.")

    specs, schedules = parts.model_specs(s, graph, lms, name)
    with parts.at_path(f"config.{name}.zero"):
        specs = {role: parts.sent(s, spec, lms.get(role)) for role, spec in specs.items()}
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
    shapes, searched = parts.batch_shapes(s, kind, length), None
    with parts.at_path(f"config.{name}.plan"):
        if s.plan == "search":
            searched = replan.search(
                _problem(s, graph, lms, shapes, sampling, specs, pools), s.search, seed=run.seed
            )
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
        name, s, lms, origins, step, batches, shapes, evaluation, schedules, source, sampling,
        searched, placed, known, notes,
    )  # fmt: skip


def _problem(
    s: StageSettings,
    graph: Graph,
    lms: dict[str, LMConfig],
    shapes: dict[str, jax.ShapeDtypeStruct],
    sampling: Sampling | None,
    specs: dict[str, Spec],
    pools: list[np.ndarray],
) -> Any:
    """Returns the planner's problem of a stage.

    Args:
        pools: lengths of the rows to pack, if any.
    """
    packing = {}
    if pools and sampling is None:
        packing = balanced.expected(s.schedule, graph, pools[0])
    elif pools:
        before = (
            round(float(np.mean(pools[-1]))) - sampling.max_tokens
        )  # all of it is sampled there
        responses = np.concatenate(balanced.guessed([0], sampling.max_tokens))
        packing = balanced.expected(s.schedule, graph, responses, before=before)
    return from_graph.works(
        graph, lms, shapes, sampling=sampling, specs=specs, **from_graph.expecting(packing)
    )


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

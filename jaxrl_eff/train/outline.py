"""A stage from its settings alone: its graph, models and optimizers, without data or devices.

The command `plan` plans outlines, and `assembly` completes them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxrl_eff.algorithms import Algorithm, Rollout
from jaxrl_eff.core import Graph, Spec
from jaxrl_eff.data.tokenizer import CharTokenizer, Tokenizer
from jaxrl_eff.models import LMConfig
from jaxrl_eff.planner import from_graph
from jaxrl_eff.planner.problem import Problem
from jaxrl_eff.rollout import Sampling
from jaxrl_eff.train import balanced, base, parts, unused
from jaxrl_eff.train.settings import Run, StageSettings


@dataclasses.dataclass(frozen=True)
class Outline:
    """A stage without data and devices.

    Attributes:
        name, settings: as in the config.
        algorithm: its record.
        graph: its calls.
        lms: role -> config of its model.
        origins: role -> source of its initial parameters, see `Stage`.
        specs: role -> `Spec`, with the optimizer.
        schedules: trained role -> learning rate by optimizer update.
        sampling: of its generate calls, if any.
    """

    name: str
    settings: StageSettings
    algorithm: Algorithm
    graph: Graph
    lms: dict[str, LMConfig]
    origins: dict[str, tuple[str, str]]
    specs: dict[str, Spec]
    schedules: dict[str, Any]
    sampling: Sampling | None

    @property
    def trained(self) -> str:
        """The role that later stages get by this stage's name: the first one trained."""
        return next(c.of for c in self.graph.calls if c.kind == "train")

    def batch(self, length: int = 0) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes of its batches.

        Args:
            length: tokens of a row; 0: the config's.
        """
        return parts.batch_shapes(self.settings, self.algorithm.batch, length)

    def problem(
        self,
        batch: dict[str, jax.ShapeDtypeStruct],
        pools: Sequence[np.ndarray] | None = None,
        **options: Any,
    ) -> Problem:
        """Returns the planner's problem.

        Args:
            batch: shapes of its batches.
            pools: lengths of the rows that a schedule packs, equally likely; None: those that the
                settings allow.
            options: of `from_graph.works`.
        """
        s, packing = self.settings, {}
        if s.schedule.name == "skrull":
            if pools is None:
                pools = self._allowed()
            before, lengths = 0, np.concatenate(pools)
            if self.sampling is not None:  # in the last pool all responses are cut off
                most = self.sampling.max_tokens
                before = round(float(np.mean(pools[-1]))) - most
                lengths = np.concatenate(balanced.guessed([0], most))
            packing = balanced.expected(s.schedule, self.graph, lengths, before=before)
        expected = from_graph.expecting(packing)
        return from_graph.works(
            self.graph, self.lms, batch, sampling=self.sampling, specs=self.specs,
            **{**expected, **options},
        )  # fmt: skip

    def _allowed(self) -> list[np.ndarray]:
        """Returns pools of lengths up to those that the settings allow."""
        data = self.settings.data
        if self.sampling is not None:
            return balanced.guessed([data.prompt_length], self.sampling.max_tokens)
        return balanced.guessed([0], data.length)


def outline(
    run: Run,
    name: str,
    tokenizer: Tokenizer,
    lm: LMConfig,
    earlier: Sequence[Any],
    reward: Callable | None,
) -> Outline:
    """Returns the outline of a stage.

    Args:
        lm: config of the base model.
        earlier: outlines or stages before it.
        reward: the host function of a reward call, if the stage samples and its reward is no model.

    Raises:
        ValueError, FileNotFoundError: a setting is wrong, or a model's config.json is missing.
    """
    s = run.stage[name]
    algorithm = parts.algorithm_of(s)
    cfg = parts.loss_of(s, name)
    origins, lms = parts.roles_of(s, lm, earlier, run.model.ignore)
    sampling, rollout = parts.sampling_of(s, name, tokenizer), None
    if sampling is not None:
        rollout = Rollout(sampling, reward)
    parts.check_length(s, lms, sampling)
    graph = parts.graph_of(s, name, cfg, lms, rollout)
    lms = {r: lm for r, lm in lms.items() if r in graph.models}
    origins = {r: o for r, o in origins.items() if r in graph.models}
    origins |= {r: ("own", "") for r in graph.models if r in algorithm.own}
    specs, schedules = parts.model_specs(s, graph, lms, name)
    with parts.at_path(f"config.{name}.zero"):
        specs = {role: parts.sent(s, spec, lms.get(role)) for role, spec in specs.items()}
    return Outline(name, s, algorithm, graph, lms, origins, specs, schedules, sampling)


def outlines(run: Run) -> list[Outline]:
    """Returns the outlines of a run's stages, whose models may be checkpoints without weights.

    Raises:
        ValueError, FileNotFoundError: see `outline`.
    """
    with parts.at_path("config.model"):
        tokenizer = _any_tokenizer(run)
        lm = base.model(run, tokenizer)
    out: list[Outline] = []
    for name in run.stages:
        with parts.at_path(f"config.{name}"):
            unused.check(run.stage[name])
            reward = None if run.stage[name].reward.name == "model" else _unread
            out.append(outline(run, name, tokenizer, lm, out, reward))
    return out


def _any_tokenizer(run: Run) -> Tokenizer:
    """Returns the run's tokenizer, or any other where its files are missing but the vocabulary is
    known: a plan depends on sizes alone.
    """
    try:
        return base.tokenizer(run)
    except (ValueError, OSError, ImportError):
        if run.model.path or "vocab" in run.model.shape:
            return CharTokenizer("0")
        raise


def _unread(*_: Any) -> dict:
    """Stands where a reward function will be."""
    raise AssertionError("planning runs no call")

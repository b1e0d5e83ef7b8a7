"""Held-out generation and scoring, as a graph with one call.

One compiled program answers a few problems at a time, so that memory does not grow with their
number. The samples of a problem depend only on its index, not on other rows of the batch.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxrl_eff import core
from jaxrl_eff.algorithms.policy import PROMPTS, ROLLOUT
from jaxrl_eff.core import Graph, Model, Placement, Spec, Step
from jaxrl_eff.data import loader, sources, text
from jaxrl_eff.data.tokenizer import Tokenizer
from jaxrl_eff.models import LMConfig
from jaxrl_eff.parallel import global_arrays
from jaxrl_eff.rollout import Sampling, sample
from jaxrl_eff.rollout.rewards import verify

# A row's random numbers are determined by its problem.
ASKED = f"{PROMPTS} prompt_row"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Answers to held-out problems, scored by a function of the text. Made by `of`.

    Attributes:
        calls: number of batches that cover all problems.
        problems: number of problems asked; `wanted`: number requested.
        notes: remarks on why these differ.
    """

    step: Step
    loader: loader.Loader
    calls: int
    source: Any
    reward: Callable[[Mapping[str, Any], str], float]
    tokenizer: Tokenizer
    problems: int
    seed: int
    wanted: int
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        *,
        lm: LMConfig,
        spec: Spec,
        sampling: Sampling,
        placement: Placement,
        source: Any,
        encode: Callable,
        problems: int,
        prompt_length: int,
        reward: Callable,
        tokenizer: Tokenizer,
        seed: int,
        batch: int = 0,
        wanted: int | None = None,
        notes: tuple[str, ...] = (),
    ) -> "Evaluation":
        """Checks shapes; compiles on first use.

        Args:
            lm: config of the model that answers.
            spec: of its parameters.
            sampling: temperature 0 is greedy.
            placement: its microbatches and offloading are ignored.
            source: held-out examples; the first `problems` are used.
            encode: example -> prompt ids.
            problems: number of problems.
            prompt_length: tokens of the longest prompt.
            reward: (example, response) -> number.
            tokenizer: for the response's text.
            seed: for sampling with a temperature.
            batch: maximum number of problems per batch; 0: all.
            wanted, notes: see the attributes; by default all problems are asked.
        """
        placement = dataclasses.replace(placement, microbatches=1, offload="")
        call = core.generate(
            "actor_gen", of="actor", fn=sample(lm, sampling), reads=ASKED, writes=ROLLOUT
        )
        step = core.compile(
            Graph(ASKED, (call,)),
            {"actor_gen": placement},
            {"actor": spec._replace(tx=None)},
            keep="tokens mask example",
        )
        rows = min(problems, batch or problems)
        rows = -(-rows // placement.row_shards) * placement.row_shards
        batches = loader.batches(
            source,
            encode=encode,
            batch=rows,
            kind="prompts",
            seed=seed % 2**32,
            prompt_length=prompt_length,
            shuffle=False,
            epochs=1,
            remainder="pad",
            process=step.share,
            threads=0,
        )
        wanted = problems if wanted is None else wanted
        return cls(
            step, batches, -(-problems // rows), source, reward, tokenizer, problems, seed, wanted,
            notes,
        )  # fmt: skip

    @property
    def of_how_many(self) -> str:
        """Text for the mean, " of 4 of 8 problems", if some could not be asked; else ""."""
        if self.problems == self.wanted:
            return ""
        return f" of {self.problems} of {self.wanted} problems"

    def __call__(self, params_: Any) -> tuple[float, list[dict[str, Any]]]:
        """Returns the mean reward over the problems, and one dict per problem of this process.

        Args:
            params_: the actor's parameters on the placement.

        Returns:
            Mean over all processes; rows of prompt, completion and reward.
        """
        self.loader.restore({**self.loader.state(), "drawn": 0, "waiting": []})
        key, rows = np.array([self.seed % 2**32, 0], np.uint32), []
        for _ in range(self.calls):
            batch = next(self.loader)
            batch["prompt_row"] = np.maximum(batch["prompt_example"], 0)
            self._build(batch)
            _, data, _ = self.step({"actor": Model(params_)}, batch, key)
            rows += responses(self.step.shown(data), self.source, self.tokenizer)
        rows = [r for r in rows if 0 <= r["example"] < self.problems]
        for row in rows:
            index = row["example"]
            where = sources.place(self.source, index)
            row["reward"] = verify.score(self.reward, self.source[index], where, row["completion"])
        total = np.array([sum(r["reward"] for r in rows), len(rows)], np.float64)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            total = np.asarray(multihost_utils.process_allgather(total)).sum(0)
        return float(total[0] / max(total[1], 1)), rows

    def _build(self, batch: Mapping[str, np.ndarray]) -> None:
        """Compiles the step for batches; `batch` is one process's share."""
        if not self.step.built:
            count = self.step.share[1]
            self.step.build(
                {
                    k: jax.ShapeDtypeStruct((v.shape[0] * count, *v.shape[1:]), v.dtype)
                    for k, v in batch.items()
                }
            )


def responses(
    data: Mapping[str, jax.Array], source: Any, tokenizer: Tokenizer, limit: int | None = None
) -> list[dict[str, Any]]:
    """Returns this process's rows as text: prompt, completion, example, and reward if scored."""
    mine = {k: global_arrays.local_rows(v) for k, v in data.items()}
    out = []
    for i in range(len(mine["tokens"]))[:limit]:
        tokens, chosen = mine["tokens"][i], mine["mask"][i] > 0
        start = int(chosen.argmax()) if chosen.any() else len(tokens)
        row = {
            "example": int(mine["example"][i]),
            "prompt": text.said(tokenizer, tokens[:start].tolist()),
            "completion": text.said(tokenizer, tokens[chosen].tolist()),
        }
        if "score" in mine:
            row["reward"] = float(mine["score"][i])
        out.append(row)
    return out

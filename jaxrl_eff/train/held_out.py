"""The held-out evaluation of a stage, from its settings."""

from typing import Any

from jaxrl_eff.core import Graph, Placement, Spec
from jaxrl_eff.data import source_files
from jaxrl_eff.data.tokenizer import Tokenizer
from jaxrl_eff.models import LMConfig
from jaxrl_eff.rollout import Sampling
from jaxrl_eff.train import examples, parts
from jaxrl_eff.train.evaluate import Evaluation
from jaxrl_eff.train.settings import Run


def evaluation(
    run: Run,
    name: str,
    tokenizer: Tokenizer,
    lms: dict[str, LMConfig],
    specs: dict[str, Spec],
    plan: dict[str, Placement],
    graph: Graph,
    held_out: Any,
    sampling: Sampling | None,
) -> Evaluation | None:
    """Returns the held-out evaluation of a stage, if its settings ask for one.

    Args:
        held_out: the examples held out from the stage's data, if any.
        sampling: of the stage, if it samples.

    Raises:
        ValueError: the stage trains no model that generates, there are too few examples, responses
            are longer than the model allows, or an example cannot be asked or scored.
    """
    e, s = run.stage[name].evaluate, run.stage[name]
    if not e.problems:
        return None
    with parts.at_path(f"config.{name}.evaluate"):
        if "actor" not in graph.models:
            raise ValueError(f"{s.algorithm} trains no model that generates.")
        if e.data:
            held_out = examples.templated(source_files.file(e.data), s.data)
        if held_out is None:
            raise ValueError("there is nothing held out; set data.held_out or evaluate.data.")
        if e.problems > len(held_out):
            raise ValueError(f"problems is {e.problems}, but {len(held_out)} are held out.")
        tokens = e.max_tokens or (sampling.max_tokens if sampling else 0)
        if not tokens:
            raise ValueError("max_tokens is 0, and the stage has no sampling to take it from.")
        if s.data.prompt_length < 1:
            raise ValueError("data.prompt_length is needed to evaluate.")
        longest = s.data.prompt_length + tokens
        if longest > lms["actor"].max_length:
            raise ValueError(
                f"data.prompt_length {s.data.prompt_length} and max_tokens {tokens} make {longest} "
                f"tokens, but the actor's max_length is {lms['actor'].max_length}."
            )
        encoder = examples.prompt_encoder(s.data, tokenizer, own_rows=not e.data)
        asked, notes = examples.asked(held_out, encoder, e.problems, s.data)
        score = parts.reward_fn(e.reward)
        what = f"the reward {e.reward.name!r}"
        examples.try_all(what, lambda row: score(row, "0"), asked)
        home = "actor_gen" if "actor_gen" in plan else graph.home("actor").name
        stop = sampling.stop if sampling else ()
        return Evaluation.of(
            lm=lms["actor"],
            spec=specs["actor"],
            sampling=Sampling(
                max_tokens=tokens,
                temperature=e.temperature,
                stop=stop,
                pad=tokenizer.pad or 0,
            ),
            placement=plan[home],
            source=asked,
            encode=encoder,
            problems=len(asked),
            wanted=e.problems,
            notes=notes,
            prompt_length=s.data.prompt_length,
            reward=score,
            tokenizer=tokenizer,
            seed=run.seed,
            batch=e.batch or s.batch * (sampling.samples if sampling else 1),
        )

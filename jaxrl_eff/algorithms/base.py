"""The record of an algorithm, and validation of config values."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jaxrl_eff.core import Graph, Spec
from jaxrl_eff.models import LMConfig
from jaxrl_eff.rollout import Sampling

# A host reward reads tokens, mask and example as numpy arrays, and the step's key (two words);
# it returns {"score": float32 [B]}.
HostReward = Callable[..., dict]
Head = Literal["lm", "value"]


class Rollout(NamedTuple):
    """Sampling and scoring of responses.

    Attributes:
        reward: a function of the text; None: the model with role "reward".

    Example:
        >>> from jaxrl_eff import LMConfig, Rollout, Sampling, algorithms
        >>> lm = LMConfig(vocab=8, layers=1, width=4, heads=1, kv_heads=1, head_dim=4, ffn=8)
        >>> value, ppo = lm.replace(head="value"), algorithms.ppo
        >>> models = {"actor": lm, "critic": value, "reward": value}
        >>> graph = ppo.graph(ppo.PPOConfig(), models, Rollout(Sampling(max_tokens=4)))
        >>> [call.name for call in graph.calls if call.kind == "train"]
        ['actor_train', 'critic_train']
    """

    sampling: Sampling
    reward: HostReward | None = None


class Own(NamedTuple):
    """A small model that an algorithm defines itself.

    Attributes:
        spec: see `core.Spec`.
        init: the algorithm's config -> the initial parameters.
    """

    spec: Spec
    init: Callable[[Any], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Algorithm:
    """Description of an algorithm for a run.

    Attributes:
        config: the frozen dataclass of its settings.
        graph: `(config, role -> config of its model, Rollout or None) -> Graph`.
        batch: rows that it reads: packed "sft" rows, "preference" pairs, or "prompts".
        roles: possible models, and their heads. The first one starts from the base model.
        own: models that it defines itself.
    """

    config: type
    graph: Callable[[Any, Mapping[str, LMConfig], Rollout | None], Graph]
    batch: Literal["sft", "preference", "prompts"]
    roles: Mapping[str, Head]
    own: Mapping[str, Own] = dataclasses.field(default_factory=dict)


def require(config: Any, field: str, ok: bool, allowed: str) -> None:
    """Raises ValueError with the field's value and the allowed values, unless `ok`."""
    if not ok:
        name = f"{type(config).__name__}.{field}"
        raise ValueError(f"{name} is {getattr(config, field)!r}; it must be {allowed}.")


def require_one_of(config: Any, field: str, allowed: Sequence[str]) -> None:
    """Requires the field's value to be in `allowed`."""
    value = getattr(config, field)
    if value not in allowed:
        name = type(config).__name__
        raise ValueError(f"{name}: unknown {field} {value!r}; expected one of {[*allowed]}.")

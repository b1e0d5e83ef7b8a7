"""Rejection of values in a stage's settings that nothing would read.

An ignored setting means that the run is not the intended one. Values that equal their defaults are
not checked, nor are those that several kinds of stages share for convenience: the lengths of their
data, and how often samples are shown.
"""

from collections.abc import Collection

from jaxrl_eff import secret
from jaxrl_eff.algorithms import ALGORITHMS
from jaxrl_eff.peft.config import AdaptSettings
from jaxrl_eff.train import parts
from jaxrl_eff.train.settings import DataSettings, RewardSettings, StageSettings

# Source -> fields of the data that it does not read.
_NOT_OF_SOURCE = {
    "jsonl": ("options",),
    "parquet": ("options",),
    "inline": ("path",),
    "needles": ("path", "held_out", "template"),
}
# Name of partial training -> fields that it does not read.
_CHOICE = ("density", "granularity", "block", "selector", "on_drop", "probe")
_NOT_OF_ADAPT = {
    "static": ("layers", "every", "share", "decay"),
    "periodic": ("layers", "share", "decay"),
    "spiel_ag": ("layers",),
    "spiel_ma": ("layers",),
    "lisa": (*_CHOICE, "share", "decay", "alpha"),
    "lora": (*_CHOICE, "layers", "every", "share", "decay"),
}
_NOT_OF_ADAPT |= dict.fromkeys(("rslora", "dora"), _NOT_OF_ADAPT["lora"])


def check(s: StageSettings) -> None:
    """Rejects values that the stage's algorithm, data or partial training does not read.

    Raises:
        ValueError: with the first such value.
    """
    algorithm = parts.algorithm_of(s)
    of = f"{s.algorithm} does not sample"
    if algorithm.batch != "prompts":
        _refuse("sampling", s.sampling, {}, of)
        _refuse("reward.name", s.reward.name, RewardSettings().name, of)
        _refuse("reward.options", s.reward.options, {}, of)
        _refuse("staleness", s.staleness, 0, of)
        _refuse("sync.name", s.sync.name, "whole", f"{of}, and no other call reads its weights")
    else:
        _refuse("data.packed", s.data.packed, True, f"{s.algorithm} reads prompts")
        if s.reward.name == "model":
            _refuse("reward.options", s.reward.options, {}, "a reward model has none")
        else:
            where = s.models.get("reward")
            _refuse("models.reward", where, None, f"the reward is {s.reward.name!r}")
    every = {role for other in ALGORITHMS.values() for role in other.roles}
    for role, where in s.models.items():
        if role in every - set(algorithm.roles):
            _refuse(f"models.{role}", where, None, f"{s.algorithm} has {_names(algorithm.roles)}")
    _data(s.data)
    for role, o in s.optim.items():
        if o.schedule == "constant":
            _refuse(f"optim.{role}.final", o.final, 0.0, "the schedule is constant")
    for role, a in s.adapt.items():
        default = AdaptSettings(name=a.name)
        for field in _NOT_OF_ADAPT.get(a.name, ()):
            value = getattr(a, field)
            _refuse(f"adapt.{role}.{field}", value, getattr(default, field), f"it is {a.name!r}")


def _data(data: DataSettings) -> None:
    default = DataSettings()
    for field in _NOT_OF_SOURCE.get(data.source, ()):
        reason = f"the source is {data.source!r}"
        _refuse(f"data.{field}", getattr(data, field), getattr(default, field), reason)


def _refuse(path: str, value: object, default: object, why: str) -> None:
    if value != default:
        raise ValueError(f"{path} is {secret.told(path, value)}, which nothing reads: {why}.")


def _names(roles: Collection[str]) -> str:
    return " and ".join(roles)

"""Parts of a stage that need neither devices nor data, from its settings.

The algorithm's graph, the models' roles and optimizers, sampling, rewards, and the shapes of a
batch. `assembly` makes steps from them, and the command `plan` a planner's problem.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrl_eff import core, optim, tree
from jaxrl_eff.algorithms import ALGORITHMS, Algorithm, Rollout
from jaxrl_eff.checkpoints import read_config
from jaxrl_eff.core import Adaptation, Call, Graph, Spec
from jaxrl_eff.data import toys
from jaxrl_eff.data.tokenizer import Tokenizer
from jaxrl_eff.models import LMConfig, params
from jaxrl_eff.optim import optimizer, warmup_then
from jaxrl_eff.parallel import SyncConfig
from jaxrl_eff.parallel.zero import levels
from jaxrl_eff.peft import ways, weights
from jaxrl_eff.rollout import Sampling
from jaxrl_eff.rollout.rewards import symbolic, verify
from jaxrl_eff.schema import build
from jaxrl_eff.train.settings import OptimSettings, RewardSettings, StageSettings
from jaxrl_eff.train.start import started

REWARDS: dict[str, Callable[..., Callable]] = {
    "exact": verify.exact,
    "numeric": verify.numeric,
    "math": symbolic.math,
    "matches": verify.matches,
    "tagged": lambda names: verify.tagged(*([names] if isinstance(names, str) else names)),
    "contains": verify.contains,
    "word_share": verify.word_share,
    "length_penalty": verify.length_penalty,
    "gold": lambda: toys.gold,
    "digit_share": lambda: toys.digit_share,
}


class at_path:
    """Context that prefixes error messages with a path in the config."""

    def __init__(self, path: str):
        self._path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if not isinstance(error, Exception):
            return
        kept = (FileNotFoundError, OSError, ImportError)  # other types need special arguments
        told = next((t for t in kept if isinstance(error, t)), ValueError)
        message = str(error)
        if not isinstance(error, (ValueError, *kept)):
            message = f"{type(error).__name__}: {message}"
        if not message.startswith("config"):
            message = f"{self._path}: {message}"
        raise told(message) from (None if isinstance(error, ValueError) else error)


def algorithm_of(s: StageSettings) -> Algorithm:
    """Returns the record of the stage's algorithm."""
    if s.algorithm not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {s.algorithm!r}; expected one of {[*ALGORITHMS]}.")
    return ALGORITHMS[s.algorithm]


def loss_of(s: StageSettings, name: str) -> Any:
    """Returns the algorithm's config."""
    return build(ALGORITHMS[s.algorithm].config, s.loss, f"config.{name}.loss")


def changes_of(s: StageSettings) -> SyncConfig | None:
    """Returns the settings for syncing trained weights as changes; None: sent in full."""
    if s.sync.name == "whole":
        return None
    sparse = [part.density for part in s.adapt.values() if part.name in ways.SCHEDULES]
    capacity = s.sync.capacity or min(1.0, 2 * max(sparse, default=0.025))
    return SyncConfig(capacity=capacity, every=s.sync.every)


def nodes_of(s: StageSettings) -> int:
    """Returns the number of nodes of train calls; 1 leaves communication to the compiler."""
    return s.zero.nodes if s.zero.name else 1


def sent(s: StageSettings, spec: Spec, lm: LMConfig | None) -> Spec:
    """Adds to a role's spec the precision of data sent between nodes, if the stage sets it.

    Frozen weights are not sent at all: every node has them.

    Raises:
        ValueError: an unknown name, or an invalid block size.
    """
    if not s.zero.name or spec.tx is None or lm is None:
        return spec
    rung = levels.zero_level(s.zero.name)
    if s.zero.name == "exact" and lm.dtype == "float32":
        rung = dataclasses.replace(rung, weight_bits=32, grad_bits=32)
    if isinstance(spec.tx, Adaptation):
        spec = ways.in_every_node(spec)
    plan = levels.ZeroConfig(rung, block=s.zero.block, dtype=lm.dtype, nodes=s.zero.nodes)
    return spec._replace(sends=plan)


def sampling_of(s: StageSettings, name: str, tokenizer: Tokenizer) -> Sampling | None:
    """Returns the stage's sampling settings, if it samples."""
    if ALGORITHMS[s.algorithm].batch != "prompts":
        return None
    pad = tokenizer.pad if tokenizer.pad is not None else 0
    return build(Sampling, {"pad": pad, **s.sampling}, f"config.{name}.sampling")


def reward_fn(reward: RewardSettings) -> Callable:
    """Returns the function of the text that a reward's settings name, as its `__name__`.

    Raises:
        ValueError: the name or an option is unknown.
    """
    if reward.name not in REWARDS:
        raise ValueError(f"unknown reward {reward.name!r}; expected one of {['model', *REWARDS]}.")
    try:
        fn = REWARDS[reward.name](**reward.options)
    except TypeError as error:
        raise ValueError(f"options of the reward {reward.name!r}: {error}.") from None

    def named(example: Any, response: str) -> Any:
        return fn(example, response)

    named.__name__ = reward.name
    return named


def roles_of(
    s: StageSettings, base: LMConfig, earlier: Sequence[Any], ignore: Sequence[str] = ()
) -> tuple[dict[str, tuple[str, str]], dict[str, LMConfig]]:
    """Returns the source of each role's parameters, and the config of its model.

    Args:
        ignore: fields of a directory's `config.json` to ignore.
    """
    roles = algorithm_of(s).roles
    given = {next(iter(roles)): "base", **s.models}
    if "ref" in roles:
        given.setdefault("ref", given["actor"])
    if unknown := sorted(set(given) - set(roles)):
        raise ValueError(f"models: unknown role {unknown[0]!r}; expected one of {[*roles]}.")
    origins, lms = {}, {}
    by_name = {e.name: e for e in earlier}
    for role, where in given.items():
        stage, _, of = where.partition("/")
        if where == "base":
            origins[role], lm = ("base", ""), base
        elif stage in by_name:
            source = by_name[stage]
            of = of or source.trained
            if of not in source.lms:
                raise ValueError(
                    f"models.{role} is {where!r}, but stage {stage!r} has {sorted(source.lms)}."
                )
            origins[role], lm = ("stage", f"{stage}/{of}"), source.lms[of]
        elif Path(where).is_dir():
            lm = read_config(where, ignore=ignore)
            lm = dataclasses.replace(
                lm, dtype=base.dtype, param_dtype=base.param_dtype, remat=base.remat, eos=base.eos
            )
            origins[role] = ("directory", where)
        else:
            raise ValueError(
                f"models.{role} is {where!r}: neither 'base', nor an earlier stage "
                f"({sorted(by_name)}), nor a directory."
            )
        head = roles[role]
        if lm.head == "value" and head == "lm":
            raise ValueError(f"models.{role} is {where!r}, a value model without a vocabulary.")
        if lm.vocab != base.vocab:
            raise ValueError(
                f"models.{role} is {where!r} with a vocabulary of {lm.vocab}, but the base model's "
                f"is {base.vocab}: every model of a run reads the same tokens."
            )
        lms[role] = dataclasses.replace(lm, head=head)
    return origins, lms


def check_length(s: StageSettings, lms: dict[str, LMConfig], sampling: Sampling | None) -> None:
    for token in (*sampling.stop, sampling.pad) if sampling else ():
        if not 0 <= token < lms["actor"].vocab:
            raise ValueError(
                f"sampling has stop={sampling.stop} and pad={sampling.pad}, but the ids of the "
                f"model's tokens are 0 to {lms['actor'].vocab - 1}."
            )
    longest = s.data.prompt_length + sampling.max_tokens if sampling else 0
    for role, lm in lms.items():
        if longest > lm.max_length:
            raise ValueError(
                f"data.prompt_length {s.data.prompt_length} and sampling.max_tokens "
                f"{sampling.max_tokens} make {longest} tokens, but {role}'s max_length is "
                f"{lm.max_length}."
            )


def graph_of(
    s: StageSettings, name: str, cfg: Any, lms: dict[str, LMConfig], rollout: Rollout | None
) -> Graph:
    """Returns the graph of the stage's algorithm.

    Args:
        name: of the stage.
        cfg: the algorithm's config.
        rollout: sampling and reward, if it samples.

    Raises:
        ValueError: a role has no model, or a setting does not fit the algorithm.
    """
    if s.staleness < 0 or (s.staleness and rollout is None):
        raise ValueError(f"staleness is {s.staleness}; it is for algorithms that sample, from 0.")
    algorithm = algorithm_of(s)
    for role in algorithm.roles:
        scored = role == "reward" and rollout is not None and rollout.reward is not None
        if role not in lms and not scored:
            raise ValueError(f"models lacks {role!r}; say where it comes from.")
    graph = algorithm.graph(cfg, lms, rollout)
    if ways.keeps_base(s.adapt.get("actor")) and _same_start(s):
        graph = dataclasses.replace(graph, calls=tuple(map(_without_ref, graph.calls)))
    with at_path(f"config.{name}.weights"):
        calls = _with_precision(graph, s.weights)
    calls = (
        dataclasses.replace(c, staleness=s.staleness) if c.kind == "generate" else c for c in calls
    )
    changed = s.staleness or s.weights
    return dataclasses.replace(graph, calls=tuple(calls)) if changed else graph


def _with_precision(graph: Graph, weights: Mapping[str, str]) -> list[Call]:
    """Returns the graph's calls with the precision of the weights that some of them read.

    Raises:
        ValueError: an unknown call or precision, or a call that cannot read rounded weights.
    """
    known = [c.name for c in graph.calls if c.kind in ("generate", "infer")]
    if unknown := [call for call in weights if call not in {c.name for c in graph.calls}]:
        raise ValueError(f"unknown call {unknown[0]!r}; expected one of {known}.")
    return [dataclasses.replace(c, weights=weights.get(c.name, c.weights)) for c in graph.calls]


def _same_start(s: StageSettings) -> bool:
    """Returns True if the reference equals the initial actor."""
    actor = s.models.get("actor", "base")
    return s.models.get("ref", actor) == actor


def _without_ref(c: core.Call) -> core.Call:
    """Returns a reference call as a call on the actor's arrays without its adapter."""
    if c.of != "ref":
        return c
    return dataclasses.replace(c, of="actor", fn=functools.partial(_on_base, c.fn))


def _on_base(fn: Callable, params_: Any, batch: Any, key: Any) -> Any:
    return fn(weights.base(params_), batch, key)


def model_specs(
    s: StageSettings, graph: Graph, lms: dict[str, LMConfig], name: str
) -> tuple[dict[str, Spec], dict[str, Any]]:
    trained = {c.of: c for c in graph.calls if c.kind == "train"}
    if unknown := sorted(set(s.optim) - set(trained)):
        raise ValueError(f"optim: unknown role {unknown[0]!r}; expected one of {sorted(trained)}.")
    if unknown := sorted(set(s.adapt) - set(trained)):
        raise ValueError(f"adapt: unknown role {unknown[0]!r}; expected one of {sorted(trained)}.")
    specs, schedules, own = {}, {}, algorithm_of(s).own
    for role in graph.models:
        if role in own:
            specs[role] = own[role].spec
            continue
        shapes, axes, tx = params.abstract(lms[role]), params.logical_axes(lms[role]), None
        if role in trained:
            if role not in s.optim:
                raise ValueError(f"optim lacks {role!r}, which the stage trains.")
            o, c = s.optim[role], trained[role]
            with at_path(f"config.{name}.optim.{role}"):
                _check_options(o)
                updates = s.steps * c.epochs * c.minibatches
                schedules[role] = warmup_then(
                    o.schedule, peak=o.lr, updates=updates, warmup=o.warmup, final=o.final
                )
            if role in s.adapt:
                with at_path(f"config.{name}.adapt.{role}"):
                    specs[role] = ways.spec(s.adapt[role], lms[role], o, schedules[role], updates)
                    started(s.adapt[role], lms[role])
                continue
            with at_path(f"config.{name}.optim.{role}"):
                tx = optimizer(
                    o.name,
                    schedules[role],
                    clip_norm=o.clip_norm,
                    weight_decay=o.weight_decay,
                    store=o.store,
                    descent=o.descent,
                    frozen=o.frozen,
                    options=o.options,
                )
                if (o.store or o.name in optim.OWN) and lms[role].param_dtype == "float32":
                    raise ValueError(
                        f"{o.name} with store={o.store!r} is for parameters of 16 bits, but "
                        "config.model.param_dtype is 'float32', of which it would keep nothing."
                    )
                _check_patterns(shapes, o.frozen)
        specs[role] = Spec(shapes, axes, tx)
    return specs, schedules


def _check_options(o: OptimSettings) -> None:
    """Checks types and ranges of an optimizer's numeric options."""
    if o.name not in optim.optimizer_names():
        return  # `optimizer` reports it
    known = inspect.signature(optim.OWN.get(o.name) or getattr(optax, o.name)).parameters
    for name, value in o.options.items():
        if name in ("learning_rate", "mask"):
            raise ValueError(f"options.{name} is {value!r:.200}, but a stage sets it by itself.")
        if name.endswith("dtype") and value not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"options.{name} is {value!r:.200}, the name of no float type.")
        like = known[name].default if name in known else None
        if type(like) in (int, float) and type(value) not in (int, float):
            raise ValueError(f"options.{name} is {value!r:.200}, but must be a number like {like}.")
        if type(like) is bool and type(value) is not bool:
            raise ValueError(f"options.{name} is {value!r:.200}, but must be True or False.")
        if type(value) is float and not math.isfinite(value):
            raise ValueError(f"options.{name} is {value}, but must be finite.")
        if name in ("b1", "b2", "b3", "momentum") and type(like) is float and not 0 <= value < 1:
            raise ValueError(f"options.{name} is {value}, but must be at least 0 and below 1.")
        if name.startswith("eps") and type(like) is float and value < 0:
            raise ValueError(f"options.{name} is {value}, but must be at least 0.")


def _check_patterns(shapes: Any, patterns: tuple[str, ...]) -> None:
    if patterns:
        tree.match(shapes, patterns)


def batch_shapes(s: StageSettings, kind: str, length: int = 0) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes of a stage's batches.

    Args:
        kind: of the batches, see `data.loader.batches`.
        length: tokens of a row; 0: the config's.
    """

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    b, length, prompt = s.batch, length or s.data.length, s.data.prompt_length
    if kind == "prompts":
        if prompt < 1:
            raise ValueError(f"data.prompt_length is {prompt}; {s.algorithm} needs at least 1.")
        return {
            "prompt": array(b, prompt),
            "prompt_length": array(b),
            "prompt_example": array(b),
        }
    if length < 2:
        raise ValueError(f"data.length is {length}; {s.algorithm} needs at least 2.")
    whole = array(b, length)
    mask = array(b, length, dtype=jnp.float32)
    return {"tokens": whole, "segment": whole, "position": whole, "mask": mask}

"""Checks of `AdaptSettings` with an optimizer's, before anything is built."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxrl_eff.optim import OWN, sparse
from jaxrl_eff.peft import lora
from jaxrl_eff.peft.config import AdaptSettings, Optimizer

GRANULARITIES = ("element", "block", "row", "column", "head")
SCHEDULES = ("static", "periodic", "spiel_ag", "spiel_ma")
NAMES = (*SCHEDULES, "lisa", *lora.METHODS)


def check(s: AdaptSettings, optim: Optimizer) -> None:
    if s.name not in NAMES:
        raise ValueError(f"unknown adaptation {s.name!r}; expected one of {list(NAMES)}.")
    if s.name in lora.METHODS and not s.rank:
        raise ValueError(f"name is {s.name!r}, but rank is {s.rank}; it must be at least 1.")
    if s.start and s.name not in lora.METHODS:
        raise ValueError(f"start is {s.start!r}, but only {list(lora.METHODS)} start from files.")
    if s.granularity not in GRANULARITIES:
        raise ValueError(
            f"unknown granularity {s.granularity!r}; expected one of {list(GRANULARITIES)}."
        )
    if s.selector not in (*sparse.WEIGHTS, *sparse.GRADIENTS):
        both = [*sparse.WEIGHTS, *sparse.GRADIENTS]
        raise ValueError(f"unknown selector {s.selector!r}; expected one of {both}.")
    if s.name == "spiel_ag" and s.selector not in sparse.GRADIENTS:
        raise ValueError(
            f"spiel_ag grows by a gradient, but selector is {s.selector!r}; expected one of "
            f"{list(sparse.GRADIENTS)}."
        )
    if s.name == "spiel_ma":
        _check_accumulators(s, optim)
    elif s.name in SCHEDULES and optim.name == "sm3":
        raise ValueError(f"name is {s.name!r}, but of entries only spiel_ma is updated by sm3.")
    if s.name == "periodic" and s.selector == "random":
        raise ValueError("periodic with selector 'random' would choose the same again.")
    if s.name == "lisa" and (s.rank or s.mode != "in_place"):
        raise ValueError("lisa trains whole kernels; it has no rank and no overlay.")
    if s.mode not in ("in_place", "overlay"):
        raise ValueError(f"mode is {s.mode!r}, not 'in_place' or 'overlay'.")
    if s.mode == "overlay" and s.on_drop != "revert":
        raise ValueError(f"on_drop is {s.on_drop!r}, but an overlay always reverts.")
    for field in ("block", "tiles"):
        value = getattr(s, field)
        if len(value) != 2 or min(value) < 1:
            raise ValueError(f"{field} is {value}; it must be two numbers of at least 1.")
    if s.name in (*SCHEDULES, "lisa") and optim.name in OWN:
        raise ValueError(
            f"optim is {optim.name!r}, but {s.name} updates numbers in float32 and keeps what "
            "rounding loses by itself; it must be one of optax's."
        )


def _check_accumulators(s: AdaptSettings, optim: Optimizer) -> None:
    if s.selector not in sparse.WEIGHTS:
        raise ValueError(
            f"spiel_ma grows by accumulators, and the selector of its start is {s.selector!r}; "
            f"there are {list(sparse.WEIGHTS)}."
        )
    if optim.name != "sm3" or optim.weight_decay or optim.options:
        raise ValueError(
            f"spiel_ma updates by SM3, but optim is {optim.name!r} with weight_decay="
            f"{optim.weight_decay} and options={optim.options}; it must be 'sm3' without them."
        )
    if s.granularity != "element" or s.mode != "in_place":
        raise ValueError(
            f"spiel_ma trains single entries in place, but granularity is {s.granularity!r} and "
            f"mode is {s.mode!r}."
        )


def check_store(optim: Optimizer, leaves: Mapping[str, Any]) -> None:
    """Checks the optimizer of leaves that are trained in full, given their shapes by name.

    Raises:
        ValueError: it keeps or reports what rounding loses, but no weight is rounded.
    """
    narrow = any(jnp.dtype(x.dtype).itemsize == 2 for x in leaves.values())
    if (optim.store or optim.name in OWN) and not narrow:
        raise ValueError(
            f"optim is {optim.name!r} with store={optim.store!r}, which is for parameters of 16 "
            "bits that are trained in full (adapt's whole); adapters are float32, and entries and "
            "layers in turn keep what rounding loses by themselves."
        )
    if optim.descent and not leaves:
        raise ValueError(
            "optim.descent reports what rounding loses of updates of parameters that are trained "
            "in full, but there are none; entries and layers in turn lose nothing."
        )

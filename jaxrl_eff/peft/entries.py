"""The entries of kernels that are trained: `AdaptSettings` as `optim.sparse` reads them."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import optax
from jax.sharding import PartitionSpec

from jaxrl_eff import tree
from jaxrl_eff.models import LMConfig, params
from jaxrl_eff.optim import optimizer, sparse
from jaxrl_eff.optim.sparse import SparseAdapt, SparseOverlay, Tiling
from jaxrl_eff.peft import lora
from jaxrl_eff.peft.config import AdaptSettings, Optimizer


def entries_of(
    s: AdaptSettings,
    lm: LMConfig,
    optim: Optimizer,
    schedule: optax.Schedule | float = 1.0,
    updates: int = 1,
) -> SparseAdapt | SparseOverlay:
    """Returns only the sparse part, for example to restore a trained model with its `revert`.

    Args:
        schedule, updates: as for `ways.spec`.
    """
    common = {
        "selector": s.selector, "schedule": _schedule(s, updates), "learning_rate": schedule,
        "layout": Layout(s, lm, targets_of(s, lm, optim)), "seed": s.seed,
    }  # fmt: skip
    inner = sparse.SM3() if s.name == "spiel_ma" else inner_optimizer(optim)
    if s.mode == "overlay":
        return sparse.sparse_overlay(inner, **common)
    return sparse.sparse_adapt(inner, on_drop=s.on_drop, **common)


def inner_optimizer(optim: Optimizer) -> optax.GradientTransformation:
    """Returns the optimizer of values in float32, whose rate multiplies its updates."""
    return optimizer(optim.name, 1.0, weight_decay=optim.weight_decay, options=optim.options)


def all_targets(s: AdaptSettings, lm: LMConfig) -> dict[str, tuple[str | None, ...]]:
    """Returns the kernels whose entries or layers are trained: name -> logical axes."""
    return {} if s.name in lora.METHODS else lora.targets(lm, s.targets or lora.TARGETS)


def targets_of(
    s: AdaptSettings, lm: LMConfig, optim: Optimizer
) -> dict[str, tuple[str | None, ...]]:
    """Returns `all_targets` without frozen ones."""
    found = all_targets(s, lm)
    return {k: found[k] for k in unfrozen(found, optim)}


def unfrozen(names: Iterable[str], optim: Optimizer) -> list[str]:
    """Returns the names that no pattern of `optim.frozen` matches."""
    return [k for k in names if not tree.matches(k, optim.frozen)]


def _schedule(s: AdaptSettings, updates: int) -> Any:
    first = s.selector in sparse.GRADIENTS
    if s.name == "periodic":
        return sparse.Periodic(s.every, first=first)
    if s.name == "spiel_ag":
        return sparse.Spiel(s.every, s.share, updates, s.decay)
    if s.name == "spiel_ma":
        return sparse.Spiel(s.every, s.share, updates, s.decay, first=False)
    return sparse.Static(first=first)


class Layout:
    """Maps name, leaf -> `Tiling`, sharded by the current logical axis rules and mesh.

    Attributes:
        tilings: name -> `Tiling` without any mesh.
        grids: name -> tiles down and across.
        axes: name -> logical axes of the kernel.
    """

    def __init__(self, s: AdaptSettings, lm: LMConfig, kernels: dict[str, tuple[str | None, ...]]):
        self.axes, flat = kernels, tree.flat(params.abstract(lm))
        self.tilings: dict[str, Tiling] = {}
        self.grids: dict[str, tuple[int, int]] = {}
        for name, axes in self.axes.items():
            shape, n = flat[name].shape, lora.inputs_of(axes[1:])
            self.grids[name] = _grid(s, axes[1:], shape[1:], n)
            try:
                self.tilings[name] = sparse.tiling(
                    shape, s.density, stack=1, inputs=n, grid=self.grids[name],
                    block=_block(s, lm, axes[1:], n),
                )  # fmt: skip
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None

    def __call__(self, name: str, leaf: Any) -> Tiling | None:
        del leaf
        t = self.tilings.get(name)
        return t and dataclasses.replace(t, spec=self._spec(name))

    def _spec(self, name: str) -> PartitionSpec | None:
        """Returns None if tiles cross devices, or there is one device."""
        table, sizes = dict(nn.get_logical_axis_rules()), jax.sharding.get_abstract_mesh().shape
        ways = {k: math.prod(sizes.get(a, 1) for a in v or ()) for k, v in table.items()}
        sides = zip(self.index_axes(name)[1:], self.grids[name], strict=True)
        if max(ways.values(), default=1) == 1 or any(n % ways[axis] for axis, n in sides):
            return None
        return PartitionSpec(*[table[axis] or None for axis in self.axes[name]])

    def index_axes(self, name: str) -> tuple[str, ...]:
        """Returns the logical axes of the first three axes of all arrays kept per unit."""
        axes = self.axes[name]
        return axes[0], axes[1], axes[1 + self.tilings[name].inputs]


def _grid(s: AdaptSettings, axes: Any, shape: tuple[int, ...], n: int) -> tuple[int, int]:
    """Returns tiles down and across: divisors of `tiles[0]` along `embed`, else of `tiles[1]`."""
    ways = [s.tiles[0] if axes[i] == "embed" else s.tiles[1] for i in (0, n)]
    return math.gcd(shape[0], ways[0]), math.gcd(shape[n], ways[1])


def _block(s: AdaptSettings, lm: LMConfig, axes: Any, n: int) -> tuple[int, int]:
    if s.granularity == "head":  # heads of attention, channels of an MLP
        size = lm.head_dim if "head_dim" in axes else 1
        return (0, size) if axes[0] == "embed" else (size, 0)
    whole = {"element": (1, 1), "row": (1, 0), "column": (0, 1)}
    return whole.get(s.granularity) or (s.block[0], s.block[1])

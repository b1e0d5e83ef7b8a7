"""Training of a part of a model: sparse changes of its kernels, LoRA, some parameters, or all.

Turns `AdaptSettings` and a model's shape into a `graph.Adaptation`, which defines the
differentiated arrays and their update, and into the added parameters (LoRA's matrices). Sparse
changes in place need none: the kernels themselves are written, which is transparent to all other
calls of the model.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from jaxrl_eff import tree
from jaxrl_eff.core.graph import Adaptation, Spec
from jaxrl_eff.models import LMConfig, params
from jaxrl_eff.optim import OWN, optimizer, sparse
from jaxrl_eff.optim.sparse import SampledLayers, SparseAdapt, SparseOverlay, Tiling
from jaxrl_eff.peft import lora, quantized
from jaxrl_eff.peft.config import AdaptSettings, Optimizer

GRANULARITIES = ("element", "block", "row", "column", "head")
SCHEDULES = ("static", "periodic", "spiel_ag", "spiel_ma")
NAMES = (*SCHEDULES, "lisa", *lora.METHODS)


def spec(
    s: AdaptSettings, lm: LMConfig, optim: Optimizer, schedule: optax.Schedule, updates: int
) -> Spec:
    """Returns the `Spec` of a model that is trained in part.

    Args:
        lm: its configuration.
        optim: the optimizer settings of all trained parameters.
        schedule: its learning rate.
        updates: optimizer updates of the whole training.

    Raises:
        ValueError: a setting is invalid or does not fit the model.
    """
    _check(s, optim)
    shapes, axes = params.abstract(lm), params.logical_axes(lm)
    low_rank: dict[str, jax.ShapeDtypeStruct] = {}
    if s.rank:
        wanted = s.targets or lora.TARGETS
        low_rank, logical = lora.lora_shapes(lm, s.rank, wanted, dora=s.name == "dora")
        shapes, axes = tree.with_leaves(shapes, low_rank), tree.with_leaves(axes, logical)
    whole = whole_names(s, lm)
    under = {k.removesuffix("lora_a") + "kernel" for k in low_rank if k.endswith("lora_a")}
    if both := sorted(under & set(whole)):
        raise ValueError(f"whole has {both}, which have an adapter; see targets.")
    names = [k for k in low_rank if not k.endswith("lora_scale")] + whole
    parts: dict[str, Any] = {}
    if names:
        options = {"weight_decay": optim.weight_decay, "options": optim.options}
        parts["whole"] = _Whole(names, optimizer(optim.name, schedule, **options))
    if s.name in SCHEDULES:
        of = entries_of(s, lm, optim, schedule, updates)
        if both := sorted(set(whole) & set(of.layout.tilings)):
            raise ValueError(f"whole has {both}, which are also trained by entries.")
        if s.mode == "in_place":
            parts["entries"] = _InPlace(of)
        else:
            parts["entries"] = _Beside(of, jnp.dtype(lm.param_dtype))
            made, logical = parts["entries"].added(shapes)
            shapes, axes = tree.with_leaves(shapes, made), tree.with_leaves(axes, logical)
    if s.name == "lisa":
        inner = optimizer(optim.name, 1.0, weight_decay=optim.weight_decay, options=optim.options)
        of = sparse.sampled_layers(
            inner, total=lm.layers, active=s.layers, every=s.every, learning_rate=schedule,
            seed=s.seed,
        )  # fmt: skip
        parts["entries"] = _InTurn(of, lora.targets(lm, s.targets or lora.TARGETS), lm.layers)
    if (kept := kept_in_bits(s, lm)) is not None:
        shapes, axes = kept.shapes(shapes, axes)
    way = _adaptation(s, optim.clip_norm, low_rank, parts, kept, jnp.dtype(lm.param_dtype))
    return Spec(shapes, axes, way)


def entries_of(
    s: AdaptSettings,
    lm: LMConfig,
    optim: Optimizer,
    schedule: optax.Schedule | float = 1.0,
    updates: int = 1,
) -> SparseAdapt | SparseOverlay:
    """Returns only the sparse part, for example to restore a trained model with its `revert`.

    Args:
        schedule, updates: as for `spec`.
    """
    if s.name == "spiel_ma":
        inner = sparse.SM3()
    else:
        inner = optimizer(optim.name, 1.0, weight_decay=optim.weight_decay, options=optim.options)
    common = {
        "selector": s.selector, "schedule": _schedule(s, updates), "learning_rate": schedule,
        "layout": _Layout(s, lm, s.targets or lora.TARGETS), "seed": s.seed,
    }  # fmt: skip
    if s.mode == "overlay":
        return sparse.sparse_overlay(inner, **common)
    return sparse.sparse_adapt(inner, on_drop=s.on_drop, **common)


def whole_names(s: AdaptSettings, lm: LMConfig) -> list[str]:
    """Returns the parameters of the base model that are trained in full.

    Raises:
        ValueError: a pattern matches none.
    """
    # A head that is initialized to 0 would otherwise stay there.
    wanted = (*s.whole, *(("value/kernel",) if lm.head == "value" else ()))
    if not wanted:
        return []
    return [k for k, v in tree.flat(tree.match(params.abstract(lm), wanted)).items() if v]


def kept_in_bits(s: AdaptSettings, lm: LMConfig) -> quantized.Quantized | None:
    """Returns the format of quantized kernels; None if the base is not quantized.

    Raises:
        ValueError: the method writes into kernels, the kind is unknown, or a kernel has no blocks.
    """
    if not s.base:
        return None
    if s.name not in lora.METHODS and s.mode != "overlay":
        raise ValueError(
            f"base is {s.base!r}, but {s.name!r} with mode={s.mode!r} writes into the kernels; "
            f"only {list(lora.METHODS)} and mode='overlay' leave them as they are."
        )
    blocks, flat, whole = {}, tree.flat(params.abstract(lm)), whole_names(s, lm)
    for name, axes in lora.targets(lm).items():
        if name not in whole:
            try:
                blocks[name] = quantized.block_of(s.base, axes, flat[name].shape, s.tiles[1])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    return quantized.Quantized(s.base, blocks)


def frozen(spec_: Spec) -> frozenset[str]:
    """Returns the parameters that neither an update nor a reselection changes.

    Determined from the jaxprs of both, so a parameter rewritten with the same value counts as
    changed.
    """
    way, shapes = spec_.tx, spec_.shapes
    opt = jax.eval_shape(way.init, shapes)
    grads, finite = jax.eval_shape(way.leaves, shapes, opt), jax.ShapeDtypeStruct((), jnp.bool_)
    kept = _unchanged(lambda p, o, g, f: way.update(g, o, p, f)[0], shapes, opt, grads, finite)
    if way.reselect is not None:
        found = None if way.probes is None else jax.eval_shape(way.probes, shapes, opt)
        kept &= _unchanged(lambda p, o, g: way.reselect(p, o, g)[0], shapes, opt, found)
    return frozenset(kept)


def _unchanged(fn: Any, shapes: Any, *more: Any) -> set[str]:
    """Returns names of parameters that `(parameters, ...) -> parameters` returns unchanged."""
    jaxpr = jax.make_jaxpr(fn)(shapes, *more).jaxpr
    pairs = zip(tree.names(shapes), jaxpr.invars, jaxpr.outvars, strict=False)
    return {name for name, a, b in pairs if a is b}


def in_every_node(spec_: Spec) -> Spec:
    """Returns the spec with frozen weights in every node, sharded over the node's devices only."""
    kept = frozen(spec_)
    axes = {
        name: tuple("node_embed" if a == "embed" else a for a in names)
        for name, names in tree.flat(spec_.axes, is_leaf=lambda x: isinstance(x, tuple)).items()
        if name in kept
    }
    return spec_._replace(axes=tree.with_leaves(spec_.axes, axes))


def keeps_base(s: AdaptSettings | None) -> bool:
    """Returns True if the base model is kept unchanged, beside the trained parameters."""
    beside = s is not None and (s.name in lora.METHODS or s.mode == "overlay")
    return beside and not s.whole


def _check(s: AdaptSettings, optim: Optimizer) -> None:
    if s.name not in NAMES:
        raise ValueError(f"name is {s.name!r}; there are {list(NAMES)}.")
    if s.name in lora.METHODS and not s.rank:
        raise ValueError(f"name is {s.name!r}, but rank is {s.rank}; it must be at least 1.")
    if s.start and s.name not in lora.METHODS:
        raise ValueError(f"start is {s.start!r}, but only {list(lora.METHODS)} start from files.")
    if s.granularity not in GRANULARITIES:
        raise ValueError(f"granularity is {s.granularity!r}; there are {list(GRANULARITIES)}.")
    if s.selector not in (*sparse.WEIGHTS, *sparse.GRADIENTS):
        both = [*sparse.WEIGHTS, *sparse.GRADIENTS]
        raise ValueError(f"selector is {s.selector!r}; there are {both}.")
    if s.name == "spiel_ag" and s.selector not in sparse.GRADIENTS:
        raise ValueError(
            f"spiel_ag grows by a gradient, but selector is {s.selector!r}; there are "
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
    if optim.store or optim.name in OWN:
        raise ValueError(
            f"optim is {optim.name!r} with store={optim.store!r}; with adapt it must be one of "
            "optax's without a store, since entries keep what rounding loses by themselves."
        )
    if optim.descent:
        raise ValueError("optim.descent is for models that are trained whole, not with adapt.")
    if optim.frozen:
        raise ValueError(f"optim.frozen is {optim.frozen}; with adapt, name what is trained.")


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


def _schedule(s: AdaptSettings, updates: int) -> Any:
    first = s.selector in sparse.GRADIENTS
    if s.name == "periodic":
        return sparse.Periodic(s.every, first=first)
    if s.name == "spiel_ag":
        return sparse.Spiel(s.every, s.share, updates, s.decay)
    if s.name == "spiel_ma":
        return sparse.Spiel(s.every, s.share, updates, s.decay, first=False)
    return sparse.Static(first=first)


class _Layout:
    """Maps name, leaf -> `Tiling`, sharded by the current logical axis rules and mesh.

    Attributes:
        tilings: name -> `Tiling` without any mesh.
        grids: name -> tiles down and across.
        axes: name -> logical axes of the kernel.
    """

    def __init__(self, s: AdaptSettings, lm: LMConfig, patterns: tuple[str, ...]):
        self.axes, flat = lora.targets(lm, patterns), tree.flat(params.abstract(lm))
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


def _beside(kernel: str, leaf: str) -> str:
    """Returns the name of a leaf stored beside a kernel."""
    return kernel.removesuffix("kernel") + leaf


class _Whole(NamedTuple):
    """Leaves that are trained in full: LoRA's, and parameters by name."""

    names: list[str]
    tx: optax.GradientTransformation

    def leaves(self, params_: Any, opt: Any) -> dict[str, jax.Array]:
        del opt
        flat = tree.flat(params_)
        return {k: flat[k] for k in self.names}

    def init(self, params_: Any) -> Any:
        return self.tx.init(self.leaves(params_, None))

    def index(self, opt: Any) -> dict[str, jax.Array]:
        del opt
        return {}

    def update(self, grads: dict[str, jax.Array], opt: Any, params_: Any, finite: jax.Array):
        mine = self.leaves(params_, opt)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
            changes, new = self.tx.update({k: grads[k] for k in self.names}, opt, mine)
            changed = optax.apply_updates(mine, changes)
        changed = tree.where(finite, changed, mine)
        return tree.with_leaves(params_, changed), tree.where(finite, new, opt)


class _InPlace(NamedTuple):
    """Trained entries that are written into the kernels."""

    of: SparseAdapt

    def leaves(self, params_: Any, opt: sparse.SparseState) -> dict[str, jax.Array]:
        del params_
        shapes = {name: a.original.shape for name, a in opt.active.items()}
        return {_beside(k, "tap"): jnp.zeros(shape, jnp.float32) for k, shape in shapes.items()}

    def init(self, params_: Any) -> sparse.SparseState:
        return self.of.init(params_)

    def index(self, opt: sparse.SparseState) -> dict[str, jax.Array]:
        return {_beside(k, "tap_index"): a.index for k, a in opt.active.items()}

    def probes(self, params_: Any, opt: sparse.SparseState) -> dict[str, jax.Array]:
        del params_
        return {k: a.index for k, a in opt.active.items()}

    def update(self, grads: dict[str, jax.Array], opt: Any, params_: Any, finite: jax.Array):
        taps = {k: grads[_beside(k, "tap")] for k in opt.active}
        updates, new = self.of.update(taps, opt, params_)
        # To change nothing, the old values are written: k of them, without a second kernel.
        updates = tree.where(finite, updates, self.of.read(params_, opt))
        return self.of.apply(params_, updates), tree.where(finite, new, opt)

    def reselect(self, params_: Any, opt: Any, found: Any) -> tuple[Any, Any]:
        return self.of.reselect(params_, opt, found)


class _Beside(NamedTuple):
    """Trained entries whose changes are stored beside the kernels.

    `stored` is the dtype of dequantized kernels.
    """

    of: SparseOverlay
    stored: jnp.dtype

    def added(self, shapes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns shapes and logical axes of the added parameters."""
        made, axes, layout = {}, {}, self.of.layout
        for name, o in jax.eval_shape(self.of.start, shapes).items():
            sides = zip(layout.index_axes(name)[1:], layout.grids[name], strict=True)
            first = ("layers", *(axis if n > 1 else None for axis, n in sides))
            for leaf, x in (("delta_index", o.index), ("delta", o.delta)):
                made[_beside(name, leaf)] = x
                axes[_beside(name, leaf)] = (*first, *[None] * (x.ndim - 3))
        return made, axes

    def start(self, base: Any) -> dict[str, jax.Array]:
        return self._leaves(self.of.start(base))

    def _leaves(self, overlays: dict[str, sparse.Overlay]) -> dict[str, jax.Array]:
        index = {_beside(k, "delta_index"): o.index for k, o in overlays.items()}
        return index | {_beside(k, "delta"): o.delta for k, o in overlays.items()}

    def _overlays(self, params_: Any) -> dict[str, sparse.Overlay]:
        flat = tree.flat(params_)
        return {
            k: sparse.Overlay(flat[_beside(k, "delta_index")], flat[_beside(k, "delta")])
            for k in self.of.layout.tilings
        }

    def leaves(self, params_: Any, opt: Any) -> dict[str, jax.Array]:
        del opt
        return {_beside(k, "delta"): o.delta for k, o in self._overlays(params_).items()}

    def init(self, params_: Any) -> sparse.OverlayState:
        return self.of.init(self._overlays(params_))

    def index(self, opt: Any) -> dict[str, jax.Array]:
        del opt
        return {}

    def probes(self, params_: Any, opt: Any) -> dict[str, jax.Array]:
        del opt
        return {k: o.index for k, o in self._overlays(params_).items()}

    def update(self, grads: dict[str, jax.Array], opt: Any, params_: Any, finite: jax.Array):
        old = self._overlays(params_)
        new, after = self.of.update({k: grads[_beside(k, "delta")] for k in old}, opt, old)
        leaves = self._leaves(tree.where(finite, new, old))
        return tree.with_leaves(params_, leaves), tree.where(finite, after, opt)

    def reselect(self, params_: Any, opt: Any, found: Any) -> tuple[Any, Any]:
        plain = quantized.plain(params_, self.stored)
        new, opt = self.of.reselect(plain, opt, self._overlays(params_), found)
        return tree.with_leaves(params_, self._leaves(new)), opt


class _InTurn(NamedTuple):
    """Kernels of a few layers at a time, trained in full."""

    of: SampledLayers
    axes: dict[str, tuple[str | None, ...]]
    layers: int

    def kernels(self, params_: Any) -> dict[str, jax.Array]:
        flat = tree.flat(params_)
        return {k: flat[k] for k in self.axes}

    def name(self, kernel: str) -> str:
        return "shared/" + _beside(kernel, "whole")

    def leaves(self, params_: Any, opt: sparse.LayersState) -> dict[str, jax.Array]:
        active = opt.layers.shape[0]
        return {
            self.name(k): jnp.zeros((active, *x.shape[1:]), jnp.float32)
            for k, x in self.kernels(params_).items()
        }

    def init(self, params_: Any) -> sparse.LayersState:
        return self.of.init(self.kernels(params_))

    def index(self, opt: sparse.LayersState) -> dict[str, jax.Array]:
        active = opt.layers.shape[0]
        turn = jnp.full(self.layers, active, jnp.int32)
        turn = turn.at[opt.layers].set(jnp.arange(active, dtype=jnp.int32))
        return {_beside(k, "turn"): turn for k in self.axes}

    def update(self, grads: dict[str, jax.Array], opt: Any, params_: Any, finite: jax.Array):
        kernels = self.kernels(params_)
        values, new = self.of.update({k: grads[self.name(k)] for k in kernels}, opt, kernels)
        values = tree.where(finite, values, self.of.read(kernels, opt))
        written = self.of.write(kernels, opt, values)
        return tree.with_leaves(params_, written), tree.where(finite, new, opt)

    def reselect(self, params_: Any, opt: Any, found: Any) -> tuple[Any, Any]:
        del found
        return params_, self.of.reselect(opt)


def _adaptation(
    s: AdaptSettings,
    clip_norm: float,
    low_rank: dict[str, jax.ShapeDtypeStruct],
    parts: dict[str, _Whole | _InPlace | _Beside | _InTurn],
    kept: quantized.Quantized | None,
    stored: jnp.dtype,
) -> Adaptation:
    """Combines several parts into one `Adaptation`; its optimizer state has theirs, by name.

    `extended` quantizes the kernels in `kept` unless the base is already quantized. `stored` is the
    dtype of dequantized kernels; under jit, only those that are read are dequantized.
    """
    entries, probe = parts.get("entries"), f"probe_{s.selector}"

    def extended(base: Any) -> Any:
        leaves: dict[str, jax.Array] = {}
        if kept is not None and not quantized.inside(base):
            base = kept.params(base)
        plain = quantized.plain(base, stored)
        if low_rank:
            method = s.name if s.name in lora.METHODS else "lora"
            scale = lora.lora_scale(method, s.alpha, s.rank)
            leaves |= lora.lora_init(plain, low_rank, jax.random.key(s.seed), scale)
        if isinstance(entries, _Beside):
            leaves |= entries.start(plain)
        return tree.with_leaves(base, leaves)

    def init(params_: Any) -> dict[str, Any]:
        return {k: part.init(params_) for k, part in parts.items()}

    def leaves(params_: Any, opt: Any) -> dict[str, jax.Array]:
        return {k: v for p in parts for k, v in parts[p].leaves(params_, opt[p]).items()}

    def attach(params_: Any, opt: Any, given: dict[str, jax.Array]) -> Any:
        index = {k: v for p in parts for k, v in parts[p].index(opt[p]).items()}
        return tree.with_leaves(params_, index | given)

    def update(grads: dict[str, jax.Array], opt: Any, params_: Any, finite: jax.Array):
        if clip_norm:
            with jax.numpy_dtype_promotion("standard"):  # gradients of several dtypes
                clip = optax.clip_by_global_norm(clip_norm)
                grads, _ = clip.update(grads, optax.EmptyState())
        new = {}
        for name, part in parts.items():
            params_, new[name] = part.update(grads, opt[name], params_, finite)
        return params_, new

    def probes(params_: Any, opt: Any) -> dict[str, jax.Array]:
        found = {}
        for name, index in entries.probes(params_, opt["entries"]).items():
            *lead, count = index.shape
            found[_beside(name, probe)] = jnp.zeros((*lead, 3, count), jnp.float32)
        return found

    def reselect(params_: Any, opt: Any, found: dict[str, jax.Array] | None):
        if found is not None:
            found = {k: found[_beside(k, probe)] for k in entries.of.layout.tilings}
        params_, new = entries.reselect(params_, opt["entries"], found)
        return params_, opt | {"entries": new}

    def axes(name: str) -> tuple[str, ...] | None:
        if entries is None or not name.startswith("entries/"):
            return None
        if isinstance(entries, _InTurn):
            return next((v for k, v in entries.axes.items() if f"/{k}" in name), None)
        layout = entries.of.layout
        kernel = next((k for k in layout.tilings if f"/{k}/" in name), None)
        return kernel and layout.index_axes(kernel)

    due, by_gradient = None, False
    if isinstance(entries, _InTurn):
        due = entries.of.due
    elif entries is not None and (s.name != "static" or s.selector in sparse.GRADIENTS):
        due, by_gradient = entries.of.schedule.due, s.selector in sparse.GRADIENTS
    return Adaptation(
        init=init,
        leaves=leaves,
        attach=attach,
        update=update,
        extended=extended,
        axes=axes,
        due=due,
        probes=probes if by_gradient else None,
        reselect=reselect if entries is not None else None,
        probe=s.probe,
        passes=_passes(s, entries),
    )


def _passes(s: AdaptSettings, entries: Any) -> float:
    """Returns `passes`: an entry's gradient costs that of its kernel, a block's only its own."""
    if isinstance(entries, _InTurn):
        return 2 + s.layers / entries.layers
    return 3.0 if entries is not None and s.granularity == "element" else 2.0

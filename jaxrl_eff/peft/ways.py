"""Training of a part of a model: sparse changes of its kernels, LoRA, some parameters, or all.

Turns `AdaptSettings` and a model's shape into a `core.Spec`, whose `Adaptation` defines the
differentiated arrays and their update, and whose parameters include the added ones (LoRA's
matrices). Sparse changes in place need none: the kernels themselves are written, which is
transparent to all other calls of the model.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrl_eff import tree
from jaxrl_eff.core.specs import Adaptation, Spec
from jaxrl_eff.models import LMConfig, params
from jaxrl_eff.optim import optimizer, sparse
from jaxrl_eff.peft import checks, entries, lora, quantized, weights
from jaxrl_eff.peft.checks import SCHEDULES
from jaxrl_eff.peft.config import AdaptSettings, Optimizer
from jaxrl_eff.peft.trained import Entries, LayersInTurn, Overlays, Whole, beside


def spec(
    s: AdaptSettings, lm: LMConfig, optim: Optimizer, schedule: optax.Schedule, updates: int
) -> Spec:
    """Returns the `Spec` of a model that is trained in part.

    Args:
        lm: its configuration.
        optim: the optimizer settings of all trained parameters; `frozen` excludes some of them, and
            `store` and `descent` are of those that are trained in full.
        schedule: its learning rate.
        updates: optimizer updates of the whole training.

    Raises:
        ValueError: a setting is invalid or does not fit the model.
    """
    checks.check(s, optim)
    shapes, axes = params.abstract(lm), params.logical_axes(lm)
    low_rank: dict[str, jax.ShapeDtypeStruct] = {}
    if s.rank:
        wanted = s.targets or lora.TARGETS
        low_rank, logical = lora.lora_shapes(lm, s.rank, wanted, dora=s.name == "dora")
        shapes, axes = tree.with_leaves(shapes, low_rank), tree.with_leaves(axes, logical)
    names = _trained_in_full(s, lm, optim, low_rank)
    checks.check_store(optim, {k: tree.flat(shapes)[k] for k in names})
    parts: dict[str, Any] = {}
    if names:
        parts["whole"] = Whole(names, _optimizer(optim, schedule))
    view = functools.partial(weights.assembled, lm)

    def plain(stored: Any) -> Any:
        """Under jit, dequantizes only the kernels that are read."""
        return quantized.dequantized(weights.base(view(stored)), jnp.dtype(lm.param_dtype))

    kernels = entries.targets_of(s, lm, optim)
    if s.name in SCHEDULES and kernels:
        of = entries.entries_of(s, lm, optim, schedule, updates)
        if s.mode == "in_place":
            parts["entries"] = Entries(of)
        else:
            parts["entries"] = Overlays(of, plain)
            made, logical = parts["entries"].added(shapes)
            shapes, axes = tree.with_leaves(shapes, made), tree.with_leaves(axes, logical)
    if s.name == "lisa" and kernels:
        of = sparse.sampled_layers(
            entries.inner_optimizer(optim), total=lm.layers, active=s.layers, every=s.every,
            learning_rate=schedule, seed=s.seed,
        )  # fmt: skip
        parts["entries"] = LayersInTurn(of, kernels, lm.layers)
    if not parts:
        raise ValueError(f"optim.frozen is {optim.frozen}, which leaves nothing to train.")
    codes: frozenset[str] = frozenset()
    if (kept := kept_in_bits(s, lm)) is not None:
        shapes, axes = kept.shapes(shapes, axes)
        codes = frozenset(leaf for k in kept.blocks for leaf in kept.names(k))
    extended = functools.partial(_extended, s, low_rank, parts.get("entries"), kept, plain)
    way = _adaptation(s, optim.clip_norm, parts, extended)
    return Spec(shapes, axes, way, view=view, codes=codes)


def _trained_in_full(
    s: AdaptSettings, lm: LMConfig, optim: Optimizer, low_rank: Collection[str]
) -> list[str]:
    """Returns the names of the leaves that are trained in full: LoRA's, and parameters by name.

    Raises:
        ValueError: a parameter is trained in two ways, or a pattern of `optim.frozen` matches none.
    """
    whole, kernels = whole_names(s, lm), entries.all_targets(s, lm)
    under = {k.removesuffix("lora_a") + "kernel" for k in low_rank if k.endswith("lora_a")}
    if both := sorted(under & set(whole)):
        raise ValueError(f"whole has {both}, which have an adapter; see targets.")
    if both := sorted(set(whole) & set(kernels)):
        what = "layers in turn" if s.name == "lisa" else "entries"
        raise ValueError(f"whole has {both}, which are also trained by {what}.")
    trained = [k for k in low_rank if not k.endswith("lora_scale")] + whole
    for pattern in optim.frozen:
        if not any(tree.matches(k, (pattern,)) for k in (*trained, *kernels)):
            every = [*trained, *kernels]
            raise ValueError(
                f"optim.frozen has {pattern!r}, which matches nothing that is trained; that is "
                f"{every}."
            )
    return entries.unfrozen(trained, optim)


def _optimizer(optim: Optimizer, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns the optimizer of leaves that are trained in full; `_adaptation` clips gradients."""
    return optimizer(
        optim.name, schedule, weight_decay=optim.weight_decay, store=optim.store,
        descent=optim.descent, options=optim.options,
    )  # fmt: skip


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


def kept_in_bits(s: AdaptSettings, lm: LMConfig) -> quantized.BaseFormat | None:
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
    return quantized.BaseFormat(s.base, blocks)


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


def _extended(
    s: AdaptSettings,
    low_rank: dict[str, jax.ShapeDtypeStruct],
    part: Any,
    kept: quantized.BaseFormat | None,
    plain: Callable[[Any], Any],
    base: Any,
) -> Any:
    """Adds the adapters' initial values to parameters, and quantizes kernels that are not yet."""
    if kept is not None:
        base = kept.params(base)
    leaves: dict[str, jax.Array] = {}
    if low_rank:
        method = s.name if s.name in lora.METHODS else "lora"
        scale = lora.lora_scale(method, s.alpha, s.rank)
        leaves |= lora.lora_init(plain(base), low_rank, jax.random.key(s.seed), scale)
    if isinstance(part, Overlays):
        leaves |= part.start(plain(base))
    return tree.with_leaves(base, leaves)


def _adaptation(
    s: AdaptSettings, clip_norm: float, parts: dict[str, Any], extended: Callable[[Any], Any]
) -> Adaptation:
    """Combines several parts into one `Adaptation`; its optimizer state has theirs, by name."""
    entry, probe = parts.get("entries"), f"probe_{s.selector}"

    def init(params: Any) -> dict[str, Any]:
        return {k: part.init(params) for k, part in parts.items()}

    def leaves(params: Any, opt: Any) -> dict[str, jax.Array]:
        return {k: v for p in parts for k, v in parts[p].leaves(params, opt[p]).items()}

    def attach(params: Any, opt: Any, given: dict[str, jax.Array]) -> Any:
        constants = {k: v for p in parts for k, v in parts[p].constants(opt[p]).items()}
        return tree.with_leaves(params, constants | given)

    def update(grads: dict[str, jax.Array], opt: Any, params: Any, finite: jax.Array):
        if clip_norm:
            with jax.numpy_dtype_promotion("standard"):  # gradients of several dtypes
                clip = optax.clip_by_global_norm(clip_norm)
                grads, _ = clip.update(grads, optax.EmptyState())
        new = {}
        for name, part in parts.items():
            params, new[name] = part.update(grads, opt[name], params, finite)
        return params, new

    def probes(params: Any, opt: Any) -> dict[str, jax.Array]:
        found = {}
        for name, index in entry.indices(params, opt["entries"]).items():
            *lead, count = index.shape
            found[beside(name, probe)] = jnp.zeros((*lead, 3, count), jnp.float32)
        return found

    def reselect(params: Any, opt: Any, found: dict[str, jax.Array] | None):
        if found is not None:
            found = {k: found[beside(k, probe)] for k in entry.of.layout.tilings}
        params, new = entry.reselect(params, opt["entries"], found)
        return params, opt | {"entries": new}

    due, by_gradient = None, False
    if isinstance(entry, LayersInTurn):
        due = entry.of.due
    elif entry is not None and (s.name != "static" or s.selector in sparse.GRADIENTS):
        due, by_gradient = entry.of.schedule.due, s.selector in sparse.GRADIENTS
    return Adaptation(
        init=init,
        leaves=leaves,
        attach=attach,
        update=update,
        extended=extended,
        axes=lambda name: None if entry is None else entry.axes(name),
        due=due,
        probes=probes if by_gradient else None,
        reselect=reselect if entry is not None else None,
        probe=s.probe,
        passes=_passes(s, entry),
    )


def _passes(s: AdaptSettings, part: Any) -> float:
    """Returns `passes`: an entry's gradient costs that of its kernel, a block's only its own."""
    if isinstance(part, LayersInTurn):
        return 2 + s.layers / part.layers
    return 3.0 if part is not None and s.granularity == "element" else 2.0

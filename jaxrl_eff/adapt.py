"""Training a part of a model: sparse changes of its kernels, LoRA, some parameters whole, or all.

From `AdaptSettings` and a model's shape to a `graph.Adaptation`, which says what is differentiated
and how it is updated, and to the parameters that the model has besides (LoRA's matrices). Sparse
changes in place need none: the kernels themselves are written, and all other calls of the model
never notice.
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
from jaxrl_eff.graph import Adaptation, Spec
from jaxrl_eff.models import LMConfig, lora, params
from jaxrl_eff.optim import optimizer, sparse
from jaxrl_eff.optim.sparse import SparseAdapt, Tiling
from jaxrl_eff.settings import AdaptSettings, OptimSettings

GRANULARITIES = ("element", "block", "row", "column", "head")
SCHEDULES = ("static", "periodic", "spiel_ag")


class _Opt(NamedTuple):
    """Optimizer state: of leaves trained whole, by name, and of entries."""

    whole: Any = ()
    sparse: Any = ()


def spec(
    s: AdaptSettings, lm: LMConfig, optim: OptimSettings, schedule: optax.Schedule, updates: int
) -> Spec:
    """The `Spec` of a model that is trained in part.

    Args:
        lm: its shape.
        optim: the optimizer of everything that is trained.
        schedule: its learning rate.
        updates: optimizer updates of the whole training.

    Raises:
        ValueError: a setting that does not exist or does not fit the model.
    """
    _check(s, optim)
    shapes, axes = params.abstract(lm), params.logical_axes(lm)
    added: dict[str, jax.ShapeDtypeStruct] = {}
    patterns = s.targets or lora.TARGETS
    if s.rank:
        added, logical = lora.lora_shapes(lm, s.rank, patterns, dora=s.name == "dora")
        shapes, axes = tree.with_leaves(shapes, added), tree.with_leaves(axes, logical)
    # A head that starts at 0 would otherwise stay there.
    wanted = (*s.whole, *(("value/kernel",) if lm.head == "value" else ()))
    whole = [k for k, v in tree.flat(tree.match(shapes, wanted)).items() if v] if wanted else []
    names = [k for k in added if not k.endswith("lora_scale")] + whole
    tx = None
    if names:
        options = {"weight_decay": optim.weight_decay, "options": optim.options}
        tx = optimizer(optim.name, schedule, **options)
    entries = entries_of(s, lm, optim, schedule, updates) if s.name in SCHEDULES else None
    if entries and (both := sorted(set(whole) & set(entries.layout.tilings))):
        raise ValueError(f"whole has {both}, which are also trained by entries.")
    return Spec(shapes, axes, _adaptation(s, optim.clip_norm, added, names, tx, entries))


def entries_of(
    s: AdaptSettings,
    lm: LMConfig,
    optim: OptimSettings,
    schedule: optax.Schedule | float = 1.0,
    updates: int = 1,
) -> SparseAdapt:
    """The sparse part alone: for example to put a trained model back, by its `revert`.

    Args:
        schedule, updates: as for `spec`.
    """
    inner = optimizer(optim.name, 1.0, weight_decay=optim.weight_decay, options=optim.options)
    return sparse.sparse_adapt(
        inner, selector=s.selector, schedule=_schedule(s, updates), learning_rate=schedule,
        layout=_Layout(s, lm, s.targets or lora.TARGETS), on_drop=s.on_drop, seed=s.seed,
    )  # fmt: skip


def keeps_base(s: AdaptSettings | None) -> bool:
    """Whether the base model stays there unchanged, beside what is trained."""
    return s is not None and s.name in lora.METHODS and not s.whole


def _check(s: AdaptSettings, optim: OptimSettings) -> None:
    if s.name not in (*SCHEDULES, *lora.METHODS):
        raise ValueError(f"name is {s.name!r}; there are {[*SCHEDULES, *lora.METHODS]}.")
    if s.name in lora.METHODS and not s.rank:
        raise ValueError(f"name is {s.name!r}, but rank is {s.rank}; it must be at least 1.")
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
    if s.name == "periodic" and s.selector == "random":
        raise ValueError("periodic with selector 'random' would choose the same again.")
    for field in ("block", "tiles"):
        value = getattr(s, field)
        if len(value) != 2 or min(value) < 1:
            raise ValueError(f"{field} is {value}; it must be two numbers of at least 1.")
    if optim.frozen:
        raise ValueError(f"optim.frozen is {optim.frozen}; with adapt, name what is trained.")


def _schedule(s: AdaptSettings, updates: int) -> Any:
    first = s.selector in sparse.GRADIENTS
    if s.name == "periodic":
        return sparse.Periodic(s.every, first=first)
    if s.name == "spiel_ag":
        return sparse.Spiel(s.every, s.share, updates, s.decay)
    return sparse.Static(first=first)


class _Layout:
    """name, leaf -> `Tiling`, sharded as the rules and the mesh in force say.

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
        """None where tiles lie across devices, or there is one device."""
        table, sizes = dict(nn.get_logical_axis_rules()), jax.sharding.get_abstract_mesh().shape
        ways = {k: math.prod(sizes.get(a, 1) for a in v or ()) for k, v in table.items()}
        sides = zip(self.index_axes(name)[1:], self.grids[name], strict=True)
        if max(ways.values(), default=1) == 1 or any(n % ways[axis] for axis, n in sides):
            return None
        return PartitionSpec(*[table[axis] or None for axis in self.axes[name]])

    def index_axes(self, name: str) -> tuple[str, ...]:
        """Logical axes of the first three axes of everything that is kept for each unit."""
        axes = self.axes[name]
        return axes[0], axes[1], axes[1 + self.tilings[name].inputs]


def _grid(s: AdaptSettings, axes: Any, shape: tuple[int, ...], n: int) -> tuple[int, int]:
    """Tiles down and across: as many as divide, `tiles[0]` along `embed`, `tiles[1]` otherwise."""
    ways = [s.tiles[0] if axes[i] == "embed" else s.tiles[1] for i in (0, n)]
    return math.gcd(shape[0], ways[0]), math.gcd(shape[n], ways[1])


def _block(s: AdaptSettings, lm: LMConfig, axes: Any, n: int) -> tuple[int, int]:
    if s.granularity == "head":  # of heads, or in an MLP of its channels
        size = lm.head_dim if "head_dim" in axes else 1
        return (0, size) if axes[0] == "embed" else (size, 0)
    whole = {"element": (1, 1), "row": (1, 0), "column": (0, 1)}
    return whole.get(s.granularity) or (s.block[0], s.block[1])


def _adaptation(
    s: AdaptSettings,
    clip_norm: float,
    added: dict[str, jax.ShapeDtypeStruct],
    names: list[str],
    tx: optax.GradientTransformation | None,
    entries: SparseAdapt | None,
) -> Adaptation:
    """Names of leaves that are trained whole, and the entries, as one way to train."""
    beside = lambda name, leaf: name.removesuffix("kernel") + leaf  # noqa: E731

    def extended(base: Any) -> Any:
        if not added:
            return base
        scale = lora.lora_scale(s.name if s.name in lora.METHODS else "lora", s.alpha, s.rank)
        return tree.with_leaves(base, lora.lora_init(base, added, jax.random.key(s.seed), scale))

    def init(params_: Any) -> _Opt:
        flat = tree.flat(params_)
        return _Opt(
            tx.init({k: flat[k] for k in names}) if tx else (),
            entries.init(params_) if entries else (),
        )

    def leaves(params_: Any, opt: _Opt) -> dict[str, jax.Array]:
        flat = tree.flat(params_)
        found = {k: flat[k] for k in names}
        if entries:
            for name, active in opt.sparse.active.items():
                found[beside(name, "tap")] = jnp.zeros(active.original.shape, jnp.float32)
        return found

    def attach(params_: Any, opt: _Opt, given: dict[str, jax.Array]) -> Any:
        index = {}
        if entries:
            index = {beside(k, "tap_index"): a.index for k, a in opt.sparse.active.items()}
        return tree.with_leaves(params_, index | given)

    def update(grads: dict[str, jax.Array], opt: _Opt, params_: Any, finite: jax.Array):
        if clip_norm:
            grads, _ = optax.clip_by_global_norm(clip_norm).update(grads, optax.EmptyState())
        keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
        whole, inner, changed = opt.whole, opt.sparse, {}
        if tx:
            flat = tree.flat(params_)
            mine = {k: flat[k] for k in names}
            with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
                changes, whole = tx.update({k: grads[k] for k in names}, opt.whole, mine)
            changed = jax.tree.map(keep, optax.apply_updates(mine, changes), mine)
            whole = jax.tree.map(keep, whole, opt.whole)
        if entries:
            taps = {k: grads[beside(k, "tap")] for k in opt.sparse.active}
            updates, inner = entries.update(taps, opt.sparse, params_)
            updates = jax.tree.map(keep, updates, entries.read(params_, opt.sparse))
            inner = jax.tree.map(keep, inner, opt.sparse)
            params_ = entries.apply(params_, updates)
        return tree.with_leaves(params_, changed), _Opt(whole, inner)

    def probes(params_: Any, opt: _Opt) -> dict[str, jax.Array]:
        found = {}
        for name, active in opt.sparse.active.items():
            *lead, count = active.index.shape
            found[beside(name, f"probe_{s.selector}")] = jnp.zeros((*lead, 3, count))
        return found

    def reselect(params_: Any, opt: _Opt, found: dict[str, jax.Array] | None):
        if found is not None:
            found = {k: found[beside(k, f"probe_{s.selector}")] for k in opt.sparse.active}
        params_, inner = entries.reselect(params_, opt.sparse, found)
        return params_, opt._replace(sparse=inner)

    def axes(name: str) -> tuple[str, ...] | None:
        rest = name.removeprefix("sparse/active/")
        if rest == name:
            return None
        kernel = next(k for k in entries.layout.tilings if rest.startswith(f"{k}/"))
        return entries.layout.index_axes(kernel)

    by_gradient = entries is not None and s.selector in sparse.GRADIENTS
    return Adaptation(
        init=init,
        leaves=leaves,
        attach=attach,
        update=update,
        extended=extended,
        axes=axes,
        due=entries.schedule.due if entries else None,
        probes=probes if by_gradient else None,
        reselect=reselect,
        probe=s.probe,
    )

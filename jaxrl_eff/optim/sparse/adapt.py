"""In-place training of k entries of every matrix, with optimizer state for these only.

The parameters keep their arrays and dtypes; the optimizer writes the active entries into them. For
every active entry the state holds the inner optimizer's numbers, the value before training
(`original`, with which `revert` restores the base bit for bit), and for bfloat16 parameters the
rounding error (`remainder`): the parameter is the nearest bfloat16 of a float32 number, and an
int16 holds the difference of the number's bits from it. So training is in exact float32, at two
bytes per active entry and without a float32 copy.

Gradients are values of the active entries only, from a tap in the model's backward pass; for a loop
with dense gradients see `dense`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrl_eff.optim import mcf
from jaxrl_eff.optim.paths import path_name
from jaxrl_eff.optim.sparse import reselection, selectors
from jaxrl_eff.optim.sparse.masks import Layout, mask_index, masked_tiling, matrices
from jaxrl_eff.optim.sparse.per_entry import check_elementwise, per_entry
from jaxrl_eff.optim.sparse.sm3 import SM3
from jaxrl_eff.optim.sparse.tiling import Tiling, gather, per_shard, scatter
from jaxrl_eff.optim.store import apart


class Active(NamedTuple):
    """State of one parameter's active units."""

    index: Any  # int32[*stack, R, C, k], ascending in every tile
    inner: Any  # a counter and moments for every unit, or the `SM3State` of rows and columns
    original: Any  # values before training, in the parameter's dtype
    remainder: Any  # int16 values, for bfloat16 parameters; () for float32 ones


class SparseState(NamedTuple):
    """State of `sparse_adapt`."""

    count: Any  # int32[], updates done
    active: Any  # name -> Active


class SparseUpdate(NamedTuple):
    """New values of one parameter's active entries. They replace; they are not added."""

    index: Any
    value: Any


class SparseAdapt(NamedTuple):
    """Functions that `sparse_adapt` returns. Names are paths, "layers/attn/q/kernel".

    Attributes:
        init: params -> SparseState.
        update: (gradients of the active entries by name, state, params) -> (SparseUpdate by name,
            state). A pure function; it reads the parameters at the active entries only.
        read: (params, state) -> the updates that would change nothing.
        apply: (params, updates) -> params, in place where params are donated.
        reselect: (params, state, found) -> (params, state) with newly chosen units. `found` has
            the output of `selectors.candidates` for every name; None for selectors of weights.
        revert: (params, state) -> params with every active entry as it was before training.
        layout: (name, leaf) -> its `Tiling`, or None for parameters that are not trained.
        schedule: when `reselect` is due.
        selector: name of the selector.
    """

    init: Callable[[Any], SparseState]
    update: Callable[[Any, SparseState, Any], tuple[dict[str, SparseUpdate], SparseState]]
    read: Callable[[Any, SparseState], dict[str, SparseUpdate]]
    apply: Callable[[Any, Any], Any]
    reselect: Callable[[Any, SparseState, Any], tuple[Any, SparseState]]
    revert: Callable[[Any, SparseState], Any]
    layout: Layout
    schedule: Any
    selector: str


def sparse_adapt(
    inner: optax.GradientTransformation | SM3,
    *,
    selector: str | Mapping[str, Any] = "random",
    schedule: Any = None,
    density: float = 0.01,
    block: tuple[int, int] = (1, 1),
    layout: Layout | None = None,
    learning_rate: float | optax.Schedule = 1.0,
    on_drop: str = "revert",
    seed: int = 0,
) -> SparseAdapt:
    """Sparse training around an elementwise optax optimizer.

    Args:
        inner: e.g. `optax.adam(1.0)`. It receives each entry with its own counter and, as
            parameters, the entry's distance from its original value, so weight decay pulls to the
            base model. Or `SM3()`, which with `Spiel` also scores growth, so that the selector, one
            of `selectors.WEIGHTS`, makes only the first choice: SpIEL-MA.
        selector: one of `selectors.WEIGHTS` or `selectors.GRADIENTS`, or for every parameter by
            name a boolean mask (numpy) of its entries, with equally many in every tile.
        schedule: `Static`, `Periodic` or `Spiel`; None: `Static`.
        density: share of the entries that is active.
        block: rows and columns of a unit, see `tiling`.
        layout: (name, leaf) -> `Tiling` or None; None: every leaf of two or more axes, whose last
            two are the matrix.
        learning_rate: multiplies the inner updates, by count of all updates. Pass a schedule here:
            inside `inner` it would count each entry's own updates.
        on_drop: effect on an entry that is no longer active: "revert" restores its original value,
            so that never more than the density differ from the base; "keep" leaves it.
        seed: of random choices.

    Raises:
        ValueError: an option does not exist or does not fit.
    """
    masks = selector if isinstance(selector, Mapping) else None
    selector = "mask" if masks is not None else selector
    known = (*selectors.WEIGHTS, *selectors.GRADIENTS)
    if selector not in (*known, "mask"):
        raise ValueError(
            f"unknown selector {selector!r}; expected one of {[*known]} or masks by name."
        )
    if on_drop not in ("revert", "keep"):
        raise ValueError(f"unknown on_drop {on_drop!r}; expected one of ['revert', 'keep'].")
    schedule = schedule or reselection.Static(first=selector in selectors.GRADIENTS)
    if selector == "mask" and type(schedule) is not reselection.Static:
        raise ValueError(f"a mask is never chosen anew, but the schedule is {schedule}.")
    grows = isinstance(inner, SM3) and isinstance(schedule, reselection.Spiel)
    if not isinstance(inner, SM3):
        check_elementwise(inner)
    elif grows and (schedule.first or selector in selectors.GRADIENTS):
        raise ValueError(
            f"SM3 grows by what it saw since the start, but the selector is {selector!r} and the "
            f"schedule {schedule}; it needs one of {[*selectors.WEIGHTS]} and first=False."
        )
    tiled = layout or partial(matrices, density, block)
    if masks is not None:
        tiled = partial(masked_tiling, masks, tiled)

    def choice(name: str, x: jax.Array, t: Tiling) -> jax.Array:
        if masks is not None:
            return mask_index(masks[name], t)
        # Selectors of gradients start from a random choice, until the first gradient.
        by = selector if selector in selectors.WEIGHTS else "random"
        return selectors.select(name, by, x, t, seed)

    def adapted(params: Any) -> dict[str, tuple[Any, Tiling]]:
        found = tiled_leaves(tiled, params)
        for name, (leaf, _) in found.items():
            if leaf.dtype not in (jnp.float32, jnp.bfloat16):
                raise ValueError(f"{name!r} is {leaf.dtype}, not float32 or bfloat16.")
        if not found:
            raise ValueError("the layout adapts no parameter at all.")
        return found

    def init(params: Any) -> SparseState:
        active = {}
        for name, (x, t) in adapted(params).items():
            index = choice(name, x, t)
            original = per_shard(partial(gather, t=t), t, "pt", "t")(x, index)
            active[name] = _fresh(inner, t, index, original)
        return apart(SparseState(jnp.int32(0), active), params)

    def update(grads: Any, state: SparseState, params: Any):
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        updates, active = {}, {}
        for name, (x, t) in adapted(params).items():
            old = state.active[name]
            visible = per_shard(partial(gather, t=t), t, "pt", "t")(x, old.index)
            exact = exact_value(visible, old.remainder)
            change = exact - old.original.astype(jnp.float32)
            g = mcf.gradients(grads[name])
            if isinstance(inner, SM3):
                u, after = inner.update(g, old.inner, old.index, t)
            else:
                u, after = per_entry(inner, len(t.unit)).update(g, old.inner, change)
            value, remainder = rounded(exact + jnp.float32(rate) * u, x.dtype)
            updates[name] = SparseUpdate(old.index, value)
            active[name] = Active(old.index, after, old.original, remainder)
        return updates, SparseState(state.count + 1, active)

    def read(params: Any, state: SparseState) -> dict[str, SparseUpdate]:
        found = {}
        for name, (x, t) in adapted(params).items():
            index = state.active[name].index
            value = per_shard(partial(gather, t=t), t, "pt", "t")(x, index)
            found[name] = SparseUpdate(index, value)
        return found

    def apply(params: Any, updates: Mapping[str, SparseUpdate]) -> Any:
        tilings = {name: t for name, (_, t) in adapted(params).items()}

        def one(path: Any, x: jax.Array) -> jax.Array:
            name = path_name(path)
            if name not in updates:
                return x
            t = tilings[name]
            return per_shard(partial(scatter, t=t), t, "ptt", "p")(x, *updates[name])

        return jax.tree_util.tree_map_with_path(one, params)

    def reselect(params: Any, state: SparseState, found: Mapping[str, Any] | None = None):
        updates, active = {}, {}
        tilings = adapted(params)
        for name, (x, t) in tilings.items():
            old, best = state.active[name], None if found is None else found[name]
            if grows:
                best = inner.grown(old.inner, old.index, t)
            if best is None:
                new = selectors.select(name, selector, x, t, seed)
            else:
                run = partial(_choose, schedule, t)
                rest = _some(old.remainder)
                new = per_shard(run, t, "pttt" + "t" * len(rest) + "-", "t")(
                    x, old.index, old.original, best, *rest, state.count
                )
            leave = partial(_left, t, on_drop)
            back = per_shard(leave, t, "pttt", "t")(x, old.index, new, old.original)
            updates[name] = SparseUpdate(old.index, back)
            active[name] = new
        params = apply(params, updates)
        named = adapted(params)
        for name, (x, t) in named.items():
            old, new = state.active[name], active[name]
            original = per_shard(partial(gather, t=t), t, "pt", "t")(x, new)
            fresh = _fresh(inner, t, new, original)
            if isinstance(inner, SM3):  # its state belongs to rows and columns, so it is kept
                moved = carried(t, old._replace(inner=()), fresh._replace(inner=()))
                active[name] = moved._replace(inner=old.inner)
            else:
                active[name] = carried(t, old, fresh)
        return params, SparseState(state.count, active)

    def revert(params: Any, state: SparseState) -> Any:
        return apply(
            params, {k: SparseUpdate(a.index, a.original) for k, a in state.active.items()}
        )

    return SparseAdapt(init, update, read, apply, reselect, revert, tiled, schedule, selector)


def tiled_leaves(layout: Layout, params: Any) -> dict[str, tuple[Any, Tiling]]:
    """Name -> parameter and its tiling, for parameters that the layout adapts."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        if (t := layout(name, leaf)) is not None:
            found[name] = leaf, t
    return found


def _some(remainder: Any) -> tuple[Any, ...]:
    return () if isinstance(remainder, tuple) else (remainder,)


def exact_value(visible: jax.Array, remainder: Any) -> jax.Array:
    """The exact trained value, float32."""
    if isinstance(remainder, tuple):
        return visible.astype(jnp.float32)
    return mcf.join_bits(visible, remainder)


def rounded(exact: jax.Array, dtype: Any) -> tuple[jax.Array, Any]:
    """The nearest value of a dtype, and the remainder, () for float32."""
    return (exact, ()) if dtype == jnp.float32 else mcf.split_bits(exact)


def _fresh(inner: Any, t: Tiling, index: jax.Array, original: jax.Array) -> Active:
    """State of units that were never trained."""
    if isinstance(inner, SM3):
        start = inner.init(index, t)
    else:
        start = per_entry(inner, len(t.unit)).init(jnp.zeros(original.shape, jnp.float32))
    narrow = original.dtype == jnp.bfloat16
    return Active(index, start, original, jnp.zeros(original.shape, jnp.int16) if narrow else ())


def _choose(schedule: Any, t: Tiling, x, index, original, found, *rest):
    """The new index of one parameter, computed on its shard alone."""
    *remainder, updates = rest
    exact = exact_value(gather(x, index, t), remainder[0] if remainder else ())
    return chosen(schedule, t, index, exact - original.astype(jnp.float32), found, updates)


def chosen(schedule: Any, t: Tiling, index, change, found, updates) -> jax.Array:
    """The new index, from each active entry's change since its first value and the candidates."""
    size = jnp.abs(change)
    size = size.sum(tuple(range(-len(t.unit), 0))) if t.unit else size
    best = found[..., 2, :]
    return schedule.choose(index, size, selectors.units_of(found, t), best, updates)


def _member(index: jax.Array, among: jax.Array) -> tuple[jax.Array, jax.Array]:
    """True where a unit is in `among` (ascending), and its position there."""

    def one(index, among):
        at = jnp.clip(jnp.searchsorted(among, index), 0, among.shape[0] - 1)
        return among[at] == index, at

    for _ in range(index.ndim - 1):
        one = jax.vmap(one)
    return one(index, among)


def _beside(mask: jax.Array, like: jax.Array) -> jax.Array:
    return mask.reshape(*mask.shape, *(1,) * (like.ndim - mask.ndim))


def _left(t: Tiling, on_drop: str, x, index, new, original):
    """New values of the previously active entries, once others are chosen."""
    visible = gather(x, index, t)
    if on_drop == "keep":
        return visible
    stays, _ = _member(index, new)
    return jnp.where(_beside(stays, visible), visible, original)


def carried(t: Tiling, old: Active, fresh: Active) -> Active:
    """`fresh` with the state of the units that were active before."""

    def run(index, new, *pairs):
        was, at = _member(new, index)
        half = len(pairs) // 2

        def one(before, start):
            rows = _beside(at, before)
            moved = jnp.take_along_axis(
                before, jnp.broadcast_to(rows, (*at.shape, *before.shape[at.ndim :])), at.ndim - 1
            )
            return jnp.where(_beside(was, start), moved, start)

        return tuple(map(one, pairs[:half], pairs[half:]))

    before, structure = jax.tree.flatten(old[1:])
    start = jax.tree.leaves(fresh[1:])
    count = len(before)
    moved = per_shard(run, t, "tt" + "t" * 2 * count, "t" * count)(
        old.index, fresh.index, *before, *start
    )
    return Active(fresh.index, *jax.tree.unflatten(structure, moved))

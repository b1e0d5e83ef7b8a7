"""Sparse changes stored separately from the parameters.

The base stays unchanged, e.g. for a reference policy from the same arrays, several adapters, or a
read-only base. The changes are float32, so nothing is rounded; the cost is that every product first
adds them to its matrix. Index and changes are part of the model, since every use of it needs them;
the state here holds only the inner optimizer's numbers.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from jaxrl_eff.optim import mcf
from jaxrl_eff.optim.sparse import reselection, selectors
from jaxrl_eff.optim.sparse.adapt import Active, carried, chosen, tiled_leaves
from jaxrl_eff.optim.sparse.masks import Layout
from jaxrl_eff.optim.sparse.per_entry import check_elementwise, per_entry
from jaxrl_eff.optim.sparse.tiling import per_shard
from jaxrl_eff.optim.store import apart


class Overlay(NamedTuple):
    """Changes of one parameter."""

    index: Any  # int32[*stack, R, C, k], ascending in every tile
    delta: Any  # float32 values


class OverlayState(NamedTuple):
    """State of `sparse_overlay`."""

    count: Any  # int32[], updates done
    inner: Any  # name -> the inner optimizer's


class SparseOverlay(NamedTuple):
    """Functions that `sparse_overlay` returns; as `SparseAdapt`, with overlays as parameters.

    Attributes:
        start: parameters -> `Overlay` by name, all changes 0.
        init: overlays -> state.
        update: (gradients of delta by name, state, overlays) -> (overlays, state).
        reselect: (parameters, state, overlays, found) -> (overlays, state). Changes of dropped
            entries are discarded, so that the parameter has its base value there.
        layout, schedule: as in `SparseAdapt`.
    """

    start: Callable[[Any], dict[str, Overlay]]
    init: Callable[[Mapping[str, Overlay]], OverlayState]
    update: Callable[..., tuple[dict[str, Overlay], OverlayState]]
    reselect: Callable[..., tuple[dict[str, Overlay], OverlayState]]
    layout: Layout
    schedule: Any


def sparse_overlay(
    inner: optax.GradientTransformation,
    *,
    layout: Layout,
    selector: str = "random",
    schedule: Any = None,
    learning_rate: float | optax.Schedule = 1.0,
    seed: int = 0,
) -> SparseOverlay:
    """Trains overlays by an elementwise optax optimizer; arguments as in `sparse_adapt`."""
    check_elementwise(inner)
    schedule = schedule or reselection.Static(first=selector in selectors.GRADIENTS)

    def start(params: Any) -> dict[str, Overlay]:
        by = selector if selector in selectors.WEIGHTS else "random"
        return {
            name: Overlay(
                selectors.select(name, by, x, t, seed),
                jnp.zeros(t.value_shape(x.shape), jnp.float32),
            )
            for name, (x, t) in tiled_leaves(layout, params).items()
        }

    def unit(overlay: Overlay) -> int:
        return overlay.delta.ndim - overlay.index.ndim

    def init(overlays: Mapping[str, Overlay]) -> OverlayState:
        each = {k: per_entry(inner, unit(o)).init(o.delta) for k, o in overlays.items()}
        return apart(OverlayState(jnp.int32(0), each), overlays)

    def update(grads: Mapping[str, Any], state: OverlayState, overlays: Mapping[str, Overlay]):
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        new, after = {}, {}
        for name, old in overlays.items():
            g = mcf.gradients(grads[name])
            each = per_entry(inner, unit(old))
            u, after[name] = each.update(g, state.inner[name], old.delta)
            new[name] = Overlay(old.index, old.delta + jnp.float32(rate) * u)
        return new, OverlayState(state.count + 1, after)

    def reselect(params: Any, state: OverlayState, overlays: Any, found: Any = None):
        new, after = {}, {}
        for name, (x, t) in tiled_leaves(layout, params).items():
            old = overlays[name]
            if found is None:
                index = selectors.select(name, selector, x, t, seed)
            else:
                choose = per_shard(partial(chosen, schedule, t), t, "ttt-", "t")
                index = choose(old.index, old.delta, found[name], state.count)
            zeros = jnp.zeros_like(old.delta)
            fresh = Active(index, per_entry(inner, unit(old)).init(zeros), (), zeros)
            kept = carried(t, Active(old.index, state.inner[name], (), old.delta), fresh)
            new[name], after[name] = Overlay(index, kept.remainder), kept.inner
        return new, OverlayState(state.count, after)

    return SparseOverlay(start, init, update, reselect, layout, schedule)

"""The parts of a model that training differentiates and updates: parameters, entries, layers.

Each kind has `init`, `leaves` (the differentiated arrays), `constants` (what a backward pass needs
beside them) and `update` as in `core.specs.Adaptation`, and the `axes` of its arrays that are no
parameters. Names are those of stored leaves, see `peft.weights`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrl_eff import tree
from jaxrl_eff.optim import sparse
from jaxrl_eff.optim.sparse import SampledLayers, SparseAdapt, SparseOverlay

Arrays = dict[str, jax.Array]


def beside(kernel: str, leaf: str) -> str:
    """Returns the name of a leaf stored beside a kernel."""
    return kernel.removesuffix("kernel") + leaf


class Whole(NamedTuple):
    """Parameters that are trained in full: LoRA's, and others by name."""

    names: list[str]
    tx: optax.GradientTransformation

    def leaves(self, params: Any, opt: Any) -> Arrays:
        del opt
        flat = tree.flat(params)
        return {k: flat[k] for k in self.names}

    def constants(self, opt: Any) -> Arrays:
        del opt
        return {}

    def init(self, params: Any) -> Any:
        return self.tx.init(self.leaves(params, None))

    def update(self, grads: Arrays, opt: Any, params: Any, finite: jax.Array) -> tuple[Any, Any]:
        mine = self.leaves(params, opt)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
            changes, new = self.tx.update({k: grads[k] for k in self.names}, opt, mine)
            changed = optax.apply_updates(mine, changes)
        changed = tree.where(finite, changed, mine)
        return tree.with_leaves(params, changed), tree.where(finite, new, opt)


class Entries(NamedTuple):
    """Entries of kernels, into which their changes are written."""

    of: SparseAdapt

    def leaves(self, params: Any, opt: sparse.SparseState) -> Arrays:
        del params
        shapes = {name: a.original.shape for name, a in opt.active.items()}
        return {beside(k, "tap"): jnp.zeros(shape, jnp.float32) for k, shape in shapes.items()}

    def constants(self, opt: sparse.SparseState) -> Arrays:
        return {beside(k, "tap_index"): a.index for k, a in opt.active.items()}

    def init(self, params: Any) -> sparse.SparseState:
        return self.of.init(params)

    def update(self, grads: Arrays, opt: Any, params: Any, finite: jax.Array) -> tuple[Any, Any]:
        taps = {k: grads[beside(k, "tap")] for k in opt.active}
        updates, new = self.of.update(taps, opt, params)
        # To change nothing, the old values are written: k of them, without a second kernel.
        updates = tree.where(finite, updates, self.of.read(params, opt))
        return self.of.apply(params, updates), tree.where(finite, new, opt)

    def axes(self, name: str) -> tuple[str, ...] | None:
        return _entry_axes(self.of.layout, name)

    def indices(self, params: Any, opt: sparse.SparseState) -> Arrays:
        """Returns kernel -> its active units."""
        del params
        return {k: a.index for k, a in opt.active.items()}

    def reselect(self, params: Any, opt: Any, found: Any) -> tuple[Any, Any]:
        return self.of.reselect(params, opt, found)


class Overlays(NamedTuple):
    """Entries of kernels whose changes are stored beside these.

    Attributes:
        of: functions on overlays.
        plain: stored parameters -> plain ones, without adapters and dequantized.
    """

    of: SparseOverlay
    plain: Callable[[Any], Any]

    def added(self, shapes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns shapes and logical axes of the added parameters."""
        made, axes, layout = {}, {}, self.of.layout
        for name, o in jax.eval_shape(self.of.start, shapes).items():
            sides = zip(layout.index_axes(name)[1:], layout.grids[name], strict=True)
            first = ("layers", *(axis if n > 1 else None for axis, n in sides))
            for leaf, x in _overlay_leaves({name: o}).items():
                made[leaf], axes[leaf] = x, (*first, *[None] * (x.ndim - 3))
        return made, axes

    def start(self, plain: Any) -> Arrays:
        return _overlay_leaves(self.of.start(plain))

    def leaves(self, params: Any, opt: Any) -> Arrays:
        del opt
        return {beside(k, "delta"): o.delta for k, o in self._overlays(params).items()}

    def constants(self, opt: Any) -> Arrays:
        del opt
        return {}

    def init(self, params: Any) -> sparse.OverlayState:
        return self.of.init(self._overlays(params))

    def update(self, grads: Arrays, opt: Any, params: Any, finite: jax.Array) -> tuple[Any, Any]:
        old = self._overlays(params)
        new, after = self.of.update({k: grads[beside(k, "delta")] for k in old}, opt, old)
        leaves = _overlay_leaves(tree.where(finite, new, old))
        return tree.with_leaves(params, leaves), tree.where(finite, after, opt)

    def axes(self, name: str) -> tuple[str, ...] | None:
        return _entry_axes(self.of.layout, name)

    def indices(self, params: Any, opt: Any) -> Arrays:
        """Returns kernel -> its active units."""
        del opt
        return {k: o.index for k, o in self._overlays(params).items()}

    def reselect(self, params: Any, opt: Any, found: Any) -> tuple[Any, Any]:
        new, opt = self.of.reselect(self.plain(params), opt, self._overlays(params), found)
        return tree.with_leaves(params, _overlay_leaves(new)), opt

    def _overlays(self, params: Any) -> dict[str, sparse.Overlay]:
        flat = tree.flat(params)
        return {
            k: sparse.Overlay(flat[beside(k, "delta_index")], flat[beside(k, "delta")])
            for k in self.of.layout.tilings
        }


def _overlay_leaves(overlays: dict[str, sparse.Overlay]) -> dict[str, Any]:
    index = {beside(k, "delta_index"): o.index for k, o in overlays.items()}
    return index | {beside(k, "delta"): o.delta for k, o in overlays.items()}


def _entry_axes(layout: Any, name: str) -> tuple[str, ...] | None:
    """Returns the axes of an array with numbers per unit of a kernel: of its state, or its tap."""
    of_kernel = lambda k: f"/{k}/" in name or name == beside(k, "tap")  # noqa: E731
    kernel = next(filter(of_kernel, layout.tilings), None)
    return kernel and layout.index_axes(kernel)


class LayersInTurn(NamedTuple):
    """Kernels of a few layers at a time, trained in full.

    Attributes:
        of: functions on these kernels.
        kernels: name -> logical axes.
        layers: number of layers of the model.
    """

    of: SampledLayers
    kernels: dict[str, tuple[str | None, ...]]
    layers: int

    def leaves(self, params: Any, opt: sparse.LayersState) -> Arrays:
        active = opt.layers.shape[0]
        return {
            beside(k, "whole"): jnp.zeros((active, *x.shape[1:]), jnp.float32)
            for k, x in self._kernels(params).items()
        }

    def constants(self, opt: sparse.LayersState) -> Arrays:
        active = opt.layers.shape[0]
        turn = jnp.full(self.layers, active, jnp.int32)
        turn = turn.at[opt.layers].set(jnp.arange(active, dtype=jnp.int32))
        return {beside(k, "turn"): turn for k in self.kernels}

    def init(self, params: Any) -> sparse.LayersState:
        return self.of.init(self._kernels(params))

    def update(self, grads: Arrays, opt: Any, params: Any, finite: jax.Array) -> tuple[Any, Any]:
        kernels = self._kernels(params)
        values, new = self.of.update({k: grads[beside(k, "whole")] for k in kernels}, opt, kernels)
        values = tree.where(finite, values, self.of.read(kernels, opt))
        written = self.of.write(kernels, opt, values)
        return tree.with_leaves(params, written), tree.where(finite, new, opt)

    def axes(self, name: str) -> tuple[str | None, ...] | None:
        of_kernel = lambda k: f"/{k}" in name or name == beside(k, "whole")  # noqa: E731
        return next((axes for k, axes in self.kernels.items() if of_kernel(k)), None)

    def reselect(self, params: Any, opt: Any, found: Any) -> tuple[Any, Any]:
        del found
        return params, self.of.reselect(opt)

    def _kernels(self, params: Any) -> Arrays:
        flat = tree.flat(params)
        return {k: flat[k] for k in self.kernels}

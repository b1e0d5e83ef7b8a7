"""Matrix products whose backward pass returns the gradient of selected entries only.

    y = x W        dx = g W^T        dW = x^T g, reduced to its active entries

The forward pass is the ordinary product. A *tap*, zeros with one number per active entry, is stored
beside the matrix; its gradient is the gradient of these entries. Single entries are gathered from
the dW of one matrix, which is then freed; blocks are products of only the columns of x and g that
they need, so that the rest of dW is never computed.

As an *overlay* the tap's numbers are added to the matrix at the active entries, for adapters that
do not change the matrix.

For layers that are trained in full, a few at a time, only the gradients of these layers are kept,
in one array that all layers of a scan share (`in_turn`).

A *probe* instead requests from the backward pass the best units by a score of dW, see
`optim.sparse.selectors`. Its gradient is their positions and scores.

On a mesh each device computes the gradients of its own rows and sums only those of the active
entries. Left to the compiler, whole matrices would be summed first.
"""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxrl_eff.optim.sparse import selectors
from jaxrl_eff.optim.sparse.tiling import Tiling, gather, positions, scatter
from jaxrl_eff.types import Array, Float, Int


class Place(NamedTuple):
    """Mesh axes that shard a product: the rows of x, their positions, x's last axis, y's last axis.

    Hashable.
    """

    rows: tuple[str, ...] = ()
    length: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


def tapped(
    x: Float[Array, "B T D"],
    matrix: Float[Array, "D F"],
    tap: Float[Array, "..."],
    index: Int[Array, "R C k"],
    *,
    place: Place = Place(),
    overlay: bool = False,
    probe: tuple[str, Float[Array, "R C 3 k"]] | None = None,
) -> Float[Array, "B T F"]:
    """Computes x @ matrix, differentiable by x, the tap and the probe; not by the matrix.

    Args:
        tap: as values of `index`, see `optim.sparse.tiling`; its shape determines the block.
        index: the active units.
        place: sharding of the product over the current mesh.
        overlay: True to add the tap to the matrix.
        probe: a selector of gradients, and zeros that receive its result.
    """
    t = tiling_of(matrix.shape, tap, index)
    kind, zeros = probe if probe is not None else ("", None)
    return _tapped(t, place, kind, overlay, x, matrix, tap, index, zeros)


def tiling_of(shape: tuple[int, int], tap: Array, index: Array) -> Tiling:
    """Returns the tiling implied by the shapes of a matrix's tap and index."""
    tile = shape[0] // index.shape[0], shape[1] // index.shape[1]
    block = tap.shape[3:] or (1, 1)
    return Tiling(0, 1, tile, index.shape[2], block)


def place_of(rows: int, length: int, inputs: str | None, outputs: str | None, grid) -> Place:
    """Returns the `Place` for the current logical axis rules and mesh.

    A mesh axis that does not divide the size it would shard is not used.

    Args:
        rows, length: of x.
        inputs, outputs: logical names of the matrix's axes; activations have the prefix "act_".
        grid: tiles down and across; a device must hold whole tiles.
    """
    table = dict(nn.get_logical_axis_rules())
    sizes = dict(jax.sharding.get_abstract_mesh().shape)

    def axes(name: str, size: int) -> tuple[str, ...]:
        found = table.get(name) or ()
        found = (found,) if isinstance(found, str) else tuple(found)
        found = tuple(a for a in found if sizes.get(a, 1) > 1)
        return found if size % math.prod(sizes[a] for a in found) == 0 else ()

    return Place(
        axes("batch", rows), axes("length", length),
        axes(f"act_{inputs}", grid[0]), axes(f"act_{outputs}", grid[1]),
    )  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _tapped(t, place, kind, overlay, x, matrix, tap, index, probe):
    return jnp.einsum("...d,df->...f", x, _effective(t, overlay, matrix, tap, index))


def _effective(t: Tiling, overlay: bool, matrix: Array, tap: Array, index: Array) -> Array:
    return with_delta(t, matrix, tap, index) if overlay else matrix


def with_delta(t: Tiling, matrix: Array, delta: Array, index: Array) -> Array:
    """Returns the matrix with changes of its active units added in float32."""
    exact = gather(matrix, index, t).astype(jnp.float32) + delta.astype(jnp.float32)
    return scatter(matrix, index, exact, t)


def _forward(t, place, kind, overlay, x, matrix, tap, index, probe):
    y = _tapped(t, place, kind, overlay, x, matrix, tap, index, probe)
    return y, (x, matrix, tap, index)


def _backward(t, place, kind, overlay, saved, g):
    x, matrix, tap, index = saved
    dx = jnp.einsum("...f,df->...d", g, _effective(t, overlay, matrix, tap, index))
    dtap = _over_mesh(functools.partial(_active_gradient, t), place, x, g, index)
    found = None
    if kind:
        if kind == "fisher":  # squares of whole rows' gradients, so rows must not be split
            place = place._replace(length=())
        found = _over_mesh(functools.partial(_scored, kind, t), place, x, g, matrix)
    return dx.astype(x.dtype), None, dtap.astype(tap.dtype), None, found


_tapped.defvjp(_forward, _backward)


@jax.custom_vjp
def in_turn(
    x: Float[Array, "B T D"], matrix: Float[Array, "D F"], whole: Float[Array, "n D F"], turn: Array
) -> Float[Array, "B T F"]:
    """Computes x @ matrix; its gradient is added to `whole[turn]` if turn < n, else skipped."""
    del whole, turn
    return jnp.einsum("...d,df->...f", x, matrix)


def _in_turn_forward(x, matrix, whole, turn):
    # Only the shape of `whole` is needed; as a residual it would be kept for every layer.
    return in_turn(x, matrix, whole, turn), (x, matrix, turn, jnp.zeros((whole.shape[0], 0)))


def _in_turn_backward(saved, g):
    x, matrix, turn, like = saved
    dx = jnp.einsum("...f,df->...d", g, matrix)
    zeros = jnp.zeros((like.shape[0], *matrix.shape), jnp.float32)

    def made():
        flat = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        return zeros.at[turn].set(
            jnp.einsum("td,tf->df", *flat, preferred_element_type=jnp.float32)
        )

    return dx, None, jax.lax.cond(turn < like.shape[0], made, lambda: zeros), None


in_turn.defvjp(_in_turn_forward, _in_turn_backward)


def _active_gradient(t: Tiling, summed, x: Array, g: Array, index: Array) -> Array:
    """Computes the gradient of the active units, float32, summed over devices that share them."""
    x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    wide = {"preferred_element_type": jnp.float32}
    if not t.unit:
        return summed(gather(jnp.einsum("td,tf->df", x, g, **wide), index, t))
    (r, c), (row, column) = t.block, (p.reshape(-1) for p in positions(index, t))
    xs = x.reshape(x.shape[0], -1, r)
    gs = g.reshape(g.shape[0], -1, c)
    # A side that is one block wide need not be gathered once per block.
    if xs.shape[1] == 1:
        out = jnp.einsum("tr,tkc->krc", xs[:, 0], gs[:, column], **wide)
    elif gs.shape[1] == 1:
        out = jnp.einsum("tkr,tc->krc", xs[:, row], gs[:, 0], **wide)
    else:
        out = jnp.einsum("tkr,tkc->krc", xs[:, row], gs[:, column], **wide)
    return summed(out.reshape(*index.shape, *t.unit))


def _scored(kind: str, t: Tiling, summed, x: Array, g: Array, matrix: Array) -> Array:
    """Returns the candidates found by a selector of gradients."""
    wide = {"preferred_element_type": jnp.float32}
    if kind == "fisher":
        if x.ndim != 3:
            x, g = x[None], g[None]

        def row(total, pair):
            return total + jnp.square(jnp.einsum("td,tf->df", *pair, **wide)), None

        start = row(0.0, (x[0], g[0]))[0]
        gradient = jax.lax.scan(row, start, (x[1:], g[1:]))[0]
    else:
        x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        gradient = jnp.einsum("td,tf->df", x, g, **wide)
    return selectors.candidates(selectors.score(kind, summed(gradient), matrix), t)


def _over_mesh(fn, place: Place, x: Array, g: Array, third: Array):
    """Runs `fn(summed, x, g, third)` on every device's part; `summed` sums over devices."""
    split = (*place.rows, *place.length)
    if x.ndim != 3 or not any(place):
        return fn(lambda v: v, x, g, third)
    inputs, outputs = place.inputs or None, place.outputs or None
    tiles = PartitionSpec(inputs, outputs)

    def run(x, g, third):
        return fn(lambda v: jax.lax.psum(v, split) if split else v, x, g, third)

    lead = place.rows or None, place.length or None
    return jax.shard_map(
        run,
        in_specs=(PartitionSpec(*lead, inputs), PartitionSpec(*lead, outputs), tiles),
        out_specs=tiles,
    )(x, g, third)

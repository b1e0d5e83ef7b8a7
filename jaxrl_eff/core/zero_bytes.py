"""Bytes that a train call on nodes with slow links must send, and those that its program sends."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_eff.core import programs
from jaxrl_eff.core.graph import Call
from jaxrl_eff.core.zero_leaves import Leaf, Leaves
from jaxrl_eff.parallel import jaxpr_bytes
from jaxrl_eff.parallel.codec import Blocks


class Update(NamedTuple):
    """Bytes of one update, received per device.

    Attributes:
        promised: by mesh axis.
        plain: of 16-bit ZeRO-3 over the slow axis.
    """

    promised: dict[str, float]
    plain: float


class Traffic(NamedTuple):
    """Bytes received per device in one run of a train call.

    Attributes:
        name: of the level.
        counted: in the call's program, by mesh axis.
        promised: by closed form.
        plain: bytes of 16-bit ZeRO-3 over the slow axis.
        notes: further remarks.
    """

    name: str
    counted: dict[str, float]
    promised: dict[str, float]
    plain: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        slow = self.counted["dcn"]
        return (
            f"{self.name} sends {slow / 1e6:,.3f} MB a device and step between nodes, "
            f"{slow / self.plain:.2f} of ZeRO-3's in 16 bits{''.join(f'; {n}' for n in self.notes)}"
        )


def of_update(
    leaves: Leaves,
    arrays: Mapping[str, jax.Array | jax.ShapeDtypeStruct],
    parts: int,
    done: programs.Sums,
    *,
    hoisted: bool = False,
) -> Update:
    """Returns the bytes that one update must send, in `parts` micro-batches.

    Args:
        arrays: a device's parts of the arrays that the loss reads.
        done: its sums.
        hoisted: weights are gathered over the slow axis once even for one micro-batch.
    """
    once = hoisted or parts > 1
    place = leaves.place
    sizes = {a: place.axes[a] for a in leaves.rows}
    found, plain = dict.fromkeys(sizes, 0.0), 0.0
    for name, x in arrays.items():
        leaf, trained = leaves.of(name), name in leaves.trained
        if leaf.cut is not None:
            vectors = x.size // math.prod(leaf.cut.shape)
            _add(found, _of_weight(leaves, leaf, x, trained, parts, once), vectors)
            if name not in leaves.codes or not jnp.issubdtype(x.dtype, jnp.floating):
                passes = (place.dcn - 1) * (2 + trained) * parts
                shards = place.dcn if leaf.cut.local else 1
                plain += passes * vectors * leaf.cut.sent(Blocks(16)) / shards
        elif trained:
            _add(found, jaxpr_bytes.summed(4 * x.size, sizes))
            plain += jaxpr_bytes.summed(2 * x.size, sizes)["dcn"] * parts
    for x in jax.tree.leaves((done.loss, done.weight, done.seen)):
        _add(found, jaxpr_bytes.summed(x.size * x.dtype.itemsize, sizes))
    return Update(found, plain)


def _of_weight(
    leaves: Leaves, leaf: Leaf, x: Any, trained: bool, parts: int, once: bool
) -> dict[str, float]:
    """Returns the bytes of one weight (of a layer) in one update, by mesh axis.

    Let w, g and h be the bytes of a shard as a weight, as a gradient on the slow axis and as a
    gradient on the fast axis. A weight is gathered twice per micro-batch if late, else once per
    update; but over the slow axis once where a secondary copy is kept or micro-batches share
    it, and as a difference where nodes keep a copy. A weight that every node has in full counts
    as on one node.
    """
    cut, place = leaf.cut, leaves.place
    w = math.prod(cut.shape) * x.dtype.itemsize if cut.raw else cut.sent(cut.plan.weights)
    g = cut.sent(cut.plan.gradients) if trained else 0
    h = cut.sent(cut.plan.fast_gradients) if trained else 0
    fast = parts if leaf.late else 1
    again = 2 if leaf.late else 1
    slow = w if cut.plan.rung.secondary or once else again * w
    if leaf.node_copy is not None:
        slow = cut.sent(cut.plan.deltas)
    nodes = 1 if cut.local else place.dcn  # nodes whose shards a device gathers
    found = {
        "dcn": (nodes - 1) * (slow + g),
        "fsdp": (place.fsdp - 1) * nodes * fast * (again * w + h),
    }
    if trained and place.data > 1:
        sums = cut.rows * cut.m * place.dcn * 4
        found["data"] = jaxpr_bytes.summed(sums, {"data": place.data})["data"]
    return {k: float(v) for k, v in found.items()}


def count(leaves: Leaves, traced: Iterable[Any]) -> dict[str, float]:
    """Counts the bytes of jaxprs on every mesh axis, without attention over `seq`."""
    each = [jaxpr_bytes.count(program, leaves.place.axes) for program in traced]
    return {a: sum(found[a] for found in each) for a in leaves.place.axes if a != "seq"}


def checked(leaves: Leaves, c: Call, found: Mapping[str, float], one: Update) -> Traffic:
    """Checks the bytes of a train call against those of its updates.

    Args:
        found: of `count`, for all updates.
        one: expected in one update.

    Raises:
        ValueError: a mesh axis carries more than expected.
    """
    updates = c.epochs * c.minibatches
    promised = {a: updates * n for a, n in one.promised.items()}
    try:
        jaxpr_bytes.contract(found, promised)
    except ValueError as error:
        raise ValueError(f"{c.name}: {error}") from None
    found = {a: found[a] for a in leaves.rows}
    return Traffic(leaves.plan.rung.name, found, promised, updates * one.plain, _notes(leaves))


def _notes(leaves: Leaves) -> tuple[str, ...]:
    """Returns notes on partial training that the level's name omits."""
    sent = {name: leaf.cut for name, leaf in leaves.by_name.items() if leaf.cut is not None}
    notes = []
    if not leaves.trained & {name for name, cut in sent.items() if not cut.raw}:
        notes.append("gradients travel exactly, in float32")
    if any(cut.local for cut in sent.values()):
        notes.append("every node has what is frozen")
    return tuple(notes)


def _add(total: dict[str, float], more: Mapping[str, float], times: int = 1) -> None:
    for axis, n in more.items():
        total[axis] += times * n

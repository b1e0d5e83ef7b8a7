"""Sequence layouts of calls: how tokens of a row are sharded over the devices of a placement.

Each function returns the layout of rows of `length` tokens, given how far every layer of the model
sees back (`sight`). `nested`: for use inside the `jax.shard_map` of `zero.NodeGradients`.
"""

import functools
from collections.abc import Callable
from typing import Any

from jaxrl_eff.parallel import Placement
from jaxrl_eff.parallel.attention import sequence
from jaxrl_eff.parallel.attention.context import LayoutOf, SequenceLayout
from jaxrl_eff.parallel.attention.token_order import reach


def of_call(place: Placement, local: int | None, *, nested: bool = False) -> LayoutOf | None:
    """Returns the layouts of a call's rows; None if rows are whole.

    Args:
        local: see `Shardings.context`.
    """
    if local is not None:
        return functools.partial(_both, place, local, nested)
    if place.seq == 1 and not sequence.for_whole_rows():
        return None
    if nested and place.seq == 1:
        return functools.partial(_own, place)
    return functools.partial(_over_axis, place, nested)


def _over_axis(place: Placement, nested: bool, length: int, sight: int | None) -> SequenceLayout:
    """Returns the sequence layout over the `seq` axis.

    Rows whose length does not divide stay whole. Where all layers have a window, tokens stay in
    order, and only the preceding shards that the window reaches are sent.
    """
    if length % place.seq:
        return SequenceLayout()
    if place.seq == 1:
        return SequenceLayout(sequence.attend(place), fits=sequence.fits_whole_rows)
    attend = functools.partial(sequence.attend, nested=True) if nested else sequence.attend
    pieces = reach(length // place.seq, sight)
    if pieces < place.seq - 1:
        return SequenceLayout(attend(place, reach=pieces))
    ways = (functools.partial(f, parts=place.seq) for f in (sequence.striped, sequence.unstriped))
    return SequenceLayout(attend(place), *ways)


def _own(place: Placement, length: int, sight: int | None) -> SequenceLayout:
    """Returns the layout of a device's own rows."""
    del length, sight
    return (
        SequenceLayout()
        if place.tensor > 1
        else SequenceLayout(sequence.own(), fits=sequence.fits_whole_rows)
    )


def _both(
    place: Placement, local: int, nested: bool, length: int, sight: int | None
) -> SequenceLayout:
    """Returns the layout of rows of devices and of groups together, see `sequence.both`."""
    del length, sight

    def on_each(turn: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def turned(x: Any) -> Any:
            halves = map(turn, sequence.divided(x, local, place.seq))
            return sequence.joined(*halves, place.seq)

        return turned

    plain = SequenceLayout()
    attend = sequence.both(place, local, nested=True) if nested else sequence.both(place, local)
    return SequenceLayout(attend, next=on_each(plain.next), previous=on_each(plain.previous))

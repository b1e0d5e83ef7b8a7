"""Operations on deltas: sums, multiples, overlaps, masks.

Sums are of changes, new minus original, so deltas to be set must have their originals. They are
exact up to one rounding to float32, and do not depend on the order of the deltas.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from jaxrl_eff.checkpoints.deltas.delta import Delta, Entries
from jaxrl_eff.checkpoints.deltas.tensors import bits


def as_add(delta: Delta) -> Delta:
    """Converts a delta to changes to be added, rounded to float32.

    Raises:
        ValueError: it is to be set and has no originals, so the changes are unknown.
    """
    tensors = {}
    for name, change in _changes(delta).items():
        tensors[name] = dataclasses.replace(delta.tensors[name], values=change.astype(np.float32))
    return dataclasses.replace(delta, tensors=tensors, semantics="add")


def as_dtype(delta: Delta, dtype: str, *, base: str = "") -> Delta:
    """Converts a delta to a base in another dtype: for example from a float32 copy to its files.

    New values are rounded to it, and entries whose value rounds to the original are dropped.

    Args:
        delta: to be set or added.
        dtype: of all tensors.
        base: content hash of the base in that dtype.

    Raises:
        ValueError: an original is not representable in this dtype, so the base never had it.
    """
    tensors = {}
    for name, e in delta.tensors.items():
        new = e.values if delta.semantics == "add" else e.values.astype(dtype)
        old = None if e.originals is None else e.originals.astype(dtype)
        if old is not None and not np.array_equal(
            old.astype(e.originals.dtype), e.originals, equal_nan=True
        ):
            raise ValueError(f"the base's {name!r} was never {dtype}: it would be rounded.")
        entries = Entries(e.shape, dtype, e.indices, new, old)
        if delta.semantics == "set" and old is not None:
            entries = entries.take(bits(new) != bits(old))
        if len(entries):
            tensors[name] = entries
    return dataclasses.replace(delta, tensors=tensors, base=base)


def scale(delta: Delta, weight: float | int) -> Delta:
    """Multiplies the changes by a number; the result is to be added."""
    return dataclasses.replace(compose([delta], [weight]), method=delta.method)


def compose(
    deltas: Sequence[Delta], weights: Sequence[float | int] | None = None, *, method: str = ""
) -> Delta:
    """Computes the weighted sum of changes of one base, to be added.

    Args:
        deltas: of the same base; a delta with unknown base is assumed to have that of the others.
        weights: one per delta; None: 1 each.
        method: of the result; "": composed of the deltas' methods.

    Returns:
        Entries of any of the deltas, with originals if all deltas that change the tensor have them.

    Raises:
        ValueError: no delta, or a wrong number of weights; different bases, shapes or dtypes;
            unknown changes.

    Example:
        >>> from jaxrl_eff import deltas
        >>> base = {"w": np.zeros(2, np.float32)}
        >>> one, two = (deltas.diff(base, {"w": np.array(w, np.float32)}) for w in ([1, 0], [1, 4]))
        >>> deltas.apply(base, deltas.compose([one, two], [1.0, 0.5]))["w"].tolist()
        [1.5, 2.0]
    """
    deltas = list(deltas)
    weights = [1.0] * len(deltas) if weights is None else list(weights)
    if not deltas or len(weights) != len(deltas):
        raise ValueError(f"{len(deltas)} deltas and {len(weights)} weights; give one for each.")
    if not np.isfinite(weights).all():
        raise ValueError(f"weights={weights} should be finite.")
    base = _same_base(deltas)
    changes = [_changes(delta) for delta in deltas]
    tensors = {}
    for name in sorted({name for delta in deltas for name in delta.tensors}):
        those = [i for i, delta in enumerate(deltas) if name in delta.tensors]
        parts = [deltas[i].tensors[name] for i in those]
        terms = [weights[i] * changes[i][name] for i in those]
        tensors[name] = _summed(name, parts, np.concatenate(terms))
    told = method or " + ".join(
        f"{w:g} * ({d.method or 'unnamed'})" for w, d in zip(weights, deltas, strict=True)
    )
    grains = {d.granularity for d in deltas}
    return Delta(tensors, base, "add", told, grains.pop() if len(grains) == 1 else "element")


def _summed(name: str, parts: list[Entries], terms: np.ndarray) -> Entries:
    """Concatenates and sorts entries, and sums those with equal indices."""
    first = parts[0]
    for part in parts[1:]:
        if (part.shape, part.dtype) != (first.shape, first.dtype):
            raise ValueError(
                f"{name!r} is {first.dtype}{list(first.shape)} in one delta and "
                f"{part.dtype}{list(part.shape)} in another."
            )
    indices = np.concatenate([part.indices for part in parts])
    # Sorted by value within an index, so that the sum does not depend on the order of the deltas.
    order = np.lexsort((terms, indices)) if len(parts) > 1 else np.arange(len(indices))
    indices, terms = indices[order], terms[order]
    starts = np.flatnonzero(np.diff(indices, prepend=-1))
    sums = np.add.reduceat(terms, starts) if len(starts) else terms
    originals = None
    if all(part.originals is not None for part in parts):
        originals = np.concatenate([part.originals for part in parts])[order][starts]
    return Entries(first.shape, first.dtype, indices[starts], sums.astype(np.float32), originals)


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Counts of entries changed by two deltas.

    Attributes:
        shared: entries that both change.
        either: entries that at least one changes.
        conflicts: shared entries that they change in opposite directions.
    """

    shared: int
    either: int
    conflicts: int

    @property
    def jaccard(self) -> float:
        """shared / either; 0 for two empty deltas."""
        return self.shared / max(1, self.either)

    @property
    def conflict_rate(self) -> float:
        """conflicts / shared."""
        return self.conflicts / max(1, self.shared)


def overlap(a: Delta, b: Delta) -> Overlap:
    """Counts the entries that both change, and those that they change in opposite directions.

    Raises:
        ValueError: different bases; unknown changes.
    """
    _same_base([a, b])
    ours, theirs = _changes(a), _changes(b)
    shared = conflicts = 0
    for name in ours.keys() & theirs.keys():
        _, i, j = np.intersect1d(
            a.tensors[name].indices, b.tensors[name].indices, True, return_indices=True
        )
        shared += len(i)
        conflicts += int((np.sign(ours[name][i]) * np.sign(theirs[name][j]) < 0).sum())
    return Overlap(shared, a.count + b.count - shared, conflicts)


def overlaps(deltas: Sequence[Delta]) -> dict[tuple[int, int], Overlap]:
    """Computes `overlap` of every pair i < j."""
    pairs = itertools.combinations(range(len(deltas)), 2)
    return {(i, j): overlap(deltas[i], deltas[j]) for i, j in pairs}


def disjoint(a: Delta, b: Delta) -> bool:
    """Returns True if no entry is changed by both; such deltas can be applied in any order."""
    return not any(
        np.intersect1d(a.tensors[name].indices, b.tensors[name].indices, True).size
        for name in a.tensors.keys() & b.tensors.keys()
    )


def without(a: Delta, b: Delta) -> Delta:
    """Returns the entries of `a` that `b` does not change."""
    tensors = {}
    for name, entries in a.tensors.items():
        if name in b.tensors:
            entries = entries.take(~np.isin(entries.indices, b.tensors[name].indices))
        if len(entries):
            tensors[name] = entries
    return dataclasses.replace(a, tensors=tensors)


def mask_of(delta: Delta) -> dict[str, np.ndarray]:
    """Returns a bool array of each tensor's shape, by name: True for changed entries.

    Its negation has the entries where another task can be trained without affecting this one.
    """
    masks = {}
    for name, entries in delta.tensors.items():
        mask = np.zeros(entries.size, bool)
        mask[entries.indices] = True
        masks[name] = mask.reshape(entries.shape)
    return masks


def _changes(delta: Delta) -> dict[str, np.ndarray]:
    """Returns new minus original in float64, by name."""
    if delta.semantics == "add":
        return {name: e.values.astype(np.float64) for name, e in delta.tensors.items()}
    if not delta.reversible:
        raise ValueError(
            "the delta is to be set and holds no originals, so its changes are not known; "
            "`resolved` takes them from the base."
        )
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, which is kept
        return {
            name: e.values.astype(np.float64) - e.originals.astype(np.float64)
            for name, e in delta.tensors.items()
        }


def _same_base(deltas: Sequence[Delta]) -> str:
    known = {delta.base for delta in deltas} - {""}
    if len(known) > 1:
        raise ValueError(f"the deltas are of different bases: {', '.join(sorted(known))}.")
    return known.pop() if known else ""

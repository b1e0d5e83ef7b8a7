"""The type of deltas: the changed entries of a fine-tune, and their new values."""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from jaxrl_eff.checkpoints.deltas import coding
from jaxrl_eff.checkpoints.deltas.tensors import bits

SEMANTICS = ("set", "add")


@dataclasses.dataclass(frozen=True, eq=False)
class Entries:
    """The changed entries of one tensor.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor, by name: "bfloat16".
        indices: [k] int64 into the flat tensor (C order), strictly increasing.
        values: [k]. To be set: the new values, in the tensor's dtype. To be added: float32.
        originals: [k], the base's values, in the tensor's dtype; or None.
    """

    shape: tuple[int, ...]
    dtype: str
    indices: np.ndarray
    values: np.ndarray
    originals: np.ndarray | None = None

    def __post_init__(self):
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "indices", coding.checked(self.indices, self.size))
        for what in ("values", "originals"):
            x = getattr(self, what)
            if x is not None and x.shape != self.indices.shape:
                raise ValueError(f"{what} {list(x.shape)} for {len(self.indices)} indices.")
        if self.originals is not None and str(self.originals.dtype) != self.dtype:
            raise ValueError(f"originals are {self.originals.dtype}, but the tensor {self.dtype}.")

    @property
    def size(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, keep: np.ndarray) -> "Entries":
        """Selects entries by a mask, or by increasing positions."""
        originals = None if self.originals is None else self.originals[keep]
        return dataclasses.replace(
            self, indices=self.indices[keep], values=self.values[keep], originals=originals
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Delta:
    """A sparse change of a model.

    Attributes:
        tensors: by name; tensors without changed entries can be omitted.
        base: `tensors.content_hash` of the model that it changes; "" is unknown and never checked.
        semantics: "set" overwrites entries, exactly; "add" adds to them, which rounds.
        method: description of how the entries were selected and trained.
        granularity: of the selection: element, block, row, ...
    """

    tensors: Mapping[str, Entries]
    base: str = ""
    semantics: str = "set"
    method: str = ""
    granularity: str = "element"

    def __post_init__(self):
        if self.semantics not in SEMANTICS:
            raise ValueError(
                f"unknown semantics {self.semantics!r}; expected one of {[*SEMANTICS]}."
            )
        for name, entries in self.tensors.items():
            wanted = entries.dtype if self.semantics == "set" else "float32"
            if str(entries.values.dtype) != wanted:
                raise ValueError(
                    f"the values of {name!r} are {entries.values.dtype}, but to {self.semantics} "
                    f"them to a {entries.dtype} tensor they should be {wanted}."
                )

    @property
    def count(self) -> int:
        """Changed entries."""
        return sum(len(e) for e in self.tensors.values())

    @property
    def density(self) -> float:
        """Changed entries over all entries of the tensors that it names."""
        return self.count / max(1, sum(e.size for e in self.tensors.values()))

    @property
    def reversible(self) -> bool:
        """True if it has the base's original values."""
        return all(e.originals is not None for e in self.tensors.values())


def from_entries(
    shapes: Mapping[str, tuple[int, ...]],
    indices: Mapping[str, np.ndarray],
    values: Mapping[str, np.ndarray],
    originals: Mapping[str, np.ndarray] | None = None,
    *,
    dtypes: Mapping[str, str] | None = None,
    base: str = "",
    semantics: str = "set",
    method: str = "",
    granularity: str = "element",
) -> Delta:
    """Makes a delta from plain arrays, as a sparse optimizer has them.

    Entries whose new value equals the original one, bit by bit, are dropped.

    Args:
        shapes: of every tensor.
        indices: [k] into the flat tensor; or [L, k] into each of the L slices of a stacked tensor,
            flat. In any order, but without duplicates.
        values: same sizes; to be set or added.
        originals: same sizes, in the tensor's dtype.
        dtypes: of the tensors; None: that of the originals, else that of the values.
        base, semantics, method, granularity: as in `Delta`.

    Raises:
        ValueError: names differ between the tables; arrays do not match; an entry is duplicated.
    """
    given = {"indices": indices, "values": values}
    given |= {} if originals is None else {"originals": originals}
    given |= {} if dtypes is None else {"dtypes": dtypes}
    for what, table in given.items():
        if odd := sorted(set(table) ^ set(shapes)):
            raise ValueError(f"{odd[0]!r} is only in one of shapes and {what}.")
    tensors = {}
    for name, shape in shapes.items():
        flat = _flat(name, np.asarray(indices[name]), shape)
        order = np.argsort(flat, kind="stable")
        columns = []
        for table in (values, originals):
            column = None if table is None else np.asarray(table[name])
            if column is not None and column.size != flat.size:
                raise ValueError(f"{name!r} has {flat.size} indices, but {column.size} values.")
            columns.append(None if column is None else column.reshape(-1)[order])
        new, old = columns
        dtype = dtypes[name] if dtypes else str(new.dtype if old is None else old.dtype)
        if semantics == "add":
            new = new.astype(np.float32)
        try:
            entries = Entries(tuple(shape), str(jnp.dtype(dtype)), flat[order], new, old)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from error
        if semantics == "set" and old is not None and new.dtype == old.dtype:
            entries = entries.take(bits(new) != bits(old))
        if len(entries):
            tensors[name] = entries
    return Delta(tensors, base, semantics, method, granularity)


def _flat(name: str, indices: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Converts indices into slices to indices into the flat tensor."""
    if indices.size and indices.dtype.kind not in "iu":
        raise ValueError(f"the indices of {name!r} are {indices.dtype}, not integers.")
    indices = indices.astype(np.int64)
    if indices.ndim == 1:
        return indices
    if indices.ndim != 2 or not shape or indices.shape[0] != shape[0]:
        raise ValueError(
            f"the indices of {name!r} are {list(indices.shape)}, but its shape is {list(shape)}: "
            "they should be [k], or [L, k] with the tensor's first axis L."
        )
    each = math.prod(shape[1:])
    if indices.size and not (indices.min() >= 0 and indices.max() < each):
        raise ValueError(f"an index of {name!r} is not from 0 to {each - 1}, the size of a slice.")
    return (indices + each * np.arange(shape[0])[:, None]).reshape(-1)

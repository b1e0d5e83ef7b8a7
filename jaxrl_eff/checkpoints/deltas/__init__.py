"""Delta files: the few entries that a sparse fine-tune changed, stored separately from the model.

`diff` or `from_entries` makes a `Delta`; `save` and `load` store it in about 3 bytes per entry;
`apply` and `remove` write it into parameters and revert it, bit for bit; `compose` adds deltas;
`audit` measures the effect of one, and `merge` writes a Hugging Face directory with it only if the
audit passes.

Example:
    >>> from jaxrl_eff import deltas
    >>> base, tuned = {"w": np.zeros(4, np.float32)}, {"w": np.array([0, 0, 5, 0], np.float32)}
    >>> delta = deltas.diff(base, tuned)
    >>> delta.tensors["w"].indices, delta.density
    (array([2]), 0.25)
    >>> deltas.apply(base, delta)["w"].tolist(), deltas.remove(tuned, delta)["w"].tolist()
    ([0.0, 0.0, 5.0, 0.0], [0.0, 0.0, 0.0, 0.0])
"""

from jaxrl_eff.checkpoints.deltas.algebra import (
    Overlap,
    as_add,
    as_dtype,
    compose,
    disjoint,
    mask_of,
    overlap,
    overlaps,
    scale,
    without,
)
from jaxrl_eff.checkpoints.deltas.apply import apply, check, diff, remove, resolved
from jaxrl_eff.checkpoints.deltas.audit import Audit, AuditError, Limits, audit, lm_kl
from jaxrl_eff.checkpoints.deltas.delta import Delta, Entries, from_entries
from jaxrl_eff.checkpoints.deltas.directory import audit_directory, hf_kl, merge, rollback
from jaxrl_eff.checkpoints.deltas.file import load, save
from jaxrl_eff.checkpoints.deltas.names import from_hf, to_hf
from jaxrl_eff.checkpoints.deltas.tensors import content_hash, read_directory

__all__ = [
    "Audit", "AuditError", "Delta", "Entries", "Limits", "Overlap", "apply", "as_add", "as_dtype",
    "audit", "audit_directory", "check", "compose", "content_hash", "diff", "disjoint",
    "from_entries", "from_hf", "hf_kl", "lm_kl", "load", "mask_of", "merge", "overlap", "overlaps",
    "read_directory", "remove", "resolved", "rollback", "save", "scale", "to_hf", "without",
]  # fmt: skip

"""Audit of a delta: measures its effect on a model before it is merged.

Per tensor, with W the base and d the change:

    share    changed entries / entries
    rms      ||d|| / ||W||, the root mean squares of change and tensor
    largest  max |d_i| / |W_i|; infinite where a zero was changed

and for the whole model the caller's measurements: the KL divergence from the base on a probe set,
and tests that the tuned model must pass. Only quantities with a limit can fail.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_eff.checkpoints.deltas.apply import apply, resolved
from jaxrl_eff.checkpoints.deltas.delta import Delta, Entries
from jaxrl_eff.checkpoints.deltas.tensors import host
from jaxrl_eff.models import LMConfig, unembed
from jaxrl_eff.models import apply as run
from jaxrl_eff.tree import flat
from jaxrl_eff.types import Array, Float, Int, PyTree

_PIECE = 2**22  # entries of a tensor that are squared at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Upper limits; None is not checked.

    Attributes:
        share, rms, largest: of every tensor, as above.
        kl: nats per token, as returned by the caller's function.
    """

    share: float | int | None = None
    rms: float | int | None = None
    largest: float | int | None = None
    kl: float | int | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not value >= 0:
                raise ValueError(f"the limit {field.name}={value} should be at least 0.")


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of the audit."""

    name: str
    size: int
    changed: int
    rms: float
    largest: float

    @property
    def share(self) -> float:
        return self.changed / max(1, self.size)


@dataclasses.dataclass(frozen=True)
class Audit:
    """The findings. Made by `audit`.

    Attributes:
        rows: of the tensors that change.
        limits: the given limits.
        kl: nats per token; None if it was not measured.
        suite: True for each test of the suite that passed.
    """

    rows: tuple[Row, ...]
    limits: Limits
    kl: float | None
    suite: Mapping[str, bool]

    @property
    def failures(self) -> tuple[str, ...]:
        """Exceeded limits and failed tests, a sentence each. A NaN exceeds every limit."""
        found = []
        for row in self.rows:
            for what in ("share", "rms", "largest"):
                value, most = getattr(row, what), getattr(self.limits, what)
                if most is not None and not value <= most:
                    found.append(f"{row.name}: {what} is {value:.3g}, over {most:g}.")
        if self.limits.kl is not None and not self.kl <= self.limits.kl:
            found.append(
                f"KL from the base is {self.kl:.3g} nats a token, over {self.limits.kl:g}."
            )
        found += [f"the test {name!r} was not passed." for name, ok in self.suite.items() if not ok]
        return tuple(found)

    @property
    def passed(self) -> bool:
        """True also if nothing was checked."""
        return not self.failures

    @property
    def changed(self) -> int:
        return sum(row.changed for row in self.rows)

    def text(self) -> str:
        """Formats a table with a line per tensor, then the findings for the whole model."""
        head = ["tensor", "entries", "changed", "share", "rms", "largest"]
        lines = [head]
        for row in self.rows:
            numbers = [f"{row.share:.4%}", f"{row.rms:.2e}", f"{row.largest:.2e}"]
            lines.append([row.name, f"{row.size:,}", f"{row.changed:,}", *numbers])
        width = [max(len(line[i]) for line in lines) for i in range(len(head))]
        out = [
            "  ".join([line[0].ljust(width[0]), *map(str.rjust, line[1:], width[1:])])
            for line in lines
        ]
        if self.kl is not None:
            out.append(f"KL from the base: {self.kl:.3g} nats a token")
        out += [f"{name}: {'passed' if ok else 'failed'}" for name, ok in self.suite.items()]
        out += [f"failed: {failure}" for failure in self.failures]
        out.append(f"{'passed' if self.passed else 'failed'}: {self.changed:,} entries change.")
        return "\n".join(out)

    def json(self) -> str:
        """Encodes all findings as JSON; non-finite numbers as text."""

        def plain(x: Any) -> Any:
            return str(x) if isinstance(x, float) and not math.isfinite(x) else x

        rows = [
            {k: plain(v) for k, v in (dataclasses.asdict(row) | {"share": row.share}).items()}
            for row in self.rows
        ]
        told = {
            "passed": self.passed,
            "failures": self.failures,
            "changed": self.changed,
            "limits": dataclasses.asdict(self.limits),
            "kl": plain(self.kl),
            "suite": dict(self.suite),
            "tensors": rows,
        }
        return json.dumps(told, indent=2, allow_nan=False)


class AuditError(ValueError):
    """A merge was rejected by the audit.

    Attributes:
        audit: the findings.
    """

    def __init__(self, audit: Audit):
        super().__init__("the audit failed: " + " ".join(audit.failures))
        self.audit = audit


Divergence = Callable[[Any, Any], float]  # (base, tuned) -> nats per token
Suite = Mapping[str, Callable[[Any], bool]]  # name -> (tuned) -> True if passed


def audit(
    base: Any,
    delta: Delta,
    *,
    limits: Limits = Limits(),
    kl: Divergence | None = None,
    suite: Suite | None = None,
) -> Audit:
    """Measures the effect of the delta on these parameters.

    Args:
        base: tree of arrays.
        delta: made for it.
        limits: upper limits.
        kl: of (base, tuned), such as `lm_kl`.
        suite: tests of the tuned parameters, by name: `lambda p: evaluation(p)[0] >= 0.9`.

    Raises:
        ValueError: the delta is for another base; there is a limit on KL but no function for it.
    """
    asked(limits, kl)
    delta = resolved(base, delta)
    tuned = apply(base, delta, content=False) if kl or suite else None
    return measured(base, delta, (base, tuned), limits=limits, kl=kl, suite=suite)


def asked(limits: Limits, kl: Divergence | None) -> None:
    """Checks that there is a function for every limited quantity."""
    if limits.kl is not None and kl is None:
        raise ValueError(f"the limit kl={limits.kl:g} needs a function that measures it.")


def measured(
    tensors: Any,
    delta: Delta,
    models: tuple[Any, Any],
    *,
    limits: Limits,
    kl: Divergence | None,
    suite: Suite | None,
) -> Audit:
    """Audits a resolved delta.

    Args:
        tensors: of the base.
        delta: from `resolved`.
        models: base and tuned, as arguments of `kl` and `suite`.
        limits, kl, suite: as in `audit`.
    """
    table = flat(tensors)
    rows = tuple(
        _row(name, host(name, table[name]), entries)
        for name, entries in sorted(delta.tensors.items())
    )
    divergence = None if kl is None else float(kl(*models))
    passed = {name: bool(test(models[1])) for name, test in (suite or {}).items()}
    return Audit(rows, limits, divergence, passed)


def _row(name: str, base: np.ndarray, entries: Entries) -> Row:
    with np.errstate(invalid="ignore", divide="ignore"):
        old = entries.originals.astype(np.float64)
        change = np.abs(entries.values.astype(np.float64) - old)
        ratio = np.where(change == 0, 0.0, change / np.abs(old))
        size = np.float64(np.sqrt(np.square(change).sum()))
        rms = 0.0 if size == 0 else size / _norm(base)
    return Row(name, entries.size, len(entries), float(rms), float(ratio.max(initial=0.0)))


def _norm(x: np.ndarray) -> np.float64:
    """Computes the Euclidean norm in float64, a piece at a time."""
    flat = np.ascontiguousarray(x).reshape(-1)
    pieces = (flat[i : i + _PIECE].astype(np.float64) for i in range(0, flat.size, _PIECE))
    return np.sqrt(np.float64(sum(float(piece @ piece) for piece in pieces)))


def lm_kl(cfg: LMConfig, rows: Int[np.ndarray, "B T"]) -> Divergence:
    """Returns a function for KL(tuned || base) of the next token, in nats per probe token.

        mean over t of  sum_v pi(v | t) (log pi(v | t) - log pi_base(v | t))

    over the whole vocabulary, so without sampling noise. Logits of one row exist at a time.

    Args:
        cfg: of the model; with `head="lm"`.
        rows: token ids; negative ones are padding after the text.

    Raises:
        ValueError: there is no token; an id is not in the vocabulary.
    """
    rows = np.asarray(rows)
    if not (rows >= 0).any():
        raise ValueError("the probe set holds no token.")
    if rows.max() >= cfg.vocab:
        raise ValueError(f"the probe set has the token {rows.max()}; the model has {cfg.vocab}.")
    if cfg.head != "lm":
        raise ValueError(f"head={cfg.head!r}, but KL is between language models.")

    def logp(params: PyTree, row: Int[Array, "1 T"]) -> Float[Array, "T V"]:
        at = jnp.arange(row.shape[1], dtype=jnp.int32)[None]
        segment = (row >= 0).astype(jnp.int32)
        hidden, _ = run(cfg, params, jnp.maximum(row, 0), at, segment)
        return jax.nn.log_softmax(unembed(cfg, params, hidden)[0].astype(jnp.float32))

    @jax.jit
    def total(base: PyTree, tuned: PyTree, row: Int[Array, "1 T"]) -> Float[Array, ""]:
        new, old = logp(tuned, row), logp(base, row)
        return jnp.where(row[0] >= 0, (jnp.exp(new) * (new - old)).sum(-1), 0.0).sum()

    def kl(base: PyTree, tuned: PyTree) -> float:
        sums = [float(total(base, tuned, jnp.asarray(row[None], jnp.int32))) for row in rows]
        return math.fsum(sums) / int((rows >= 0).sum())

    return kl

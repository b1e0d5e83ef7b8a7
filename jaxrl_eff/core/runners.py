"""Runners: calls of a graph as compiled programs and the host functions that drive them.

A runner is made from the shapes of what its call reads, lowers its programs, and, once they are
compiled, runs the call. `Apply`, `Train` and `Host` take rows as they are, split into the
placement's microbatches inside a program; `packed` has the runners of rows that are packed first.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from jaxrl_eff.core import glossary, lowering
from jaxrl_eff.core.graph import Call
from jaxrl_eff.core.lowering import Lowered, Traced
from jaxrl_eff.core.shardings import Shardings
from jaxrl_eff.core.specs import Model
from jaxrl_eff.core.zero import Traffic
from jaxrl_eff.parallel import global_arrays

RESELECT = "reselect"  # the program that reselects what a train call trains


@runtime_checkable
class Runner(Protocol):
    """One call of a graph. Besides these two methods a runner has

    - `out`: shapes and dtypes of the arrays that the call writes, by name;
    - `metrics`: names of the call's metrics;
    - `programs`: name -> compiled program, where "" is a call's only or main one.
    """

    def lower(self, made: Mapping[str, Any]) -> dict[str, Lowered]:
        """Lowers the programs, by name; the caller sets the compiled ones as `programs`.

        Args:
            made: arrays that the call writes, with shapes and shardings.
        """

    def __call__(self, model: Any, args: Mapping[str, Any], key: Any) -> tuple[Any, dict, dict]:
        """Runs the call.

        Args:
            model: for a train call the model without stale versions, donated; else parameters.
            args: the arrays that it reads.
            key: the step's two key words, on the call's devices.

        Returns:
            the updated model or None, the arrays that it writes, its metrics.
        """


class Apply:
    """A call that generates, infers or computes without a model: one program.

    Args:
        shardings: of the graph.
        c: the call.
        args: arrays that it reads, with shapes and shardings.
        seen: called whenever the call's function is traced.
    """

    def __init__(
        self, shardings: Shardings, c: Call, args: Mapping[str, Any], seen: Callable[[], None]
    ):
        check_rows(shardings, c, args)
        self._shardings, self._call, self.programs = shardings, c, {}
        self._make = lambda: lowering.trace(shardings, c, args, seen)
        self._traced: Traced | None = self._make()
        self.out, metrics = self._traced.out
        self.metrics = tuple(metrics)

    def lower(self, made: Mapping[str, Any]) -> dict[str, Lowered]:
        traced, self._traced = self._traced or self._make(), None
        return {"": lowering.lower(self._shardings, self._call, traced, made)}

    def __call__(self, model: Any, args: Mapping[str, Any], key: Any) -> tuple[Any, dict, dict]:
        return None, *self.programs[""](model, args, key)


class Train:
    """A call that updates a model: one program, and another that reselects what it trains.

    Traced when first needed, as late as compilation. Arguments are those of `Apply`.

    Attributes:
        out: nothing.
        traffic: the call's bytes on every mesh axis, if its model's `Spec` sets `sends`; None
            otherwise, and until it is traced.
    """

    out: Mapping[str, Any] = {}

    def __init__(
        self, shardings: Shardings, c: Call, args: Mapping[str, Any], seen: Callable[[], None]
    ):
        check_rows(shardings, c, args)
        self._shardings, self._call, self._args, self._seen = shardings, c, dict(args), seen
        self.programs: dict[str, Any] = {}
        self.traffic: Traffic | None = None
        self._traced: Traced | None = None

    def _found(self) -> Traced:
        if self._traced is None:
            self._traced = lowering.trace(self._shardings, self._call, self._args, self._seen)
            if self._call.name in self._shardings.sharded:
                sums = self._shardings.sharded[self._call.name]
                self.traffic = sums.traffic(self._traced.jaxpr)
        return self._traced

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(self._found().out[1])

    @property
    def still(self) -> Model:
        """The model with True for leaves that no step changes, and False for others."""
        return self._found().still

    def lower(self, made: Mapping[str, Any]) -> dict[str, Lowered]:
        del made
        out = {"": lowering.update(self._shardings, self._call, self._found())}
        self._traced = None
        return out | reselection(self._shardings, self._call, self._args)

    def __call__(self, model: Any, args: Mapping[str, Any], key: Any) -> tuple[Any, dict, dict]:
        model, metrics = self.programs[""](model, args, key)
        return model, {}, metrics


class Host:
    """A local call on numpy arrays, in the process that has the rows: no program.

    Called with the key's words as a numpy array.
    """

    metrics: tuple[str, ...] = ()

    def __init__(self, c: Call, args: Mapping[str, Any]):
        self._call, self.programs = c, {}
        self.out = glossary.shapes(c.writes, args)
        self._made: Mapping[str, Any] = {}

    def lower(self, made: Mapping[str, Any]) -> dict[str, Lowered]:
        self._made = made
        return {}

    def __call__(self, model: Any, args: Mapping[str, Any], key: np.ndarray) -> Any:
        out = self._call.fn({k: global_arrays.local_rows(v) for k, v in args.items()}, key)
        check_outputs(self._call, out)
        return None, {k: global_arrays.from_parts(self._made[k], v) for k, v in out.items()}, {}


def reselection(shardings: Shardings, c: Call, args: Mapping[str, Any]) -> dict[str, Lowered]:
    """Lowers the program that reselects what a train call trains; empty if nothing is reselected.

    Args:
        args: arrays that the call reads, with shapes and shardings.
    """
    if not lowering.reselects(shardings, c):
        return {}
    return {RESELECT: lowering.lower_reselection(shardings, c, args)}


def check_rows(shardings: Shardings, c: Call, args: Mapping[str, Any]) -> None:
    """Checks that the rows that a call reads divide by its placement.

    Raises:
        ValueError: they do not.
    """
    place = shardings.plan[c.name]
    parts = place.row_shards * place.microbatches * c.minibatches
    for k, x in args.items():
        if c.of is not None and x.shape[0] % parts:
            raise ValueError(
                f"{c.name} reads '{k}' with {x.shape[0]} rows, which do not divide by {parts} = "
                f"{place.row_shards} (dcn x data x fsdp) x {place.microbatches} (microbatches) x "
                f"{c.minibatches} (minibatches)."
            )


def check_outputs(c: Call, out: Mapping[str, Any]) -> None:
    """Checks that a call wrote the arrays that it declares, as the glossary says.

    Raises:
        ValueError: it did not.
    """
    if set(out) != set(c.writes):
        raise ValueError(f"{c.name} wrote {sorted(out)}, but declares {sorted(c.writes)}.")
    glossary.check(c.name, out)


def key_words(key: Any) -> np.ndarray:
    """Returns the two words of a key. A typed key is fetched; pass words to avoid the transfer."""
    if isinstance(key, jax.Array) and jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    words = np.asarray(key, np.uint32)
    if words.shape != (2,):
        raise ValueError(f"a key has two uint32 words, got an array of shape {words.shape}.")
    return words

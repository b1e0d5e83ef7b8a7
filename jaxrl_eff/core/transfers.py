"""Data movement in a step, and its order.

Arrays move to their readers, parameters to the calls that borrow them, metrics to all processes.
The shardings determine one list of operations in a total order.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxrl_eff.core.graph import Call
from jaxrl_eff.core.program_order import Operation
from jaxrl_eff.core.shardings import Shardings
from jaxrl_eff.core.weight_sources import Source
from jaxrl_eff.parallel import Placement, Route
from jaxrl_eff.parallel.sharding import replicated

Weights = Callable[[Call], Source]


class Transfers:
    """All operations of a step, in order.

    The constructor makes the routes, so that an impossible one is found before anything runs.

    Args:
        layouts: of the graph.
        weights: call -> the route of its parameters from home.
        args: call -> arrays that it reads, with shapes and shardings.
        home: array -> shape and sharding in which it is written, or first read.
        numbers: call -> its metrics, with shardings; only needed with several processes.

    Attributes:
        operations: in their order.
        routes: of moved arrays and metrics, by operation.
        slots: (call, array) -> the name under which the call finds it. An array moved for one call
            also serves later calls that read it in the same sharding.
        last_use: name of an array -> the last call that reads it.
    """

    def __init__(
        self,
        layouts: Shardings,
        weights: Weights,
        args: Mapping[str, Mapping[str, Any]],
        home: Mapping[str, jax.ShapeDtypeStruct],
        numbers: Mapping[str, Mapping[str, Any]],
    ):
        self._layouts, self._args, self._home = layouts, args, home
        self.routes: dict[str, Route] = {}
        self.slots: dict[tuple[str, str], str] = {}
        self._there = {(k, v.sharding): k for k, v in home.items()}
        out: list[Operation] = []
        borrowed: set[Any] = set()
        for c in layouts.calls:
            out += self._to(c)
            if c.of is not None and c.kind != "train" and not c.staleness:
                if not weights(c).alias and layouts.key(c) not in borrowed:
                    out.append(self._reallocation("realloc", c))
                borrowed.add(layouts.key(c))
            if c.kind == "train":
                out += [self._reallocation("keep", old) for old in layouts.graph.stale(c.of)]
                borrowed = {key for key in borrowed if key[0] != c.of}
            mine = _processes(layouts.whole(c))
            out.append(Operation("call", c.name, c.name, mine))
            if not c.host and len(mine) < jax.process_count():
                out.append(self._telling(c, numbers[c.name]))
        self.operations = tuple(out)
        turn = {c.name: i for i, c in enumerate(layouts.calls)}
        uses = [(slot, call) for (call, _), slot in self.slots.items()]
        uses += [(k, op.call) for op in out if op.kind == "move" for k in op.arrays]
        self.last_use = dict(sorted(uses, key=lambda use: turn[use[1]]))

    def _to(self, c: Call) -> list[Operation]:
        """Moves arrays that a call reads but that are not in its sharding; sets its slots."""
        args, out = self._args[c.name], []
        groups: dict[Any, list[str]] = {}
        for k in c.reads:
            if (k, args[k].sharding) not in self._there:
                groups.setdefault(self._home[k].sharding.mesh, []).append(k)
        for names in groups.values():
            op = self._move(tuple(names), c)
            out += [op] if op is not None else []
            for k in names:
                slot = k if op is None else moved_name(k, c)
                self._there[k, args[k].sharding] = slot
        for k in c.reads:
            self.slots[c.name, k] = self._there[k, args[k].sharding]
        return out

    def _move(self, names: tuple[str, ...], c: Call) -> Operation | None:
        """Returns None if the arrays are already there under another name."""
        source = {k: self._home[k] for k in names}
        target = {k: self._args[c.name][k].sharding for k in names}
        route = Route(source, target)
        if route.alias:
            return None
        name = f"{' '.join(names)} to {c.name}"
        self.routes[name] = route
        touched = _processes(source[names[0]].sharding, target[names[0]])
        return Operation("move", name, c.name, touched, names)

    def _reallocation(self, kind: str, c: Call) -> Operation:
        home = self._layouts.whole(self._layouts.graph.home(c.of))
        touched = _processes(home, self._layouts.whole(c))
        return Operation(kind, f"{c.of}->{c.name}", c.name, touched)

    def _telling(self, c: Call, numbers: Mapping[str, Any]) -> Operation:
        """Sends a call's metrics to every process."""
        name = f"metrics of {c.name}"
        self.routes[name] = to_all(numbers)
        return Operation("tell", name, c.name, tuple(range(jax.process_count())))


def moved_name(array: str, c: Call) -> str:
    """Returns the name of an array that was moved for a call."""
    return f"{array} to {c.name}"


def to_all(arrays: Mapping[str, Any]) -> Route:
    """Returns the route that replicates arrays on every device."""
    everywhere = replicated(Placement(tuple(range(jax.device_count()))))
    return Route(dict(arrays), dict.fromkeys(arrays, everywhere))


def everywhere(array: Any) -> bool:
    """Returns True if every process has a part of the array."""
    return len(_processes(array.sharding)) == jax.process_count()


def _processes(*shardings: jax.sharding.Sharding) -> tuple[int, ...]:
    return tuple(sorted({d.process_index for s in shardings for d in s.device_set}))

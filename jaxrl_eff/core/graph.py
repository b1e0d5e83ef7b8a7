"""Graphs of model function calls as plain data: calls, models, and the order of calls.

Terminology follows ReaL (Mei et al. 2024, arXiv:2406.14088, Sec. 3). A call applies one model to
named arrays; edges follow from the names.
"""

import dataclasses
import functools
import graphlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

from jaxrl_eff.parallel import Placement
from jaxrl_eff.parallel.codec import BITS

TOKENS = ("tokens", "position", "segment")
PRECISIONS = ("", *BITS)  # of the weights that a call reads


@dataclasses.dataclass(frozen=True)
class Call:
    """One node of the graph: a pure function of a model and named arrays.

    Attributes:
        name: unique; ReaL's names where they exist (`actor_gen`, `rew_inf`, ...).
        kind: how the model is used.
        of: the model's name; None for local calls.
        fn: by kind,
            generate, infer: `(params, batch, key) -> outputs`;
            train: `(params, batch, key) -> (loss_sum, weight, meters)`, `loss` after `forward`;
            local: `(batch, key) -> outputs`.
            `outputs` has the arrays of `writes` and, optionally, `metrics`, a dict of meters or
            numbers.
        reads, writes: names of arrays.
        host: True for a local call on numpy arrays, outside any program, e.g. a reward on text.
        epochs, minibatches: of a train call: passes over the rows, optimizer updates per pass.
        finish: of an infer call that writes one number per row: `(arrays, key) -> outputs`, from
            the arrays that the call reads and the per-token outputs of `fn`. With it, tokens can be
            packed or sharded, which a function of whole rows could not handle.
        forward: of a train call over rows of tokens: `(params, tokens, position, segment) ->
            numbers`, a tree of `[B, T]`. Only `forward` applies the model.
        loss: of a call with `forward`: `(numbers, batch, key) -> (loss_sum, weight, meters)`.
        staleness: of a generate call: age of its weights in steps. 0 is synchronous RL; 1 lets it
            sample on its own devices while the previous step still trains. It changes what is
            computed (samples are off-policy by that many steps), so it belongs to the graph.
        weights: of a generate or infer call: precision of the weights that it reads, wherever it
            runs. "": as trained; "int8", "int4": kernels and tables rounded to codes of 8 or 4 bits
            and decoded again, see `Spec.rounded` and `parallel.reshard.rounded`. If the weights
            come from other devices, the codes are sent.

    Example:
        >>> from jaxrl_eff import Call
        >>> call = Call("double", "local", None, lambda batch, key: {}, reads=("x",), writes=("y",))
        >>> f"{call.name} reads {call.reads} and writes {call.writes}"
        "double reads ('x',) and writes ('y',)"
    """

    name: str
    kind: Literal["generate", "infer", "train", "local"]
    of: str | None
    fn: Callable
    reads: tuple[str, ...]
    writes: tuple[str, ...] = ()
    host: bool = False
    epochs: int = 1
    minibatches: int = 1
    staleness: int = 0
    finish: Callable | None = None
    forward: Callable | None = None
    loss: Callable | None = None
    weights: str = ""

    def __post_init__(self):
        if self.weights not in PRECISIONS:
            raise ValueError(
                f"{self.name}: unknown weights {self.weights!r}; expected one of {[*PRECISIONS]}."
            )
        if self.weights and self.kind not in ("generate", "infer"):
            raise ValueError(
                f"{self.name} is a {self.kind} call with {self.weights} weights; only generate and "
                "infer calls read rounded weights."
            )
        if self.staleness < 0 or (self.staleness and self.kind != "generate"):
            raise ValueError(
                f"{self.name} is a {self.kind} call with staleness {self.staleness}; only a "
                "generate call may use old weights, by 0 or more steps."
            )


def generate(
    name: str,
    *,
    of: str,
    fn: Callable,
    reads: str,
    writes: str,
    staleness: int = 0,
    weights: str = "",
) -> Call:
    """Returns a call that samples from a model, with weights `staleness` steps old.

    Args:
        weights: their precision, see `Call`.

    Example:
        >>> from jaxrl_eff import LMConfig, Sampling, core, sample
        >>> lm = LMConfig(vocab=8, layers=1, width=4, heads=1, kv_heads=1, head_dim=4, ffn=8)
        >>> fn = sample(lm, Sampling(max_tokens=4))
        >>> reads = "prompt prompt_length"
        >>> call = core.generate("actor_gen", of="actor", fn=fn, reads=reads, writes="tokens logp")
        >>> call.kind, call.staleness
        ('generate', 0)
    """
    return Call(
        name, "generate", of, fn, tuple(reads.split()), tuple(writes.split()),
        staleness=staleness, weights=weights,
    )  # fmt: skip


def infer(
    name: str,
    *,
    of: str,
    fn: Callable,
    reads: str,
    writes: str,
    finish: Callable | None = None,
    weights: str = "",
) -> Call:
    """Returns a call that evaluates a model: `fn` per token, then `finish`, if given, per row.

    Args:
        weights: precision of those that it reads, see `Call`.

    Example:
        >>> from jaxrl_eff import core
        >>> double = lambda params, batch, key: {"y": params["w"] * batch["x"]}
        >>> call = core.infer("label", of="rule", fn=double, reads="x", writes="y")
        >>> call.fn({"w": 2.0}, {"x": 3.0}, None)
        {'y': 6.0}
    """
    return Call(
        name, "infer", of, fn, tuple(reads.split()), tuple(writes.split()),
        finish=finish, weights=weights,
    )  # fmt: skip


def train(
    name: str,
    *,
    of: str,
    loss: Callable,
    reads: str,
    forward: Callable | None = None,
    epochs: int = 1,
    minibatches: int = 1,
) -> Call:
    """Returns a call that updates a model: `epochs` passes of `minibatches` updates each.

    Args:
        forward, loss: see `Call`. Without `forward`, `loss` takes the parameters directly.

    Raises:
        ValueError: `forward` is given, but no rows of tokens are read.

    Example:
        >>> from jaxrl_eff import core
        >>> def loss(params, batch, key):
        ...     return ((params["w"] * batch["x"] - batch["y"]) ** 2).sum(), batch["x"].size, {}
        >>> call = core.train("fit", of="line", loss=loss, reads="x y", epochs=2)
        >>> call.fn({"w": 2.0}, {"x": np.array([1.0, 2.0]), "y": np.array([2.0, 3.0])}, None)[1]
        2
    """
    names, fn = tuple(reads.split()), loss
    if forward is not None:
        prefix = row_prefix(names)
        if prefix is None:
            raise ValueError(
                f"{name} has a forward pass, which takes {', '.join(TOKENS)}; it reads {reads!r}."
            )
        fn = functools.partial(_learned, forward, loss, tuple(prefix + k for k in TOKENS))
    return Call(
        name, "train", of, fn, names, epochs=epochs, minibatches=minibatches,
        forward=forward, loss=loss,
    )  # fmt: skip


def _learned(
    forward: Callable, loss: Callable, row: tuple[str, ...], params: Any, batch: dict, key: Any
) -> Any:
    return loss(forward(params, *(batch[k] for k in row)), batch, key)


def row_prefix(names: Collection[str]) -> str | None:
    """Returns the prefix of names of token rows: "best_" for "best_tokens". None if no rows."""
    for name in names:
        prefix = name.removesuffix("tokens")
        if prefix != name and {prefix + k for k in TOKENS} <= {*names}:
            return prefix
    return None


def local(name: str, *, fn: Callable, reads: str, writes: str, host: bool = False) -> Call:
    """Returns a call without a model; with `host=True` on numpy arrays, in each row's process.

    Example:
        >>> from jaxrl_eff import core
        >>> minus = lambda batch, key: {"adv": batch["score"] - batch["value"]}
        >>> call = core.local("advantage", fn=minus, reads="score value", writes="adv")
        >>> call.fn({"score": 3.0, "value": 1.0}, None)
        {'adv': 2.0}
    """
    return Call(name, "local", None, fn, tuple(reads.split()), tuple(writes.split()), host=host)


@dataclasses.dataclass(frozen=True)
class Graph:
    """Calls in any order, and the names of the arrays that the data source supplies.

    Example:
        >>> from jaxrl_eff import Graph, core
        >>> train = core.train("fit", of="line", loss=lambda params, batch, key: ..., reads="x y")
        >>> label = core.infer("label", of="rule", fn=lambda p, b, key: ..., reads="x", writes="y")
        >>> graph = Graph(inputs="x", calls=(train, label))
        >>> graph.models, [call.name for call in core.order(graph)]
        (('line', 'rule'), ['label', 'fit'])
    """

    inputs: str
    calls: tuple[Call, ...]

    def __post_init__(self):
        order(self)

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models, in order of first use."""
        return tuple(dict.fromkeys(c.of for c in self.calls if c.of))

    def of(self, model: str) -> tuple[Call, ...]:
        """Returns the calls of one model."""
        return tuple(c for c in self.calls if c.of == model)

    def stale(self, model: str) -> tuple[Call, ...]:
        """Returns the calls that use old weights of a model."""
        return tuple(c for c in self.of(model) if c.staleness)

    def home(self, model: str) -> Call:
        """Returns the call at a model's home: the call that trains it, else its first."""
        calls = self.of(model)
        return next((c for c in calls if c.kind == "train"), calls[0])


Plan = Mapping[str, Placement]


def order(graph: Graph) -> tuple[Call, ...]:
    """Sorts the calls so that arrays are written, and weights read, before they are used.

    Among ready calls, device calls come first, so that they run while the host works; otherwise the
    graph's own order is kept.

    Raises:
        ValueError: an array has two writers or none, a name is used twice, or calls depend on each
            other in a cycle.

    Example:
        >>> from jaxrl_eff import Graph, core
        >>> second = core.local("second", fn=lambda b, key: {}, reads="y", writes="z")
        >>> first = core.local("first", fn=lambda b, key: {}, reads="x", writes="y")
        >>> [call.name for call in core.order(Graph("x", (second, first)))]
        ['first', 'second']
    """
    writer = dict.fromkeys(graph.inputs.split(), "the data source")
    names: set[str] = set()
    for c in graph.calls:
        if c.name in names:
            raise ValueError(f"two calls are named '{c.name}'.")
        names.add(c.name)
        for k in c.writes:
            if k in writer:
                raise ValueError(f"'{k}' is written by {writer[k]} and again by {c.name}.")
            writer[k] = c.name
    needs: dict[str, set[str]] = {c.name: set() for c in graph.calls}
    for c in graph.calls:
        for k in c.reads:
            if k not in writer:
                raise ValueError(
                    f"{c.name} reads the unknown array '{k}'; expected one of {sorted(writer)}."
                )
        needs[c.name] = {writer[k] for k in c.reads} - {"the data source"}
        if c.kind == "train":
            readers = [d for d in graph.of(c.of) if d.kind != "train" and not d.staleness]
            needs[c.name] |= {d.name for d in readers}
        elif c.staleness and not any(d.kind == "train" for d in graph.of(c.of)):
            raise ValueError(f"{c.name} has staleness {c.staleness}, but nothing trains {c.of}.")
    rank = {c.name: (c.host, i) for i, c in enumerate(graph.calls)}
    by_name = {c.name: c for c in graph.calls}
    sorter, out, ready = graphlib.TopologicalSorter(needs), [], []
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        raise ValueError(f"calls wait for each other: {' -> '.join(error.args[1])}.") from None
    while sorter.is_active():
        ready = sorted([*ready, *sorter.get_ready()], key=rank.__getitem__)
        name = ready.pop(0)
        out.append(by_name[name])
        sorter.done(name)
    return tuple(out)

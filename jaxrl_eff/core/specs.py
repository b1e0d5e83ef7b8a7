"""Models of a graph: their state, their description for `compile`, and how a part is trained."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from jaxrl_eff import tree
from jaxrl_eff.core.graph import Call
from jaxrl_eff.parallel.zero import levels


class Model(NamedTuple):
    """Parameters and training state of one language model.

    Attributes:
        params: parameters.
        opt: optimizer state, if a call trains the model.
        stale: for every call with stale weights, the last versions in that call's layout, oldest
            first: `{call: (params, ...)}`.
        error_feedback: quantization residuals of the last gradients, if these are sent with error
            feedback: parameter -> float32 `[N, ..., N, D / N, ...]`, indexed by sending node, then
            receiving node. Stored where the optimizer state is.
        node_copy: every node's copy of the weights, if weight differences are sent: parameter ->
            `[..., N, D / N, ...]`, bitwise equal on all nodes. A train call updates it from
            `params`, whatever changed these; after replacing parameters for good, call
            `Step.refreshed`.

    Example:
        >>> from jaxrl_eff import Model
        >>> model = Model(params={"w": jnp.ones(2)})
        >>> model.params["w"].shape, model.opt
        ((2,), ())
    """

    params: Any
    opt: Any = ()
    stale: Any = ()
    error_feedback: Any = ()
    node_copy: Any = ()


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """Partial training of a model: the counterpart of an optax transform for full training.

    Attributes:
        init: params -> optimizer state.
        leaves: (params, opt) -> the differentiated arrays, by name.
        attach: (params, opt, leaves) -> the parameters with the leaves, for `Spec.view`.
        update: (gradients of the leaves, opt, params, finite) -> (params, opt), both unchanged
            unless `finite`; its temporaries are no larger than the trained part.
        extended: parameters of the base model -> all parameters that the model starts with.
        axes: name of a leaf of the optimizer state, or of a differentiated array that is not a
            parameter -> logical axes of its first axes; None for a leaf that is sharded like its
            parameter, or replicated.
        due: step of the stage -> True if `reselect` runs before it; None: never.
        probes: (params, opt) -> leaves whose gradients `reselect` needs; None: it needs no
            gradient.
        reselect: (params, opt, gradients of the probes or None) -> (params, opt).
        probe: the gradient of the probes uses one in this many rows.
        passes: cost of a training pass in forward passes: 3 with gradients of all weights, 2 with
            none, ignoring small arrays.
    """

    init: Callable[[Any], Any]
    leaves: Callable[[Any, Any], Any]
    attach: Callable[[Any, Any, Any], Any]
    update: Callable[..., tuple[Any, Any]]
    extended: Callable[[Any], Any]
    axes: Callable[[str], tuple[str, ...] | None]
    due: Callable[[int], bool] | None = None
    probes: Callable[[Any, Any], Any] | None = None
    reselect: Callable[[Any, Any, Any], tuple[Any, Any]] | None = None
    probe: int = 1
    passes: float = 3.0


class Spec(NamedTuple):
    """Description of a model for `compile`.

    Attributes:
        shapes: tree of `jax.ShapeDtypeStruct`, one per parameter.
        axes: the same tree with a tuple of logical axis names per parameter.
        tx: the optax transform or `Adaptation`, if a call trains the model.
        sends: precision of weights and gradients sent between the nodes of a train call; None:
            unquantized, with communication left to the compiler.
        view: parameters, as stored -> the parameters that functions of calls read; None: the same.
        codes: names of parameters that are never quantized when sent, since they are codes already.

    Example:
        >>> from jaxrl_eff import LMConfig, Spec, abstract, logical_axes
        >>> lm = LMConfig(vocab=8, layers=1, width=4, heads=1, kv_heads=1, head_dim=4, ffn=8)
        >>> spec = Spec(abstract(lm), logical_axes(lm), optax.adamw(1e-5))
        >>> spec.shapes["embed"]["table"].shape, spec.axes["embed"]["table"]
        ((8, 4), ('vocab', 'embed'))
    """

    shapes: Any
    axes: Any
    tx: optax.GradientTransformation | Adaptation | None = None
    sends: levels.ZeroConfig | None = None
    view: Callable[[Any], Any] | None = None
    codes: frozenset[str] = frozenset()

    @property
    def rounded(self) -> Any:
        """Tree of bools: True for parameters that a call with a precision of `weights` rounds.

        These are kernels of layers, embeddings and unembeddings. Norms, biases, heads of one
        number, adapters, and codes and scales of a quantized base are never rounded.
        """

        def of(name: str, x: Any, axes: tuple[str | None, ...]) -> bool:
            floats = jnp.issubdtype(x.dtype, jnp.floating)
            return floats and is_kernel(axes) and name not in self.codes

        return tree.map_with_name(of, self.shapes, self.axes)


def is_kernel(axes: tuple[str | None, ...]) -> bool:
    """Returns True for the logical axes of kernels and tables: several, all of which are named.

    Adapters and heads of one number have an axis that is never sharded.
    """
    own = axes[1:] if axes[:1] == ("layers",) else axes
    return len(own) > 1 and None not in own


def viewed(c: Call, spec: Spec | None) -> Call:
    """Returns the call with functions of stored parameters, which it passes on as their view."""
    if spec is None or spec.view is None:
        return c

    def of_view(fn: Callable) -> Callable:
        return lambda params, *args: fn(spec.view(params), *args)

    forward = None if c.forward is None else of_view(c.forward)
    return dataclasses.replace(c, fn=of_view(c.fn), forward=forward)

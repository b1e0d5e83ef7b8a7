"""The program of one call on its devices: a pure function, traced once.

Implements microbatches, epochs and minibatches. Losses are sums, so how rows are split cannot
change a gradient beyond the rounding of reordered sums.
"""

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrl_eff import tree
from jaxrl_eff.core import meters
from jaxrl_eff.core.graph import Call
from jaxrl_eff.core.specs import Adaptation, Model
from jaxrl_eff.optim import mcf, precision_metrics
from jaxrl_eff.parallel.offload import OffloadedWeight

# (parameters, arrays, key) -> sums of loss and weight over rows, meters.
Loss = Callable[[Any, Any, jax.Array], tuple[jax.Array, jax.Array, dict[str, Any]]]
# (loss, way, key, model, leaves, batch, micro-batches) -> sums, and the fields of the model that
# communication has changed.
SumsOf = Callable[..., tuple["Sums", dict[str, Any]]]


def key_of(name: str, words: jax.Array) -> jax.Array:
    """Returns the call's key. Folding in its name keeps it fixed when other calls are added."""
    key = jax.random.wrap_key_data(words, impl="threefry2x32")
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def outputs_and_metrics(c: Call, params: Any, batch: dict, words: jax.Array) -> tuple[dict, dict]:
    key = key_of(c.name, words)
    out = dict(c.fn(batch, key) if c.kind == "local" else c.fn(params, batch, key))
    if c.finish is not None:
        out = dict(c.finish({**batch, **out}, key))
    return out, out.pop("metrics", {})


def split(batch: Any, parts: int) -> Any:
    """`[B, ...] -> [parts, B / parts, ...]`; part m has rows m, m + parts, ...

    Strided, so that every device keeps its own rows for any number of parts.
    """
    return jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1), batch
    )


def fetched(params: Any, axes: Any) -> Any:
    """Fetches parameters from host memory; those of layers when a layer uses them."""

    def fetch(names: tuple, x: jax.Array) -> Any:
        x = OffloadedWeight(x)
        return x if "layers" in names else x.materialize()

    return jax.tree.map(fetch, axes, params, is_leaf=lambda x: isinstance(x, tuple))


def with_state(model: Model) -> Model:
    """Fetches a model's optimizer state from host memory to the devices."""
    return model._replace(opt=jax.device_put(model.opt, jax.memory.Space.Device))


def apply_program(
    c: Call, microbatches: int, in_host: Any, params: Any, batch: dict, words: jax.Array
):
    """Runs a call that does not train: `-> (outputs, metrics)`.

    Args:
        in_host: the logical axes of the parameters if these are offloaded to host memory, else
            None.
    """
    if in_host is not None:
        params = fetched(params, in_host)
    if microbatches == 1 or c.kind == "local":
        out, m = outputs_and_metrics(c, params, batch, words)
        return out, _numbers(m)
    if c.kind == "generate":  # a row's randomness must not depend on its microbatch
        first = next(iter(batch.values()))
        batch = batch | {"prompt_row": jnp.arange(first.shape[0], dtype=jnp.int32)}
    parts = split(batch, microbatches)
    out, m = jax.lax.map(lambda part: outputs_and_metrics(c, params, part, words), parts)
    size = next(iter(batch.values())).shape[0] // microbatches

    def whole(x: jax.Array) -> jax.Array:  # undoes split; a part has x.shape[1] / size rows each
        each = x.shape[1] // size
        x = x.reshape(microbatches, size, each, *x.shape[2:])
        return jnp.swapaxes(x, 0, 1).reshape(microbatches * size * each, *x.shape[3:])

    merged = jax.tree.map(_merge_parts, m, is_leaf=_is_meter)
    return jax.tree.map(whole, out), _numbers(merged)


def _is_meter(x: Any) -> bool:
    return isinstance(x, meters.Mean | meters.Max | meters.Quantile | meters.First)


def _merge_parts(m: Any) -> Any:
    if not _is_meter(m):
        return m.mean()
    inner = m.inner if isinstance(m, meters.First) else m
    return meters.combine(inner)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, jax.Array]:
    return {k: jnp.asarray(meters.read(v), jnp.float32) for k, v in metrics.items()}


def train_program(
    c: Call,
    tx: optax.GradientTransformation | Adaptation,
    microbatches: int,
    opt_in_host: bool,
    sharded: SumsOf | None,
    model: Model,
    batch: dict,
    words: jax.Array,
):
    """Runs a train call: epochs x minibatches optimizer updates, `-> (model, metrics)`.

    Args:
        sharded: computes gradients and sums of rows; None: `sums`, partitioned by the compiler.
    """
    if opt_in_host:
        model = with_state(model)
    key = key_of(c.name, words)
    updates = c.epochs * c.minibatches
    way = way_of(tx)
    update = functools.partial(_update, c, way, microbatches, sharded, key)
    if updates == 1:
        model, seen = update(model, batch)
        seen = jax.tree.map(lambda x: x[None], seen)
    else:
        index = shuffled(c, key, next(iter(batch.values())).shape[0])
        model, seen = jax.lax.scan(
            lambda carry, rows: update(carry, jax.tree.map(lambda x: x[rows], batch)), model, index
        )
    return model, read(seen)


def shuffled(c: Call, key: jax.Array, rows: int) -> jax.Array:
    """Returns the rows of every update of a train call, int32 `[updates, rows / minibatches]`.

    Args:
        key: the call's key.
    """
    each = [jax.random.permutation(jax.random.fold_in(key, e), rows) for e in range(c.epochs)]
    return jnp.stack(each).reshape(c.epochs * c.minibatches, rows // c.minibatches)


def read(seen: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Returns the metrics of a train call from the stacked meters of its updates."""
    metrics = _numbers({k: meters.combine(v) for k, v in seen.items() if k != "finite"})
    metrics["finite"] = seen["finite"].min().astype(jnp.float32)
    return metrics


def reselect_program(
    c: Call, way: Adaptation, opt_in_host: bool, model: Model, batch: dict, words: jax.Array
) -> Model:
    """Reselects a train call's trained part, by a gradient on one in `way.probe` of its rows.

    These rows are not split into microbatches, so that the plan cannot change the selection.
    """
    if opt_in_host:
        model = with_state(model)
    found = None
    if way.probes is not None:
        part = jax.tree.map(lambda x: x[0], split(batch, way.probe))
        key = key_of(c.name, words)
        taps = way.leaves(model.params, model.opt)

        def total(probes: Any) -> jax.Array:
            params = way.attach(model.params, model.opt, {**taps, **probes})
            return c.fn(params, part, key)[0]

        found = jax.grad(total)(way.probes(model.params, model.opt))
    params, opt = way.reselect(model.params, model.opt, found)
    return model._replace(params=params, opt=opt)


def way_of(tx: optax.GradientTransformation | Adaptation) -> Adaptation:
    """Returns `tx` as an `Adaptation`; an optax transform trains all parameters."""
    return tx if isinstance(tx, Adaptation) else _whole(tx)


def _whole(tx: optax.GradientTransformation) -> Adaptation:
    """Wraps an optax transform of all parameters as an `Adaptation`."""

    def update(grads, opt, params, finite):
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
            changes, new = tx.update(grads, opt, params)
            updated = optax.apply_updates(params, changes), new
        # XLA fuses a select into the optimizer's pass over parameters; a cond would copy them.
        return tree.where(finite, updated, (params, opt))

    return Adaptation(
        init=tx.init,
        leaves=lambda params, opt: params,
        attach=lambda params, opt, leaves: leaves,
        update=update,
        extended=lambda params: params,
        axes=lambda name: None,
    )


class Sums(NamedTuple):
    """Sums over rows: loss, weight, meters, gradients."""

    loss: jax.Array
    weight: jax.Array
    seen: dict[str, Any]
    grads: Any

    def plus(self, more: "Sums") -> "Sums":
        """Returns the total of both."""
        return Sums(
            self.loss + more.loss,
            self.weight + more.weight,
            {k: meters.add(self.seen[k], more.seen[k]) for k in more.seen},
            jax.tree.map(lambda a, g: a + g.astype(a.dtype), self.grads, more.grads),
        )

    @classmethod
    def zeros(cls, like: "Sums") -> "Sums":
        """Returns zeros in the shapes of `like`; gradients in float32 or wider."""
        loss, weight, seen = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like[:3])
        wide = jax.tree.map(lambda x: jnp.zeros(x.shape, mcf.wide_dtype(x.dtype)), like.grads)
        return cls(loss, weight, {k: _lowest(v) for k, v in seen.items()}, wide)


def sums(loss: Loss, way: Adaptation, key: jax.Array, model: Model, leaves: Any, part: Any) -> Sums:
    """Computes the sums of some rows."""

    def total(leaves: Any, part: Any) -> Any:
        value, weight, seen = loss(way.attach(model.params, model.opt, leaves), part, key)
        return value, (weight, seen)

    (value, (weight, seen)), grads = jax.value_and_grad(total, has_aux=True)(leaves, part)
    return Sums(value, weight, seen, grads)


def updated(
    way: Adaptation, model: Model, leaves: Any, done: Sums, sent: Mapping[str, Any] | None = None
) -> tuple[Model, dict]:
    """Applies one optimizer update from the sums of all rows.

    If the loss or gradient is not finite, the update is skipped: the model stays unchanged.

    Args:
        sent: fields of the model that sending its weights or gradients has changed.
    """
    scale = 1.0 / jnp.maximum(done.weight, 1e-8)

    def scaled(g: jax.Array, p: jax.Array) -> jax.Array:
        wide = mcf.wide(g)  # otherwise the scale would be rounded to the gradient's dtype
        return (wide * scale.astype(wide.dtype)).astype(p.dtype)

    grads = jax.tree.map(scaled, done.grads, leaves)
    norm = tree.norm(grads)
    finite = jnp.isfinite(done.loss) & jnp.isfinite(norm)
    params, opt = way.update(grads, model.opt, model.params, finite)
    one = jnp.float32(1)
    seen = dict(done.seen)
    seen["loss"] = meters.Mean(done.loss.astype(jnp.float32), done.weight.astype(jnp.float32))
    seen["grad_norm"] = meters.Mean(norm, one)
    seen["finite"] = finite
    seen |= {f"descent_{k}": meters.Mean(v, one) for k, v in precision_metrics(opt).items()}
    kept = {k: tree.where(finite, new, getattr(model, k)) for k, new in (sent or {}).items()}
    return model._replace(params=params, opt=opt, **kept), seen


def _update(
    c: Call,
    way: Adaptation,
    microbatches: int,
    sharded: SumsOf | None,
    key: jax.Array,
    model: Model,
    batch: dict,
) -> tuple[Model, dict]:
    """Applies one optimizer update from one minibatch.

    Losses and gradients are summed over microbatches and divided once by the global weight, so
    that the split cannot change the gradient.
    """
    leaves = way.leaves(model.params, model.opt)
    if sharded is not None:
        done, sent = sharded(c.fn, way, key, model, leaves, batch, microbatches)
        return updated(way, model, leaves, done, sent)
    of = functools.partial(sums, c.fn, way, key, model, leaves)
    if microbatches == 1:
        done = of(batch)
    else:
        parts = split(batch, microbatches)
        first = jax.tree.map(lambda x: x[0], parts)
        start = Sums.zeros(jax.eval_shape(of, first))
        done, _ = jax.lax.scan(lambda carry, part: (carry.plus(of(part)), None), start, parts)
    return updated(way, model, leaves, done)


def _lowest(meter: Any) -> Any:
    """Returns the neutral element of `meters.add` in the shape of a zeroed meter."""
    inner = meter.inner if isinstance(meter, meters.First) else meter
    if not isinstance(inner, meters.Max):
        return meter
    low = meters.Max(jnp.full_like(inner.value, -jnp.inf))
    return meters.First(low) if isinstance(meter, meters.First) else low

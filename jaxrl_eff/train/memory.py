"""Memory on a device: what a training method will need, computed in advance, and current use.

Activations are not included; `Step.analysis` has the needs of the compiled programs.
"""

from typing import Any, NamedTuple

import jax

from jaxrl_eff.core import Step
from jaxrl_eff.core.shardings import placed, shard_bytes
from jaxrl_eff.peft import quantized, weights


class Footprint(NamedTuple):
    """Bytes of one model on the fullest device.

    Attributes:
        parameters: including adapters; for quantized kernels, codes and scales.
        state: optimizer state, including indices, original values and remainders, residuals of
            gradients sent with error feedback, and nodes' copies of weights sent as differences.
        gradients: of the trained leaves, as returned by the backward pass.
    """

    parameters: int
    state: int
    gradients: int

    @property
    def total(self) -> int:
        return sum(self)

    def __str__(self) -> str:
        names = ("parameters", "optimizer state", "gradients")
        parts = (f"{name} {n / 1e6:,.2f}" for name, n in zip(names, self, strict=True))
        return f"{' + '.join(parts)} = {self.total / 1e6:,.2f} MB a device"


def planned(step: Step, model: str) -> Footprint:
    """Returns a model's memory at home in a compiled graph, from shapes and shardings alone."""
    home = step.home(model)
    params, state = _bytes(home.params), _bytes((home.opt, home.error_feedback, home.node_copy))
    if not any(c.kind == "train" for c in step.graph.of(model)):
        return Footprint(params, 0, 0)
    return Footprint(params, state, _bytes(step.gradients(model)))


def whole(step: Step, model: str) -> Footprint:
    """Returns the memory if all parameters were trained by Adam with float32 moments."""
    there, view = step.home(model).params, step.specs[model].view
    if view is not None:
        there = weights.base(view(there))
    if quantized.inside(there):
        dtype = there["embed"]["table"].dtype
        shapes = jax.eval_shape(lambda x: quantized.dequantized(x, dtype), there)
        where = quantized.layout(jax.tree.map(lambda x: x.sharding, there))
        there = jax.tree.map(placed, shapes, where)
    params = jax.tree.leaves(there)
    size = _bytes(params)
    return Footprint(size, 2 * _bytes(params, itemsize=4), size)


def _bytes(arrays: Any, itemsize: int = 0) -> int:
    """Returns the bytes of one device's shards."""
    return sum(shard_bytes(x, itemsize) for x in jax.tree.leaves(arrays))


def used() -> tuple[int, str]:
    """Returns bytes on this process's fullest device, and a description of them.

    The peak of the run if the device reports it; otherwise (CPU) the arrays alive now.
    """
    stats = [d.memory_stats() or {} for d in jax.local_devices()]
    if all("peak_bytes_in_use" in s for s in stats):
        return max(s["peak_bytes_in_use"] for s in stats), "peak in use"
    held: dict[Any, int] = {}
    for x in jax.live_arrays():
        for shard in x.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values(), default=0), "arrays alive"

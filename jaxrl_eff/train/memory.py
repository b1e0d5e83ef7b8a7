"""Bytes on a device: what a way to train will hold, said beforehand, and what there is now.

Activations are not here; `Step.analysis` has what the compiled programs need of them.
"""

from typing import Any, NamedTuple

import jax

from jaxrl_eff import tree
from jaxrl_eff.core import Adaptation, Step
from jaxrl_eff.core.shardings import placed, shard_bytes
from jaxrl_eff.peft import lora, quantized


class Footprint(NamedTuple):
    """Bytes that the fullest device holds of one model.

    Attributes:
        parameters: adapters included; of quantized kernels codes and scales.
        state: of the optimizer, with indices, original values and remainders, and what rounding
            left over of gradients that were sent, and what nodes hold of weights whose differences
            are sent.
        gradients: of what is trained, as they leave the backward pass.
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
    """What a compiled graph will hold of a model at home, from shapes and layouts alone."""
    home, spec = step.home(model), step.specs[model]
    params, state = _bytes(home.params), _bytes((home.opt, home.left, home.held))
    if not any(c.kind == "train" for c in step.graph.of(model)):
        return Footprint(params, 0, 0)
    if not isinstance(spec.tx, Adaptation):
        return Footprint(params, state, params)
    there, gradients = tree.flat(home.params), 0
    # A tap has a number for every original value.
    originals = [x for name, x in tree.flat(home.opt).items() if name.endswith("/original")]
    for name, leaf in jax.eval_shape(spec.tx.leaves, spec.shapes, home.opt).items():
        if name in there:
            gradients += _bytes(there[name])
        elif name.startswith("shared/"):  # a few layers of a kernel
            kernel = there[name.removeprefix("shared/").removesuffix("whole") + "kernel"]
            gradients += _bytes(kernel, itemsize=4) * leaf.shape[0] // kernel.shape[0]
    return Footprint(params, state, gradients + _bytes(originals, itemsize=4))


def whole(step: Step, model: str) -> Footprint:
    """The same model with all parameters trained by Adam with float32 moments, to compare with."""
    there = lora.base(step.home(model).params)
    if quantized.inside(there):
        dtype = tree.flat(there)["embed/table"].dtype
        where = quantized.plain_layout(jax.tree.map(lambda x: x.sharding, there))
        there = jax.tree.map(placed, quantized.plain_shapes(there, dtype), where)
    params = jax.tree.leaves(there)
    size = _bytes(params)
    return Footprint(size, 2 * _bytes(params, itemsize=4), size)


def _bytes(arrays: Any, itemsize: int = 0) -> int:
    """Of the part that one device holds."""
    return sum(shard_bytes(x, itemsize) for x in jax.tree.leaves(arrays))


def used() -> tuple[int, str]:
    """Bytes on this process's fullest device, and what they are.

    The peak of the run where the device tells it; elsewhere (CPU) the arrays alive now.
    """
    stats = [d.memory_stats() or {} for d in jax.local_devices()]
    if all("peak_bytes_in_use" in s for s in stats):
        return max(s["peak_bytes_in_use"] for s in stats), "peak in use"
    held: dict[Any, int] = {}
    for x in jax.live_arrays():
        for shard in x.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values(), default=0), "arrays alive"

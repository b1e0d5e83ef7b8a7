"""The character model of `experiments/collage` as one vector over two nodes' simulated devices."""

import os

os.environ.setdefault("NPROC", "32")  # see tests/conftest.py
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_cpu_enable_concurrency_optimized_scheduler=false"  # see jaxrl_eff/parallel/host.py
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from experiments.collage.run import corpus, loss, model, rows
from jaxrl_eff.models import init

DEVICES = 8
BOTH = ("dcn", "ici")
SPLIT, ROWS = P(BOTH), P(None, BOTH)  # of a vector; of batches [steps, rows, length]


@dataclasses.dataclass(frozen=True)
class Vector:
    """A model whose parameters are one vector, filled with zeros to a multiple of 8.

    Attributes:
        loss: (vector, tokens [rows, length]) -> mean negative log-likelihood in nats.
        start: seed -> vector.
        shard: elements a device.
        training, validation: characters as numbers.
    """

    loss: Callable
    start: Callable
    shard: int
    training: np.ndarray
    validation: np.ndarray

    def batches(self, seed: int, count: int, *, validation: bool = False) -> np.ndarray:
        """[count, rows, length] random pieces of the text."""
        return rows(self.validation if validation else self.training, seed, count)


def language_model() -> Vector:
    training, validation, vocab = corpus()
    cfg = model(vocab)
    vector, unravel = ravel_pytree(init(cfg, jax.random.key(0)))
    shard = -(-vector.size // DEVICES)
    fill = DEVICES * shard - vector.size

    def start(seed: int) -> jax.Array:
        return jnp.pad(ravel_pytree(init(cfg, jax.random.key(seed)))[0], (0, fill))

    def value(vector: jax.Array, tokens: jax.Array) -> jax.Array:
        return loss(cfg, unravel(vector[: vector.size - fill]), tokens)

    return Vector(value, start, shard, training, validation)


def grid(nodes: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:DEVICES]).reshape(nodes, -1), BOTH)

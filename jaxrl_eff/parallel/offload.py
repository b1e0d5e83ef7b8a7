"""Arrays in host memory, as leaves of a parameter tree."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OffloadedWeight:
    """Array in host memory that is fetched to the devices when it is used.

    With layers as its first axis, a loop over layers fetches one at a time.
    """

    value: Any

    def materialize(self) -> jax.Array:
        """Fetches the array."""
        return jax.device_put(self.value, jax.memory.Space.Device)

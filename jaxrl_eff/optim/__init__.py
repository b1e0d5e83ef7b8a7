"""Optax transforms and schedules that any JAX code can import: needs jax and optax alone."""

from jaxrl_eff.optim.build import in_float32, optimizer, optimizer_names
from jaxrl_eff.optim.schedules import warmup_then

__all__ = ["in_float32", "optimizer", "optimizer_names", "warmup_then"]

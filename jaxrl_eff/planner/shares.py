"""Numbers of parameters of a model, and a device's share of them, by placement.

Norms and biases, a few per thousand, are left out.
"""

from typing import NamedTuple

import jax.numpy as jnp

from jaxrl_eff.models import LMConfig
from jaxrl_eff.parallel.mesh import Placement
from jaxrl_eff.planner.problem import Role


def compute_bytes(lm: LMConfig) -> int:
    """Bytes of one number in a product."""
    return jnp.dtype(lm.dtype).itemsize


def layer_params(lm: LMConfig) -> int:
    """Matrix entries of one layer."""
    attention = lm.width * lm.head_dim * 2 * (lm.heads + lm.kv_heads)
    return attention + 3 * lm.width * lm.ffn


def head_params(lm: LMConfig) -> int:
    """Matrix entries of the output head."""
    return lm.width * (1 if lm.head == "value" else lm.vocab)


def _stored_head(lm: LMConfig) -> int:
    return 0 if lm.tie and lm.head == "lm" else head_params(lm)


def params(lm: LMConfig) -> int:
    """Number of stored parameters."""
    return lm.layers * layer_params(lm) + lm.vocab * lm.width + _stored_head(lm)


def seen(lm: LMConfig, context: float | int) -> float:
    """Number of keys that a token attends to, summed over layers."""
    local = min(context, lm.window) if lm.window else context
    windowed = sum(lm.windowed)
    return (lm.layers - windowed) * context + windowed * local


class Split(NamedTuple):
    """Ways that each dimension is sharded; 1 where the size does not divide, as in `Rules`."""

    heads: int
    kv: int
    ffn: int
    vocab: int
    head: int  # outputs of the head
    fsdp: int


def split(lm: LMConfig, p: Placement) -> Split:
    """The ways in which a placement shards a model."""
    cut = lambda n: p.tensor if n % p.tensor == 0 else 1  # noqa: E731
    ways, vocab = p.weight_shards, cut(lm.vocab)
    fsdp = ways if lm.width % ways == 0 else 1
    head = 1 if lm.head == "value" else vocab
    return Split(cut(lm.heads), cut(lm.kv_heads), cut(lm.ffn), vocab, head, fsdp)


def layer_share(lm: LMConfig, cut: Split) -> float:
    """Matrix entries of one layer on a device, before sharding over fsdp."""
    queries = 2 * lm.width * lm.head_dim * lm.heads / cut.heads
    keys = 2 * lm.width * lm.head_dim * lm.kv_heads / cut.kv
    return queries + keys + 3 * lm.width * lm.ffn / cut.ffn


def params_share(lm: LMConfig, p: Placement) -> float:
    """Number of parameters on a device."""
    cut = split(lm, p)
    ends = lm.vocab * lm.width / cut.vocab + _stored_head(lm) / cut.head
    return (lm.layers * layer_share(lm, cut) + ends) / (cut.fsdp * p.stage)


def state_bytes(role: Role, p: Placement) -> tuple[float, float]:
    """A device's bytes of parameters and of optimizer state."""
    n = params_share(role.lm, p)
    opt = n * role.opt_bytes / (p.data * p.seq if role.zero else 1)
    copies = p.dcn if role.nodes is not None and role.nodes.frozen else 1
    return n * copies * role.param_bytes, opt

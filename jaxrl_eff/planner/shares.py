"""A device's share of a model, by placement."""

from typing import NamedTuple

from jaxrl_eff.parallel.mesh import Placement
from jaxrl_eff.planner.problem import Role, Shape


class Split(NamedTuple):
    """Ways that each dimension is sharded; 1 where the size does not divide, as in `Rules`."""

    heads: int
    kv: int
    ffn: int
    vocab: int
    fsdp: int


def split(shape: Shape, p: Placement) -> Split:
    """The ways in which a placement shards a model."""
    cut = lambda n: p.tensor if n % p.tensor == 0 else 1  # noqa: E731
    ways = p.weight_shards
    fsdp = ways if shape.width % ways == 0 else 1
    return Split(cut(shape.heads), cut(shape.kv_heads), cut(shape.ffn), cut(shape.vocab), fsdp)


def layer_share(shape: Shape, cut: Split) -> float:
    """Matrix entries of one layer on a device, before sharding over fsdp."""
    queries = 2 * shape.width * shape.head_dim * shape.heads / cut.heads
    keys = 2 * shape.width * shape.head_dim * shape.kv_heads / cut.kv
    return queries + keys + (3 if shape.gated else 2) * shape.width * shape.ffn / cut.ffn


def params_share(shape: Shape, p: Placement) -> float:
    """Number of parameters on a device."""
    cut = split(shape, p)
    head = 0.0 if shape.tied and not shape.value else shape.head_params
    ends = shape.vocab * shape.width / cut.vocab + head / (1 if shape.value else cut.vocab)
    return (shape.layers * layer_share(shape, cut) + ends) / (cut.fsdp * p.stage)


def seen(shape: Shape, context: float | int) -> float:
    """Number of keys that a token attends to, summed over layers."""
    local = min(context, shape.window) if shape.window else context
    return (shape.layers - shape.windowed) * context + shape.windowed * local


def state_bytes(role: Role, p: Placement) -> tuple[float, float]:
    """A device's bytes of parameters and of optimizer state."""
    n = params_share(role.shape, p)
    opt = n * role.opt_bytes / (p.data * p.seq if role.zero else 1)
    return n * role.shape.param_bytes, opt

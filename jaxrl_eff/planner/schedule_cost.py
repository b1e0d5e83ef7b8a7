"""Cost of a packing schedule, from a model's sizes and a cluster's rates."""

from typing import Any

import numpy as np

from jaxrl_eff.data.balance.cost import Cost, Model, cost_of
from jaxrl_eff.planner.clusters import Cluster


def model_of(lm: Any) -> Model:
    """The sizes of an `LMConfig`, or of a `problem.Shape`, that the cost depends on."""
    sizes = lm.layers, lm.width, lm.heads, lm.kv_heads, lm.head_dim, lm.ffn, lm.vocab
    return Model(*sizes, window=lm.window or 0, windowed=int(np.sum(lm.windowed)))


def cost_on(cluster: Cluster, model: Model, *, seq: int, tensor: int, itemsize: int) -> Cost:
    """Cost of training microbatches, with neighbors on the `seq` axis next to each other.

    The ring sends while it computes, so attention of distributed sequences hides the exchange.

    Args:
        seq, tensor: sizes of these axes.
        itemsize: bytes of a number in the model's arithmetic.
    """
    if seq * tensor <= cluster.domain:
        rate, start = cluster.link_bytes_per_s * cluster.link_efficiency, cluster.link_latency
    else:
        rate, start = cluster.nic_bytes_per_s * cluster.nic_efficiency, cluster.nic_latency
    return cost_of(
        model,
        flops_per_s=tensor * cluster.train_efficiency * cluster.peak(itemsize),
        bytes_per_s=tensor * rate,  # each tensor rank sends its share of the heads
        hop_seconds=start,
        attention_half=cluster.attention_half,
        overlap=1.0,
    )

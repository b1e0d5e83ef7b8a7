"""Adaptive sparse fine-tuning: updates of k entries with k-sized state, around any optimizer.

Example:
    >>> from jaxrl_eff import sparse
    >>> params = {"w": jnp.ones((10, 10))}
    >>> tx = sparse.from_dense(sparse.sparse_adapt(optax.sgd(1.0), density=0.05, learning_rate=0.1))
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> int((updates["w"] != 0).sum())
    5
"""

from jaxrl_eff.optim.sparse.adapt import (
    Active,
    SparseAdapt,
    SparseState,
    SparseUpdate,
    sparse_adapt,
)
from jaxrl_eff.optim.sparse.dense import dense_to_sparse, from_dense
from jaxrl_eff.optim.sparse.layers import LayersState, SampledLayers, sampled_layers
from jaxrl_eff.optim.sparse.overlay import Overlay, OverlayState, SparseOverlay, sparse_overlay
from jaxrl_eff.optim.sparse.per_entry import per_entry
from jaxrl_eff.optim.sparse.reselection import Periodic, Spiel, Static
from jaxrl_eff.optim.sparse.selectors import GRADIENTS, WEIGHTS
from jaxrl_eff.optim.sparse.sm3 import SM3, SM3State
from jaxrl_eff.optim.sparse.tiling import Tiling, gather, scatter, tiling

__all__ = [
    "GRADIENTS", "SM3", "WEIGHTS", "Active", "LayersState", "Overlay", "OverlayState", "Periodic",
    "SM3State", "SampledLayers", "SparseAdapt", "SparseOverlay", "SparseState", "SparseUpdate",
    "Spiel", "Static", "Tiling", "dense_to_sparse", "from_dense", "gather",
    "per_entry", "sampled_layers", "scatter", "sparse_adapt", "sparse_overlay", "tiling",
]  # fmt: skip

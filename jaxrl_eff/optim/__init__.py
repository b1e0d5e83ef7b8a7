"""Optax transforms and schedules for any JAX code; they depend on jax, optax and chex only.

`optimizer` builds one by name. For low precision use `collage_adamw`, or any optax transforms
followed by a store of the weights (`lowp_chain`). `sparse` trains a part of the entries. The names
in `__all__`, here and there, are public, everything else is private.
"""

from jaxrl_eff.optim.build import OWN, in_float32, optimizer, optimizer_names, upcast
from jaxrl_eff.optim.collage import collage_adamw
from jaxrl_eff.optim.convert import (
    Master,
    from_master,
    full_precision_params,
    init_sharded,
    set_full_precision_params,
    state_shardings,
    to_master,
    visible_change_mask,
)
from jaxrl_eff.optim.moments import scale_by_adam
from jaxrl_eff.optim.schedules import warmup_then
from jaxrl_eff.optim.store import (
    apply_if_finite,
    inject_hyperparams,
    lowp_chain,
    precision_metrics,
    store_weights,
    watch_descent,
)

__all__ = [
    "OWN", "Master", "apply_if_finite", "collage_adamw", "from_master", "full_precision_params",
    "in_float32", "init_sharded", "inject_hyperparams", "lowp_chain", "optimizer",
    "optimizer_names", "precision_metrics", "scale_by_adam", "set_full_precision_params",
    "state_shardings", "store_weights", "to_master", "upcast", "visible_change_mask",
    "warmup_then", "watch_descent",
]  # fmt: skip

"""Meshes, shardings and transfers of arrays between them; independent of any model.

The names below are public, everything else is private.
"""

from jaxrl_eff import public

__all__, __getattr__, __dir__ = public.table(
    __name__,
    {
        "mesh": ("AXES", "Placement"),
        "sharding": ("Rules", "arrays", "rules"),
        "reshard.layout": ("Network",),
        "reshard.route": ("Report", "Route"),
        "reshard.changes": ("ChangedElements", "SyncConfig"),
        "reshard.sync": ("WeightSync",),
    },
    modules=("host",),
)

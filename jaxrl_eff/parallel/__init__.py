"""Meshes, shardings and the movement of arrays between them."""

from jaxrl_eff.parallel.delta import Delta
from jaxrl_eff.parallel.layout import Network
from jaxrl_eff.parallel.mesh import AXES, Placement, mesh
from jaxrl_eff.parallel.realloc import Report, Route
from jaxrl_eff.parallel.sharding import Rules, rows, rules
from jaxrl_eff.parallel.sync import Changes, Sync

__all__ = [
    "AXES", "Changes", "Delta", "Network", "Placement", "Report", "Route", "Rules", "Sync", "mesh",
    "rows", "rules",
]  # fmt: skip

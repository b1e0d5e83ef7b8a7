"""Meshes, shardings and the movement of arrays between them."""

from jaxrl_eff.parallel.mesh import AXES, Placement, mesh
from jaxrl_eff.parallel.realloc import Route
from jaxrl_eff.parallel.sharding import Rules, rows, rules

__all__ = ["AXES", "Placement", "Route", "Rules", "mesh", "rows", "rules"]

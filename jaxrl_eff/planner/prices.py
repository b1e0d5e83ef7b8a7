"""Prices of a problem's calls, reallocations and transfers on one cluster, each computed once."""

from typing import NamedTuple

from jaxrl_eff.parallel.mesh import Placement
from jaxrl_eff.planner import transfer
from jaxrl_eff.planner.clusters import Cluster
from jaxrl_eff.planner.corrections import Corrections
from jaxrl_eff.planner.cost import Cost, call_cost
from jaxrl_eff.planner.problem import Problem


def realloc_name(model: str, call: str) -> str:
    """Name of the reallocation of a model for a call, in corrections and spans."""
    return f"{model}->{call}"


def move_name(writer: str, reader: str) -> str:
    """Name of the transfer of all arrays from one call to another, in corrections and spans."""
    return f"{writer}->{reader}"


class Site(NamedTuple):
    """A placement with the keys and bit masks that the simulator needs."""

    index: int
    placement: Placement
    mask: int  # bit d: device d
    nics: int  # bit devices + h: the network cards of domain h
    layout: int  # equal for placements with equal layouts of parameters


class Prices:
    """Prices of calls and edges, by number of the call in `problem.works` and by site."""

    def __init__(self, problem: Problem, cluster: Cluster, corrections: Corrections):
        self.problem, self.cluster, self.corrections = problem, cluster, corrections
        self._sites: dict[int, Site] = {}
        self._by_value: dict[Placement, Site] = {}
        self._alive: list[Placement] = []
        self._layouts: dict[tuple, int] = {}
        self._calls: dict[tuple[int, int], Cost] = {}
        self._reallocs: dict[tuple[int, int, int], float] = {}
        self._moves: dict[tuple[int, int, int, int], tuple[float, bool]] = {}

    def site(self, p: Placement) -> Site:
        """The site of a placement.

        Raises:
            ValueError: a device does not exist.
        """
        found = self._sites.get(id(p))
        if found is not None:
            return found
        site = self._by_value.get(p)
        if site is None:
            mask = sum(1 << d for d in p.devices)
            domain, n = self.cluster.domain, self.cluster.devices
            if max(p.devices) >= n:
                raise ValueError(
                    f"the placement names device {max(p.devices)}, but {self.cluster.name} has "
                    f"{n}, 0 to {n - 1}."
                )
            nics = sum(1 << (n + h) for h in {d // domain for d in p.devices})
            layout = self._layouts.setdefault(transfer.layout(p), len(self._layouts))
            site = Site(len(self._by_value), p, mask, nics, layout)
            self._by_value[p] = site
        if id(p) != id(site.placement):
            if len(self._alive) > 1_000_000:
                self._sites.clear()
                self._alive.clear()
            self._alive.append(p)  # an id is valid only while its object exists
        self._sites[id(p)] = site
        return site

    def call(self, i: int, site: Site) -> Cost:
        """Cost of call i."""
        key = (i, site.index)
        found = self._calls.get(key)
        if found is None:
            work = self.problem.works[i]
            found = self._calls[key] = call_cost(
                self.problem, work, site.placement, self.cluster, self.corrections
            )
        return found

    def realloc(self, i: int, source: Site, target: Site) -> float:
        """Seconds to move the model of call i from `source`, its home, to `target`."""
        key = (i, source.layout, target.layout)
        found = self._reallocs.get(key)
        if found is None:
            work = self.problem.works[i]
            seconds = transfer.realloc_cost(
                self.problem, work.model, source.placement, target.placement, self.cluster,
                weights=work.weights,
            )  # fmt: skip
            name = realloc_name(work.model, work.name)
            found = self._reallocs[key] = seconds * self.corrections.edge(name, "realloc")
        return found

    def move(
        self, j: int, i: int, bytes_: float | int, source: Site, target: Site
    ) -> tuple[float, bool]:
        """Seconds to move what call j wrote to call i, and True if that takes network cards."""
        key = (j, i, source.index, target.index)
        found = self._moves.get(key)
        if found is None:
            works, a, b = self.problem.works, source.placement, target.placement
            seconds = transfer.move_cost(bytes_, a, b, self.cluster)
            name = move_name(works[j].name, works[i].name)
            found = self._moves[key] = (
                seconds * self.corrections.edge(name, "move"),
                seconds > 0 and transfer.crosses(a, b, self.cluster),
            )
        return found

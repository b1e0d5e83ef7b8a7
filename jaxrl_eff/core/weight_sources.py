"""Sources of the weights that calls read: routes from home, or syncs of changes.

A call that reads rounded weights gets them by a `RoundedRoute` wherever it runs, also at home.
"""

from collections.abc import Callable
from typing import Any

from jaxrl_eff.core.graph import Call
from jaxrl_eff.core.shardings import Shardings
from jaxrl_eff.parallel import Route, SyncConfig, WeightSync
from jaxrl_eff.parallel.reshard.rounded import RoundedRoute

Source = Route | RoundedRoute | WeightSync


class WeightSources:
    """The source of every call's weights.

    Args:
        shardings: of the graph.
        sync: how trained parameters are sent to the calls that borrow them unrounded, as changes;
            None sends them in full.
        still: train call -> the tree of its model's parameters with True for unchanged leaves.
    """

    def __init__(self, shardings: Shardings, sync: SyncConfig | None, still: Callable[[Call], Any]):
        self._shardings, self._sync, self._still = shardings, sync, still
        self._routes: dict[str, Route | RoundedRoute] = {}
        self._sources: dict[str, Source] = {}

    def route(self, c: Call) -> Route | RoundedRoute:
        """Returns the route of a call's parameters from home, all of them."""
        if c.name not in self._routes:
            home = self._shardings.borrowed(self._shardings.graph.home(c.of))
            there, rounded = self._shardings.params(c), self._shardings.specs[c.of].rounded
            self._routes[c.name] = (
                RoundedRoute(home, there, rounded=rounded, precision=c.weights)
                if c.weights
                else Route(home, there)
            )
        return self._routes[c.name]

    def __call__(self, c: Call) -> Source:
        """Returns the source of a call's parameters in every step."""
        if c.name not in self._sources:
            found, trainer = self.route(c), self._shardings.graph.home(c.of)
            changing = self._sync is not None and trainer.kind == "train"
            if changing and not c.weights and not found.alias:
                home = self._shardings.borrowed(trainer)
                found = WeightSync(
                    home, self._shardings.params(c), still=self._still(trainer), changes=self._sync
                )
            self._sources[c.name] = found
        return self._sources[c.name]

    def used(self) -> tuple[Source, ...]:
        """Returns the sources that calls have asked for."""
        return tuple(self._sources.values())

    def begin(self) -> None:
        """Forgets the sources, for another batch's shapes."""
        self._sources = {}

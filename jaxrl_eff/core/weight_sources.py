"""Where calls get the weights of their models from: routes from home, or syncs of changes."""

from collections.abc import Callable
from typing import Any

from jaxrl_eff.core.graph import Call
from jaxrl_eff.core.shardings import Shardings
from jaxrl_eff.parallel import Route, SyncConfig, WeightSync


class WeightSources:
    """The source of every call's weights.

    Args:
        shardings: of the graph.
        sync: how trained parameters are sent to the calls that borrow them, as changes; None sends
            them in full.
        still: train call -> the tree of its model's parameters with True for unchanged leaves.
    """

    def __init__(self, shardings: Shardings, sync: SyncConfig | None, still: Callable[[Call], Any]):
        self._shardings, self._sync, self._still = shardings, sync, still
        self._routes: dict[str, Route] = {}
        self._sources: dict[str, Route | WeightSync] = {}

    def route(self, c: Call) -> Route:
        """Returns the route of a call's parameters from home, all of them."""
        if c.name not in self._routes:
            home = self._shardings.borrowed(self._shardings.graph.home(c.of))
            self._routes[c.name] = Route(home, self._shardings.params(c))
        return self._routes[c.name]

    def __call__(self, c: Call) -> Route | WeightSync:
        """Returns the source of a call's parameters in every step."""
        if c.name not in self._sources:
            found, trainer = self.route(c), self._shardings.graph.home(c.of)
            if self._sync is not None and trainer.kind == "train" and not found.alias:
                home = self._shardings.borrowed(trainer)
                found = WeightSync(
                    home, self._shardings.params(c), still=self._still(trainer), changes=self._sync
                )
            self._sources[c.name] = found
        return self._sources[c.name]

    def used(self) -> tuple[Route | WeightSync, ...]:
        """Returns the sources that calls have asked for."""
        return tuple(self._sources.values())

    def begin(self) -> None:
        """Forgets the sources, for another batch's shapes."""
        self._sources = {}

    def saved(self) -> None:
        """Makes the next sync of rounded differences send full weights, as a resumed run does."""
        for source in self._sources.values():
            if isinstance(source, WeightSync) and self._sync.bits:
                source.restart()

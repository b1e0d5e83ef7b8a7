"""Schedules for reselection: when the active units are chosen again, and which stay.

    Static()      never; a selector of gradients chooses once, before the first step
    Periodic()    every M steps the best units, of all; units that stay keep their state
    Spiel()       SpIEL-AG (arXiv:2401.16405): every R steps drop the smallest changes, grow the
                  largest gradients; with `SM3`, SpIEL-MA

`due(step)` is evaluated on the host, so that the program of an ordinary step contains no selection;
`choose` runs on the device.

SpIEL differs from its authors' code in two points: candidates come from a whole batch and not from
its first microbatch, and grown entries start without moments, which did as well as initializing
them with the window's mean gradient.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Static:
    """Schedule that chooses once. `first` is True if that waits for the first step's gradient."""

    first: bool = False

    def due(self, step: int) -> bool:
        return self.first and step == 0

    def choose(self, index, change, found, score, updates):
        """Returns all units found, regardless of which were active."""
        del index, change, score, updates
        return jnp.sort(found, axis=-1)


@dataclasses.dataclass(frozen=True)
class Periodic:
    """Schedule that chooses the best units every `every` steps (as GASDU and LIFT do)."""

    every: int = 20
    first: bool = True

    def __post_init__(self):
        _at_least_one("every", self.every)

    def due(self, step: int) -> bool:
        return step % self.every == 0 and (self.first or step > 0)

    choose = Static.choose


@dataclasses.dataclass(frozen=True)
class Spiel:
    """Schedule that drops and grows units.

    Attributes:
        every: R, steps between two choices.
        share: p0, of the active units that can be exchanged. Before the first step all can be.
        updates: optimizer updates of the whole training, over which the share falls to 0.
        decay: "linear", p = p0 (1 - s/T), or "cosine", p = p0 (1 + cos(pi s/T)) / 2.
        first: True if the first choice is before the first step.
    """

    every: int = 20
    share: float = 0.2
    updates: int = 1000
    decay: str = "linear"
    first: bool = True

    def __post_init__(self):
        _at_least_one("every", self.every)
        _at_least_one("updates", self.updates)
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}, but must be above 0 and at most 1.")
        if self.decay not in ("linear", "cosine"):
            raise ValueError(f"unknown decay {self.decay!r}; expected one of ['linear', 'cosine'].")

    def due(self, step: int) -> bool:
        return step % self.every == 0 and (self.first or step > 0)

    def choose(self, index, change, found, score, updates):
        """The new active units, ascending.

        Args:
            index: int32 `[..., k]`, active units, ascending.
            change: float32 `[..., k]`, the distance of each from its initial value.
            found: int32 `[..., k]`, the units with the best scores, best first.
            score: float32 `[..., k]`, those scores.
            updates: int32, optimizer updates done.
        """
        done = jnp.minimum(updates.astype(jnp.float32) / self.updates, 1.0)
        rest = 1 - done if self.decay == "linear" else (1 + jnp.cos(jnp.pi * done)) / 2
        share = jnp.where(updates == 0, 1.0, self.share * rest)
        # In float32 k * share can fall just below a whole number.
        exchanged = jnp.floor(share * index.shape[-1] + 1e-4).astype(jnp.int32)

        def one(index, change, found, score):
            """For one tile: drops, grows, and keeps the dropped units that nothing replaces."""
            k = index.shape[0]
            rank = jnp.argsort(jnp.argsort(change))  # 0 changed least
            kept = rank >= exchanged
            at = jnp.clip(jnp.searchsorted(index, found), 0, k - 1)
            active = index[at] == found
            candidate = ~(active & kept[at]) & (score > 0)
            grown = candidate & (jnp.cumsum(candidate) <= exchanged)
            # A unit that is both dropped and grown stays, and must not be in the list twice.
            back = jnp.zeros(k, bool).at[at].max(grown & active)
            stays = jnp.where(kept | back, 2 * k + rank, rank)
            enters = jnp.where(grown & ~active, 4 * k, -1) + jnp.zeros(k, rank.dtype)
            best = jax.lax.top_k(jnp.concatenate([stays, enters]), k)[1]
            return jnp.sort(jnp.concatenate([index, found])[best])

        for _ in range(index.ndim - 1):
            one = jax.vmap(one)
        return one(index, change, found, score)


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}, but must be at least 1.")

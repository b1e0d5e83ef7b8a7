"""Learning-rate schedules by number of updates."""

import optax

SHAPES = ("constant", "linear", "cosine")


def warmup_then(
    shape: str, *, peak: float, updates: int, warmup: int = 0, final: float = 0.0
) -> optax.Schedule:
    """Linear warm-up from 0 to `peak`, then constant, or linear or cosine decay to `final * peak`.

    Args:
        shape: "constant", "linear" or "cosine".
        peak: the learning rate after warm-up.
        updates: optimizer updates in all, warm-up included; the last value is reached there.
        warmup: updates of warm-up; the first one already has a learning rate above 0.
        final: the last value as a share of the peak; unused by a constant schedule.

    Returns:
        update count -> learning rate.

    Raises:
        ValueError: the shape is unknown, or the warm-up is longer than the whole.

    Example:
        >>> from jaxrl_eff import warmup_then
        >>> rate = warmup_then("linear", peak=1.0, updates=6, warmup=2)
        >>> [float(rate(n)) for n in range(7)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if shape not in SHAPES:
        raise ValueError(f"unknown schedule {shape!r}; expected one of {[*SHAPES]}.")
    if not 0 <= warmup <= updates:
        raise ValueError(f"warmup is {warmup} updates, but must be within 0 and {updates}.")
    rest = max(updates - warmup, 1)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, final * peak, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=final),
    }[shape]()
    if not warmup:
        return after
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])

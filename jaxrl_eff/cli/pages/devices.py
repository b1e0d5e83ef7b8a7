"""Devices in rows and words: which did the same, and how their numbers are written."""

from collections.abc import Sequence
from typing import Any

HOST = "host"


def by_device(where: Sequence[Sequence[Any]]) -> list[tuple[str, list[int]]]:
    """(label, spans) of every group of devices that take part in the same spans.

    Args:
        where: devices of every span, numbers or `HOST`.
    """
    does: dict[Any, list[int]] = {}
    for i, devices in enumerate(where):
        for device in devices:
            does.setdefault(device, []).append(i)
    groups: dict[tuple[int, ...], list[Any]] = {}
    for device in sorted(does, key=lambda d: (isinstance(d, str), d)):
        groups.setdefault(tuple(does[device]), []).append(device)
    return [(device_range(devices), list(spans)) for spans, devices in groups.items()]


def device_range(devices: Sequence[Any]) -> str:
    """`0-3, 6` for [0, 1, 2, 3, 6]; an order that isn't ascending is spelled out."""
    if not all(isinstance(d, int) for d in devices):
        return ", ".join(map(str, devices))
    runs: list[list[int]] = []
    for device in devices:
        if runs and device == runs[-1][-1] + 1:
            runs[-1].append(device)
        else:
            runs.append([device])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)

"""Saves come every so many steps or minutes."""

import itertools

import jax
import pytest

from jaxrl_eff.train import cadence


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(cadence.time, "monotonic", lambda: now[0])
    return now


def due(c, clock, steps, seconds, *, first=1):
    found = []
    for step in range(first, first + steps):
        clock[0] += seconds
        if c.due(step):
            found.append(step)
            c.saved()
    return found


def test_by_steps(clock):
    assert due(cadence.Cadence(3, 1.0), clock, 10, 1e9) == [3, 6, 9]


def test_by_minutes(clock):
    assert due(cadence.Cadence(0, 1.0), clock, 30, 7.0) == [9, 18, 27]


def test_never(clock):
    assert due(cadence.Cadence(0, 0.0), clock, 30, 1e9) == []


@pytest.mark.parametrize("seconds", [0.01, 1.0, 7.0, 100.0])
def test_of_several_processes_the_first_decides_and_is_seldom_asked(clock, monkeypatch, seconds):
    asked = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(cadence, "first_says", lambda ask, _: asked.append(ask()) or asked[-1])
    steps = int(1000 / seconds)
    found = due(cadence.Cadence(0, 1.0), clock, steps, seconds)
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert all(60 <= gap * seconds <= 60 + 2 * seconds for gap in gaps) and found
    assert len(asked) <= 20 * len(found)

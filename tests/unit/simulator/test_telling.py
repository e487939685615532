"""Beats come at most once an interval, and never twice at one moment."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.simulator.events import EventLoop
from kvrelay.simulator.telling import Ticker


def test_asking_often_calls_once_at_the_next_beat() -> None:
    loop, seen = EventLoop(), list[float]()

    def call() -> bool:
        seen.append(loop.now_s)
        return False

    ticker = Ticker(loop, 1.0, 0.25, call)
    for time_s in (0.1, 0.2, 0.9, 1.0, 5.0):
        loop.at(time_s, ticker.ask)
    loop.run()
    assert seen == pytest.approx([0.25, 1.25, 5.25])


@given(st.floats(1e-3, 10), st.floats(0, 1), st.floats(0, 1e5))
def test_a_beat_that_asks_for_the_next_one_gets_it_an_interval_later(
    interval_s: float, phase: float, at_s: float
) -> None:
    loop, seen = EventLoop(), list[float]()

    def call() -> bool:
        seen.append(loop.now_s)
        return len(seen) < 20

    loop.at(at_s, Ticker(loop, interval_s, phase * interval_s, call).ask)
    loop.run()
    assert at_s <= seen[0] <= at_s + interval_s * 1.001
    gaps = [later - earlier for earlier, later in itertools.pairwise(seen)]
    assert gaps == pytest.approx([interval_s] * 19, rel=1e-3)

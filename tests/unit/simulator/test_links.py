"""A worker sends one thing at a time and receives one thing at a time."""

from __future__ import annotations

import pytest

from kvrelay.simulator.links import Links


def test_transfers_queue_at_both_ends() -> None:
    links = Links(100.0)
    assert links.send("a", "x", 100, now_s=1.0) == pytest.approx(2.0)
    assert links.send("a", "y", 50, now_s=1.0) == pytest.approx(2.5), "a is sending until 2 s"
    assert links.send("b", "y", 50, now_s=1.0) == pytest.approx(3.0), "y is receiving until 2.5 s"
    assert links.send("c", "z", 50, now_s=1.0) == pytest.approx(1.5), "these two have nothing else to do"
    assert links.sent_bytes == 250


def test_both_directions_at_a_time() -> None:
    links = Links(100.0)
    assert links.send("a", "b", 100, now_s=0.0) == links.send("b", "a", 100, now_s=0.0) == pytest.approx(1.0)

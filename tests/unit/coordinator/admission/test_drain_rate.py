"""The rate at which a queue empties is measured while something waits, and guessed before."""

from __future__ import annotations

import pytest

from kvrelay.coordinator.admission.drain_rate import DrainRate


def drained(*, num_tokens: int, every_s: float, seconds: float) -> DrainRate:
    rate = DrainRate()
    rate.begin(0.0)
    for step in range(1, int(seconds / every_s) + 1):
        rate.left(num_tokens, step * every_s)
    return rate


def test_the_guess_holds_before_anything_was_measured() -> None:
    assert DrainRate().tokens_per_s(100.0, guess=5000.0) == 5000.0
    assert DrainRate().tokens_per_s(100.0, guess=0.0) == 0.0


def test_what_is_measured_outweighs_the_guess_soon() -> None:
    rate = drained(num_tokens=100, every_s=0.1, seconds=20)
    assert rate.tokens_per_s(20.0, guess=3000.0) == pytest.approx(1000, rel=0.3)


def test_time_in_which_nothing_waits_does_not_count() -> None:
    rate = drained(num_tokens=100, every_s=0.1, seconds=20)
    rate.end(20.0)
    rate.begin(1000.0)
    assert rate.tokens_per_s(1000.0, guess=1000.0) == pytest.approx(1000, rel=0.05)


def test_a_queue_that_stands_still_is_seen_to() -> None:
    rate = drained(num_tokens=100, every_s=0.1, seconds=20)
    assert rate.tokens_per_s(50.0, guess=1000.0) < 300


def test_the_rate_follows_a_change() -> None:
    rate = drained(num_tokens=100, every_s=0.1, seconds=20)
    for step in range(300):
        rate.left(1000, 20 + step * 0.1)
    assert rate.tokens_per_s(50.0, guess=1000.0) == pytest.approx(10_000, rel=0.15)

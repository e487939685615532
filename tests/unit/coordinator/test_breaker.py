"""A worker that fails or crawls gets nothing for a while, then one request, and all again once that went well."""

from __future__ import annotations

import pytest

from kvrelay.coordinator.breaker import Breaker, BreakerConfig, State
from tests.support.clock import Clock

CONFIG = BreakerConfig(max_failures=3, slow_factor=10, slow_window_s=1, max_slow_windows=2, pause_s=5, max_pause_s=15)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(CONFIG, clock)


def opened(breaker: Breaker) -> Breaker:
    for _ in range(3):
        breaker.failed()
    return breaker


def test_failures_in_a_row_open_it(breaker: Breaker) -> None:
    for _ in range(2):
        breaker.failed()
        breaker.failed()
        assert breaker.allows()
        breaker.succeeded()
    assert not opened(breaker).allows()


def test_after_the_pause_one_request_goes_through(breaker: Breaker, clock: Clock) -> None:
    opened(breaker)
    clock.now_s += 5
    assert breaker.allows()
    breaker.sent()
    assert not breaker.allows()
    breaker.succeeded()
    assert breaker.state is State.CLOSED
    assert breaker.allows()


def test_a_probe_that_fails_doubles_the_pause_up_to_a_bound(breaker: Breaker, clock: Clock) -> None:
    opened(breaker)
    for pause_s in (5, 10, 15, 15):
        clock.now_s += pause_s - 0.1
        assert not breaker.allows()
        clock.now_s += 0.1
        assert breaker.allows()
        breaker.sent()
        breaker.failed()
    clock.now_s += 15
    breaker.sent()
    breaker.succeeded()
    opened(breaker)
    clock.now_s += 5
    assert breaker.allows()


def test_a_probe_that_nobody_hears_of_is_followed_by_another(breaker: Breaker, clock: Clock) -> None:
    opened(breaker)
    clock.now_s += 5
    breaker.sent()
    clock.now_s += 4.9
    assert not breaker.allows()
    clock.now_s += 0.1
    assert breaker.allows()


def test_what_had_been_sent_before_it_opened_changes_nothing(breaker: Breaker, clock: Clock) -> None:
    opened(breaker)
    for _ in range(20):
        breaker.failed()
    breaker.succeeded()
    assert not breaker.allows()
    clock.now_s += 5
    assert breaker.allows()


def test_work_ten_times_slower_than_expected_opens_it(breaker: Breaker) -> None:
    for _ in range(4):
        breaker.took(0.5, 0.04)
    assert not breaker.allows()


def test_work_nine_times_slower_does_not(breaker: Breaker) -> None:
    for _ in range(100):
        breaker.took(0.36, 0.04)
    assert breaker.allows()


def test_a_hiccup_does_not(breaker: Breaker) -> None:
    for _ in range(10):
        breaker.took(3.0, 0.02)
        for _ in range(10):
            breaker.took(0.1, 0.1)
    assert breaker.allows()


def test_a_probe_that_is_slow_opens_it_again(breaker: Breaker, clock: Clock) -> None:
    opened(breaker)
    clock.now_s += 5
    breaker.sent()
    breaker.took(2.0, 0.1)
    breaker.succeeded()
    clock.now_s += 9.9
    assert not breaker.allows()
    clock.now_s += 0.1
    assert breaker.allows()

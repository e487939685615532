"""Silence counts only while somebody could have been heard."""

from __future__ import annotations

import asyncio

import pytest

from kvrelay.heartbeat import HeartbeatConfig, Silence, SilentError, until_silent

TICK_S = 0.25
TIMEOUT_S = 2.0


class Watched:
    """A silence whose clock the test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.silence = Silence(TIMEOUT_S, tick_s=TICK_S, clock=lambda: self.now_s)

    def after(self, elapsed_s: float) -> bool:
        """One tick, so long after the one before."""
        self.now_s += elapsed_s
        return self.silence.tick()

    def ticks_until_silent(self, tick_s: float = TICK_S) -> int:
        return next(number for number in range(1, 1000) if self.after(tick_s))


def test_who_says_nothing_for_the_timeout_is_silent() -> None:
    assert Watched().ticks_until_silent() == TIMEOUT_S / TICK_S


def test_every_message_begins_the_timeout_anew() -> None:
    watched = Watched()
    for _ in range(20):
        assert not any(watched.after(TICK_S) for _ in range(7))
        watched.silence.heard()
    assert watched.ticks_until_silent() == 9, "the tick in which it was heard does not count"


def test_time_in_which_the_observer_was_stopped_does_not_count() -> None:
    watched = Watched()
    assert not watched.after(3600.0)
    assert watched.ticks_until_silent() == 8


@pytest.mark.parametrize("stall_s", [0.6, 3600.0])
def test_after_a_stall_there_is_time_to_read_what_came_meanwhile(stall_s: float) -> None:
    watched = Watched()
    assert not any(watched.after(TICK_S) for _ in range(7))
    assert not watched.after(stall_s)
    assert watched.ticks_until_silent() == 4


def test_an_observer_whose_loop_is_busy_all_the_time_blames_nobody() -> None:
    watched = Watched()
    assert not any(watched.after(0.6) for _ in range(100))


def test_ticks_may_come_somewhat_late() -> None:
    assert Watched().ticks_until_silent(0.4) == 5


def test_a_large_message_that_is_announced_may_take_its_time_once() -> None:
    watched = Watched()
    watched.silence.heard(64 << 20)
    assert watched.ticks_until_silent() == (8.0 + TIMEOUT_S) / TICK_S + 1
    watched.silence.heard(64 << 20)
    watched.silence.heard()
    assert watched.ticks_until_silent() == 9


def test_an_end_that_says_it_is_busy_is_not_watched_for_so_long_whatever_else_it_says() -> None:
    watched = Watched()
    watched.silence.heard(busy_ms=30_000)
    watched.silence.heard(busy_ms=1000)
    watched.silence.heard()
    assert not any(watched.after(TICK_S) for _ in range(119))
    assert watched.ticks_until_silent() == 8


@pytest.mark.parametrize(("promised_ms", "timeout_s"), [(500, 2.0), (100, 2.0), (2000, 8.0)])
def test_an_end_that_promises_less_gets_more_time(promised_ms: int, timeout_s: float) -> None:
    silence = HeartbeatConfig().silence_of(promised_ms)
    assert silence is not None
    assert silence.timeout_s == timeout_s


def test_an_end_that_promises_nothing_is_not_watched() -> None:
    assert HeartbeatConfig().silence_of(0) is None


async def test_the_loop_ends_with_the_silence_and_says_whose_it_was() -> None:
    silence = Silence(0.02, tick_s=0.01)
    async with asyncio.timeout(10):
        with pytest.raises(SilentError, match=r"worker d1 said nothing for 0\.02 s"):
            await until_silent(silence, "worker d1")

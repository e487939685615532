"""Resource trackers are killed only when nobody is left for them to clean up after."""

from __future__ import annotations

import pytest

from kvrelay import keeper

TRACKER, ENGINE = 1001, 1002


class Clock:
    """Stands still unless it is told to move."""

    now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(keeper, "time", clock)
    monkeypatch.setattr(keeper, "is_cleaning_up", lambda pid: pid == TRACKER)
    return clock


def test_others_are_killed_at_once(clock: Clock) -> None:
    assert keeper.LastWords().over([TRACKER, ENGINE]) == [ENGINE]


def test_a_trackers_time_begins_when_the_others_are_gone(clock: Clock) -> None:
    last_words = keeper.LastWords()
    clock.now_s += 2 * keeper.LAST_WORDS_S
    assert last_words.over([TRACKER, ENGINE]) == [ENGINE]
    assert last_words.over([TRACKER]) == []
    clock.now_s += keeper.LAST_WORDS_S / 2
    assert last_words.over([TRACKER]) == []


def test_a_tracker_that_does_not_end_is_killed_in_the_end(clock: Clock) -> None:
    last_words = keeper.LastWords()
    clock.now_s += keeper.LAST_WORDS_S + 0.1
    assert last_words.over([TRACKER]) == [TRACKER]

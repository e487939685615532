"""A lease counts as lost as soon as etcd may have ended it."""

from __future__ import annotations

import pytest

from kvrelay.etcd import LeaseLostError
from kvrelay.etcd.lease import LeaseClock


def test_lives_for_its_time_after_the_grant() -> None:
    clock = LeaseClock(1, 5.0, now=100.0)
    clock.check(104.9)
    with pytest.raises(LeaseLostError):
        clock.check(105.0)


def test_an_answer_counts_from_when_the_question_was_sent() -> None:
    clock = LeaseClock(1, 5.0, now=100.0)
    clock.acknowledge(sent_at=102.0, ttl_s=5)
    assert clock.left_s(104.0) == 3.0


def test_a_late_answer_takes_no_time_away() -> None:
    clock = LeaseClock(1, 5.0, now=100.0)
    clock.acknowledge(sent_at=99.0, ttl_s=5)
    assert clock.left_s(100.0) == 5.0


def test_an_answer_without_time_means_lost() -> None:
    with pytest.raises(LeaseLostError, match="lease ff is lost"):
        LeaseClock(255, 5.0, now=100.0).acknowledge(sent_at=101.0, ttl_s=0)

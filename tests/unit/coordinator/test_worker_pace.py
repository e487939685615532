"""What a worker takes for prompts and steps is held against its own fit, also while it has not come."""

from __future__ import annotations

from typing import Any

import pytest

from kvrelay.coordinator.breaker import Breaker, BreakerConfig, State
from kvrelay.coordinator.scheduler.view import WorkerView
from kvrelay.coordinator.worker_pace import WorkerPace
from kvrelay.step_times.model import StepTimes
from tests.support.clock import Clock
from tests.support.scheduling import BOTH
from tests.support.scheduling import view as view_of

TIMES = StepTimes(
    prefill_fixed_s=0.1, prefill_token_s=0.001, num_prefills=9, step_fixed_s=0.02, step_request_s=0.0, num_steps=9
)


def view(**figures: Any) -> WorkerView:
    return view_of("w", BOTH, **({"times": TIMES} | figures))


class Paced:
    def __init__(self) -> None:
        self.clock = Clock()
        self.breaker = Breaker(BreakerConfig(max_slow_windows=1), self.clock)
        self.pace = WorkerPace(self.breaker, self.clock)


@pytest.fixture
def paced() -> Paced:
    return Paced()


def test_a_prompt_may_take_as_long_as_what_is_queued_before_it(paced: Paced) -> None:
    paced.pace.sent_prompt("r", view(num_queued_prompt_tokens=1000))
    paced.clock.now_s += 10.9
    assert not paced.pace.is_overdue()
    paced.pace.ended_prompt("r", done=True)
    assert paced.breaker.state is State.CLOSED


def test_a_prompt_that_takes_ten_times_as_long_is_overdue_and_slow(paced: Paced) -> None:
    paced.pace.sent_prompt("r", view(num_queued_prompt_tokens=1000))
    paced.clock.now_s += 11.1
    assert paced.pace.is_overdue()
    paced.pace.ended_prompt("r", done=True)
    assert not paced.pace.is_overdue()
    assert paced.breaker.state is State.OPEN


def test_a_prompt_that_nobody_waits_for_tells_nothing(paced: Paced) -> None:
    paced.pace.sent_prompt("r", view(num_queued_prompt_tokens=1000))
    paced.clock.now_s += 11.1
    paced.pace.ended_prompt("r", done=False)
    assert not paced.pace.is_overdue()
    assert paced.breaker.state is State.CLOSED


def test_steps_ten_times_as_long_are_slow(paced: Paced) -> None:
    paced.pace.stepped({"r"}, set(), view())
    for _ in range(6):
        paced.clock.now_s += 0.22
        paced.pace.stepped({"r"}, set(), view())
    assert paced.breaker.state is State.OPEN


def test_no_step_is_expected_while_no_sequence_is_there(paced: Paced) -> None:
    paced.pace.stepped({"r", "s"}, set(), view())
    paced.pace.stepped(set(), {"r"}, view())
    paced.pace.ended_sequence("s")
    paced.clock.now_s += 60
    assert not paced.pace.is_overdue()
    paced.pace.stepped({"t"}, set(), view())
    assert paced.breaker.state is State.CLOSED


def test_a_step_that_does_not_come_is_overdue(paced: Paced) -> None:
    paced.pace.stepped({"r"}, set(), view())
    paced.clock.now_s += 0.9
    assert not paced.pace.is_overdue()
    paced.clock.now_s += 0.2
    assert paced.pace.is_overdue()


def test_prompts_between_two_steps_may_take_their_time(paced: Paced) -> None:
    paced.pace.stepped({"r"}, set(), view(num_queued_prompt_tokens=2000))
    paced.clock.now_s += 20
    assert not paced.pace.is_overdue()


def test_nothing_is_expected_of_a_worker_that_has_measured_nothing(paced: Paced) -> None:
    paced.pace.sent_prompt("r", view(times=StepTimes()))
    paced.pace.stepped({"r"}, set(), view(times=StepTimes()))
    paced.clock.now_s += 100
    assert not paced.pace.is_overdue()

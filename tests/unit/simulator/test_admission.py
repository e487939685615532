"""Requests wait in a simulated coordinator as in a real one: until a worker would soon be idle, and no longer."""

from __future__ import annotations

import pytest

from kvrelay.coordinator.admission.config import AdmissionConfig
from kvrelay.coordinator.scheduler.view import RequestShape, WorkerView
from kvrelay.workload.outcome import Status
from tests.support.simulation import HARDWARE, ChosenScheduler, cluster, request, run

M = HARDWARE.message_s
PREFILL_S = 1.5
"""A prompt of 100 tokens."""
WAITING = AdmissionConfig(dispatch_ahead_s=0.2)
LOAD = [request(number, 0.0, 100, 1, *range(10 * number, 10 * number + 10)) for number in range(3)]


class Spreading(ChosenScheduler):
    """To the prefill worker with the shorter queue; keeps how long that was."""

    def __init__(self) -> None:
        super().__init__(self._spread)
        self.queues: list[int] = []

    def _spread(self, _: RequestShape, views: dict[str, WorkerView]) -> tuple[str | None, str, str | None]:
        prefills = [view for view in views.values() if view.prefills]
        shortest = min(prefills, key=lambda view: view.num_queued_prompt_tokens)
        self.queues.append(shortest.num_queued_prompt_tokens)
        return shortest.worker_id, "decode-0", None


def test_it_is_decided_late_where_a_prompt_goes() -> None:
    scheduler = Spreading()
    ran = run(LOAD, cluster(2, admission=WAITING), scheduler)
    first, second, third = (outcome.token_times_s[0] for outcome in ran.outcomes)
    assert first == second == pytest.approx(M + PREFILL_S + M)
    # Its worker is known to be done when its token comes; 5 ms later the coordinator looks for room.
    assert third == pytest.approx(first + 0.005 + M + PREFILL_S + M)
    assert scheduler.queues == [0, 0, 0]


def test_no_worker_is_idle_for_longer_than_it_takes_to_tell() -> None:
    ran = run(LOAD, cluster(2, admission=WAITING), Spreading())
    # Two workers from when the second token comes, and one until the third request has come to it.
    assert ran.idle_while_waiting["prefill"] * 2 * ran.duration_s < 0.02


def test_who_has_waited_for_too_long_is_refused() -> None:
    ran = run(LOAD, cluster(1, admission=WAITING), Spreading(), ttft_s=2.0)
    assert [outcome.status for outcome in ran.outcomes] == [Status.COMPLETED, Status.COMPLETED, Status.REJECTED]

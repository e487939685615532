"""Requests go to the workers as long as one of them would soon have nothing to do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvrelay.coordinator.admission.capacity import WorkerCapacity
from kvrelay.coordinator.scheduler.view import WorkerView
from kvrelay.step_times.model import StepTimes
from kvrelay.v1 import cluster_pb2

PREFILL = WorkerView(
    worker_id="p",
    role=cluster_pb2.ROLE_PREFILL,
    model="m",
    address="p:1",
    fingerprint=b"",
    block_size_tokens=16,
    max_model_len_tokens=4096,
    times=StepTimes(prefill_fixed_s=0.0, prefill_token_s=1e-3),
)
DECODE = replace(PREFILL, worker_id="d", role=cluster_pb2.ROLE_DECODE, num_running_requests=3)


def queued(view: WorkerView, num_tokens: int) -> WorkerView:
    return replace(view, num_queued_prompt_tokens=num_tokens, num_queued_prompts=1)


def capacity_of(*views: WorkerView, ahead_s: float = 0.25, local: bool = False) -> WorkerCapacity:
    return WorkerCapacity(lambda: views, "m", dispatch_ahead_s=ahead_s, may_prefill_locally=local)


def has_room(*views: WorkerView) -> bool:
    return capacity_of(*views).has_room()


@pytest.mark.parametrize(("num_tokens", "room"), [(0, True), (249, True), (251, False)])
def test_a_prefill_worker_has_so_much_work_ahead(num_tokens: int, room: bool) -> None:
    assert has_room(queued(PREFILL, num_tokens), DECODE) is room
    assert has_room(DECODE, queued(PREFILL, num_tokens)) is room


def test_an_idle_worker_has_room_even_when_nothing_is_to_wait_there() -> None:
    assert capacity_of(PREFILL, DECODE, ahead_s=0.0).has_room()
    busy = queued(PREFILL, 1)
    assert not capacity_of(busy, DECODE, ahead_s=0.0).has_room()


def test_one_of_them_with_little_to_do_is_enough() -> None:
    assert has_room(queued(PREFILL, 9000), queued(PREFILL, 10), DECODE)


def test_decode_workers_compute_prompts_when_idle_or_alone() -> None:
    full = queued(PREFILL, 9000)
    assert not has_room(full, DECODE)
    assert has_room(full, replace(DECODE, num_running_requests=0))
    assert has_room(DECODE)
    assert not has_room(queued(DECODE, 9000))


def test_decode_workers_have_room_beside_other_work_where_the_policy_may_choose_them() -> None:
    full = queued(PREFILL, 9000)
    assert capacity_of(full, DECODE, local=True).has_room()
    assert not capacity_of(full, queued(DECODE, 9000), local=True).has_room()
    assert not capacity_of(full, replace(DECODE, max_running_requests=1), local=True).has_room()


def test_a_sequence_must_find_room_soon() -> None:
    limited = replace(DECODE, max_running_requests=4, capacity_tokens=1000)
    assert has_room(PREFILL, limited)
    assert has_room(PREFILL, replace(limited, num_running_requests=4))
    assert not has_room(PREFILL, replace(limited, num_running_requests=5))
    assert not has_room(PREFILL, replace(limited, num_context_tokens=1000))
    assert has_room(PREFILL, replace(limited, num_running_requests=5), DECODE)


def test_workers_that_drain_or_serve_another_model_do_not_count() -> None:
    full = queued(PREFILL, 9000)
    assert not has_room(full, replace(PREFILL, draining=True), replace(PREFILL, model="other"), DECODE)


def test_that_nobody_is_there_is_not_told_by_waiting() -> None:
    assert has_room()
    assert has_room(queued(PREFILL, 9000))


def test_the_rate_is_that_of_the_prefill_workers() -> None:
    capacity = capacity_of(PREFILL, PREFILL, DECODE)
    assert capacity.tokens_per_s() == pytest.approx(2000)
    alone = capacity_of(DECODE)
    assert alone.tokens_per_s() == pytest.approx(1000)
    assert capacity_of().tokens_per_s() == 0

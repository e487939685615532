"""What is counted of requests, whichever way they go."""

from __future__ import annotations

import math

import pytest

from kvrelay.coordinator.metrics.histogram import Histogram
from kvrelay.coordinator.metrics.requests import RequestMetrics
from kvrelay.errors import GenerationFailedError, InvalidRequestError, KvrelayError, NoWorkersError, OverloadedError
from kvrelay.v1 import common_pb2, worker_pb2

LENGTH, ABORT = common_pb2.FINISH_REASON_LENGTH, common_pb2.FINISH_REASON_ABORT


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics(clock: Clock) -> RequestMetrics:
    return RequestMetrics(clock)


def start(metrics: RequestMetrics, clock: Clock, request_id: str = "r", *completion_ids: str) -> None:
    metrics.started(request_id, completion_ids or [request_id], arrived_s=clock.now_s, num_prompt_tokens=10)


def delta(completion_id: str = "r", num_tokens: int = 1, **values: int) -> worker_pb2.TokenDelta:
    return worker_pb2.TokenDelta(request_id=completion_id, token_ids=[7] * num_tokens, **values)


def count(histogram: Histogram) -> int:
    return dict(histogram.cumulative())[math.inf]


def outcomes(metrics: RequestMetrics) -> dict[str, int]:
    return {outcome: number for outcome, number in metrics.num_by_outcome.items() if number}


def test_a_request_is_timed_from_its_arrival_to_each_message(metrics: RequestMetrics, clock: Clock) -> None:
    start(metrics, clock)
    assert metrics.num_in_flight == 1
    for after_s, message in ((0.5, delta()), (0.25, delta(num_tokens=2)), (0.125, delta(finish_reason=LENGTH))):
        clock.now_s += after_s
        metrics.take([message])
    metrics.finished("r")
    assert (metrics.ttft_s.sum, count(metrics.ttft_s)) == (0.5, 1)
    assert (metrics.itl_s.sum, count(metrics.itl_s)) == (0.375, 2)
    assert (metrics.e2e_s.sum, count(metrics.e2e_s)) == (0.875, 1)
    assert (metrics.num_prompt_tokens, metrics.num_generated_tokens) == (10, 4)
    assert outcomes(metrics) == {"ok": 1}
    assert metrics.num_in_flight == 0


def test_of_several_completions_the_first_token_is_the_requests(metrics: RequestMetrics, clock: Clock) -> None:
    start(metrics, clock, "r", "a", "b")
    clock.now_s += 0.5
    metrics.take([delta("a", num_cached_tokens=6), delta("b", num_cached_tokens=8)])
    clock.now_s += 0.5
    metrics.take([delta("a", finish_reason=LENGTH)])
    assert (count(metrics.ttft_s), count(metrics.itl_s)) == (1, 1)
    assert (metrics.num_cached_tokens, metrics.num_prompt_tokens) == (6, 10)
    metrics.take([delta("b", 0, finish_reason=LENGTH)])
    metrics.finished("r")
    assert outcomes(metrics) == {"ok": 1}


def test_cached_tokens_are_those_of_the_first_message_only(metrics: RequestMetrics, clock: Clock) -> None:
    start(metrics, clock)
    metrics.take([delta(num_cached_tokens=6)])
    metrics.take([delta(num_cached_tokens=10)])
    assert metrics.num_cached_tokens == 6


def test_a_stop_string_ends_a_request_well_and_a_client_that_leaves_cancels_it(
    metrics: RequestMetrics, clock: Clock
) -> None:
    for request_id in ("stopped", "left"):
        start(metrics, clock, request_id)
        metrics.take([delta(request_id)])
    metrics.stopped(["stopped", "unknown"])
    metrics.finished("stopped")
    metrics.finished("left")
    assert outcomes(metrics) == {"ok": 1, "cancelled": 1}
    assert count(metrics.e2e_s) == 1


def test_a_request_of_which_one_completion_is_missing_was_cancelled(metrics: RequestMetrics, clock: Clock) -> None:
    start(metrics, clock, "r", "a", "b")
    metrics.take([delta("a", finish_reason=LENGTH)])
    metrics.stopped(["a"])
    metrics.finished("r")
    assert outcomes(metrics) == {"cancelled": 1}


def test_a_failure_is_one_whoever_tells_it(metrics: RequestMetrics, clock: Clock) -> None:
    start(metrics, clock, "told")
    metrics.failed(["told", "unknown"])
    metrics.finished("told")
    start(metrics, clock, "engine")
    metrics.take([delta("engine", 0, finish_reason=ABORT)])
    metrics.finished("engine")
    assert outcomes(metrics) == {"failed": 2}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (InvalidRequestError("x"), "invalid"),
        (OverloadedError("x"), "overloaded"),
        (NoWorkersError("x"), "no_workers"),
    ],
)
def test_a_refusal_has_a_reason(metrics: RequestMetrics, error: KvrelayError, reason: str) -> None:
    metrics.refused(error)
    assert outcomes(metrics) == {"refused": 1}
    assert metrics.num_refused[reason] == 1
    assert metrics.num_refused.total() == 1


def test_what_goes_wrong_on_the_way_to_a_worker_is_a_failure(metrics: RequestMetrics) -> None:
    metrics.refused(GenerationFailedError("x"))
    assert outcomes(metrics) == {"failed": 1}


def test_what_never_started_or_is_over_is_ignored(metrics: RequestMetrics, clock: Clock) -> None:
    metrics.take([delta("unknown")])
    metrics.finished("unknown")
    start(metrics, clock)
    metrics.finished("r")
    metrics.finished("r")
    metrics.take([delta()])
    assert outcomes(metrics) == {"cancelled": 1}
    assert metrics.num_generated_tokens == 0


def test_decisions_are_counted_by_policy_and_kind(metrics: RequestMetrics) -> None:
    metrics.decided("cost", "split", 0.001)
    metrics.decided("cost", "split", 0.001)
    metrics.decided("cost", "local", 0.001)
    assert metrics.num_decided == {("cost", "split"): 2, ("cost", "local"): 1}
    assert count(metrics.schedule_s) == 3

"""When is a call tried again, and for how long?"""

from __future__ import annotations

import pytest

from kvrelay.client.connection import UnreachableError
from kvrelay.client.resumption import Resumption
from kvrelay.errors import DeadlineError, KvrelayError, NoWorkersError
from kvrelay.v1 import common_pb2, inference_pb2
from tests.support.clock import Clock


def broken(*, had_connected: bool = True) -> UnreachableError:
    error = UnreachableError("gone")
    error.had_connected = had_connected
    return error


def resumption(clock: Clock, *, n: int = 1, timeout_s: float | None = None) -> Resumption:
    request = inference_pb2.GenerateRequest(sampling=common_pb2.SamplingParams(n=n))
    return Resumption(request, reconnect_for_s=10, timeout_s=timeout_s, clock=clock)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_what_has_come_is_told_to_the_next(clock: Clock) -> None:
    call = resumption(clock)
    call.took(inference_pb2.GenerateResponse(token_ids=[1, 2], text="ab"))
    call.took(inference_pb2.GenerateResponse(token_ids=[3], text="é\N{GRINNING FACE}"))
    assert call.pause_s(broken()) is not None
    assert list(call.request.resume) == [inference_pb2.Resume(token_ids=[1, 2, 3], num_text_chars=4)]


def test_pauses_grow_until_the_time_is_over_and_begin_anew_with_each_token(clock: Clock) -> None:
    call = resumption(clock)
    pauses = []
    while (pause_s := call.pause_s(broken(had_connected=not pauses))) is not None:
        pauses.append(pause_s)
        clock.now_s += pause_s
    assert 8 <= sum(pauses) <= 10
    assert pauses[0] <= 0.05 < pauses[-1] <= 2
    call.took(inference_pb2.GenerateResponse(token_ids=[1]))
    again = call.pause_s(broken())
    assert again is not None
    assert again <= 0.05


@pytest.mark.parametrize("error", [broken(had_connected=False), NoWorkersError("none"), DeadlineError("late")], ids=str)
def test_what_no_coordinator_was_lost_for_fails(clock: Clock, error: KvrelayError) -> None:
    assert resumption(clock).pause_s(error) is None


def test_each_completion_goes_on_by_itself_until_all_have_ended(clock: Clock) -> None:
    call = resumption(clock, n=2)
    call.took(inference_pb2.GenerateResponse(token_ids=[1], index=1, finish_reason=common_pb2.FINISH_REASON_STOP))
    call.took(inference_pb2.GenerateResponse(token_ids=[2]))
    assert not call.is_complete
    assert list(call.request.resume) == [
        inference_pb2.Resume(index=1, token_ids=[1], is_finished=True),
        inference_pb2.Resume(token_ids=[2]),
    ]
    call.took(inference_pb2.GenerateResponse(token_ids=[3], finish_reason=common_pb2.FINISH_REASON_LENGTH))
    assert call.is_complete


def test_the_deadline_is_that_of_the_whole_call(clock: Clock) -> None:
    call = resumption(clock, timeout_s=5)
    clock.now_s += 4
    assert call.timeout_s == pytest.approx(1)
    assert call.pause_s(broken()) is not None
    clock.now_s += 1
    assert call.pause_s(broken()) is None
